"""What this panel has under way: one task for each operation, its last progress, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

import msgspec

from vllm_sleep_tui.errors import CancelledByUser, PanelError
from vllm_sleep_tui.fleet.snapshot import WAITING, ModelSnapshot, Progress, Report
from vllm_sleep_tui.tui.words import DOING
from vllm_sleep_tui.units import counted

CLOSE_SECONDS = 30.0
"""How long leaving waits for operations to reach a safe point."""
TROUBLE_SECONDS = 30.0
"""So long a refusal stands on the screen; after it, it tells of a past that may be another one by now."""

_BRINGING = frozenset(DOING[verb] for verb in ("switch", "wake", "start", "restart"))

T = TypeVar("T")
Work = Callable[[Report], Awaitable[object]]


class Running(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that this panel started and that is under way."""

    model: str
    verb: str
    """What is being done, for a person, `{}` for the model: switching to {}, putting {} to sleep …"""
    since: float
    """UTC seconds."""
    others: int = 0
    """So many more models that the same operation is about."""
    progress: Progress | None = None
    cancelled: bool = False

    @property
    def doing(self) -> str:
        """What is being done, with the model's name."""
        return self.verb.replace("{}", self.model) + self.and_others

    @property
    def and_others(self) -> str:
        """The other models it is about, in words."""
        return f" and {counted(self.others, 'other')}" if self.others else ""


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """A refusal or a failure of an operation of this panel; it stays until the next one on that model.

    It is over before that once the model has moved on, whoever moved it, or after TROUBLE_SECONDS: a failure
    of the model itself is in its record.
    """

    doing: str
    """What was tried, with the model's name."""
    what: str
    cure: str
    at: float
    """UTC seconds of its end."""

    def stands(self, model: ModelSnapshot, now: float) -> bool:
        """Whether it still tells how things are; `now` in UTC seconds."""
        return now < self.at + TROUBLE_SECONDS and (model.since is None or model.since <= self.at)


Ended = Callable[[Running, PanelError | None], None]


def expected(error: BaseException) -> PanelError | None:
    """The error in words for a person; None if the person stopped it."""
    if isinstance(error, (asyncio.CancelledError, CancelledByUser)):
        return None
    if isinstance(error, PanelError):
        return error
    return PanelError(
        f"Something unforeseen went wrong: {type(error).__name__}: {error}",
        "The operation ended. This is a defect of the panel: please report it with these words.",
    )


class Operations:
    """Owns the tasks; one operation a model at a time, and a stop takes the place of what is under way.

    From Python 3.12 on Textual's loop runs a new task at once, up to its first wait or to its end, before
    `create_task` returns; and a task that is cancelled before its first step never runs a line. So what is
    known of a task is noted before it is made, and its end is a callback.
    """

    def __init__(self) -> None:
        self.running: dict[str, Running] = {}
        self.troubles: dict[str, Trouble] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._marks: dict[str, object] = {}
        """Names the operation that each model has under way; a report or an end of another one is late."""
        self._others: set[asyncio.Task[Any]] = set()

    def begin(
        self, model: str, *, verb: str, work: Work, ended: Ended, others: int = 0, replaces: bool = False
    ) -> bool:
        """Start an operation; False if the model has one under way and this one does not replace it."""
        before = self._tasks.get(model)
        if before is not None and not replaces:
            return False
        self.running[model] = Running(model=model, verb=verb, since=time.time(), others=others)
        self.troubles.pop(model, None)
        mark = self._marks[model] = object()
        task = self.spawn(self._run(model, mark, before, work))
        self._tasks[model] = task
        task.add_done_callback(lambda done: self._end(model, mark, done, ended))
        return True

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run what must end before the panel does, such as an answer; what it raises is the caller's."""
        task = asyncio.create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)
        return task

    def next_to_cancel(self, preferred: str | None) -> str | None:
        """The model whose operation is to be asked to stop; None if there is none to ask."""
        open_ones = [name for name, running in self.running.items() if not running.cancelled]
        if not open_ones:
            return None
        return preferred if preferred in open_ones else open_ones[-1]

    def cancel(self, model: str) -> bool:
        """Ask its operation to stop at its next safe point; False if it has ended already."""
        if model not in self.running:
            return False
        self.running[model] = msgspec.structs.replace(self.running[model], cancelled=True)
        self._tasks[model].cancel()
        return True

    def brings(self, model: str) -> Running | None:
        """The operation at whose end the model is to be awake; None if there is none."""
        running = self.running.get(model)
        return running if running is not None and running.verb in _BRINGING else None

    def waiting(self) -> list[str]:
        """The models whose operation waits for somebody else's and has begun nothing."""
        open_ones = list(self.running.items())
        return [name for name, running in open_ones if running.progress and running.progress.phase == WAITING]

    async def settled(self, models: Iterable[str]) -> None:
        """Wait until nothing is under way on these models."""
        while tasks := {self._tasks[name] for name in models if name in self._tasks}:
            await asyncio.wait(tasks)

    async def close(self) -> None:
        """Stop all at their next safe points and wait for them, CLOSE_SECONDS at most."""
        for task in self._others:
            task.cancel()
        if self._others:
            await asyncio.wait(self._others, timeout=CLOSE_SECONDS)

    async def _run(self, model: str, mark: object, before: asyncio.Task[None] | None, work: Work) -> None:
        if before is not None:
            before.cancel()
            await asyncio.wait({before})
        await work(lambda progress: self._report(model, mark, progress))

    def _report(self, model: str, mark: object, progress: Progress) -> None:
        if self._marks.get(model) is mark:
            self.running[model] = msgspec.structs.replace(self.running[model], progress=progress)

    def _end(self, model: str, mark: object, task: asyncio.Task[None], ended: Ended) -> None:
        raised = asyncio.CancelledError() if task.cancelled() else task.exception()
        if self._marks.get(model) is not mark:
            return
        del self._marks[model]
        error = None if raised is None else expected(raised)
        del self._tasks[model]
        running = self.running.pop(model)
        for name, wrong in ({} if error is None else error.by_model or {model: error}).items():
            doing = running.verb.replace("{}", name)
            self.troubles[name] = Trouble(doing=doing, what=wrong.what, cure=wrong.cure, at=time.time())
        ended(running, error)
