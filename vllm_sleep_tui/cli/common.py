"""What the verbs share: the config option, the question before foreign commands are run, output."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.types import CONFIG_NAME
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError, UsageError
from vllm_sleep_tui.files import trust, trusted
from vllm_sleep_tui.paths import config_dir, find_config, state_dir
from vllm_sleep_tui.text import OBEYED, clean, one_line

Command = TypeVar("Command", bound=Callable[..., Any])
_GIVEN = "vllm_sleep_tui.config.types"


class WholeNumber(click.IntRange):
    """A whole number, called so where something else is given: click says `integer range`."""

    name = "whole number"


class Number(click.FloatRange):
    """Any number, called so."""

    name = "number"


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


def complete_model(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """The names of models that begin so, for a shell; none without a config that can be read."""
    try:
        names = load(find_config(given_config(ctx))).config.models
    except PanelError:
        return []
    return [name for name in names if name.startswith(incomplete)]


# ── trust ───────────────────────────────────────────────────────────────────────────────────────────────


def load_config(ctx: click.Context, *, only_looks: bool = False) -> LoadedConfig:
    """The config file of this command, read, checked and agreed to; raises PanelError.

    Whoever left a file in the current folder would have its commands run by any verb that starts or wakes
    something, and be sent by any that asks its `url:` servers what the person's variables and files hold as
    keys. So this asks, once for each content of the file and of the files that it names. `only_looks`
    is for verbs that run nothing: they ask only about keys.
    """
    given = given_config(ctx)
    loaded = load(find_config(given))
    sends_keys = any(model.api_key and model.is_attached for model in loaded.config.models.values())
    if only_looks and not sends_keys:
        return loaded
    if given is None:
        if not is_agreed(loaded):
            _ask(loaded)
    elif _is_here(loaded):  # who names it has agreed to it
        trust(loaded.found, loaded.agreement(), state_dir())
    return loaded


def is_agreed(loaded: LoadedConfig) -> bool:
    """Whether a file that was found, not named, is the person's own or was agreed to as it is."""
    return not _is_here(loaded) or trusted(loaded.found, loaded.agreement(), state_dir())


def agreement(ctx: click.Context) -> Callable[[LoadedConfig], bool]:
    """Whether the file of this command, when it has changed, may be heeded without asking again."""
    return is_agreed if given_config(ctx) is None else lambda _: True


def _is_here(loaded: LoadedConfig) -> bool:
    """Whether it is the file that is found in the current folder: by its name there, wherever a link leads.

    In the user's config folder it is the file that is found from everywhere.
    """
    try:
        return str(loaded.found) == os.path.abspath(CONFIG_NAME) and loaded.found.parent != config_dir()
    except OSError:  # the current folder is gone, and nothing is found in it
        return False


def _ask(loaded: LoadedConfig) -> None:
    """Show what would be run and who would be sent what; raises PanelError without a yes."""
    if not sys.stdin.isatty():
        raise RefusedError(
            f"{loaded.found} was found here and names commands or keys that nobody has agreed to use.",
            f"Look at it, then name it: --config {loaded.found.name}",
        )
    agreement = loaded.agreement()  # before the question: a file that is another after it was not agreed to
    leads = f", a link to {loaded.path}," if loaded.path != loaded.found else ""
    own = (model.vllm_command for model in loaded.config.models.values() if model.vllm_command)
    commands = dict.fromkeys([loaded.config.vllm_command, *own])
    words = ", ".join(f"{shlex.join(command)} serve …" for command in commands)
    say(one_line(f"{loaded.found}{leads} was found here. It would run: {words}"))
    for model in loaded.config.models.values():
        if model.api_key is not None and model.is_attached:
            say(one_line(f"It would send an API key to: {model.url}"))
    if not confirm("Do what it says? (asked again only if it or a file that it names changes)"):
        raise CancelledByUser("Nothing was started.", f"Look at {loaded.found} first.")
    trust(loaded.found, agreement, state_dir())


# ── the person ──────────────────────────────────────────────────────────────────────────────────────────


def need_terminal() -> None:
    """Raises UsageError where no panel can be shown: Textual reads stdin and draws on stderr."""
    if "TEXTUAL_DRIVER" in os.environ:
        return  # a browser is at the other end, see `web`
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError(
            "The panel needs a terminal to read keys from and to draw on.",
            "In scripts use the verbs, such as `status`; without a screen, `serve`.",
        )


def confirm(question: str) -> bool:
    """A yes or no from the terminal; raises click.Abort if none comes, as from a terminal that is gone."""
    try:
        return click.confirm(one_line(question), err=True)
    except OSError:
        raise click.Abort from None


def say(line: str, *, nl: bool = True) -> None:
    """One line for the person, on stderr, so that stdout holds results only; lost if nobody can hear it."""
    with contextlib.suppress(OSError):
        sys.stderr.write(clean(line) + "\n" * nl)
        sys.stderr.flush()


# ── results ─────────────────────────────────────────────────────────────────────────────────────────────

_LEFT = (errno.EPIPE, errno.ECONNRESET)
"""How the kernel says that who read has had enough, as `head` has."""
_LOST = (errno.EIO, errno.ENXIO, errno.EBADF)
"""How it says that nobody can read any more: a terminal that hung up."""


class ReaderGoneError(Exception):
    """Nobody reads what stdout was to show; its words are empty where that is no reason to complain."""


def open_streams() -> None:
    """Give stdin, stdout and stderr a file where they were closed; no character fails on them."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # Python found its number closed, so the next file opened gets that
            file = os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w")
            setattr(sys, name, file)
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def put(text: object = "", *, nl: bool = True) -> None:
    """A result on stdout, cleaned; raises ReaderGoneError, or OperationError if it cannot be written."""
    draw(clean(str(text)) + "\n" * nl)


def put_done(text: str) -> None:
    """Tell on stdout what was done: it stays done, and a success, if nobody reads that."""
    try:
        put(text)
    except ReaderGoneError as gone:
        if str(gone):
            say(str(gone))


def draw(text: str) -> None:
    """Write on stdout what is clean already and may hold escapes of our own; raises as `put` does."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        discard(sys.stdout)
        if error.errno in _LEFT:
            raise ReaderGoneError from None
        if error.errno in _LOST:
            raise ReaderGoneError(f"Nobody can read the output any more: {error.strerror}.") from None
        raise OperationError(
            f"The output cannot be written: {error.strerror}.",
            "What was done stands; make room, or send the output elsewhere.",
        ) from None


def discard(stream: TextIO) -> None:
    """Let what the stream still holds go nowhere: it must not raise again when Python exits."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def json_text(value: Any) -> str:
    """A value as one line of JSON that is safe to show: what a terminal obeys is escaped in it, not lost."""
    import msgspec

    encoded = msgspec.json.encode(_encodable(msgspec.to_builtins(value))).decode()
    return OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", encoded)


def put_json(value: Any, *, done: bool = False) -> None:
    """One JSON value on stdout; with `done` as `put_done` does."""
    import msgspec

    (put_done if done else put)(msgspec.json.format(json_text(value), indent=2))


def _encodable(value: Any) -> Any:
    """Plain values with what is no UTF-8 made visible: JSON cannot hold it."""
    if isinstance(value, str):
        return value if value.isascii() else re.sub("[\ud800-\udfff]+", lambda match: clean(match[0]), value)
    if isinstance(value, dict):
        return {_encodable(key): _encodable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_encodable(item) for item in value]
    return value
