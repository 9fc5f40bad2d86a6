"""What the verbs share: the config option, the question before foreign commands are run, output."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from vllm_sleep_tui.config_file import LoadedConfig, load
from vllm_sleep_tui.errors import CancelledByUser, RefusedError, UsageError
from vllm_sleep_tui.paths import find_config, state_dir, trust, trusted

Command = TypeVar("Command", bound=Callable[..., Any])
_GIVEN = "vllm_sleep_tui.config"


def config_option(function: Command) -> Command:
    """The --config option, before or after the verb; the one nearest to the verb wins."""
    return click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path),
        expose_value=False,
        callback=_keep_config,
        help="The config file; otherwise ./vllm-sleep-tui.yaml, then the one in your config folder.",
    )(function)


def _keep_config(ctx: click.Context, _: click.Parameter, value: Path | None) -> None:
    if value is not None:
        ctx.find_root().meta[_GIVEN] = value


json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")


def given_config(ctx: click.Context) -> Path | None:
    """The file named with --config."""
    path: Path | None = ctx.find_root().meta.get(_GIVEN)
    return path


def load_config(ctx: click.Context) -> LoadedConfig:
    """The config file of this command, read and checked; raises UsageError."""
    return load(find_config(given_config(ctx)))


def run_commands_of(loaded: LoadedConfig) -> None:
    """Ask once before commands of a file that lies in the current folder are run and its keys are sent.

    Raises RefusedError if nobody can be asked.
    """
    state = state_dir()
    if loaded.path.parent != Path.cwd().resolve() or trusted(loaded.path, loaded.digest, state):
        return
    if given_config(click.get_current_context()) is not None:  # who names it has agreed to it
        trust(loaded.path, loaded.digest, state)
        return
    if not sys.stdin.isatty():
        raise RefusedError(
            f"{loaded.path} was found here and names commands or keys that nobody has agreed to use.",
            f"Look at it, then name it: --config {loaded.path.name}",
        )
    say(f"{loaded.path} was found here. It would run: {' '.join(loaded.config.vllm_command)} serve …")
    for model in loaded.config.models.values():
        if model.api_key is not None:
            say(f"It would send an API key to: {model.url}")
    if not click.confirm("Do what it says? (asked again only if the file changes)", err=True):
        raise CancelledByUser("Nothing was started.", f"Look at {loaded.path} first.")
    trust(loaded.path, loaded.digest, state)


def need_terminal() -> None:
    """Raises UsageError where no panel can be shown: Textual reads stdin and draws on stderr."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "The panel needs a terminal to read keys from and to draw on.",
            "In scripts use the verbs, such as `status`; without a screen, `serve`.",
        )


def say(line: str) -> None:
    """One line for the person, on stderr, so that stdout holds results only."""
    click.echo(line, err=True)


def put_json(value: Any) -> None:
    """One JSON value on stdout."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def in_words(size: int | None) -> str:
    """Bytes as GiB with one decimal; a dash for what is not known."""
    return "–" if size is None else f"{size / 2**30:.1f} GiB"
