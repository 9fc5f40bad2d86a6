"""What the panel knows of the past: figures under the last switch, and a timeline that outlives it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import TIMES, ScriptedFleet

from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.snapshot import Serving
from vllm_sleep_tui.fleet.states import State


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[ScriptedFleet]:
    """A fleet of this moment, with a history in the folder of its logs."""
    scripted = ScriptedFleet(logs=tmp_path)
    scripted.settle_at(time.time())
    yield scripted
    scripted.history.close()


def cells_of(lines: list[str], name: str, under: str) -> str:
    """One lane of the timeline; none as long as it is not there."""
    start = next((index for index, line in enumerate(lines) if under in line), len(lines))
    lane = next((line for line in lines[start + 1 :] if f"  {name} " in line), "│ ? ?")
    return lane.split("│")[1].split()[1]


async def test_under_the_last_switch_stand_what_it_saved_and_what_is_usual(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    fleet.history.record_cold_start("phi", 47.2, at=now - 500)
    for seconds in (0.4, 0.46, 0.61):
        times = TIMES.__class__(phases=TIMES.phases, total=seconds)
        fleet.history.record_switch("phi", times, level=1, from_state=State.ASLEEP, at=now)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "last switch to phi", "102 × faster than a start")
        await until_seen(pilot, "46.7 s saved · today 3 switches, 2 min saved")
        await until_seen(pilot, "drain 4 ms · sleep 67 ms · settle 4 ms · wake 0.36 s ·", "prove 26 ms")
        await until_seen(pilot, "╰─╯•  ╵╰─╯ s")  # 0.46 s, three lines high
        await until_seen(pilot, "p50 0.46 s · p95 0.61 s over 3 switches at level 1")
        await pilot.resize_terminal(100, 30)  # what does not fit is said in fewer words
        await until_seen(pilot, "last switch to phi  0.46 s  102 × faster ─", "46.7 s saved")


async def test_a_start_is_called_one_and_saves_nothing(fleet: ScriptedFleet, tmp_path: Path) -> None:
    fleet.history.record_cold_start("qwen", 47.2)
    phases = TIMES.phases | {"wake": None, "prove": None}
    start = TIMES.__class__(phases=phases, total=12.0)
    fleet.change("qwen", last_switch=start)
    fleet.history.record_switch("qwen", start, level=1, from_state=State.STOPPED)
    fleet.history.record_switch("phi", TIMES, level=1, from_state=State.ASLEEP)
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "last start of qwen", "start 11.9 s", "today 1 switch")
        assert "saved" not in text_of(pilot.app)


async def test_a_switch_made_while_the_panel_looks_is_counted_soon(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "last switch to qwen")
        assert "today" not in text_of(pilot.app)
        fleet.history.record_switch("qwen", TIMES, level=1, from_state=State.ASLEEP)
        fleet.happened.put_nowait(
            FleetEvent(time=time.time(), kind=Kind.OPERATION, model="qwen", operation="switch")
        )
        await until_seen(pilot, "today 1 switch")


async def test_a_model_that_fails_of_itself_or_by_others_is_told_at_once_and_what_is_ours_only_once(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    def fault(model: str, operation: str | None, pid: int) -> FleetEvent:
        reason = f"{model} has no memory left."
        fleet.change(model, state=State.FAILED, reason=reason, cure="Give it less.")
        return FleetEvent(
            time=time.time(),
            kind=Kind.FAULT,
            model=model,
            operation=operation,
            state=State.FAILED,
            detail=reason,
            pid=pid,
        )

    async with panel(fleet, tmp_path) as pilot:
        fleet.happened.put_nowait(fault("coder", "switch", os.getpid()))
        fleet.happened.put_nowait(fault("phi", None, os.getpid()))
        fleet.happened.put_nowait(fault("vision", "start", os.getpid() + 1))
        await until_seen(pilot, "phi failed", "phi has no memory left.", "vision failed", "Give it less.")
        assert "coder failed" not in text_of(pilot.app)


async def test_the_timeline_survives_a_restart_of_the_panel_and_goes_back_a_day(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    fleet.change("qwen", since=now - 150)
    fleet.history.record_state("qwen", State.ASLEEP, 1, at=now - 450)
    fleet.history.record_state("qwen", State.AWAKE, at=now - 150)
    fleet.history.record_state("coder", State.AWAKE, at=now - 3000)
    fleet.history.record_state("coder", State.ASLEEP, 1, at=now - 1500)
    async with panel(fleet, tmp_path) as pilot:
        await until(pilot, lambda: "▁" in cells_of(lines_of(pilot.app), "qwen", "last 10 min"), "the past")
        cells = cells_of(lines_of(pilot.app), "qwen", "last 10 min")
        assert 0.2 < cells.count("█") / len(cells) < 0.32
        assert 0.4 < cells.count("▁") / len(cells) < 0.6
        assert "█" not in cells_of(lines_of(pilot.app), "coder", "last 10 min")
        await pilot.press("plus")
        await until(pilot, lambda: "█" in cells_of(lines_of(pilot.app), "coder", "last hour"), "the hour")
        cells = cells_of(lines_of(pilot.app), "coder", "last hour")
        assert 0.35 < cells.count("█") / len(cells) < 0.5
        await pilot.press("plus", "plus", "plus")
        await until_seen(pilot, "last 24 hours")
        await pilot.press("minus")
        await until_seen(pilot, "last 6 hours")


async def test_a_death_shows_from_when_it_was_seen_although_its_record_is_older(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    fleet.change("qwen", since=now - 300)
    async with panel(fleet, tmp_path) as pilot:
        await until(pilot, lambda: "█" in cells_of(lines_of(pilot.app), "qwen", "last 10 min"), "awake")
        fleet.change("qwen", state=State.FAILED, reason="gone")
        fleet.settle_at(now + 30)
        await until(pilot, lambda: "✗" in cells_of(lines_of(pilot.app), "qwen", "last 10 min"), "the death")
        cells = cells_of(lines_of(pilot.app), "qwen", "last 10 min")
        assert cells.count("█") > 5 * cells.count("✗")


async def test_who_holds_the_gpu_stands_beside_what_enter_would_do(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    fleet.waits_for = "waits for ada's start of coder, about 20 s more"
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("down")
        await until_seen(pilot, "enter → phi", "First it waits for ada's start of coder, about")
        fleet.waits_for = None
        await until(pilot, lambda: "First it waits" not in text_of(pilot.app), "the end of it")


async def test_an_awake_model_shows_how_it_serves(tmp_path: Path) -> None:
    fleet = ScriptedFleet()
    serving = Serving(
        running=3,
        waiting=1,
        kv_use=0.42,
        prompt_tokens_per_s=10.0,
        generation_tokens_per_s=212.4,
        ttft_p50=0.026,
        ttft_p95=0.5,
        inter_token_p50=0.008,
        inter_token_p95=0.021,
        prefix_hit_share=None,
        cached_tokens=12_000,
    )
    fleet.change("qwen", serving=serving)
    async with panel(fleet, tmp_path) as pilot:
        await until_seen(pilot, "3 running · 1 waiting · KV 42 % · 212 tok/s", "p95 0.50 s", "12,000 tokens")
        assert "between tokens p50 8 ms" in text_of(pilot.app)
        idle = msgspec.structs.replace(
            serving, running=0, waiting=0, kv_use=0.0, generation_tokens_per_s=0.0, prefix_hit_share=0.0
        )
        fleet.change("qwen", serving=idle)
        # The table says the rest, and nothing said twice is nothing.
        await until_seen(pilot, "│   TTFT p50 26 ms", "12,000 tokens")
        assert "prefix hits" not in text_of(pilot.app)
