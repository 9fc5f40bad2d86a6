"""The screen of advice: its cards, and writing them to the config."""

from __future__ import annotations

from pathlib import Path

import pytest
from screen_text import lines_of, panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet

from vllm_sleep_tui.fleet.advice import Advice, GpuAdvice, ModelAdvice, Verdict

ADVICE = Advice(
    models=(
        ModelAdvice(name="qwen", verdict=Verdict.LEVEL_1, why="It wakes in 0.36 s [/b].", level="1"),
        ModelAdvice(
            name="phi",
            verdict=Verdict.TOGETHER,
            why="It fits beside qwen.",
            level="none",
            utilization=0.31,
            is_estimate=True,
        ),
        ModelAdvice(name="coder", verdict=Verdict.UNKNOWN, why="Nothing is known.", level=None),
    ),
    gpus=(GpuAdvice(index=0, together=("qwen",), sentence="At most one fits awake at a time."),),
)


def advised(folder: Path) -> ScriptedFleet:
    fleet = ScriptedFleet(logs=folder)
    fleet.advised = ADVICE
    return fleet


async def test_each_model_and_gpu_has_a_card_with_the_reason_and_what_would_change(tmp_path: Path) -> None:
    async with panel(advised(tmp_path), tmp_path) as pilot:
        await pilot.press("a")
        await until_seen(
            pilot,
            "SIMULATED",
            "qwen  level 1",
            "It wakes in 0.36 s [/b].",
            "The config says level auto; the advice is 1.",
            "phi  keep awake  estimated",
            "gpu-memory-utilization 0.31",
            "coder  start it once",
            "At most one fits awake at a time.",
        )
        await pilot.press("escape")
        await until_seen(pilot, "last switch to qwen")


async def test_the_advice_is_written_after_a_question_with_comments_kept(tmp_path: Path) -> None:
    fleet = advised(tmp_path)
    path = tmp_path / "scripted.yaml"
    before = path.read_text()
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("a")
        await until_seen(pilot, "qwen  level 1")
        await pilot.press("enter")
        await until_seen(pilot, "Write to scripted.yaml?", "+    level: 1")
        await pilot.press("enter")
        await until(pilot, lambda: "Write to" not in text_of(pilot.app), "the answer no")
        assert path.read_text() == before
        await pilot.press("A")
        await until_seen(pilot, "Write to scripted.yaml?")
        await pilot.press("y")
        await until_seen(pilot, "Written. It holds from each model's next start on")
        text = path.read_text()
        assert "level: 1" in text
        assert "gpu-memory-utilization: 0.31" in text
        assert "# qwen's own" in text
        assert fleet.loaded is not None
        assert str(fleet.loaded.config.models["qwen"].level) == "1"
        await until(pilot, lambda: "advice is 1" not in text_of(pilot.app), "the new cards")


async def test_a_config_that_cannot_be_written_is_told_and_kept(tmp_path: Path) -> None:
    fleet = advised(tmp_path)
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("a")
        await until_seen(pilot, "qwen  level 1")
        await pilot.press("enter")
        await until_seen(pilot, "Write to scripted.yaml?")
        (tmp_path / "scripted.yaml").rename(tmp_path / "moved.yaml")
        (tmp_path / "scripted.yaml").mkdir()
        await pilot.press("y")
        await until_seen(pilot, "Nothing was written")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (200, 60)])
async def test_every_size_shows_the_cards(tmp_path: Path, size: tuple[int, int]) -> None:
    async with panel(advised(tmp_path), tmp_path, size=size) as pilot:
        await pilot.press("a")
        await until_seen(pilot, "qwen  level 1", "phi  keep awake")
        assert all(len(line) <= size[0] for line in lines_of(pilot.app))
