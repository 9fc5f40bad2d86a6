"""The panel on a real terminal, beside what is drawn without one at the same moment: they must agree.

python -m screenshots.terminal --out DIR [--sizes 60x20,80x24,120x40,200x60] [--models 4] [--short]

The panel runs in a tmux of its own, over the demo with as many models as told. Each capture is a text and
the same with its colours (`cat NAME.ansi` shows it). Beside it a panel without a terminal looks at the same
models: exits 1 and says where it shows other words, figures left out, which go on while one looks. Among
them is a server that dies at night: the three keys that find out why.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from textual.pilot import Pilot

from screenshots.every import SIZES, text_of
from screenshots.make import until
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.files import private_dir
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.paths import APP
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.theme import package_folder

AGREE_SECONDS = 60.0
"""So long the two may differ: each looks at the models by its own clock."""
_CHANGING = re.compile(r"[\d.:/%░▒█▁▂▃▄▅▆▇╷│·–\s\u2800-\u28ff]+")
"""What goes on while one looks: figures, the course of lines, bars and curves."""
_WHO = re.compile(r"by (this panel|process \d+) ─+")
"""One of the two did it, the other gives its pid; the line goes on to the same edge."""
_TMUX_CONFIG = "set -g status off\nset -g escape-time 0\n"
_MORE_GPU = "  - {name: Demo, memory: 24GiB}\n"
_MORE = """\
  {name}:
    model: {source}
    gpus: [{gpu}]
    args: {{max-model-len: 4096}}
    env: {{VLLM_SIM_SPEED: "{speed:g}"}}
"""
_SOURCES = (
    "Qwen/Qwen3-0.6B",
    "microsoft/Phi-3-vision-128k-instruct",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct-AWQ",
)
_ROLES = ("assistant", "translator", "summariser", "reviewer", "extractor", "classifier")


def write_config(folder: Path, speed: float, models: int) -> Path:
    """The demo, and on six GPUs beside its two the more models that are wanted."""
    path = write_demo(folder, speed)
    text = path.read_text(encoding="utf-8")
    if models > 4:
        text = text.replace("models:\n", _MORE_GPU * 6 + "models:\n", 1)
    more = [
        _MORE.format(
            name=f"{_ROLES[number % len(_ROLES)]}-{number:02d}",
            source=_SOURCES[number % len(_SOURCES)],
            gpu=2 + number % 6,
            speed=speed,
        )
        for number in range(models - 4)
    ]
    path.write_text(text + "".join(more), encoding="utf-8")
    return path


class Tmux:
    """A terminal of its own with the panel in it."""

    def __init__(self, folder: Path, command: Sequence[str], size: tuple[int, int]) -> None:
        (folder / "tmux.conf").write_text(_TMUX_CONFIG, encoding="utf-8")
        self._tmux = ["tmux", "-u", "-S", str(folder / "tmux"), "-f", str(folder / "tmux.conf")]
        ours = {"LC_ALL": "C.UTF-8", "COLORTERM": "truecolor", "TEXTUAL_ANIMATIONS": "none"}
        self._environment = os.environ | ours | {"XDG_STATE_HOME": str(folder), "TERM": "xterm-256color"}
        self._environment.pop("TMUX", None)
        place = ["new-session", "-d", "-x", str(size[0]), "-y", str(size[1]), *command]
        self._do(*place)

    def _do(self, *words: str) -> str:
        done = subprocess.run(
            [*self._tmux, *words], env=self._environment, check=True, capture_output=True, text=True
        )
        return done.stdout

    def press(self, *keys: str) -> None:
        """As a person does."""
        self._do("send-keys", *keys)

    def resize(self, width: int, height: int) -> None:
        """As a person does with a window."""
        self._do("resize-window", "-x", str(width), "-y", str(height))

    def text(self) -> str:
        """The words on the terminal."""
        return self._do("capture-pane", "-p")

    def colored(self) -> str:
        """The words with their colours."""
        return self._do("capture-pane", "-e", "-p")

    def end(self) -> None:
        """Close it, and the panel in it."""
        subprocess.run([*self._tmux, "kill-server"], env=self._environment, check=False, capture_output=True)


class Captures:
    """Takes both at once, and remembers where they differ."""

    def __init__(
        self, tmux: Tmux, app: PanelApp, pilot: Pilot[None], into: Path, sizes: Sequence[tuple[int, int]]
    ) -> None:
        self._tmux, self._app, self._pilot, self._into, self._sizes = tmux, app, pilot, into, sizes
        self.taken = 0
        self.faults: list[str] = []

    async def press(self, *keys: str) -> None:
        """The same keys on both, by their names for tmux."""
        self._tmux.press(*keys)
        await self._pilot.press(*(_TEXTUAL_KEYS.get(key, key) for key in keys))

    async def shown(self, *words: str) -> None:
        """Wait until the terminal has these words."""
        await until(self._pilot, lambda: all(each in self._tmux.text() for each in words))

    async def take(self, name: str, *shows: str, is_log: bool = False) -> None:
        """A capture in each size; the words must be in it, and it must be as it is without a terminal.

        A log need not be: Rich breaks its lines for a console, which without a terminal has 80 columns.
        """
        for width, height in self._sizes:
            self._tmux.resize(width, height)
            await self._pilot.resize_terminal(width, height)
            capture, differing = f"{name}-{width}x{height}", ["nothing was seen"]
            end = time.monotonic() + AGREE_SECONDS
            while differing and time.monotonic() < end:
                await self._pilot.pause(0.3)
                self._app.clear_notifications()
                terminal = self._tmux.text()
                drawn = terminal if is_log else text_of(self._app.export_screenshot(title=""))
                differing = differences(terminal, drawn, shows)
            (self._into / f"{capture}.txt").write_text(self._tmux.text(), encoding="utf-8")
            (self._into / f"{capture}.ansi").write_text(self._tmux.colored(), encoding="utf-8")
            self.taken += 1
            if differing:
                self.faults.append(f"{capture}:\n" + "\n".join(differing))


_TEXTUAL_KEYS = {"Down": "down", "Home": "home", "Escape": "escape", "Enter": "enter", "?": "question_mark"}


def differences(terminal: str, picture: str, shows: Sequence[str]) -> list[str]:
    """The lines that differ in more than figures and the lengths of bars, and the words that are missing."""
    found = [f"  missing: {words}" for words in shows if words not in terminal]
    there, here = _words_of(terminal), _words_of(picture)
    there += [""] * (len(here) - len(there))
    here += [""] * (len(there) - len(here))
    return found + [f"  - {one}\n  + {other}" for one, other in zip(here, there, strict=True) if one != other]


def _words_of(text: str) -> list[str]:
    text = _WHO.sub("by somebody", text)
    return [_CHANGING.sub(" ", line).strip() for line in text.rstrip().splitlines()]


async def _story(captures: Captures, tmux: Tmux, fleet: Fleet, pilot: Pilot[None], *, short: bool) -> None:
    """What is done to the models is done once: by the panel on the terminal, or beside both."""

    def is_in(name: str, state: State) -> bool:
        model = fleet.snapshot().model(name)
        return model.state is state and model.operation is None

    await captures.shown("SIMULATED", "qwen", "enter →")
    await captures.take("empty", "no model awake", "stopped")
    tmux.press("u")
    await until(pilot, lambda: is_in("qwen", State.AWAKE))
    await fleet.start(["coder"])
    await fleet.switch("phi")
    tmux.press("Enter")
    await until(pilot, lambda: is_in("qwen", State.AWAKE) and is_in("phi", State.ASLEEP))
    await captures.take("switched", "last switch to qwen", "● qwen", "asleep L1")
    if not short:
        for keys, name, words in (
            ("?", "help", "Keys and words"),
            ("g", "gpus", "Processes by VRAM"),
            ("/co", "finding", "esc all models"),
        ):
            for key in keys:  # as fast as a person: keys that are read in one all go to where the first went
                await captures.press(key)
                await pilot.pause(0.5)
            await captures.take(name, words)
            await captures.press("Escape")
            # Read in one with the next key, an escape would be that key's alt.
            await until(pilot, lambda gone=words: gone not in tmux.text())
    pid = fleet.snapshot().model("qwen").pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    await until(pilot, lambda: fleet.snapshot().model("qwen").last_failure is not None)
    await until(pilot, lambda: is_in("qwen", State.AWAKE))
    await captures.take("night-0-alarm", "qwen died, restarted")
    for number, (key, name, words) in enumerate(
        (("n", "events", "awake by restart"), ("f", "failures", "SIGKILL"), ("l", "log", "Log of qwen")), 1
    ):
        await captures.press(key)
        await captures.take(f"night-{number}-{name}", words, is_log=name == "log")


async def make(
    into: Path, sizes: Sequence[tuple[int, int]], speed: float, models: int, *, short: bool
) -> Captures:
    """Run both over one demo and take all captures."""
    into.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="vst-") as name:
        folder = Path(name)
        state = private_dir(folder / APP)
        config = write_config(folder / "demo", speed, models)
        async with Fleet(load(config), state, leads=True) as fleet:
            tmux = Tmux(folder, [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)], sizes[0])
            app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()])
            try:
                async with app.run_test(size=sizes[0]) as pilot:
                    captures = Captures(tmux, app, pilot, into, sizes)
                    await _story(captures, tmux, fleet, pilot, short=short)
            finally:
                await app.operations.close()
                tmux.end()
                await fleet.stop(fleet.snapshot().with_servers(), force=True)
    return captures


def main() -> None:
    """Read the arguments and take the captures."""
    parser = argparse.ArgumentParser(
        description="The panel on a real terminal, beside what is drawn without one."
    )
    parser.add_argument("--out", type=Path, required=True, help="a folder for the captures")
    parser.add_argument("--sizes", default=SIZES)
    parser.add_argument(
        "--models", type=int, default=4, help="how many, 4 or more; three of them are started"
    )
    parser.add_argument("--speed", type=float, default=20.0, help="how many times faster than measured")
    parser.add_argument("--short", action="store_true", help="only the table, and the night")
    given = parser.parse_args()
    if shutil.which("tmux") is None:
        print("There is no tmux here, so nothing is captured.")
        return
    sizes = [(int(one.split("x")[0]), int(one.split("x")[1])) for one in given.sizes.split(",")]
    captures = asyncio.run(make(given.out, sizes, given.speed, given.models, short=given.short))
    wrong = len(captures.faults)
    print(f"{captures.taken} captures in {given.out}, {wrong} of them not as drawn without a terminal")
    if captures.faults:
        sys.exit("\n".join(captures.faults))


if __name__ == "__main__":
    main()
