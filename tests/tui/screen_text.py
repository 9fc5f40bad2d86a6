"""What a person sees: the lines of the screen, read from the public screenshot."""

from __future__ import annotations

import asyncio
import html
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from scripted_fleet import ScriptedFleet
from textual.app import App
from textual.pilot import Pilot

from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.theme import package_folder

_TEXT = re.compile(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', re.DOTALL)
_CELL = 12.2
DEADLINE = 60.0
"""Generous: the cores may be busy; what does not come at all fails all the same."""
STILL_TURNS, STILL_SECONDS = 20, 2.0
"""So many turns of the loop without a message, and what a key begins at once is there; it has so long."""


def lines_of(app: App[None]) -> list[str]:
    """The screen, a string a line."""
    rows: dict[float, dict[int, str]] = {}
    for x, y, text in _TEXT.findall(app.export_screenshot(simplify=True)):
        rows.setdefault(float(y), {})[round(float(x) / _CELL)] = html.unescape(text).replace("\xa0", " ")
    lines = []
    for y in sorted(rows):
        line = ""
        for column, text in sorted(rows[y].items()):
            line = line.ljust(column) + text
        lines.append(line.rstrip())
    return lines


def text_of(app: App[None]) -> str:
    """The whole screen."""
    return "\n".join(lines_of(app))


async def settled(pilot: Pilot[None]) -> None:
    """Wait until no widget has a message left, and what a message began at once, a question say, is there."""
    deadline = time.monotonic() + STILL_SECONDS
    still = 0
    while still < STILL_TURNS and time.monotonic() < deadline:
        app = pilot.app
        widgets = app.screen.walk_children(with_self=True) if app.screen_stack else []
        still = 0 if any(one.message_queue_size for one in (app, *widgets)) else still + 1
        await asyncio.sleep(0)


async def until(
    pilot: Pilot[None], condition: Callable[[], object], what: str, *, limit: float = DEADLINE
) -> None:
    """Wait for a condition; fail with the screen when it does not come."""
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not happen; the screen:\n{text_of(pilot.app)}")
        await pilot.pause(0.02)


async def until_seen(pilot: Pilot[None], *texts: str) -> None:
    """Wait until the screen shows all these texts."""
    await until(pilot, lambda: all(text in text_of(pilot.app) for text in texts), f"{texts} on the screen")


@asynccontextmanager
async def panel(
    fleet: ScriptedFleet, state_dir: Path, *, size: tuple[int, int] = (120, 40), themes: Path | None = None
) -> AsyncIterator[Pilot[None]]:
    """The panel over a scripted fleet."""
    folders = [package_folder(), *([themes] if themes else [])]
    app = PanelApp(fleet, state_dir=state_dir, theme_folders=folders)
    async with app.run_test(size=size, notifications=True) as pilot:
        await until_seen(pilot, "qwen") if size >= (60, 20) else await pilot.pause()
        yield pilot
    await app.operations.close()
    app.conversations.close()  # what was said is on the disk before the next panel reads it
