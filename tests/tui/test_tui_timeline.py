"""The timeline: requests and tokens under its lanes, and the cursor that tells what was at a moment."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import TIMES, ScriptedFleet, four_models, model
from textual.pilot import Pilot

from vllm_sleep_tui.fleet.snapshot import Serving
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.widgets.timeline import Timeline

ANSWERING = Serving(
    running=1,
    waiting=0,
    kv_use=0.1,
    prompt_tokens_per_s=0.0,
    generation_tokens_per_s=50.0,
    ttft_p50=None,
    ttft_p95=None,
    inter_token_p50=None,
    inter_token_p95=None,
    prefix_hit_share=None,
    cached_tokens=None,
)
LOW, USUAL = (80, 24), (120, 40)
FIRST_CELL = 14
"""Where the rows of the timeline begin, with the box and the name before them."""


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[ScriptedFleet]:
    """A fleet of this moment, whose qwen was asleep and woke in the last ten minutes."""
    now = time.time()
    scripted = ScriptedFleet(logs=tmp_path)
    scripted.settle_at(now)
    scripted.change("qwen", since=now - 150)
    scripted.history.record_state("qwen", State.ASLEEP, 1, at=now - 450)
    scripted.history.record_state("qwen", State.AWAKE, at=now - 150)
    scripted.history.record_switch("qwen", TIMES, level=1, from_state=State.ASLEEP, at=now - 150)
    yield scripted
    scripted.history.close()


def cursor_of(pilot: Pilot[None]) -> tuple[int, bool]:
    """The cursor's column on the screen, and whether it stands at the right end of its row."""
    line = next((line for line in lines_of(pilot.app) if "  requests  " in line), "")
    column = line.find("│", 2)
    return column, line[column + 1 : column + 3] == " │"


def lane_of(pilot: Pilot[None], name: str) -> str:
    """The cells of a row of the timeline; none as long as it is not there."""
    lines = lines_of(pilot.app)
    start = next((index for index, line in enumerate(lines) if "─ last " in line), len(lines))
    row = next((line for line in lines[start + 1 :] if f"  {name} " in line), "│ ? ?")
    return row.split("│")[1].split()[1]


async def until_told(pilot: Pilot[None], *texts: str) -> None:
    """Wait until the cursor is out and the screen says so."""
    await until(pilot, lambda: "─ last 10 " not in text_of(pilot.app), "the cursor")
    await until_seen(pilot, *texts)


async def walk_to(pilot: Pilot[None], key: str, text: str) -> None:
    """Press a key until the screen shows a text."""
    for _ in range(60):
        if text in text_of(pilot.app):
            return
        await pilot.press(key)
    raise AssertionError(f"{text!r} did not come; the screen:\n{text_of(pilot.app)}")


async def test_requests_and_tokens_stand_under_the_lanes_and_survive_a_restart(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = time.time()
    fleet.history.record_served("qwen", 2, 100, 900, at=now - 100)
    fleet.history.record_served("phi", 1, 20, 230, at=now - 400)
    fleet.history.record_served("phi", 7, 70, 70, at=now - 2000)
    for _ in range(2):
        async with panel(fleet, tmp_path, size=USUAL) as pilot:
            await until_seen(pilot, "last 10 minutes  + −  ← →  3 requests · 1,250 tokens")
            cells = lane_of(pilot, "tokens")
            assert 0.75 < cells.index("█") / len(cells) < 0.88
            assert 0.25 < (len(cells) - len(cells.lstrip("·"))) / len(cells) < 0.36
            await pilot.press("plus")
            await until_seen(pilot, "last hour  + −  ← →  10 requests · 1,390 tokens")
            assert lane_of(pilot, "requests").index("█") / len(lane_of(pilot, "requests")) < 0.5


async def test_what_is_served_while_the_panel_looks_shows_soon(fleet: ScriptedFleet, tmp_path: Path) -> None:
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await until_seen(pilot, "last 10 minutes  + −  ← → ─")
        fleet.change("qwen", serving=ANSWERING)
        fleet.history.record_served("qwen", 1, 10, 300)
        await until_seen(pilot, "1 request · 310 tokens")
        fleet.history.record_served("qwen", 0, 0, 40)
        await until_seen(pilot, "1 request · 350 tokens")
        fleet.change("qwen", serving=None)
        fleet.history.record_served("qwen", 0, 0, 50)
        await until_seen(pilot, "1 request · 400 tokens")


async def test_the_cursor_tells_state_switch_phases_and_what_was_served(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    now = fleet.now.time
    fleet.history.record_served("qwen", 2, 100, 900, at=now - 90)
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await until(pilot, lambda: "▁" in lane_of(pilot, "qwen"), "the past")
        await pilot.press("left_square_bracket")
        woke = time.strftime("%H:%M:%S", time.localtime(now - 150))
        await until_told(pilot, f"{woke}  qwen  ● awake", "● qwen      ·", "◐ phi       ▁")
        await until_seen(pilot, "switch to qwen", "0.46 s   drain 4 ms · sleep 67 ms", "prove 26 ms")
        await pilot.press("left")
        await until_told(pilot, "qwen  ◐ asleep L1  esc ends ─", "◐ qwen      ·", "switch to qwen")
        await walk_to(pilot, "right", "qwen  ● awake  2 requests · 1,000 tokens in 10 s")
        await pilot.press("down")
        await until_told(pilot, "phi  ◐ asleep L1  qwen: 2 requests", "no switch to phi in this time")


async def test_the_cursor_stops_at_both_ends_and_keeps_its_moment_when_the_window_grows(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await until(pilot, lambda: "▁" in lane_of(pilot, "qwen"), "the past")
        await pilot.press("left_square_bracket", "plus")
        woke = time.strftime("%H:%M:%S", time.localtime(fleet.now.time - 150))
        await until_told(pilot, f"{woke}  qwen  ● awake")
        await pilot.press("minus", "right_square_bracket", "right_square_bracket", "right")
        await until(pilot, lambda: cursor_of(pilot)[1], "the right end")
        await pilot.press(*["left_square_bracket"] * 4, "left")
        await until_told(pilot, "qwen  not known", "? qwen ")
        assert cursor_of(pilot) == (FIRST_CELL, False)


async def test_escape_puts_the_cursor_away_before_it_stops_anything(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await pilot.press("down", "enter")
        await until_seen(pilot, "switching to phi")
        await pilot.press("left")
        await until_told(pilot, "◐ phi ")
        await pilot.press("escape")
        await until_seen(pilot, "last 10 minutes")
        assert fleet.cancelled == []
        assert "stops at the next safe point" not in text_of(pilot.app)
        await pilot.press("escape")
        await until(pilot, lambda: fleet.cancelled == ["switch"], "the end of the switch")


async def test_an_input_keeps_the_keys_of_the_cursor(fleet: ScriptedFleet, tmp_path: Path) -> None:
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await pilot.press("c", "a", "b", "left", "left_square_bracket")
        await until_seen(pilot, "a[b")
        assert " esc ends ─" not in text_of(pilot.app)


async def test_in_a_low_terminal_the_timeline_takes_the_place_of_the_detail_while_its_cursor_is_out(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    async with panel(fleet, tmp_path, size=LOW) as pilot:
        await until_seen(pilot, "example/qwen")
        assert "last 10 minutes" not in text_of(pilot.app)
        await pilot.press("tab", "left", "left")
        await until_told(pilot, "● qwen      ·", "  requests ", "  tokens ", "prove 26 ms")
        assert "example/qwen" not in text_of(pilot.app)
        await pilot.press("down")
        await until_told(pilot, "phi  ◐ asleep L1")
        await pilot.press("escape")
        await until_seen(pilot, "then wakes phi.")
        assert " esc ends ─" not in text_of(pilot.app)


async def test_with_many_models_requests_and_tokens_give_way_and_the_selected_lane_stays(
    tmp_path: Path,
) -> None:
    models = tuple(model(f"model-{index:02}", State.ASLEEP, 1, 1, 1, level=1) for index in range(12))
    fleet = ScriptedFleet(msgspec.structs.replace(four_models(), models=(four_models().models[0], *models)))
    async with panel(fleet, tmp_path, size=LOW) as pilot:
        await pilot.press("end", "left")
        await until_told(pilot, "model-11  ◐ asleep L1", "◐ model-11 ", "no switch to model-11")
        assert "requests" not in text_of(pilot.app)
        await pilot.press("home")
        await until_told(pilot, "● qwen ")


async def test_a_click_puts_the_cursor_where_it_points(fleet: ScriptedFleet, tmp_path: Path) -> None:
    async with panel(fleet, tmp_path, size=USUAL) as pilot:
        await until(pilot, lambda: "▁" in lane_of(pilot, "qwen"), "the past")
        await pilot.click(Timeline, offset=(12 + 15, 1))
        await until_told(pilot, "qwen  ◐ asleep L1")
        await pilot.click(Timeline, offset=(12 + 50, 1))
        await until_told(pilot, "qwen  ● awake")


async def test_a_narrow_chat_is_left_before_the_cursor_comes_out(
    fleet: ScriptedFleet, tmp_path: Path
) -> None:
    async with panel(fleet, tmp_path, size=LOW) as pilot:
        await pilot.press("c", "escape", "left")
        await until_seen(pilot, "Chat with qwen")
        await pilot.press("escape", "left")
        await until_told(pilot, "● qwen ")
