"""Tasks that begin at once, as Textual's loop makes them from Python 3.12 on, for older Pythons too."""

from __future__ import annotations

import asyncio
import types
from collections.abc import Coroutine, Generator, Iterator
from contextlib import contextmanager
from typing import Any


@types.coroutine
def _goes_on(work: Coroutine[Any, Any, Any], waits_for: Any) -> Generator[Any, Any, Any]:
    """The rest of a coroutine that has run up to its first wait."""
    while True:
        thrown, sent = None, None
        try:
            sent = yield waits_for
        except BaseException as error:
            thrown = error
        try:
            waits_for = work.send(sent) if thrown is None else work.throw(thrown)
        except StopIteration as end:
            return end.value


async def _ended(value: Any, error: BaseException | None) -> Any:
    if error is not None:
        raise error
    return value


def _eager(
    loop: asyncio.AbstractEventLoop, work: types.CoroutineType[Any, Any, Any], **named: Any
) -> asyncio.Task[Any]:
    if (
        "vllm_sleep_tui" not in work.cr_code.co_filename
    ):  # Textual's own need the context of a true eager task
        return asyncio.Task(work, loop=loop, **named)
    try:
        waits_for = work.send(None)
    except StopIteration as end:
        return asyncio.Task(_ended(end.value, None), loop=loop, **named)
    except Exception as error:
        return asyncio.Task(_ended(None, error), loop=loop, **named)

    async def rest() -> Any:
        return await _goes_on(work, waits_for)

    return asyncio.Task(rest(), loop=loop, **named)


@contextmanager
def eager_tasks() -> Iterator[None]:
    """While it lasts, a new task of this loop runs up to its first wait before `create_task` returns."""
    loop = asyncio.get_running_loop()
    before = loop.get_task_factory()
    loop.set_task_factory(getattr(asyncio, "eager_task_factory", _eager))
    try:
        yield
    finally:
        loop.set_task_factory(before)
