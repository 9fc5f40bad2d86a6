"""The dashboard: memory, models, what a key would do, and the chat."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import DescendantBlur, DescendantFocus, Resize
from textual.widgets import Input, Static

from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.conversations import Conversations
from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot, Prediction
from vllm_sleep_tui.fleet.states import SETTLED, State
from vllm_sleep_tui.tui.drawing.timeline import WINDOWS
from vllm_sleep_tui.tui.keys import CHANGING, bindings
from vllm_sleep_tui.tui.screens.chat_keys import ChatKeys
from vllm_sleep_tui.tui.screens.dialogs import Choice, Chooser, Help, Question
from vllm_sleep_tui.tui.state.copies import copies_of
from vllm_sleep_tui.tui.state.failure import Failure
from vllm_sleep_tui.tui.state.hands import Hands
from vllm_sleep_tui.tui.state.operations import Operations, Running, Trouble, Work
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.state.past import PastReader, Readings
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.widgets.bands import BottomBand, TopBand
from vllm_sleep_tui.tui.widgets.chat import ChatPane
from vllm_sleep_tui.tui.widgets.detail import Detail
from vllm_sleep_tui.tui.widgets.find_line import FindLine
from vllm_sleep_tui.tui.widgets.memory import MemoryPanel
from vllm_sleep_tui.tui.widgets.models import FindInput, ModelTable
from vllm_sleep_tui.tui.widgets.timeline import Timeline
from vllm_sleep_tui.tui.words import DOING
from vllm_sleep_tui.units import counted, gib

if TYPE_CHECKING:
    from vllm_sleep_tui.gateway.post import Post

    # imported by `action_bench`
    from vllm_sleep_tui.tui.state.bench_runner import BenchRunner


BUSY_SECONDS, IDLE_SECONDS = 0.25, 1.0
"""Between two looks at the fleet while something is under way, and while nothing is."""
CALM_SECONDS, CALM_TICKS = 10.0, 2
"""After so long without a key, one of so many idle looks is taken."""
MIN_WIDTH, MIN_HEIGHT = 60, 20
NARROW_WIDTH, LOW_HEIGHT = 100, 30
TIMELINE_HEIGHT, SERVED_HEIGHT = 29, 2
"""The lanes need so many lines beside the table's and their own; requests and tokens so many more."""
_WHY_BELOW = "Why stands below the table."
_FINDING_HINT = "⏎ to the table   ↑ ↓ move   esc all models   letters are text"
_EDITING_HINT = "⏎ replace the last question  alt+⏎ line  ↑ earlier  esc leave the input"
_TYPING_HINT = "⏎ send  alt+⏎ line  ↑ earlier  esc leave the input   letters are text"


class Dashboard(ChatKeys):
    """The one screen of every day; the others are imported when they are opened, as the first paint waits."""

    BINDINGS: ClassVar[list[BindingType]] = bindings()
    keeps_readings = True

    def __init__(
        self, fleet: PanelFleet, operations: Operations, conversations: Conversations, hands: Hands
    ) -> None:
        super().__init__()
        self._hands = hands
        self.conversations = conversations
        self.fleet = fleet
        self.operations = operations
        self._ticks = 0
        self._is_busy = self._is_painted = False
        self.readings = Readings()
        self._bench: BenchRunner | None = None
        self._past = PastReader(fleet, operations, self.changed)
        snapshot = fleet.snapshot()
        awake = [model.name for model in snapshot.models if model.state is State.AWAKE]
        self._table = ModelTable(id="table")
        self._table.selected = next(iter(awake or [model.name for model in snapshot.models]), None)

    @property
    def selected(self) -> str | None:
        """The model under the table's cursor, on which the keys act."""
        return self._table.selected

    def compose(self) -> ComposeResult:
        """Top to bottom."""
        yield TopBand(id="top")
        yield BottomBand(id="bottom")
        yield MemoryPanel(id="memory")
        with Horizontal(id="body"):
            with Vertical(id="models") as box:
                box.border_title = "Models"
                yield FindLine(FindInput(placeholder="name, state, gpu 1 …"), id="find")
                yield self._table
                with VerticalScroll(id="scroll", can_focus=True):
                    yield Detail(id="detail")
                yield Timeline(id="timeline")
            yield ChatPane(self.fleet, self.operations, self.conversations, id="chat")
        yield Static(id="too-small", markup=False)

    async def on_mount(self) -> None:
        """Show the first moment, then look again and again."""
        self._table.focus()
        self._busy_timer = self.set_interval(BUSY_SECONDS, self._busy_tick, pause=True)
        await self.look()
        self.call_after_refresh(self._painted)
        self.look_every(IDLE_SECONDS, self._tick)
        self.run_worker(self._hear(), group="events")

    def _painted(self) -> None:
        """Add to the first screen what a key would do, which takes longer to know than how all are."""
        self._is_painted = True
        self.changed()

    def on_resize(self, event: Resize) -> None:
        """Fit the layout to the terminal."""
        width, height = event.size
        self.set_class(width < MIN_WIDTH or height < MIN_HEIGHT, "-tiny")
        self.set_class(width < NARROW_WIDTH, "-narrow")
        self.set_class(height < LOW_HEIGHT, "-low")
        # The timeline is the first thing to go, what a key would do the last; but with its cursor out the
        # timeline is what is looked at.
        self._fit_timeline()
        words = f"The panel needs {MIN_WIDTH}×{MIN_HEIGHT} at least; this terminal has {width}×{height}."
        self.query_one("#too-small", Static).update(words)

    def _fit_timeline(self) -> None:
        timeline, wanted = self.query_one(Timeline), self._table.rows
        rows = min(wanted, self.size.height // 3)
        self.set_class(wanted > rows, "-many")
        spare = self.size.height - TIMELINE_HEIGHT - rows - timeline.lanes
        self.set_class(spare < 0, "-cramped")
        timeline.shows_served = spare >= SERVED_HEIGHT

    def view(self) -> View:
        """This moment."""
        snapshot = self.fleet.snapshot()
        names = [model.name for model in snapshot.models]
        if self.selected is not None and self.selected not in names:  # the config names it no longer
            self._table.selected = next(iter(names), None)
        return View(
            snapshot=snapshot,
            selected=self.selected,
            prediction=self._prediction(snapshot),
            waits=None if self.selected is None else self.fleet.waits(self.selected),
            past=self._past.latest,
            tokens=self.readings.tokens(),
            waiting=self._waiting(),
            bench="" if self._bench is None else self._bench.words(),
            running={name: one for name, one in self.operations.running.items() if name in names},
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

    def _has_open_gateway(self) -> bool:
        post: Post | None = getattr(self.app, "post", None)
        return post is not None and post.view().is_open

    def _waiting(self) -> int:
        """The requests that wait in the gateway, if it is open here."""
        post: Post | None = getattr(self.app, "post", None)
        return 0 if post is None else sum(ask.state == "waiting" for ask in post.view().asks)

    def _prediction(self, snapshot: FleetSnapshot) -> Prediction | None:
        if self.selected is None or not self._is_painted or snapshot.read_only:
            return None
        return self.fleet.predict(self.selected)

    async def _tick(self) -> None:
        self._ticks += 1
        calm = not self._is_busy and not self.is_answering and self._hands.rest_seconds > CALM_SECONDS
        self.fleet.look_less(calm)
        if not self._is_busy and (not calm or self._ticks % CALM_TICKS == 0):
            await self.look()

    async def _busy_tick(self) -> None:
        if self.is_current or self.app.screen.is_modal:
            await self.look()

    def on_screen_suspend(self) -> None:
        """Figures as often as ever for the screen in front; the base's own handler runs besides."""
        self.fleet.look_less(False)

    async def _hear(self) -> None:
        """Show what happens when it happens, whoever does it; say so if a model failed."""
        async with aclosing(self.fleet.events()) as events:
            async for event in events:
                self._past.heard()
                is_ours = event.operation is not None and event.pid == os.getpid()
                if event.kind is Kind.FAULT and not is_ours:  # else `_ended` says it
                    self._say_failed(event)
                if self.is_current or self.app.screen.is_modal:
                    self.changed()

    def _say_failed(self, event: FleetEvent) -> None:
        models = [model for model in self.fleet.snapshot().models if model.name == event.model]
        cure = next((model.cure for model in models if model.state is State.FAILED), None)
        text = "\n".join(filter(None, [event.detail or "No reason is known; its log (l) may tell.", cure]))
        if event.model is not None and self._says_why(event.model):
            text = _WHY_BELOW
        self.post_message(Failure(f"{event.model} failed", text, lambda: not self._is_failed(event.model)))

    def _says_why(self, name: str) -> bool:
        """Whether the text below the table is in sight and about this model."""
        is_about_it = self.is_attached and self.is_current and self.selected == name
        return is_about_it and self.query_one(Detail).is_on_screen

    def _is_failed(self, name: str | None) -> bool:
        models = self.fleet.snapshot().models
        return any(model.name == name and model.state is State.FAILED for model in models)

    async def look(self) -> None:
        """Look at the fleet and show what changed."""
        view = self.view()
        moving = any(model.state not in SETTLED or model.operation for model in view.snapshot.models)
        self._is_busy = moving or bool(view.running)
        (self._busy_timer.resume if self._is_busy else self._busy_timer.pause)()
        self.readings.see(view.snapshot)
        self.query_one(TopBand).show(view)
        self.query_one(BottomBand).show_keys(read_only=view.snapshot.read_only)
        self.query_one(MemoryPanel).show(view)
        self._table.show(view)
        self.query_one(Detail).show(view)
        timeline = self.query_one(Timeline)
        timeline.show(view)
        self._fit_timeline()
        self._past.look(view.snapshot, timeline.window.seconds)
        self.query_one(ChatPane).show(view)

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
        super().recolor()
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

    def on_chat_pane_edited(self) -> None:
        """Say what enter does now."""
        self._hint()

    def _hint(self) -> None:
        chat = self.query_one(ChatPane)
        hint = (_EDITING_HINT if chat.is_editing else _TYPING_HINT) if chat.input.has_focus else ""
        hint = _FINDING_HINT if self.query_one(FindInput).has_focus else hint
        self.query_one(BottomBand).show_typing(hint)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """A panel that only looks has no key that changes anything; the fleet refuses it besides."""
        if action in CHANGING and self.fleet.snapshot().read_only:
            return False
        return super().check_action(action, parameters)

    # ── what the keys do to models ──────────────────────────────────────────────────────────────────────────

    def begin(self, model: str, verb: str, work: Work, *, others: int = 0, replaces: bool = False) -> None:
        """Start an operation, or say that the model is busy."""
        begins = self.operations.begin
        if not begins(model, verb=verb, work=work, ended=self._ended, others=others, replaces=replaces):
            busy = self.operations.running[model].doing
            self.notify(f"Already {busy}; escape stops that.", severity="warning", markup=False)
        self.changed()

    def _ended(self, running: Running, error: PanelError | None) -> None:
        if error is not None and running.others and error.by_model:
            left_out = ", ".join(error.by_model)
            text = f"{left_out}: their rows (!) say why. The others are done."
            title = f"{counted(len(error.by_model), 'model')} left out"
            self._say_trouble(title, text, error.by_model)
        elif error is not None:
            text = f"{error.what}\n{error.cure}" if error.cure else error.what
            title = f"{running.doing[:1].upper()}{running.doing[1:]} did not work"
            self._say_trouble(title, _WHY_BELOW if self._says_why(running.model) else text, [running.model])
        elif running.cancelled:
            self.notify(f"Stopped {running.doing}.", markup=False)
        if self.is_attached:
            self.changed()

    def _say_trouble(self, title: str, text: str, models: Iterable[str]) -> None:
        """Of an operation, until these models have moved on."""
        names = frozenset(models)
        self.post_message(
            Failure(title, text, lambda: names.isdisjoint(self._troubles(self.fleet.snapshot())))
        )

    def _model(self) -> ModelSnapshot | None:
        return None if (name := self.acted_on()) is None else self.fleet.snapshot().model(name)

    def acted_on(self) -> str | None:
        """The selected model, for a key that acts on it; without a row there is none, which is told."""
        if self.selected is None:
            self.notify(self._table.no_match, markup=False)
        return self.selected

    def action_switch(self) -> None:
        """Switch to the selected model."""
        if (name := self.acted_on()) is not None:
            self.switch_to(name)

    def switch_to(self, name: str) -> None:
        """Switch to a model; one that is awake, with nothing under way that could change it, is left so."""
        snapshot = self.fleet.snapshot()
        moving = self.operations.running or any(model.operation for model in snapshot.models)
        if snapshot.model(name).state is State.AWAKE and not moving:
            self.notify(f"{name} is awake.", markup=False)
            return
        self.begin(name, DOING["switch"], lambda report: self.fleet.switch(name, report=report))

    def action_sleep(self) -> None:
        """Put it to sleep at its own level."""
        if (name := self.acted_on()) is not None:
            self.sleep(name)

    def sleep(self, name: str) -> None:
        """Put a model to sleep at its own level."""
        self.begin(name, DOING["sleep"], lambda report: self.fleet.sleep(name, report=report))

    def action_sleep_at(self, level: int) -> None:
        """Put it to sleep at a level."""
        if (name := self.acted_on()) is not None:
            self.begin(
                name,
                f"{DOING['sleep']} at level {level}",
                lambda report: self.fleet.sleep(name, level=level, report=report),
            )

    def action_wake(self) -> None:
        """Wake it beside the others."""
        if (name := self.acted_on()) is not None:
            self.begin(name, DOING["wake"], lambda report: self.fleet.wake(name, report=report))

    def action_start(self) -> None:
        """Start it."""
        if (name := self.acted_on()) is not None:
            self.start([name])

    def start(self, names: Sequence[str]) -> None:
        """Start models; the fleet takes them one after the other where they share a GPU."""
        first, others = names[0], len(names) - 1
        self.begin(
            first, DOING["start"], lambda report: self.fleet.start(list(names), report=report), others=others
        )

    def action_start_all(self) -> None:
        """Start every model that does not run; who is awake now is awake in the end."""
        models = [model for model in self.fleet.snapshot().models if not model.is_external]
        down = [model.name for model in models if model.state in {State.STOPPED, State.FAILED}]
        if not down:
            self.notify("Every model runs, or is on its way.", markup=False)
            return
        # The first of those that share a GPU is the one that ends awake.
        awake = [model.name for model in models if model.state is State.AWAKE]
        self.start([*awake, *down])

    def action_sleep_all(self) -> None:
        """Put every model that is awake to sleep, each at its own level."""
        awake = [model.name for model in self.fleet.snapshot().models if model.state is State.AWAKE]
        if not awake:
            self.notify("No model is awake.", markup=False)
        for name in awake:
            self.sleep(name)

    @work
    async def action_stop_all(self) -> None:
        """Stop every model, after a question."""
        running = self.running_models()
        if not running:
            self.notify("Every model is stopped already.", markup=False)
            return
        held = sum(model.vram_bytes or 0 for model in self.fleet.snapshot().models)
        text = (
            f"{', '.join(running)}: {gib(held)} of VRAM are given back, and each loads anew when it starts."
        )
        choices = [Choice("y", "Stop all", "stop")]
        if await self.app.push_screen_wait(
            Question(f"Stop {counted(len(running), 'model')}?", text, choices)
        ):
            for name in running:
                self.stop(name)

    @work
    async def action_stop(self) -> None:
        """Stop it, after a question."""
        model = self._model()
        if model is None:
            return
        if model.state is State.STOPPED and model.name not in self.operations.running:
            self.notify(f"{model.name} is stopped already.", markup=False)
            return
        gain = f"It gives back {gib(model.vram_bytes)} of VRAM. " if model.vram_bytes else ""
        text = f"{gain}The next start loads the model anew, which takes far longer than waking it."
        choices = [Choice("y", f"Stop {model.name}", "stop")]
        if await self.app.push_screen_wait(Question(f"Stop {model.name}?", text, choices)):
            self.stop(model.name)

    def stop(self, name: str) -> None:
        """Stop a model; what is under way on it is broken off."""
        self.begin(name, DOING["stop"], lambda report: self.fleet.stop([name], report=report), replaces=True)

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
            self.begin(name, DOING["restart"], lambda report: self.fleet.restart([name], report=report))

    @work
    async def ask_autostart(self, names: Sequence[str]) -> None:
        """Offer to start the models that the config marks, if they are stopped."""
        stopped = [name for name in names if self.fleet.snapshot().model(name).state is State.STOPPED]
        if not stopped:
            return
        text = f"The config marks them with autostart: {', '.join(stopped)}."
        choices = [Choice("y", "Start", "start")]
        if await self.app.push_screen_wait(Question("Start models?", text, choices)):
            self.start(stopped)

    def background(self) -> str:
        """A benchmark ends with the panel."""
        if self._bench is None or not self._bench.is_running:
            return ""
        return "A benchmark runs: leaving stops it; what it measured is kept."

    def running_models(self) -> list[str]:
        """The models with a server of ours."""
        return self.fleet.snapshot().with_servers()

    @work(exclusive=True, group="quit")
    async def action_quit_panel(self) -> None:
        """Leave: at once if nothing runs, else after asking what becomes of the servers."""
        running = [] if self.fleet.snapshot().read_only else self.running_models()
        background = self.background()
        if not running and not self.operations.running and not background:
            self.app.exit()
            return
        text = f"Running: {', '.join(running)}." if running else "No server runs."
        if doings := [operation.doing for operation in self.operations.running.values()]:
            each = "that" if len(doings) == 1 else "each of that"
            text += f"\nStill {', '.join(doings)}: leaving stops {each} at its next safe point."
        text += f"\n{background}" if background else ""
        text += "\nThe gateway closes with the panel." if self._has_open_gateway() else ""
        choices = [Choice("l", "Leave them running", "leave"), Choice("s", "Stop them", "stop")]
        answer = await self.app.push_screen_wait(Question("Quit the panel?", text, choices))
        if answer == "leave":
            self.app.exit()
        elif answer == "stop":
            await self._stop_all(running)

    async def _stop_all(self, names: Sequence[str]) -> None:
        for name in names:
            self.stop(name)
        await self.operations.settled(names)
        if not any(name in self.operations.troubles for name in names):
            self.app.exit()

    # ── what the keys show ──────────────────────────────────────────────────────────────────────────────────

    def action_find(self) -> None:
        """Into the line that says which models have a row, at once: what is typed next is a name already."""
        self.add_class("-finding")
        self.set_focus(self.query_one(FindInput))

    @on(Input.Changed, "FindInput")
    def _find(self, event: Input.Changed) -> None:
        self._table.find(event.value)
        self.changed()

    @on(Input.Submitted, "FindInput")
    def _found(self) -> None:
        """The rows stay as they are; letters are keys again."""
        if not self._table.wanted:
            self.remove_class("-finding")
        self._table.focus()

    def _find_all(self) -> None:
        self.query_one(FindInput).value = ""
        self.remove_class("-finding")
        self._table.focus()

    def action_move_selection(self, step: int) -> None:
        """The table's cursor, from elsewhere."""
        self._table.action_move(step)

    def action_reorder(self) -> None:
        """Sort the table another way."""
        self._table.reorder()

    def action_back(self) -> None:
        """Leave the input; else the timeline's cursor; else stop the answer; else an operation; else show all
        models again; else close a narrow screen's chat."""
        chat = self.query_one(ChatPane)
        if self.query_one(FindInput).has_focus:
            self._find_all()
        elif chat.input.has_focus:
            self._table.focus()
            if self.focused is not self._table:
                self.set_focus(None)
        elif self.query_one(Timeline).put_away():
            self._look_back()
        elif chat.stop_answer():
            self.notify("Stopped the answer; what was said is kept.", markup=False)
        elif (name := self.operations.next_to_cancel(self.selected)) is not None:
            self._break_off(name)
        elif self.has_class("-finding") and self._shows_models():
            self._find_all()
        else:
            self.remove_class("-chatting", "-zoomed")
            self._table.focus()

    @work
    async def _break_off(self, name: str) -> None:
        """Have what is under way on a model stop at its next safe point; a start after a question."""
        if self.fleet.snapshot().model(name).state is State.STARTING:
            text = "What it has loaded so far is lost; the next start begins anew."
            choices = [Choice("y", f"Stop starting {name}", "stop")]
            if not await self.app.push_screen_wait(Question(f"Stop the start of {name}?", text, choices)):
                return
        if self.operations.cancel(name):
            self.notify(f"{name}: stops at the next safe point.", markup=False)
            self.changed()

    @work
    async def action_copy_of(self, kind: str = "") -> None:
        """Something of the selected model, asked which, to the clipboard."""
        if (name := self.acted_on()) is None:
            return
        copies = await copies_of(self.fleet, name)
        if not copies:
            self.notify(f"{name} does not run: there is nothing of it to copy.", markup=False)
            return
        if not kind:
            chooser = Chooser(f"Copy of {name}", list(copies.items()), "⏎ copies, esc does not")
            chosen: str | None = await self.app.push_screen_wait(chooser)
            kind = chosen or ""
        if kind in copies:
            self.copy(copies[kind], f"the {kind} of {name}")
        elif kind:
            self.notify(f"{name} has no {kind} now.", markup=False)

    async def act_on(self, name: str, action: str) -> None:
        """Do what a key does, on this model."""
        if name not in [model.name for model in self.fleet.snapshot().models]:  # while the palette was open
            self.notify(f"{name} is no longer in the config.", severity="warning", markup=False)
            return
        self._table.selected = name
        await self.run_action(action)
        self.changed()

    async def action_log(self) -> None:
        """The selected model's log."""
        from vllm_sleep_tui.tui.screens.logs import show_log

        if (name := self.acted_on()) is not None:
            await show_log(self, self.fleet, name)

    @work
    async def action_events(self) -> None:
        """What happened; the event that was chosen there is looked at on the timeline."""
        from vllm_sleep_tui.tui.screens.events import EventScreen

        event = await self.app.push_screen_wait(EventScreen(self.fleet))
        if event is None:
            return
        names = [model.name for model in self.fleet.snapshot().models]
        if event.models and event.models[0] in names:
            self._table.selected = event.models[0]
        view = self.view()
        if view.snapshot.time - event.time > WINDOWS[-1].seconds:
            words = (
                f"That was before the {WINDOWS[-1].words} that the timeline goes back; its log: n, then l."
            )
            self.notify(words, severity="warning", markup=False)
        else:
            self.query_one(Timeline).look_at(view, event.time)
            self._look_back()
        self.changed()

    def action_gpus(self) -> None:
        """The screen of the GPUs."""
        from vllm_sleep_tui.tui.screens.gpus import GpuScreen

        self.app.push_screen(GpuScreen(self.fleet, self.readings))

    def action_gateway(self) -> None:
        """The screen of the gateway, with the models' own addresses."""
        from vllm_sleep_tui.tui.app import PanelApp  # which imports this
        from vllm_sleep_tui.tui.screens.gateway import GatewayScreen

        assert isinstance(self.app, PanelApp)
        if self.app.post is None:
            self.notify("This panel has no gateway.", markup=False)
            return
        models = self.fleet.snapshot().models
        addresses = [(model.name, f"http://127.0.0.1:{model.port}/v1") for model in models if model.port]
        self.app.push_screen(GatewayScreen(self.app.post, addresses, self.fleet.snapshot))

    def action_bench(self) -> None:
        """The benchmark's screen."""
        from vllm_sleep_tui.tui.screens.bench import BenchScreen
        from vllm_sleep_tui.tui.state.bench_runner import BenchRunner

        if self._bench is None:
            self._bench = BenchRunner(self.fleet, self.operations)
        self.app.push_screen(BenchScreen(self.fleet, self._bench))

    def action_advice(self) -> None:
        """What to do with each model."""
        from vllm_sleep_tui.tui.screens.advice import AdviceScreen

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
        self.app.push_screen(Help(read_only=self.fleet.snapshot().read_only))
