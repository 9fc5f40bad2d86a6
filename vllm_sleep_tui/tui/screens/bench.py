"""The screen of the benchmark: two models, modes, repeats; live bars; past results."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Resize
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from vllm_sleep_tui.bench.plan import Plan, order
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.tui.screens.dialogs import Choice, Question
from vllm_sleep_tui.tui.screens.looking import LookingScreen
from vllm_sleep_tui.tui.state.bench_runner import BenchRunner, past_runs
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.widgets.bands import KeyLine, TopBand
from vllm_sleep_tui.tui.widgets.bench import BenchBars, BenchForm

STEP_SECONDS = 0.5
_KEYS = "esc back, stop   r run   + − repeats   space choose   tab results   ⏎ show one"
NARROW_WIDTH = 80


class BenchScreen(LookingScreen):
    """Everything about the benchmark; a run goes on when the screen is left."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "back", show=False),
        Binding("b,q", "dismiss", "back", show=False),
        Binding("r", "run", "run", show=False),
        Binding("plus,equals_sign", "repeat(1)", "more repeats", show=False),
        Binding("minus", "repeat(-1)", "fewer repeats", show=False),
    ]

    def __init__(self, fleet: PanelFleet, runner: BenchRunner) -> None:
        super().__init__()
        self._fleet = fleet
        self._runner = runner
        self._past: list[tuple[Path, Run]] = []
        self._looked_at: tuple[Path, Run] | None = None

    def compose(self) -> ComposeResult:
        """What to run at the left, what came of it at the right."""
        yield TopBand(id="top")
        yield KeyLine(_KEYS, id="keys")
        names = [model.name for model in self._fleet.snapshot().models]
        with Horizontal(id="bench"):
            with Vertical(id="bench-plan"):
                form = BenchForm(names, id="bench-form")
                form.border_title = "What to measure"
                yield form
                results = OptionList(id="bench-results")
                results.border_title = "Past results"
                yield results
            with Vertical(id="bench-run") as box:
                box.border_title = "Switches"
                yield BenchBars(id="bench-bars")

    def on_mount(self) -> None:
        """Show the first moment, then look twice a second."""
        self.query_one(BenchForm).focus()
        self.look_every(STEP_SECONDS, self._step)
        self.call_after_refresh(self._step)
        self._list_results()

    def _step(self) -> None:
        self.query_one(TopBand).show(View(snapshot=self._fleet.snapshot(), bench=self._runner.words()))
        shown = self._looked_at[1] if self._looked_at else self._runner.run
        self.set_class(self._looked_at is not None or self._runner.is_running, "-showing")
        self.query_one(BenchBars).show(shown, self._now())

    def _now(self) -> str:
        if not self._runner.is_running:
            return ""
        if self._runner.is_cancelled:
            return "Stopping at the next safe point; the models are put back as they were found."
        step = self._runner.progress
        doing = "" if step is None else f": {step.model} {step.phase} {step.detail}".rstrip()
        return f"{self._runner.words()}{doing}"

    @work(exclusive=True, group="results")
    async def _list_results(self) -> None:
        self._past = await asyncio.to_thread(past_runs, self._runner.folder)
        results = self.query_one("#bench-results", OptionList)
        results.clear_options()
        results.add_options(Option(Text(_title(run))) for _, run in self._past)
        if not self._past:
            results.add_option(Option(Text("None yet: r runs one."), disabled=True))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Show a past result."""
        if event.option_list.id == "bench-results":
            self._looked_at = self._past[event.option_index]
            self._step()

    def action_repeat(self, step: int) -> None:
        """More or fewer repeats of each mode."""
        self.query_one(BenchForm).repeat(step)

    @work(exclusive=True, group="run")
    async def action_run(self) -> None:
        """Run the benchmark, after a question."""
        if self._runner.is_running:
            self.notify("A benchmark is under way; escape stops it.", markup=False)
            return
        form = self.query_one(BenchForm)
        if len(form.pair) != 2 or not form.modes:
            self.notify("Choose two models and at least one mode (space).", severity="warning", markup=False)
            return
        a, b = form.pair
        text = (
            f"{a} and {b} answer nobody else meanwhile; they are started anew first. "
            "At the end every model is as it is now."
        )
        unfinished = self._looked_at if self._looked_at and not self._looked_at[1].is_done else None
        choices = [Choice("g", "Go on with the result shown", "go on")] if unfinished else []
        choices.append(Choice("y", "Run", "run"))
        answer = await self.app.push_screen_wait(Question("Run the benchmark?", text, choices))
        if answer == "run":
            passes = order(dict.fromkeys(form.modes, form.repeats), seed=int(time.time()))
            self._begin(Plan(a=a, b=b, passes=passes), None)
        elif answer == "go on" and unfinished:
            self._begin(unfinished[1].plan, unfinished[0])

    def _begin(self, plan: Plan, resume: Path | None) -> None:
        self._looked_at = None
        self._runner.start(plan, self._ended, resume)
        self._step()

    def _ended(self, error: PanelError | None) -> None:
        if error is not None:
            text = f"{error.what}\n{error.cure}".strip()
            self.app.notify(text, title="The benchmark ended", severity="error", timeout=12, markup=False)
        else:
            words = "was stopped; what it measured is kept" if self._runner.is_cancelled else "is done"
            self.app.notify(f"The benchmark {words}.", markup=False)
        if self.is_attached:
            self._list_results()
            self._step()

    def action_back(self) -> None:
        """Ask what becomes of a run; else, where both do not fit, close a result; else leave."""
        if self._runner.is_running and not self._runner.is_cancelled:
            self._ask_stop()
        elif self._looked_at is None or not self.has_class("-narrow"):
            self.dismiss()
        else:
            self._looked_at = None
            self._step()

    @work(exclusive=True, group="stop")
    async def _ask_stop(self) -> None:
        """Stop the run at its next safe point, or leave it running, after a question."""
        text = (
            f"{self._runner.words()}.\nStopped, it ends at its next safe point, and the models are put back "
            "as they were found; what it measured is kept and can be gone on with."
        )
        choices = [Choice("y", "Stop it", "stop"), Choice("l", "Leave it running", "leave")]
        answer = await self.app.push_screen_wait(Question("Stop the benchmark?", text, choices))
        if answer == "stop":
            self._runner.cancel()
            self._step()
        elif answer == "leave":
            self.dismiss()

    def on_resize(self, event: Resize) -> None:
        """Where both do not fit beside each other, the run takes the place of the form."""
        self.set_class(event.size.width < NARROW_WIDTH, "-narrow")


def _title(run: Run) -> str:
    when = time.strftime("%d %b %H:%M", time.localtime(run.began))
    return f"{when}  {run.plan.a} ⇄ {run.plan.b}{'' if run.is_done else '  unfinished'}"
