"""`conversations`: what was said with models, listed, shown, exported, taken back in, renamed, deleted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vllm_sleep_tui.cli.common import (
    WholeNumber,
    config_option,
    json_option,
    load_config,
    put,
    put_done,
    put_json,
    say,
)
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.units import date_and_time

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.conversations import Conversations


_NUMBER = WholeNumber(1, 2**63 - 1)
"""What SQLite can count to."""


@click.group()
def conversations() -> None:
    """What was said with models, as far as it was kept."""


@contextmanager
def _store(ctx: click.Context) -> Iterator[Conversations]:
    from vllm_sleep_tui.fleet.conversations import Conversations  # with SQLite

    loaded = load_config(ctx, only_looks=True)
    store = Conversations(state_dir(), loaded.path)
    try:
        yield store
    finally:
        store.close()
        if store.note:
            say(store.note)


def _none(number: int) -> OperationError:
    return OperationError(f"There is no conversation {number}.", "See: vllm-sleep-tui conversations list")


@conversations.command("list")
@click.argument("words", nargs=-1)
@json_option
@config_option
@click.pass_context
def list_(ctx: click.Context, words: tuple[str, ...], as_json: bool) -> None:
    """List them, the latest first; with WORDS those that hold them all."""
    with _store(ctx) as store:
        found = store.listed(" ".join(words)).result()
    if as_json:
        put_json({"version": 1, "conversations": found})
        return
    for kept in found:
        put(f"{kept.id:>5}  {date_and_time(kept.changed)}  {one_line(kept.model)}  {one_line(kept.title)}")


@conversations.command()
@click.argument("number", type=_NUMBER)
@json_option
@config_option
@click.pass_context
def show(ctx: click.Context, number: int, as_json: bool) -> None:
    """Write one as Markdown, or as JSON that `import` takes."""
    from vllm_sleep_tui.fleet.conversations import as_markdown

    with _store(ctx) as store:
        whole = store.whole(number).result()
    if whole is None:
        raise _none(number)
    if as_json:
        put_json(whole)
    else:
        put(as_markdown(whole), nl=False)


@conversations.command("import")
@click.argument("file", type=click.Path(path_type=Path))
@config_option
@click.pass_context
def import_(ctx: click.Context, file: Path) -> None:
    """Take in one that was exported as JSON."""
    from vllm_sleep_tui.fleet.conversations import imported

    whole = imported(file)
    with _store(ctx) as store:
        number = store.add(whole).result()
        if number is None:
            raise OperationError(store.note or "It cannot be kept.", "Free space, or see the state folder.")
    put_done(f"Conversation {number}: {whole.title}")


@conversations.command()
@click.argument("number", type=_NUMBER)
@click.argument("title")
@config_option
@click.pass_context
def rename(ctx: click.Context, number: int, title: str) -> None:
    """Give one another title."""
    with _store(ctx) as store:
        if not store.rename(number, title).result():
            raise _none(number)


@conversations.command()
@click.argument("numbers", type=_NUMBER, nargs=-1, required=True)
@config_option
@click.pass_context
def delete(ctx: click.Context, numbers: tuple[int, ...]) -> None:
    """Forget them for good; their words are overwritten in the file."""
    with _store(ctx) as store:
        missing = [number for number in numbers if not store.delete(number).result()]
    if missing:
        raise _none(missing[0])
