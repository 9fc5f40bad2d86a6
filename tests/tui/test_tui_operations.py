"""The panel's operations, also where a new task runs at once (Textual's loop from Python 3.12 on)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from eager import eager_tasks
from screen_text import panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from textual.notifications import Notification

from vllm_sleep_tui.errors import OperationError, PanelError
from vllm_sleep_tui.fleet.snapshot import Progress, Report
from vllm_sleep_tui.tui.state.failure import READ_SECONDS, ToldFailures
from vllm_sleep_tui.tui.state.operations import Operations, Running


class Ends:
    """What was told of ends."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, PanelError | None]] = []

    def __call__(self, running: Running, error: PanelError | None) -> None:
        self.seen.append((running.model, error))


async def test_an_operation_that_ends_before_it_was_noted_is_over_and_the_next_may_begin() -> None:
    operations, ends = Operations(), Ends()

    async def at_once(_: Report) -> None:
        return None

    with eager_tasks():
        assert operations.begin("b", verb="switching to {}", work=at_once, ended=ends)
        await operations.settled(["b"])
        assert operations.running == {}
        assert operations.begin("b", verb="waking {}", work=at_once, ended=ends)
        await operations.settled(["b"])
    assert ends.seen == [("b", None), ("b", None)]


async def test_what_an_operation_tells_before_its_first_wait_is_kept() -> None:
    operations, gate = Operations(), asyncio.Event()
    waits = Progress(model="b", operation="switch", phase="waiting", detail="waits for ada's start")

    async def work(report: Report) -> None:
        report(waits)
        await gate.wait()

    with eager_tasks():
        operations.begin("b", verb="switching to {}", work=work, ended=Ends())
        assert operations.running["b"].progress == waits
        gate.set()
        await operations.settled(["b"])


async def test_an_operation_that_was_replaced_tells_nothing_any_more() -> None:
    operations, ends = Operations(), Ends()
    reports: list[Report] = []

    async def work(report: Report) -> None:
        reports.append(report)
        await asyncio.Event().wait()

    operations.begin("b", verb="switching to {}", work=work, ended=ends)
    await asyncio.sleep(0)
    operations.begin("b", verb="stopping {}", work=work, ended=ends, replaces=True)
    reports[0](Progress(model="b", operation="switch", phase="wake"))
    assert operations.running["b"].progress is None
    operations.cancel("b")
    await operations.settled(["b"])
    assert ends.seen == [("b", None)]


async def test_an_answer_that_is_refused_before_its_first_wait_can_be_asked_again(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = [OperationError("The engine died.", "Restart it (r).")]
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c", *"one")
        with eager_tasks():
            await pilot.press("enter")
            await until_seen(pilot, "The engine died.")
            await pilot.press(*"two", "enter")
            await until(pilot, lambda: len(fleet.asked) == 2, "the second question")
        assert "still answering" not in text_of(pilot.app)


async def test_enter_on_an_awake_model_beside_another_operation_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    fleet = ScriptedFleet()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down", "enter")
        await until_seen(pilot, "switching to phi")
        fleet.outcome, fleet.is_gated = lambda: None, False
        with eager_tasks():
            await pilot.press("up", "enter")
            await until(pilot, lambda: fleet.calls[-1] == ("switch", "qwen"), "the second switch")
            await until(pilot, lambda: "switching to qwen" not in text_of(pilot.app), "its end")
        assert "switching to phi" in text_of(pilot.app)
        fleet.gate.set()


def test_what_is_told_of_a_failure_goes_once_when_it_is_over_and_was_there_to_be_read() -> None:
    told, now = ToldFailures(), time.time()
    read, stands, new = (
        Notification(name, timeout=600, raised_at=now + since)
        for name, since in (("read", -READ_SECONDS), ("stands", -READ_SECONDS), ("new", 500.0))
    )
    told.add(read, lambda: True)
    told.add(stands, lambda: False)
    told.add(new, lambda: True)
    assert told.over() == [read]
    assert told.over() == []
