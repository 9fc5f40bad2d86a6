"""Choosing a theme."""

from __future__ import annotations

import os
from pathlib import Path

from screen_text import panel, text_of, until, until_seen
from scripted_fleet import ScriptedFleet
from textual.color import Color
from textual.pilot import Pilot

from vllm_sleep_tui.tui.theme import package_folder


def is_in_its_theme(pilot: Pilot[None]) -> bool:
    """Whether what the stylesheet colours has the theme's colours, as what we paint has."""
    background = pilot.app.current_theme.background
    return background is not None and pilot.app.screen.styles.background == Color.parse(background)


async def test_t_tries_themes_on_escape_undoes_enter_keeps_and_the_choice_is_remembered(
    tmp_path: Path,
) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        assert pilot.app.theme == "night"
        assert is_in_its_theme(pilot)
        await pilot.press("t")
        await until_seen(pilot, "Theme", "night", "clear")
        await pilot.press("down")
        await until(pilot, lambda: pilot.app.theme != "night", "another theme")
        await pilot.press("escape")
        await until(pilot, lambda: pilot.app.theme == "night", "the old theme")
        await pilot.press("t")
        await until_seen(pilot, "contrast")
        await pilot.press("home", "enter")
        await until(pilot, lambda: "⏎ keeps" not in text_of(pilot.app), "the end of the question")
        chosen = pilot.app.theme
        assert chosen != "night"
        await until(pilot, (tmp_path / "panel.json").exists, "the memory of it")
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        assert pilot.app.theme == chosen
        assert is_in_its_theme(pilot)


async def test_a_theme_changes_the_colours_of_what_we_paint_ourselves(tmp_path: Path) -> None:
    async with panel(ScriptedFleet(), tmp_path) as pilot:
        before = pilot.app.export_screenshot()
        assert "#5fb3f6" in before
        pilot.app.theme = "day"
        await until(pilot, lambda: "#1f6fc4" in pilot.app.export_screenshot(), "the day's blue")
        await until(pilot, lambda: "#5fb3f6" not in pilot.app.export_screenshot(), "the end of the night's")


async def test_a_bad_theme_of_the_user_is_told_in_one_line_and_the_panel_opens(tmp_path: Path) -> None:
    good = (package_folder() / "night.yaml").read_text(encoding="utf-8")
    (tmp_path / "odd.yaml").write_text(good.replace("name: night", "name: odd").replace("#14161d", "blu"))
    (tmp_path / "mine.yaml").write_text(good.replace("name: night", "name: mine"))
    async with panel(ScriptedFleet(), tmp_path, themes=tmp_path) as pilot:
        await until_seen(pilot, "Theme skipped: odd.yaml: background: 'blu'")
        await pilot.press("t")
        await until_seen(pilot, "mine")


async def test_a_broken_memory_of_the_choice_is_no_reason_not_to_open(tmp_path: Path) -> None:
    memory = tmp_path / "panel.json"
    for content in (b"{oops", b'{"theme": "\xff"}', b"[" * 60_000, None):
        memory.unlink(missing_ok=True)
        if content is None:
            os.mkfifo(memory)
        else:
            memory.write_bytes(content)
        async with panel(ScriptedFleet(), tmp_path) as pilot:
            assert pilot.app.theme == "night"
