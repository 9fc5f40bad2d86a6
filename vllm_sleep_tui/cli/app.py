"""The verbs by name, and what every error and interruption looks like from outside."""

from __future__ import annotations

import asyncio
import difflib
import errno
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from vllm_sleep_tui import __version__
from vllm_sleep_tui.cli.common import (
    ReaderGoneError,
    agreement,
    config_option,
    discard,
    given_config,
    load_config,
    need_terminal,
    open_streams,
    say,
)
from vllm_sleep_tui.errors import PanelError, UsageError
from vllm_sleep_tui.files import private_dir, write_private
from vllm_sleep_tui.paths import has_config, state_dir
from vllm_sleep_tui.text import clean, one_line
from vllm_sleep_tui.units import file_stamp

VERBS: dict[str, str] = {
    "status": "status",
    "start": "operations",
    "stop": "operations",
    "restart": "operations",
    "sleep": "operations",
    "wake": "operations",
    "switch": "operations",
    "chat": "chat",
    "conversations": "conversations",
    "logs": "logs",
    "events": "events",
    "bench": "bench",
    "init": "init",
    "doctor": "doctor",
    "demo": "demo",
    "serve": "serve",
    "web": "web",
    "advise": "advise",
    "orphans": "orphans",
    "completion": "completion",
    "man": "man",
}
"""Verb → the module of this folder that holds it."""
INTERRUPTED = 130
UNWRITABLE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENOSPC, errno.EDQUOT)
"""What a write to a pipe, a terminal or a file is answered when there is no place for it any more."""


class Verbs(click.Group):
    """A group whose verbs are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of their use."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb, imported now; None if there is none of that name."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"vllm_sleep_tui.cli.{VERBS[cmd_name]}")
        _look_for_garbage()
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As ever, but with the nearest verb named: click looks for that among those that are imported."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            if not (near := difflib.get_close_matches(args[0], VERBS, n=1)):
                raise
            words = f"{error.format_message()} Did you mean {near[0]!r}?"
            raise click.UsageError(words, error.ctx) from None


@click.group(cls=Verbs, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@config_option
@click.option("--read-only", is_flag=True, help="A panel that only looks: it changes no server.")
@click.version_option(__version__, prog_name="vllm-sleep-tui")
@click.pass_context
def command(ctx: click.Context, read_only: bool) -> None:
    """Switch between vLLM models that do not fit on the GPU together; without a verb: the panel."""
    if ctx.invoked_subcommand is None:
        need_terminal()
        is_first = given_config(ctx) is None and not has_config() and not read_only
        ctx.exit(open_first(ctx) if is_first else open_panel(ctx, read_only=read_only))
    elif read_only:
        raise UsageError(
            f"--read-only is for the panel, not for `{ctx.invoked_subcommand}`.",
            "Leave it out, or the verb; behind `web` it stands after it.",
        )


def open_panel(ctx: click.Context, *, read_only: bool = False, begin: str | None = None) -> int:
    """The panel over the config of this command, with a model to start; the exit code."""
    loaded = load_config(ctx, only_looks=read_only)
    from vllm_sleep_tui.tui.app import run_panel

    _look_for_garbage()
    return run_panel(loaded, state_dir(), agreement(ctx), read_only=read_only, begin=begin)


def open_first(ctx: click.Context) -> int:
    """The panel of somebody who has no config yet; the exit code."""
    from vllm_sleep_tui.cli.first_run import ask_first, write_wish

    wish = ask_first()
    if wish is None:
        return 0
    if wish.is_demo:
        from vllm_sleep_tui.cli.demo import open_demo

        _look_for_garbage()
        return open_demo()
    return open_panel(ctx, begin=next(iter(write_wish(wish).config.models)))


def _look_for_garbage() -> None:
    """From now on, and not in what was imported so far: `main` has put it off."""
    gc.freeze()
    gc.enable()


def run(arguments: Sequence[str]) -> int:
    """Run a command line; the exit code. Expected errors are two lines on stderr, never a traceback."""
    open_streams()
    code = _run(arguments)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            discard(stream)
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        code = command.main(list(arguments), prog_name="vllm-sleep-tui", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        return _usage_error(error)
    except PanelError as error:
        _complain(error.what, error.cure)
        return error.exit_code
    except (KeyboardInterrupt, click.Abort, asyncio.CancelledError):
        _complain("Interrupted.")
        return INTERRUPTED
    except ReaderGoneError as gone:
        _complain(str(gone))
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE and error.filename is None:
            discard(sys.stdout)  # click wrote its help there, or Textual its screen
            _complain(f"The output cannot be written: {error.strerror}.")
            return 1
        _complain(f"Unexpected: {type(error).__name__}: {_first_line(error)}", _keep_details())
        return 1


def _usage_error(error: click.ClickException) -> int:
    ctx: Any = getattr(error, "ctx", None)
    path = ctx.command_path if ctx else "vllm-sleep-tui"
    _complain(" ".join(error.format_message().split()), f"See: {path} --help")
    return 2


def _complain(what: str, cure: str = "") -> None:
    for line in filter(None, (what, cure)):
        say(one_line(line))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no words")[:200]


def _keep_details() -> str:
    """Write the traceback to the state folder; says where it lies."""
    try:
        folder = private_dir(state_dir() / "crashes")
        path: Path = folder / f"{file_stamp()}-{os.getpid()}.txt"
        write_private(path, clean(traceback.format_exc()).encode())
    except PanelError:
        return "The details could not be written either; the state folder is not writable."
    return f"The details are in {path}; please report them."
