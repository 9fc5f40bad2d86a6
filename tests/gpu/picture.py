"""Pictures of the panel on this machine's servers, by its own keys: a switch under way, then a chat after it.

    python tests/gpu/picture.py --config FILE --state DIR --into DIR --chat MODEL --other MODEL

Both models must run. The pictures are DIR/switching.svg and DIR/panel.svg; the other model ends awake.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.app import PanelApp
from vllm_sleep_tui.tui.theme import package_folder
from vllm_sleep_tui.tui.widgets.chat import ChatPane

SIZE = (120, 40)
DEADLINE = 30.0
QUESTION = "Why is the sky blue?"
SETTLE_SECONDS = 1.5
"""The figures on the screen are a sample old at most."""


async def until(pilot: Pilot[None], condition: Callable[[], bool], what: str) -> None:
    """Let the panel run until the condition holds; raises TimeoutError."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"Not within {DEADLINE:g} s: {what}.")
        await pilot.pause(0.02)


class Camera:
    """The panel, and what it is asked to do for the pictures."""

    def __init__(self, pilot: Pilot[None], app: PanelApp, fleet: Fleet, into: Path) -> None:
        self.pilot, self.app, self.fleet, self.into = pilot, app, fleet, into

    def write(self, name: str) -> None:
        """The screen as it is."""
        self.into.mkdir(parents=True, exist_ok=True)
        (self.into / f"{name}.svg").write_text(self.app.export_screenshot(title=""), encoding="utf-8")

    def is_settled(self, awake: str) -> bool:
        """Whether this model is awake and nothing is under way, on the screen as well."""
        snapshot = self.fleet.snapshot()
        quiet = not self.app.operations.running and not any(model.operation for model in snapshot.models)
        return quiet and snapshot.model(awake).state is State.AWAKE

    async def select(self, name: str) -> None:
        """Move the cursor to a model."""
        names = [model.name for model in self.fleet.snapshot().models]
        await self.pilot.press("home", *["down"] * names.index(name))
        await until(self.pilot, lambda: self.app.dashboard.selected == name, f"{name} is selected")

    async def switch(self, name: str, picture: str | None = None) -> None:
        """Press enter on a model, with a picture on the way."""
        await self.select(name)
        await self.pilot.press("enter")
        if picture is not None:
            waking = (State.WAKING, State.FALLING_ASLEEP)
            models = self.fleet.snapshot
            await until(
                self.pilot,
                lambda: any(model.state in waking for model in models().models) or self.is_settled(name),
                f"the switch to {name} shows",
            )
            await self.app.dashboard.look()
            await self.pilot.pause()
            self.write(picture)
        await until(self.pilot, lambda: self.is_settled(name), f"{name} is awake")

    async def ask(self, question: str) -> None:
        """Type a question and wait for the whole answer."""
        await self.pilot.press("c", *question, "enter")
        chat = self.app.dashboard.query_one(ChatPane)
        await until(self.pilot, lambda: bool(chat.last_answer()) and not chat.is_answering, "the answer ends")
        await self.pilot.press("escape")


async def take(config: Path, state: Path, into: Path, chat: str, other: str) -> None:
    """The whole story."""
    async with Fleet(load(config), state, leads=True) as fleet:  # as the panel does: serving figures too
        await fleet.switch(chat)  # from wherever it is, so that the switch in the pictures is a wake
        await fleet.switch(other)
        app = PanelApp(fleet, state_dir=state, theme_folders=[package_folder()])
        try:
            async with app.run_test(size=SIZE) as pilot:
                camera = Camera(pilot, app, fleet, into)
                await camera.switch(chat, "switching")
                await camera.ask(QUESTION)
                await pilot.pause(SETTLE_SECONDS)
                app.clear_notifications()
                await pilot.pause(0.2)
                camera.write("panel")
                await camera.switch(other)
        finally:
            await app.operations.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--chat", required=True)
    parser.add_argument("--other", required=True)
    given = parser.parse_args()
    asyncio.run(take(given.config, given.state, given.into, given.chat, given.other))


if __name__ == "__main__":
    main()
