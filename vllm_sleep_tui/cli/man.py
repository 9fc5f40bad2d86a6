"""`man`: the manual page, made from the command line itself."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click

from vllm_sleep_tui import __version__
from vllm_sleep_tui.cli.common import draw

_FILES = (
    ("./vllm-sleep-tui.yaml, then the user's config folder", "the config"),
    ("$XDG_STATE_HOME/vllm-sleep-tui", "records, logs, history, conversations"),
)
_EXITS = (
    ("0", "done"),
    ("1", "the operation failed, or was refused"),
    ("2", "the command line or the config is wrong"),
    ("130", "interrupted"),
)


@click.command()
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page: vllm-sleep-tui man | man -l -"""
    draw("\n".join(page(ctx.find_root())) + "\n")


def page(root: click.Context) -> Iterator[str]:
    """The lines of the page, as roff."""
    name = root.info_name or ""
    yield f'.TH {name.upper()} 1 "" "{name} {__version__}"'
    yield from (".SH NAME", f"{_text(name)} \\- {_text(root.command.get_short_help_str(200))}")
    yield from (".SH SYNOPSIS", f".B {_text(name)}", "[OPTIONS] [VERB [ARGS]]")
    yield from (".SH OPTIONS", *_options(root.command, root))
    yield ".SH VERBS"
    for command, ctx in verbs(root):
        yield f".SS {_text(_usage(command, ctx))}"
        for paragraph in re.split(r"\n\s*\n", (command.help or "").strip()):
            yield from (_text(" ".join(paragraph.split())), ".PP")
        yield from _options(command, ctx)
    yield from (".SH FILES", *(line for row in _FILES for line in _row(*row)))
    yield from (".SH EXIT STATUS", *(line for row in _EXITS for line in _row(*row)))


def verbs(root: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Every verb, and of a verb that has verbs those, each with its context."""
    assert isinstance(root.command, click.Group)
    for name in root.command.list_commands(root):
        command = root.command.get_command(root, name)
        assert command is not None
        ctx = click.Context(command, info_name=name, parent=root)
        if isinstance(command, click.Group):
            yield from verbs(ctx)
        else:
            yield command, ctx


def options(command: click.Command, ctx: click.Context) -> list[tuple[str, str]]:
    """The options in the words of --help: how they are written, and what they do."""
    rows = [one.get_help_record(ctx) for one in command.get_params(ctx)]
    return [row for row in rows if row is not None and row[1]]  # of arguments the usage tells


def _usage(command: click.Command, ctx: click.Context) -> str:
    return " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])


def _options(command: click.Command, ctx: click.Context) -> Iterator[str]:
    return (line for row in options(command, ctx) for line in _row(*row))


def _row(left: str, right: str) -> tuple[str, str, str]:
    return ".TP", f".B {_text(left)}", _text(right)


def _text(words: str) -> str:
    """Words that roff does not take for orders."""
    escaped = words.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
