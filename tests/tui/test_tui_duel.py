"""Two answers to one question: side by side, one above the other, and the words that differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from screen_text import lines_of, panel, text_of, until_seen
from scripted_fleet import ScriptedFleet
from test_tui_chat import answer, ask
from textual.pilot import Pilot

from vllm_sleep_tui.fleet.snapshot import ChatEvent
from vllm_sleep_tui.tui.drawing.differing import difference


async def duel(pilot: Pilot[None]) -> None:
    await ask(pilot, "count")
    await until_seen(pilot, "one two three four")
    await pilot.press("escape", "d")
    await until_seen(pilot, "Ask another model the same")
    await pilot.press("enter")
    await until_seen(pilot, "Switch to phi?")
    await pilot.press("y")


@pytest.mark.parametrize("size", [(120, 40), (80, 24)])
async def test_two_answers_stand_beside_each_other_and_stream(tmp_path: Path, size: tuple[int, int]) -> None:
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "one two three four <b>", ttft=0.026)
    fleet.answers["phi"] = [
        ChatEvent(model="phi", switch_seconds=0.36, ttft=0.03),
        ChatEvent(model="phi", reasoning="hm"),
        ChatEvent(model="phi", text="one two "),
        0.0,
        ChatEvent(model="phi", text="three five <b>"),
        ChatEvent(model="phi", finish_reason="length"),
    ]
    async with panel(fleet, tmp_path, size=size) as pilot:
        await duel(pilot)
        await until_seen(
            pilot, "you  count", "one two three four <b>", "woke in 0.36 s · TTFT 30 ms", "one two"
        )
        await pilot.press("w")
        await until_seen(pilot, "Both have to come to their")
        fleet.gate.set()
        await until_seen(pilot, "three five <b>", "TTFT 26 ms", "cut off: the token")
        assert "SIMULATED" in lines_of(pilot.app)[0]
        beside = text_of(pilot.app)
        together = [row for row in beside.splitlines() if "one two three" in row]
        assert len(together) == 2
        assert any("─ qwen ─" in row and "─ phi ─" in row for row in beside.splitlines()) is (size[0] >= 100)
        await pilot.press("w")
        await until_seen(pilot, "80 % of the words are the same", "one two three five")
        await pilot.press("w", "tab", "o")
        await until_seen(pilot, "┆ hm")
        await pilot.press("escape")
        await until_seen(pilot, "Chat with qwen")
        await pilot.press("D")
        await until_seen(pilot, "w words that differ")
        await pilot.press("escape", "ctrl+n", "D")
        await until_seen(pilot, "One question has to be")


def test_the_words_of_long_answers_are_lined_up_in_a_moment() -> None:
    common = [f"word{number % 997}" for number in range(20_000)]
    left, right = " ".join(common), " ".join([*common[:10_000], "new", *common[10_000:]])
    found = difference(left, right)
    assert 10_000 not in found.right
    assert found.share > 0.99
    assert difference("", "").share == 1
