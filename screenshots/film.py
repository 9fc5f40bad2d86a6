"""Films the demo for the README: a switch, a question, its answer; an animated WebP of less than a megabyte.

python -m screenshots.film [--size 100x30] [--theme night] [--speed 1] [--out screenshots/switch.webp]

Needs resvg-py and Pillow. Each frame is what the panel showed, and stays for as long as it did; at speed 1
the switch takes as long as one was measured to. Starting the models, which is not filmed, takes minutes then.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import tempfile
import time
from pathlib import Path

from PIL import Image
from textual.pilot import Pilot

from screenshots.make import drawn, is_answering, until
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.theme import package_folder

EVERY = 0.08
"""Seconds between two frames, at the least."""
WIDTH = 1000
"""Pixels."""
LIMIT = 1_000_000
"""Bytes: a README should be there at once."""
LAST = 3.0
"""Seconds that the last frame stays, before it begins anew."""


async def _film(app: PanelApp, frames: list[tuple[float, str]]) -> None:
    while True:
        frames.append((time.monotonic(), app.export_screenshot(title="")))
        await asyncio.sleep(EVERY)


async def _story(pilot: Pilot[None], fleet: Fleet, app: PanelApp, frames: list[tuple[float, str]]) -> None:
    def state(name: str) -> State:
        return fleet.snapshot().model(name).state

    await fleet.start(["coder"])
    await fleet.start(["qwen"])
    await fleet.switch("phi")
    await fleet.switch("qwen")
    app.clear_notifications()
    await pilot.press("home")
    await pilot.pause(1.0)
    filming = asyncio.create_task(_film(app, frames))
    await pilot.pause(1.2)
    await pilot.press("down")
    await pilot.pause(1.0)
    await pilot.press("enter")
    await until(pilot, lambda: state("phi") is State.AWAKE)
    await pilot.pause(2.5)
    await pilot.press("c")
    for letter in "Why is the sky blue?":
        await pilot.press(letter)
        await pilot.pause(0.04)
    await pilot.press("enter")
    await until(pilot, lambda: not is_answering(pilot))
    await pilot.pause(0.5)
    filming.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await filming


async def take(size: tuple[int, int], theme: str, speed: float) -> list[tuple[float, str]]:
    """Run the demo headless; what was seen, each with its moment."""
    frames: list[tuple[float, str]] = []
    with tempfile.TemporaryDirectory(prefix="vst-") as folder:
        state = Path(folder) / "state"
        state.mkdir(mode=0o700)
        async with Fleet(load(write_demo(Path(folder) / "demo", speed)), state) as fleet:
            app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()])
            app.theme = theme
            try:
                async with app.run_test(size=size) as pilot:
                    await _story(pilot, fleet, app, frames)
            finally:
                await app.operations.close()
                await fleet.stop([model.name for model in fleet.snapshot().models], force=True)
    return frames


def cut(frames: list[tuple[float, str]]) -> tuple[list[Image.Image], list[int]]:
    """The frames that differ from the one before, and how many milliseconds each stays."""
    images: list[Image.Image] = []
    starts: list[float] = []
    for at, svg in frames:
        image = Image.open(io.BytesIO(drawn(svg, WIDTH))).convert("RGB")
        if not images or image.tobytes() != images[-1].tobytes():
            images.append(image)
            starts.append(at)
    ends = [*starts[1:], starts[-1] + LAST]
    return images, [round((end - start) * 1000) for start, end in zip(starts, ends, strict=True)]


def main() -> None:
    """Read the arguments, film, and write; exits 1 if it is too large."""
    parser = argparse.ArgumentParser(description="Film a switch of the demo for the README.")
    parser.add_argument("--size", default="100x30", help="columns x rows")
    parser.add_argument("--theme", default="night")
    parser.add_argument("--speed", type=float, default=1.0, help="how many times faster than measured")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "switch.webp")
    given = parser.parse_args()
    width, height = map(int, given.size.split("x"))
    images, stays = cut(asyncio.run(take((width, height), given.theme, given.speed)))
    images[0].save(
        given.out, save_all=True, append_images=images[1:], duration=stays, loop=0, lossless=True, method=4
    )
    size = given.out.stat().st_size
    print(f"{given.out}: {len(images)} frames, {sum(stays) / 1000:.1f} s, {size // 1000} kB")
    if size > LIMIT:
        raise SystemExit("That is too large for a README: fewer frames, or fewer columns.")


if __name__ == "__main__":
    main()
