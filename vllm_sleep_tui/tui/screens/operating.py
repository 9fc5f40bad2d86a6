"""What the keys do to models; the dashboard is built on it."""

from __future__ import annotations

from collections.abc import Sequence

from textual import work
from textual.screen import Screen

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.states import RUNNING, State
from vllm_sleep_tui.tui.screens.dialogs import Choice, Question
from vllm_sleep_tui.tui.state.operations import Operations, Work
from vllm_sleep_tui.tui.state.view import PanelFleet, Running
from vllm_sleep_tui.units import gib


class OperatingScreen(Screen[None]):
    """A screen with a selected model and the actions on it."""

    def __init__(self, fleet: PanelFleet, operations: Operations) -> None:
        super().__init__()
        self.fleet = fleet
        self.operations = operations

    @property
    def selected(self) -> str | None:
        """The model that the keys act on."""
        raise NotImplementedError

    def changed(self) -> None:
        """Something was started or ended: look at once."""
        raise NotImplementedError

    def begin(self, model: str, verb: str, work: Work, *, replaces: bool = False) -> None:
        """Start an operation, or say that the model is busy."""
        if not self.operations.begin(model, verb=verb, work=work, ended=self._ended, replaces=replaces):
            busy = self.operations.running[model].verb
            self.notify(f"Already {busy} {model}; escape stops that.", severity="warning", markup=False)
        self.changed()

    def _ended(self, running: Running, error: PanelError | None) -> None:
        if error is not None:
            text = f"{error.what}\n{error.cure}" if error.cure else error.what
            title = f"{running.verb.capitalize()} {running.model} did not work"
            self.notify(text, title=title, severity="error", timeout=12, markup=False)
        elif running.cancelled:
            self.notify(f"Stopped {running.verb} {running.model}.", markup=False)
        if self.is_attached:
            self.changed()

    def _model(self) -> ModelSnapshot | None:
        return None if self.selected is None else self.fleet.snapshot().model(self.selected)

    def action_switch(self) -> None:
        """Switch to the selected model."""
        if (name := self.selected) is not None:
            self.switch_to(name)

    def switch_to(self, name: str) -> None:
        """Switch to a model; one that is awake, with nothing under way that could change it, is left so."""
        snapshot = self.fleet.snapshot()
        moving = self.operations.running or any(model.operation for model in snapshot.models)
        if snapshot.model(name).state is State.AWAKE and not moving:
            self.notify(f"{name} is awake.", markup=False)
            return
        self.begin(name, "switching to", lambda report: self.fleet.switch(name, report=report))

    def action_sleep(self) -> None:
        """Put it to sleep at its own level."""
        if (name := self.selected) is not None:
            self.begin(name, "putting to sleep", lambda report: self.fleet.sleep(name, report=report))

    def action_sleep_at(self, level: int) -> None:
        """Put it to sleep at a level."""
        if (name := self.selected) is not None:
            self.begin(
                name,
                f"putting to sleep at level {level}",
                lambda report: self.fleet.sleep(name, level=level, report=report),
            )

    def action_wake(self) -> None:
        """Wake it beside the others."""
        if (name := self.selected) is not None:
            self.begin(name, "waking", lambda report: self.fleet.wake(name, report=report))

    def action_start(self) -> None:
        """Start it."""
        if (name := self.selected) is not None:
            self.start_all([name])

    def start_all(self, names: Sequence[str]) -> None:
        """Start models; the fleet takes them one after the other where they share a GPU."""
        first, rest = names[0], len(names) - 1
        verb = "starting" if not rest else f"starting {rest} more and"
        self.begin(first, verb, lambda report: self.fleet.start(list(names), report=report))

    @work
    async def action_stop(self) -> None:
        """Stop it, after a question."""
        model = self._model()
        if model is None:
            return
        if model.state is State.STOPPED and model.name not in self.operations.running:
            self.notify(f"{model.name} is stopped already.", markup=False)
            return
        held = f"It gives back {gib(model.vram_bytes)} of VRAM. " if model.vram_bytes else ""
        text = f"{held}The next start loads the model anew, which takes far longer than waking it."
        choices = [Choice("y", f"Stop {model.name}", "stop")]
        if await self.app.push_screen_wait(Question(f"Stop {model.name}?", text, choices)):
            self._stop(model.name)

    def _stop(self, name: str) -> None:
        self.begin(name, "stopping", lambda report: self.fleet.stop([name], report=report), replaces=True)

    @work
    async def action_restart(self) -> None:
        """Restart it, after a question."""
        model = self._model()
        if model is None:
            return
        text = "It answers nobody until it is loaded again."
        choices = [Choice("y", f"Restart {model.name}", "restart")]
        if await self.app.push_screen_wait(Question(f"Restart {model.name}?", text, choices)):
            name = model.name
            self.begin(name, "restarting", lambda report: self.fleet.restart([name], report=report))

    @work
    async def ask_autostart(self, names: Sequence[str]) -> None:
        """Offer to start the models that the config marks, if they are stopped."""
        stopped = [name for name in names if self.fleet.snapshot().model(name).state is State.STOPPED]
        if not stopped:
            return
        text = f"The config marks them with autostart: {', '.join(stopped)}."
        choices = [Choice("y", "Start", "start")]
        if await self.app.push_screen_wait(Question("Start models?", text, choices)):
            self.start_all(stopped)

    def background(self) -> str:
        """What else is under way and ends with the panel, in a sentence; empty if nothing is."""
        return ""

    def running_models(self) -> list[str]:
        """The models with a server of ours."""
        models = self.fleet.snapshot().models
        return [model.name for model in models if model.state in RUNNING and not model.is_attached]

    @work(exclusive=True, group="quit")
    async def action_quit_panel(self) -> None:
        """Leave: at once if nothing runs, else after asking what becomes of the servers."""
        running = self.running_models()
        background = self.background()
        if not running and not self.operations.running and not background:
            self.app.exit()
            return
        text = f"Running: {', '.join(running)}." if running else "No server runs."
        for operation in self.operations.running.values():
            text += f"\nStill {operation.verb} {operation.model}: leaving stops that at its next safe point."
        text += f"\n{background}" if background else ""
        choices = [Choice("l", "Leave them running", "leave"), Choice("s", "Stop them", "stop")]
        answer = await self.app.push_screen_wait(Question("Quit the panel?", text, choices))
        if answer == "leave":
            self.app.exit()
        elif answer == "stop":
            await self._stop_all(running)

    async def _stop_all(self, names: Sequence[str]) -> None:
        for name in names:
            self._stop(name)
        await self.operations.settled(names)
        if not any(name in self.operations.troubles for name in names):
            self.app.exit()
