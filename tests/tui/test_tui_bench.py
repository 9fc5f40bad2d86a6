"""The benchmark's screen over the real fleet, with real processes of the simulator."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from test_tui_real_fleet import demo, real_panel
from textual.pilot import Pilot

from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.widgets.bench import BenchForm

BAR = re.compile(r"1  qwen → phi +█+ +[0-9.]+ m?s")

__all__ = ["demo"]


async def until_it_runs(pilot: Pilot[None]) -> None:
    """Wait until the screen tells of a run, however far it is by now."""
    await until(pilot, lambda: re.search(r"bench (begins|\d+ of \d)", text_of(pilot.app)), "the run")


async def test_the_form_takes_two_models_and_some_modes(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        await pilot.press("b")
        await until_seen(pilot, "two models", "A qwen", "B phi", "✓ sleep level 1", "3 repeats of each")
        await pilot.press("down", "down", "space")
        await until_seen(pilot, "· qwen", "A phi", "B coder")
        await pilot.press("down", "down", "space", "minus", "minus")
        await until_seen(pilot, "· sleep level 1", "1 repeat of each")
        form = pilot.app.screen.query_one(BenchForm)
        assert (form.pair, form.modes) == (["phi", "coder"], {Mode.LEVEL2, Mode.COLD})
        await pilot.press("up", "up", "space", "r")
        await until_seen(pilot, "Choose two models and at least one mode")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 60)])
async def test_every_size_shows_the_form(tmp_path: Path, size: tuple[int, int]) -> None:
    async with panel(ScriptedFleet(), tmp_path, size=size) as pilot:
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi", "stop and start", "r run")
        assert all(len(line) <= size[0] for line in lines_of(pilot.app))


async def test_a_run_shows_a_bar_as_each_switch_ends_and_is_listed_afterwards(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, fleet):
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi")
        await pilot.press(*["down"] * 5, "space", "down", "space", "minus", "minus", "r")
        await until_seen(pilot, "Run the benchmark?", "qwen and phi answer nobody else")
        await pilot.press("y")
        await until(pilot, lambda: "1  qwen → phi" in text_of(pilot.app), "a switch", limit=120)
        await until_seen(pilot, "─ sleep level 1, the newest first ─")  # by the word of the form
        await until_seen(pilot, "median switch between qwen and phi")
        await until(pilot, lambda: "The benchmark is done." in text_of(pilot.app), "its end", limit=120)
        await until_seen(pilot, "qwen ⇄ phi")
        await pilot.resize_terminal(80, 24)
        await until(pilot, lambda: bool(BAR.search(text_of(pilot.app))), "a time with its unit")
        assert {model.state for model in fleet.snapshot().models} == {State.STOPPED}
        await pilot.press("escape")
        await until_seen(pilot, "enter → qwen")


async def test_escape_asks_stops_a_run_at_a_safe_point_and_another_leaves_the_screen(
    demo: LoadedConfig, tmp_path: Path
) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi")
        await pilot.press("r")
        await until_seen(pilot, "Run the benchmark?")
        await pilot.press("y")
        await until_it_runs(pilot)
        await pilot.press("escape")
        await until_seen(pilot, "Stop the benchmark?", "what it measured is kept")
        await pilot.press("escape")
        await until(pilot, lambda: "Stop the benchmark?" not in text_of(pilot.app), "the question gone")
        assert "bench stops" not in text_of(pilot.app)
        await pilot.press("escape")
        await until_seen(pilot, "Stop the benchmark?")
        await pilot.press("y")
        await until(pilot, lambda: "The benchmark was stopped" in text_of(pilot.app), "its end", limit=120)
        await until_seen(pilot, "What to measure", "qwen ⇄ phi  unfinished")
        await pilot.press("escape")
        await until_seen(pilot, "enter → qwen")


async def test_an_unfinished_result_can_be_gone_on_with(demo: LoadedConfig, tmp_path: Path) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        # With cold starts among the modes it cannot be over before escape is heard.
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi")
        await pilot.press(*["down"] * 5, "space", "minus", "minus", "r")
        await until_seen(pilot, "Run the benchmark?")
        await pilot.press("y")
        await until(pilot, lambda: "1  – → qwen" in text_of(pilot.app), "a switch", limit=120)
        await pilot.press("escape")
        await until_seen(pilot, "Stop the benchmark?")
        await pilot.press("y")
        await until(pilot, lambda: "The benchmark was stopped" in text_of(pilot.app), "its end", limit=120)
        await until_seen(pilot, "unfinished")
        await pilot.press("tab", "down", "enter", "r")
        await until_seen(pilot, "Go on with the result shown")
        await pilot.press("g")
        await until(pilot, lambda: "The benchmark is done." in text_of(pilot.app), "its end", limit=120)
        await until(pilot, lambda: "unfinished" not in text_of(pilot.app), "the list")


async def test_a_run_goes_on_when_escape_only_leaves_the_screen(demo: LoadedConfig, tmp_path: Path) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi")
        await pilot.press("r")
        await until_seen(pilot, "Run the benchmark?")
        await pilot.press("y")
        await until_it_runs(pilot)
        await pilot.press("escape")
        await until_seen(pilot, "Stop the benchmark?")
        await pilot.press("l")
        await until_seen(pilot, "enter → qwen", "vllm-sleep-tui   bench ")


async def test_quitting_tells_that_a_benchmark_runs(demo: LoadedConfig, tmp_path: Path) -> None:
    async with real_panel(demo, tmp_path / "state") as (pilot, _):
        await pilot.press("b")
        await until_seen(pilot, "A qwen", "B phi")
        await pilot.press("r")
        await until_seen(pilot, "Run the benchmark?")
        await pilot.press("y")
        await until_it_runs(pilot)
        await pilot.press("b")
        await until_seen(pilot, "enter → qwen", "vllm-sleep-tui   bench ")
        await pilot.press("q")
        await until_seen(pilot, "A benchmark runs: leaving stops it")
        await pilot.press("escape")
