"""Every screen of the panel in every size that counts, dark and light, from one run of the demo.

python -m screenshots.every --out DIR [--sizes 60x20,80x24,120x40,200x60] [--themes night,day] [--png]

Each picture is an SVG, and the same as text. A picture must show what it is a picture of: exits 1 and names
those that do not. The set is to be looked at, not to be kept.
"""

from __future__ import annotations

import argparse
import asyncio
import html
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from textual.pilot import Pilot

from screenshots.make import is_answering, until, write
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.types import GatewayConfig
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.gateway.post import Post
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.screens.duel import DuelScreen
from vllm_sleep_tui.tui.theme import package_folder

SIZES = "60x20,80x24,120x40,200x60"
THEMES = "night,day"
_TEXT = re.compile(r'<text class="[^"]*" x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', re.DOTALL)
SETTLE_SECONDS = 20.0
_SLOW = "big"
"""The last model of the demo."""
_CELL = 12.2
"""The width of a character in Textual's SVG."""


class Camera:
    """Takes each screen in all sizes and themes, and remembers what did not show what it should."""

    def __init__(
        self,
        app: PanelApp,
        pilot: Pilot[None],
        into: Path,
        sizes: Sequence[tuple[int, int]],
        themes: Sequence[str],
        *,
        png: bool,
    ) -> None:
        self._png = png
        self._app, self._pilot, self._into = app, pilot, into
        self._sizes, self._themes = sizes, themes
        self.taken = 0
        self.faults: list[str] = []

    async def take(self, name: str, *shows: str, opened_by: str | None = None) -> None:
        """A picture in each size and theme; all these texts must be in each.

        What a key opens anew for each theme is what keeps the colours in which it was opened.
        """
        self._app.clear_notifications()
        for theme in self._themes:
            self._app.theme = theme
            if opened_by is not None:
                await self._pilot.pause(0.3)
                await self._pilot.press(opened_by)
            for width, height in self._sizes:
                await self._pilot.resize_terminal(width, height)
                await self._settled(shows)
                folder, picture = self._into / theme, f"{name}-{width}x{height}"
                text = text_of(write(self._app, folder, picture, png=self._png))
                (folder / f"{picture}.txt").write_text(text + "\n", encoding="utf-8")
                self.taken += 1
                if missing := [words for words in shows if words not in text]:
                    self.faults.append(f"{theme}/{picture} does not show {', '.join(missing)}")
            if opened_by is not None:
                await self._pilot.press("escape")
        await self._pilot.resize_terminal(120, 40)
        await self._pilot.pause(0.1)

    async def _settled(self, shows: Sequence[str]) -> None:
        """Wait for the words, as the panel looks by its own clock; what never comes is told afterwards."""
        end = time.monotonic() + SETTLE_SECONDS
        await self._pilot.pause(0.2)
        while time.monotonic() < end:
            text = text_of(self._app.export_screenshot(title=""))
            if all(words in text for words in shows):
                return
            await self._pilot.pause(0.2)


def text_of(svg: str) -> str:
    """The lines of a picture."""
    rows: dict[float, dict[int, str]] = {}
    for x, y, text in _TEXT.findall(svg):
        rows.setdefault(float(y), {})[round(float(x) / _CELL)] = html.unescape(text).replace("\xa0", " ")
    lines = []
    for _, row in sorted(rows.items()):
        line = ""
        for column, text in sorted(row.items()):
            line = line.ljust(column) + text
        lines.append(line.rstrip())
    return "\n".join(lines)


async def _story(camera: Camera, app: PanelApp, pilot: Pilot[None], fleet: Fleet) -> None:
    """All screens, in the order in which a person may come by them."""

    def state(name: str) -> State:
        return fleet.snapshot().model(name).state

    await camera.take("empty", "SIMULATED", "qwen", "stopped")
    await pilot.press("question_mark")
    await camera.take("help", "Keys and words", "Switch to the selected model")
    await pilot.press("escape")
    await camera.take("themes", "forest", opened_by="t")
    await pilot.press("end", "u")
    await until(pilot, lambda: state(_SLOW) is State.STARTING)
    await camera.take("starting", f"starting {_SLOW}")
    await fleet.stop([_SLOW], force=True)
    await fleet.start(["qwen"])
    await fleet.start(["coder"])
    await fleet.switch("phi")
    await fleet.switch("qwen")
    await pilot.press("home")
    await camera.take("switched", "SIMULATED", "awake", "asleep")
    await pilot.press("c", *"Why is the sky blue?")
    await camera.take("typing", "Why is the sky blue?")
    await pilot.press("enter")
    await until(pilot, lambda: not is_answering(pilot))
    await camera.take("answered", "tok/s")
    await pilot.press("escape", "z")
    await camera.take("chat", "Why is the sky blue?")
    await pilot.press("z", "escape", "d")
    await pilot.pause(0.3)
    await pilot.press("down", "enter")  # coder, which is awake beside it
    await until(pilot, lambda: isinstance(app.screen, DuelScreen))
    await pilot.pause(1.0)
    await camera.take("duel", "words that differ", "qwen", "coder", "tokens")
    await pilot.press("escape", "escape", "h")
    await pilot.pause(0.5)
    await camera.take("conversations", "Conversations", "Why is the sky")
    await pilot.press("escape", "escape", "home", "left", "left")
    await camera.take("looking-back", "SIMULATED")
    await pilot.press("escape", "slash", *"co")
    await camera.take("finding", "coder")
    await pilot.press("escape", "home", "x")
    await pilot.pause(0.3)
    await camera.take("question", "Stop qwen?")
    await pilot.press("escape")
    for key, name, shows in (
        ("n", "events", "qwen"),
        ("l", "log", "INFO"),
        ("g", "gpus", "Demo"),
        ("e", "gateway", "127.0.0.1"),
        ("b", "bench", "qwen"),
        ("a", "advice", "Advice"),
    ):
        await pilot.press(key)
        await pilot.pause(0.8)
        await camera.take(name, shows)
        await pilot.press("escape")
        await pilot.pause(0.2)
    await camera.take("palette", "Switch to the selected model", opened_by="ctrl+p")
    pid = fleet.snapshot().model("qwen").pid
    assert pid is not None
    await pilot.press("home")
    os.kill(pid, signal.SIGKILL)
    # Why it died is known once its keeper has seen its end.
    await until(pilot, lambda: "SIGKILL" in (fleet.snapshot().model("qwen").reason or ""))
    await camera.take("failed", "failed", "SIGKILL")


def _with_a_slow_one(path: Path, speed: float) -> Path:
    """The same config, in which the start of one model lasts until it has been taken in every size."""
    text = path.read_text(encoding="utf-8")
    head, _, model = text.partition(f"  {_SLOW}:\n")
    ours, theirs = (f'VLLM_SIM_SPEED: "{each:g}"' for each in (speed, min(speed, 1.0)))
    path.write_text(f"{head}  {_SLOW}:\n{model.replace(ours, theirs, 1)}", encoding="utf-8")
    return path


async def make(
    into: Path, sizes: Sequence[tuple[int, int]], themes: Sequence[str], speed: float, *, png: bool
) -> Camera:
    """Run the demo headless and take all pictures."""
    with tempfile.TemporaryDirectory(prefix="vst-") as folder:
        state = Path(folder) / "state"
        state.mkdir(mode=0o700)
        config = _with_a_slow_one(write_demo(Path(folder) / "demo", speed), speed)
        async with Fleet(load(config), state) as fleet:
            post = Post(fleet, GatewayConfig())
            app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()], post=post)
            try:
                async with app.run_test(size=(120, 40)) as pilot:
                    await pilot.pause(0.5)
                    camera = Camera(app, pilot, into, sizes, themes, png=png)
                    await _story(camera, app, pilot, fleet)
            finally:
                await app.operations.close()
                await post.close()
                await fleet.stop([model.name for model in fleet.snapshot().models], force=True)
    return camera


def main() -> None:
    """Read the arguments and make the pictures."""
    parser = argparse.ArgumentParser(description="Every screen in every size, dark and light, from the demo.")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the pictures")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument("--themes", default=THEMES)
    parser.add_argument("--speed", type=float, default=20.0, help="how many times faster than measured")
    parser.add_argument("--png", action="store_true", help="PNG too, by resvg-py, which takes seconds each")
    given = parser.parse_args()
    sizes = [(int(one.split("x")[0]), int(one.split("x")[1])) for one in given.sizes.split(",")]
    camera = asyncio.run(make(given.out, sizes, given.themes.split(","), given.speed, png=given.png))
    print(f"{camera.taken} pictures in {given.out}, {len(camera.faults)} of them wrong")
    if camera.faults:
        sys.exit("\n".join(camera.faults))


if __name__ == "__main__":
    main()
