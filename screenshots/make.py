"""Makes the pictures of the README from the real demo: SVG, and PNG where resvg-py is installed.

python -m screenshots.make [--size 120x40] [--theme night] [--speed 4] [--into screenshots] [--chat]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import os
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from textual.pilot import Pilot
from textual.screen import Screen
from textual.widgets import Input

from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.screens.chances import ChancesScreen
from vllm_sleep_tui.tui.screens.dialogs import Question
from vllm_sleep_tui.tui.screens.duel import DuelScreen
from vllm_sleep_tui.tui.screens.parameters import ParametersScreen
from vllm_sleep_tui.tui.theme import package_folder
from vllm_sleep_tui.tui.widgets.chat import ChatPane

Story = Callable[[Pilot[None], Fleet, Callable[[str], Awaitable[None]]], Awaitable[None]]
CHAT_SIZES = ((80, 24), (120, 40), (200, 60))
DEADLINE = 300.0
TOOLS = (
    '[{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", '
    '"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}}]'
)
FONT = Path("/usr/share/fonts/truetype/dejavu")
"""Fira Code, which Textual names, is seldom installed; DejaVu has every sign that the panel uses."""


async def until(pilot: Pilot[None], condition: Callable[[], bool]) -> None:
    """Wait until the demo has come to the state of a picture; raises TimeoutError."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("The demo did not come to the state of the picture.")
        await pilot.pause(0.05)


def write(app: PanelApp, into: Path, name: str, *, png: bool = True) -> str:
    """Write what is seen as SVG, and as PNG where resvg-py is installed; the SVG."""
    into.mkdir(parents=True, exist_ok=True)
    svg = app.export_screenshot(title="")
    (into / f"{name}.svg").write_text(svg, encoding="utf-8")
    if png and importlib.util.find_spec("resvg_py") is not None:
        (into / f"{name}.png").write_bytes(drawn(svg))
    return svg


def drawn(svg: str, width: int | None = None) -> bytes:
    """The picture as PNG, as wide as it is or so many pixels."""
    import resvg_py

    fonts = [str(path) for path in sorted(FONT.glob("DejaVuSansMono*.ttf"))]
    named = svg.replace("Fira Code", "DejaVu Sans Mono") if fonts else svg
    return bytes(resvg_py.svg_to_bytes(svg_string=named, width=width, font_files=fonts))


async def _story(pilot: Pilot[None], fleet: Fleet, take: Callable[[str], Awaitable[None]]) -> None:
    def is_in(name: str, state: State) -> bool:
        return fleet.snapshot().model(name).state is state

    await fleet.start(["qwen"])
    await fleet.start(["coder"])
    await fleet.switch("phi")
    await fleet.switch("qwen")
    await pilot.press("home", "enter")
    await pilot.press("c", *"Why is the sky blue?", "enter")
    await until(pilot, lambda: not is_answering(pilot))
    await pilot.press("escape", "down")
    await until(pilot, lambda: is_in("qwen", State.AWAKE))
    await take("panel-before")
    await pilot.press("c", *"And at sunset?", "enter")
    await pilot.pause(0.5)
    await pilot.press("y")  # to the question whether qwen may sleep for it
    await until(pilot, lambda: is_in("phi", State.AWAKE) and not is_answering(pilot))
    await pilot.press("escape")
    await take("panel")
    await pilot.press("g")
    await take("gpus")
    await pilot.press("escape", "a")
    await take("advice")
    await pilot.press("escape")
    await pilot.press("question_mark")
    await take("help")
    await pilot.press("escape")


async def _chat_story(pilot: Pilot[None], fleet: Fleet, take: Callable[[str], Awaitable[None]]) -> None:
    """The states of the chat pane."""

    async def asked(words: str) -> None:
        await pilot.press("c", *words, "enter")
        await until(pilot, lambda: words in _answer(pilot) and not is_answering(pilot))

    await fleet.start(["coder"])
    await fleet.start(["qwen"])
    await pilot.press("home")
    await asked("Why is the sky blue?")
    await pilot.press("escape")
    await asked("And at sunset?")
    await take("answer")
    await pilot.press("escape", "escape", "end", "c", *"Write a function.")
    await take("cost")
    await pilot.press("enter")
    await take("question")
    await pilot.press("escape", "escape", "escape", "home", "d")
    await take("duel")
    await pilot.press("escape", "h")
    await take("conversations")
    await pilot.press("escape", "z")
    await take("whole")
    await pilot.press("z", "escape", "p")
    await _until_open(pilot, ParametersScreen)
    await take("parameters")
    pilot.app.screen.query_one("#top_p", Input).value = "3"
    await pilot.press("enter")
    await take("parameters-wrong")
    pilot.app.screen.query_one("#top_p", Input).value = ""
    pilot.app.screen.query_one("#tools", Input).value = TOOLS
    pilot.app.screen.query_one("#logprobs", Input).value = "3"
    await pilot.press("enter", "c", *"Rain in Oslo?", "enter")
    await until(pilot, lambda: _calls(pilot) and not is_answering(pilot))
    await take("calls")
    await pilot.press("escape", "p")
    await _until_open(pilot, ParametersScreen)
    pilot.app.screen.query_one("#tools", Input).value = ""
    await pilot.press("enter")
    await asked("And now?")
    await pilot.press("escape", "i")
    await _until_open(pilot, ChancesScreen)
    await take("chances")
    await pilot.press("escape")


async def _until_open(pilot: Pilot[None], kind: type[Screen[Any]]) -> None:
    await until(pilot, lambda: isinstance(pilot.app.screen, kind))


def _calls(pilot: Pilot[None]) -> bool:
    answer = pilot.app.screen.query_one(ChatPane).transcript.answer_in_sight()
    return answer is not None and bool(answer.calls)


async def _pair_story(pilot: Pilot[None], fleet: Fleet, take: Callable[[str], Awaitable[None]]) -> None:
    """A picture in a question, and two answers side by side."""
    await fleet.start(["qwen"])
    await fleet.start(["phi"])
    await pilot.press("home", "down")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        _sunset(Path("sunset.png"))
        await pilot.press("c", *"What is on @sunset.png?", "enter")
        await until(pilot, lambda: "image/png" in _answer(pilot) and not is_answering(pilot))
    await pilot.press("escape")
    await take("picture")
    await pilot.press("ctrl+n", "c", *"Why is the sky blue?", "enter")
    await until(pilot, lambda: "sky blue" in _answer(pilot) and not is_answering(pilot))
    await pilot.press("escape", "d", "enter")
    await pilot.pause(0.5)
    await pilot.press("y")  # to the question whether phi may sleep for it
    await until(pilot, lambda: isinstance(pilot.app.screen, DuelScreen))
    await until(pilot, lambda: not is_answering(pilot))
    await take("side-by-side")
    await pilot.press("w")
    await take("words-that-differ")


async def _trouble_story(pilot: Pilot[None], fleet: Fleet, take: Callable[[str], Awaitable[None]]) -> None:
    """A cut answer, a context that is nearly full and one that is, and a death."""

    async def limit(tokens: str) -> None:
        await pilot.press("escape", "p")
        await _until_open(pilot, ParametersScreen)
        pilot.app.screen.query_one("#max_tokens", Input).value = tokens
        await pilot.press("enter")

    await fleet.start(["qwen"])
    await pilot.press("home", "c")
    await limit("12")
    await pilot.press("c", *"Why is the sky blue?", "enter")
    await until(pilot, lambda: bool(_answer(pilot)) and not is_answering(pilot))
    await take("cut")
    await limit("")
    await pilot.press("c")
    pane = pilot.app.screen.query_one(ChatPane)
    pane.input.text = "Sum this up: " + "and one more word " * 600
    await take("context-nearly-full")
    pane.input.text += "and one more word " * 100
    await pilot.press("enter")
    await _until_open(pilot, Question)
    await take("context-full")
    await pilot.press("escape")
    pane.input.text = ""
    pid = fleet.snapshot().model("qwen").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(pilot, lambda: fleet.snapshot().model("qwen").state is State.FAILED)
    await take("death")


def _sunset(path: Path) -> None:
    from PIL import Image

    image = Image.new("RGB", (320, 200))
    for row in range(200):
        sky = (255 - row // 2, 120 - row // 2, 40 + row // 2) if row < 130 else (20, 30 + row // 8, 60)
        for column in range(320):
            is_sun = (column - 160) ** 2 + (row - 110) ** 2 < 1600 and row < 130
            image.putpixel((column, row), (255, 220, 120) if is_sun else sky)
    image.save(path)


def _answer(pilot: Pilot[None]) -> str:
    return pilot.app.screen.query_one(ChatPane).last_answer() or ""


def is_answering(pilot: Pilot[None]) -> bool:
    """Whether an answer streams."""
    app = pilot.app
    assert isinstance(app, PanelApp)
    return app.dashboard.is_answering


async def make(
    size: tuple[int, int], theme: str, speed: float, into: Path, story: Story, prefix: str = ""
) -> None:
    """Run the demo headless and take the pictures of a story."""
    with tempfile.TemporaryDirectory(prefix="vst-") as folder:
        state = Path(folder) / "state"
        state.mkdir(mode=0o700)
        async with Fleet(load(write_demo(Path(folder) / "demo", speed)), state) as fleet:
            app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()])
            app.theme = theme

            async def take(name: str) -> None:
                await pilot.pause(1.0)  # the numbers settle with the next sample
                app.clear_notifications()
                await pilot.pause(0.2)
                write(app, into, prefix + name)

            try:
                async with app.run_test(size=size) as pilot:
                    await story(pilot, fleet, take)
            finally:
                await app.operations.close()
                await fleet.stop([model.name for model in fleet.snapshot().models], force=True)


def main() -> None:
    """Read the arguments and make the pictures; at speed 1 it takes some four minutes."""
    parser = argparse.ArgumentParser(description="Make the pictures of the README from the demo.")
    parser.add_argument("--size", default="120x40", help="columns x rows")
    parser.add_argument("--theme", default="night")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster than measured")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent)
    parser.add_argument("--chat", action="store_true", help="the states of the chat, at three sizes")
    given = parser.parse_args()
    if given.chat:
        for width, height in CHAT_SIZES:
            chat, prefix = given.into / "chat", f"{width}x{height}-"
            for story in (_chat_story, _pair_story, _trouble_story):
                asyncio.run(make((width, height), given.theme, given.speed, chat, story, prefix))
        return
    width, height = map(int, given.size.split("x"))
    asyncio.run(make((width, height), given.theme, given.speed, given.into, _story))


if __name__ == "__main__":
    main()
