"""Pictures in the chat pane: dropped or typed, shown below the question, refused before anything is sent."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from screen_text import panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from test_tui_chat import answer
from textual.events import Paste

from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.widgets.chat import ChatPane


async def test_a_dropped_picture_is_shown_and_told_and_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "a photo.png"
    Image.new("RGB", (64, 32), (250, 10, 10)).save(file)
    fleet = ScriptedFleet()
    fleet.answers["qwen"] = answer("qwen", "A red field.")
    async with panel(fleet, tmp_path) as pilot:
        await pilot.press("c", *"Look: ")
        dropped = str(file).replace(" ", "\\ ")
        pilot.app.screen.query_one(ChatPane).input.post_message(Paste(dropped))
        await until_seen(pilot, 'a photo.png"')
        await pilot.press(*"and?", "enter")
        await until_seen(pilot, "▣ a photo.png · 64×32 · 0 KB", "A red field.")
        assert "▀" * 32 in text_of(pilot.app)
        (message,) = fleet.asked[0][1]
        assert message["content"] == "Look: a photo.png and?"
        assert [picture.path for picture in message["pictures"]] == [str(file)]
        await pilot.press("ctrl+r")
        await until(pilot, lambda: len(fleet.asked) == 2, "the question again")
        assert fleet.asked[1][1] == fleet.asked[0][1]
        await until_seen(pilot, "A red field.")
        fleet.blind = {"qwen"}
        await pilot.press(*"more", "enter")
        await until(pilot, lambda: len(fleet.asked) == 3, "the next question")
        await until_seen(pilot, "qwen reads text alone: the pictures of")


async def test_what_cannot_see_or_be_seen_is_told_before_sending(tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    Image.new("RGB", (3, 3)).save(file)
    fleet = ScriptedFleet()
    fleet.blind = {"qwen"}
    async with panel(fleet, tmp_path) as pilot:
        app = pilot.app
        assert isinstance(app, PanelApp)
        chat = app.screen.query_one(ChatPane)
        chat.input.text = f"What is @{file}?"
        await pilot.press("c", "enter")
        await until_seen(pilot, "qwen reads text alone.", "Ask a model that sees.")
        assert chat.input.text == f"What is @{file}?"  # it is not lost
        chat.input.text = f"And @{tmp_path}/none.png?"
        await pilot.press("enter")
        await until_seen(pilot, "none.png cannot be read")
        assert fleet.asked == []
