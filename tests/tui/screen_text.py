"""What a person sees: the lines of the screen, read from the public screenshot."""

from __future__ import annotations

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
DEADLINE = 30.0
"""Generous: the cores may be busy; what does not come at all fails all the same."""


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
