"""Which modules a call goes through: the package's part of the stack at its end, while real work is done."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import vllm_sleep_tui

PACKAGE = f"{Path(vllm_sleep_tui.__file__).parent}/"
Walk = tuple[str, ...]
"""Modules from the outermost caller to the end, each named once for all its frames that stand together."""
End = Callable[[FrameType], bool]


def module_of(code: CodeType) -> str | None:
    """The module of the package, as `fleet/core`; None if it is none."""
    return code.co_filename.removeprefix(PACKAGE)[:-3] if code.co_filename.startswith(PACKAGE) else None


def function_of(frame: FrameType) -> str:
    """Module and name of the function that a frame runs: `fleet/core:flush`."""
    return f"{module_of(frame.f_code)}:{frame.f_code.co_name}"


class Walks:
    """Collects the walks to each of `ends` while it traces, by the name of the end."""

    def __init__(self, ends: Mapping[str, End]) -> None:
        self.ends = ends
        self.seen: dict[str, set[Walk]] = {name: set() for name in ends}
        self._made_by: dict[asyncio.Task[Any], list[str]] = {}

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace this thread; a task that the package makes goes on from the call that made it."""
        loop = asyncio.get_running_loop()
        before = loop.get_task_factory()
        loop.set_task_factory(self._make)
        sys.setprofile(self._called)
        try:
            yield
        finally:
            sys.setprofile(None)
            loop.set_task_factory(before)

    def _make(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **named: Any
    ) -> asyncio.Task[Any]:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and "/asyncio/" in frame.f_code.co_filename:
            frame = frame.f_back
        made_here = frame is not None and module_of(frame.f_code) is not None
        callers = self._callers(frame) if made_here else []
        task = asyncio.Task(work, loop=loop, name=named.get("name"), context=named.get("context"))
        self._made_by[task] = callers
        return task

    def _callers(self, frame: FrameType | None) -> list[str]:
        """The modules of a frame and of those below it, innermost first."""
        modules = []
        while frame is not None and not frame.f_code.co_filename.endswith("asyncio/events.py"):
            if (module := module_of(frame.f_code)) is not None:
                modules.append(module)
            frame = frame.f_back
        task = asyncio.current_task()
        return modules + (self._made_by.get(task, []) if task is not None else [])

    def _called(self, frame: FrameType, event: str, _: object) -> None:
        if event != "call" or module_of(frame.f_code) is None:
            return
        for name, is_end in self.ends.items():
            if is_end(frame):
                self.seen[name].add(without_repeats(reversed(self._callers(frame))))


def without_repeats(modules: Iterator[str]) -> Walk:
    """Each module once for all that stand together."""
    walk: list[str] = []
    for module in modules:
        if not walk or walk[-1] != module:
            walk.append(module)
    return tuple(walk)
