"""The dashboard: memory, models, what a key would do, and the chat."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, ClassVar, cast

from textual import work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantBlur, DescendantFocus, Resize
from textual.timer import Timer
from textual.widgets import Static

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, Prediction
from vllm_sleep_tui.fleet.states import SETTLED, State
from vllm_sleep_tui.tui.drawing.paint import Painted
from vllm_sleep_tui.tui.keys import bindings
from vllm_sleep_tui.tui.screens.advice import AdviceScreen
from vllm_sleep_tui.tui.screens.dialogs import Help, ThemeChooser
from vllm_sleep_tui.tui.screens.gpus import GpuScreen
from vllm_sleep_tui.tui.screens.logs import LogScreen
from vllm_sleep_tui.tui.screens.operating import OperatingScreen
from vllm_sleep_tui.tui.state.operations import Operations
from vllm_sleep_tui.tui.state.past import PastReader
from vllm_sleep_tui.tui.state.readings import Readings
from vllm_sleep_tui.tui.state.view import PanelFleet, Trouble, View
from vllm_sleep_tui.tui.widgets.bands import BottomBand, TopBand
from vllm_sleep_tui.tui.widgets.chat import ChatPane
from vllm_sleep_tui.tui.widgets.detail import Detail
from vllm_sleep_tui.tui.widgets.memory import MemoryPanel
from vllm_sleep_tui.tui.widgets.models import ModelTable
from vllm_sleep_tui.tui.widgets.timeline import Timeline

if TYPE_CHECKING:
    from vllm_sleep_tui.tui.app import PanelApp
    from vllm_sleep_tui.tui.state.bench_runner import BenchRunner

TICK_SECONDS = 0.25
IDLE_TICKS = 3
"""While nothing is under way, only every third tick looks at the fleet."""
MIN_WIDTH, MIN_HEIGHT = 60, 20
NARROW_WIDTH, LOW_HEIGHT = 100, 30
TIMELINE_HEIGHT, SERVED_HEIGHT = 28, 2
"""The lanes need a terminal of so many lines and two a model; requests and tokens so many more."""
_TYPING_HINT = "⏎ or ctrl+j send   esc leave the input   letters are text here"


class Dashboard(OperatingScreen):
    """The one screen of every day."""

    BINDINGS: ClassVar[list[BindingType]] = bindings()

    def __init__(self, fleet: PanelFleet, operations: Operations) -> None:
        super().__init__(fleet, operations)
        self._ticks = 0
        self._is_busy = False
        self._look_timer: Timer | None = None
        self.readings = Readings()
        self._bench: BenchRunner | None = None
        self._past = PastReader(fleet.history, operations, self.changed)
        snapshot = fleet.snapshot()
        awake = [model.name for model in snapshot.models if model.state is State.AWAKE]
        self._table = ModelTable(id="table")
        self._table.selected = next(iter(awake or [model.name for model in snapshot.models]), None)

    @property
    def selected(self) -> str | None:
        """The model under the table's cursor."""
        return self._table.selected

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield TopBand(id="top")
        yield BottomBand(id="bottom")
        yield MemoryPanel(id="memory")
        with Horizontal(id="body"):
            with Vertical(id="models") as box:
                box.border_title = "Models"
                yield self._table
                with VerticalScroll(id="scroll", can_focus=True):
                    yield Detail(id="detail")
                yield Timeline(id="timeline")
            yield ChatPane(self.fleet, self.operations, id="chat")
        yield Static(id="too-small", markup=False)

    async def on_mount(self) -> None:
        """Show the first moment, then look again four times a second."""
        self._table.focus()
        await self.look()
        self._look_timer = self.set_interval(TICK_SECONDS, self._tick)

    def on_screen_suspend(self) -> None:
        """Rest while another screen is in front, unless it lets this one be seen."""
        if self._look_timer is not None and not self.app.screen.is_modal:
            self._look_timer.pause()

    def on_screen_resume(self) -> None:
        """Go on."""
        if self._look_timer is not None:
            self._look_timer.resume()

    def on_resize(self, event: Resize) -> None:
        """Fit the layout to the terminal."""
        width, height = event.size
        self.set_class(width < MIN_WIDTH or height < MIN_HEIGHT, "-tiny")
        self.set_class(width < NARROW_WIDTH, "-narrow")
        self.set_class(height < LOW_HEIGHT, "-low")
        # The timeline is the first thing to go, what a key would do the last; but with its cursor out the
        # timeline is what is looked at.
        spare = height - TIMELINE_HEIGHT - 2 * len(self.fleet.snapshot().models)
        self.set_class(spare < 0, "-cramped")
        self.query_one(Timeline).shows_served = spare >= SERVED_HEIGHT
        words = f"The panel needs {MIN_WIDTH}×{MIN_HEIGHT} at least; this terminal has {width}×{height}."
        self.query_one("#too-small", Static).update(words)

    def view(self) -> View:
        """This moment."""
        snapshot = self.fleet.snapshot()
        return View(
            snapshot=snapshot,
            selected=self.selected,
            prediction=self._prediction(),
            waits=None if self.selected is None else self.fleet.waits(self.selected),
            past=self._past.latest,
            bench="" if self._bench is None else self._bench.words(),
            running=dict(self.operations.running),
            troubles=self._troubles(snapshot),
        )

    def _troubles(self, snapshot: FleetSnapshot) -> dict[str, Trouble]:
        """What went wrong here and is not over."""
        now, models = time.time(), {model.name: model for model in snapshot.models}
        return {
            name: trouble
            for name, trouble in self.operations.troubles.items()
            if name in models and trouble.stands(models[name], now)
        }

    def _prediction(self) -> Prediction | None:
        return None if self.selected is None else self.fleet.predict(self.selected)

    async def _tick(self) -> None:
        self._ticks += 1
        if self._is_busy or self._ticks % IDLE_TICKS == 0:
            await self.look()

    async def look(self) -> None:
        """Look at the fleet and show what changed."""
        view = self.view()
        moving = any(model.state not in SETTLED or model.operation for model in view.snapshot.models)
        self._is_busy = moving or bool(view.running)
        self.readings.see(view.snapshot)
        self.query_one(TopBand).show(view)
        self.query_one(MemoryPanel).show(view)
        self._table.show(view)
        self.query_one(Detail).show(view)
        timeline = self.query_one(Timeline)
        timeline.show(view)
        self._past.look(view.snapshot, timeline.window.seconds)
        await self.query_one(ChatPane).show(view)

    def changed(self) -> None:
        """Look at once."""
        if self.is_attached:
            self.call_later(self.look)

    @property
    def is_answering(self) -> bool:
        """True while an answer streams."""
        return self.query_one(ChatPane).is_answering

    def recolor(self) -> None:
        """Paint everything in the theme's new colours."""
        for widget in self.query(Painted):
            widget.refresh()
        self.query_one(ChatPane).recolor()

    def on_model_table_selected(self) -> None:
        """Another row."""
        self.changed()

    def on_model_table_chosen(self) -> None:
        """A double click."""
        self.action_switch()

    def on_descendant_focus(self, _event: DescendantFocus) -> None:
        """Say which keys work now."""
        self._hint()

    def on_descendant_blur(self, _event: DescendantBlur) -> None:
        """Say which keys work now."""
        self._hint()

    def _hint(self) -> None:
        typing = self.query_one(ChatPane).input.has_focus
        self.query_one(BottomBand).show_typing(_TYPING_HINT if typing else "")

    def action_chat(self) -> None:
        """Into the chat's input."""
        self.add_class("-chatting")
        self.query_one(ChatPane).input.focus()

    def action_back(self) -> None:
        """Leave the input; else the timeline's cursor; else stop the answer; else an operation; else close a
        narrow screen's chat."""
        chat = self.query_one(ChatPane)
        if chat.input.has_focus:
            self._table.focus()
            if self.focused is not self._table:
                self.set_focus(None)
        elif self.query_one(Timeline).put_away():
            self._look_back()
        elif chat.stop_answer():
            self.notify("Stopped the answer; what was said is kept.", markup=False)
        elif (name := self.operations.cancel(self.selected)) is not None:
            self.notify(f"{name}: stops at the next safe point.", markup=False)
            self.changed()
        else:
            self.remove_class("-chatting")
            self._table.focus()

    def action_copy_answer(self) -> None:
        """The last answer, as it was written, to the clipboard."""
        text = self.query_one(ChatPane).last_answer()
        if text is None:
            self.notify(f"{self.selected} has not answered anything yet.", markup=False)
            return
        self.app.copy_to_clipboard(text)
        self.notify(f"Copied {len(text)} characters.", markup=False)

    def action_log(self) -> None:
        """The selected model's log."""
        if self.selected is not None:
            name = self.selected
            died = self.fleet.snapshot().model(name).last_failure
            self.app.push_screen(LogScreen(name, self.fleet.log_path(name), died))
            if died is not None:
                self.run_worker(self.fleet.seen(name))

    def action_gpus(self) -> None:
        """The screen of the GPUs."""
        self.app.push_screen(GpuScreen(self.fleet, self.readings))

    def action_bench(self) -> None:
        """The benchmark's screen."""
        from vllm_sleep_tui.tui.screens.bench import BenchScreen  # seldom looked at, and slow to import

        self.app.push_screen(BenchScreen(self.fleet, self._bench_runner()))

    def _bench_runner(self) -> BenchRunner:
        from vllm_sleep_tui.tui.state.bench_runner import BenchRunner

        if self._bench is None:
            self._bench = BenchRunner(self.fleet, self.operations)
        return self._bench

    def background(self) -> str:
        """A benchmark ends with the panel."""
        if self._bench is None or not self._bench.is_running:
            return ""
        return "A benchmark runs: leaving stops it; what it measured is kept."

    def action_advice(self) -> None:
        """What to do with each model."""
        self.app.push_screen(AdviceScreen(self.fleet))

    def action_zoom(self, step: int) -> None:
        """Show the timeline further back, or less far."""
        self.query_one(Timeline).zoom(step)
        self.changed()

    def action_walk(self, step: int) -> None:
        """The timeline's cursor, step by step."""
        if self._shows_models():
            self.query_one(Timeline).walk(self.view(), step)
            self._look_back()

    def action_jump(self, step: int) -> None:
        """The timeline's cursor, from change to change of the selected model."""
        if self._shows_models():
            self.query_one(Timeline).jump(self.view(), step)
            self._look_back()

    def _shows_models(self) -> bool:
        return not self.has_class("-narrow", "-chatting")

    def on_timeline_pointed(self) -> None:
        """A click on the timeline."""
        self._look_back()

    def _look_back(self) -> None:
        """In a low terminal the timeline takes the place of the detail while its cursor is out."""
        self.set_class(self.query_one(Timeline).is_looking_back, "-looking-back")
        if self.focused is not None and not self.focused.display:
            self._table.focus()

    def action_help(self) -> None:
        """All keys."""
        self.app.push_screen(Help())

    @work
    async def action_theme(self) -> None:
        """Choose a theme."""
        app = cast("PanelApp", self.app)
        chosen = await app.push_screen_wait(ThemeChooser(app.theme_names, app.theme))
        if chosen is not None:
            app.remember_theme(chosen)
