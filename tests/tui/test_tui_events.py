"""The screen of events: what happened while nobody looked, and the way to its moment and its log."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet

from vllm_sleep_tui.fleet.events import FleetEvent, Kind, Outcome
from vllm_sleep_tui.fleet.states import State


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[ScriptedFleet]:
    """A fleet of this moment, with a history in the folder of its logs."""
    scripted = ScriptedFleet(logs=tmp_path)
    scripted.settle_at(time.time())
    yield scripted
    scripted.history.close()


def keep(fleet: ScriptedFleet, *events: FleetEvent) -> None:
    for event in events:
        fleet.history.record_event(event)


def night(now: float) -> list[FleetEvent]:
    """A model dies at night, is started again by itself, and the person comes back after a day's work."""
    died = now - 6 * 3600
    state = Kind.STATE
    return [
        FleetEvent(time=died - 60, kind=state, model="phi", operation="switch", state=State.AWAKE, pid=4242),
        FleetEvent(time=died, kind=Kind.FAULT, model="coder", detail="the engine was killed by SIGKILL"),
        FleetEvent(time=died, kind=state, model="coder", state=State.FAILED),
        FleetEvent(time=died + 40, kind=state, model="coder", operation="restart", state=State.AWAKE, pid=77),
        FleetEvent(
            time=died + 90,
            kind=Kind.OPERATION,
            model="vision",
            operation="start",
            outcome=Outcome.FAILED,
            seconds=3.5,
            detail="it does not fit",
        ),
    ]


SECONDS_OF_A_CELL = 24 * 3600 / 50


def cursor_in(lines: list[str]) -> tuple[str, float] | None:
    """The model and the moment (UTC seconds, of today or yesterday) that the timeline's title tells."""
    for line in lines:
        if told := re.search(r"─ (?:\S+ )??(\d\d):(\d\d):(\d\d)  (\w+)  .* esc", line):
            now = time.localtime()
            hour, minute, second = (int(part) for part in told.groups()[:3])
            moment = time.mktime((*now[:3], hour, minute, second, 0, 0, -1))
            return told[4], moment if moment <= time.time() else moment - 86400
    return None


async def test_a_failure_of_the_night_is_found_and_explained_in_three_keys(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    keep(fleet, *night(now))
    # A busy day after it: more than the screen keeps of everything.
    for at in range(1_100):
        keep(
            fleet,
            FleetEvent(
                time=now - 3600 + at, kind=Kind.STATE, model="qwen", state=State.AWAKE, operation="wake"
            ),
        )
    died = now - 6 * 3600
    for start in (died - 100, died + 1):
        fleet.history.record_state("coder", State.STARTING, at=start)
    dead = tmp_path / "coder.log.died"
    dead.write_text("".join(f"before {number}\n" for number in range(100)) + "the last words of coder\n")
    os.utime(dead, (died, died))
    (tmp_path / "coder.log").write_text("".join(f"since {number}\n" for number in range(100)))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("n")
        await until_seen(pilot, "Events", "awake by wake")
        assert "SIGKILL" not in text_of(pilot.app)
        await pilot.press("f")
        await until_seen(pilot, "failures only", "the engine was killed by SIGKILL", "it does not fit")
        assert "awake by wake" not in text_of(pilot.app)
        await pilot.press("up")
        await until_seen(pilot, "─ coder ")
        # Of the server that died, in sight at once, though another has said more since.
        await pilot.press("l")
        await until_seen(pilot, "the last words of coder", "failed: the engine was killed by SIGKILL.")
        assert "since " not in text_of(pilot.app).replace("since then", "")
        await pilot.resize_terminal(100, 30)
        await until_seen(pilot, "the last words of coder", "failed: the engine was killed by SIGKILL.")
        await pilot.press("end")
        await until_seen(pilot, "since 99")
        await pilot.press("escape")
        await until_seen(pilot, "failures only")
        await pilot.press("enter")
        # The timeline goes as far back as it must, its cursor at the cell of that moment.
        await until(pilot, lambda: cursor_in(lines_of(pilot.app)), "the timeline's cursor")
        name, moment = cursor_in(lines_of(pilot.app))
        assert name == "coder"
        assert abs(moment - (now - 6 * 3600 - SECONDS_OF_A_CELL / 2)) <= SECONDS_OF_A_CELL


async def test_what_was_before_the_timeline_is_told_so_and_not_shown_as_another_moment(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    long_ago = time.time() - 3 * 24 * 3600
    keep(fleet, FleetEvent(time=long_ago, kind=Kind.FAULT, model="coder", detail="killed by SIGKILL"))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("n")
        await until_seen(pilot, "killed by SIGKILL")
        await pilot.press("enter")
        await until_seen(pilot, "before the 24 hours")
        assert cursor_in(lines_of(pilot.app)) is None


async def test_what_happens_meanwhile_appears_and_the_cursor_stays_where_it_was_put(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    keep(fleet, *night(now))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("n")
        await until_seen(pilot, "─ vision ")
        keep(fleet, FleetEvent(time=now, kind=Kind.STATE, model="phi", state=State.ASLEEP, level=1))
        await until_seen(pilot, "─ phi ", "asleep at level 1")
        await pilot.press("up")
        await until_seen(pilot, "─ vision ")
        keep(fleet, FleetEvent(time=now, kind=Kind.STATE, model="qwen", state=State.AWAKE, pid=9))
        await until_seen(pilot, "qwen", "● awake")
        assert "─ vision " in text_of(pilot.app)
        await pilot.press("end")
        await until_seen(pilot, "─ qwen ", "by process 9")
        keep(fleet, FleetEvent(time=now, kind=Kind.STATE, model="qwen", state=State.ASLEEP, pid=os.getpid()))
        await pilot.press("end")
        await until_seen(pilot, "─ qwen ", "by this panel")


async def test_without_events_it_says_so(fleet: ScriptedFleet, tmp_path: Path) -> None:
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("n")
        await until_seen(pilot, "Nothing has happened yet.")
        await pilot.press("f")
        await until_seen(pilot, "No failure is on record.")
        await pilot.press("enter", "l", "up")
        await pilot.press("escape")
        await until_seen(pilot, "Models")


async def test_words_of_others_are_text_and_stay_in_their_line(fleet: ScriptedFleet, tmp_path: Path) -> None:
    hostile = "[/b] \x1b]0;title\x07 two\nlines"
    keep(fleet, FleetEvent(time=time.time(), kind=Kind.FAULT, model="gone once", detail=hostile))
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("n")
        await until_seen(pilot, "[/b]", "two")
        assert "\x1b" not in text_of(pilot.app)
        await pilot.press("l")  # the log of a model that the config had once
        await pilot.pause()
        await until_seen(pilot, "gone once")
