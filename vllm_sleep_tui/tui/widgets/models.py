"""The table of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.widgets import Input

from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.states import SETTLED, State
from vllm_sleep_tui.tui.drawing.paint import Line, Shown, Span, left, middle, right, rule
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.words import LOOKS, memory_words, state_words
from vllm_sleep_tui.units import NONE, clock, counted, start_time, took

_MARK_WIDTH = 4
"""The cursor and the model's swatch."""
_STATE_WIDTH = 18
_MIN_STATE_WIDTH = 13
_MIN_NAME, _MAX_NAME, _WIDE_NAME = 5, 24, 40
"""Cells of a name; the last in a table of WIDE cells."""
_WIDE = 100
_SWATCHES = "▌▐▀▄▚▞▛▟"
"""Another shape where the colours begin again."""
_LEVELS = "▁▂▃▄▅▆▇█"


def wakes_in(past: Past, model: ModelSnapshot) -> str:
    """What the next wake of a model takes, by those that were; of one that does not run, its start."""
    takes = past.takes.get(model.name, {})
    if model.state in {State.STOPPED, State.FAILED}:
        return f"start {start_time(takes['start'])}" if "start" in takes else NONE
    if model.state in {State.STARTING, State.STOPPING}:
        return NONE
    if model.is_external:  # nobody sleeps for it, so that a switch to it is a wake
        last = model.last_switch
        return took(last.total) if last is not None and last.is_wake else NONE
    wake = takes.get(f"wake{model.resolved_level if model.level is None else model.level}")
    return NONE if wake is None else took(wake)


def _tokens(view: View, model: ModelSnapshot) -> str:
    """The rate now, behind its last seconds as a small picture."""
    course = view.tokens.get(model.name, ())
    serving = model.serving
    if serving is None or serving.generation_tokens_per_s is None:
        return NONE
    top = max(course, default=0.0)
    # One moment has no course, and of less than a token a full bar would stand beside a 0.
    is_course = len(course) > 1 and top >= 1
    picture = "".join(_LEVELS[min(7, int(8 * value / top))] for value in course) if is_course else ""
    return f"{picture} {serving.generation_tokens_per_s:.0f}".strip()


def _time_in_state(view: View, model: ModelSnapshot) -> str:
    if model.since is None or model.state is State.STOPPED:
        return NONE
    seconds = view.snapshot.time - model.since
    if model.state in SETTLED and seconds < 3600:
        # Nobody waits for it: seconds that count on in each row would be half of what an idle panel costs.
        return "<1 min" if seconds < 60 else f"{seconds // 60:.0f} min"
    return clock(seconds)


def _queue(_: View, model: ModelSnapshot) -> str:
    serving = model.serving
    if serving is None or serving.running is None:
        return NONE
    return f"{serving.running}+{serving.waiting or 0}"


def _kv_use(_: View, model: ModelSnapshot) -> str:
    kv_use = None if model.serving is None else model.serving.kv_use
    return NONE if kv_use is None else f"{kv_use * 100:.0f} %"


class Column(NamedTuple):
    """A column of figures."""

    title: str
    width: int
    stays: int
    """Where not all have room, the column with the least of these leaves first; the last one never does."""
    text: Callable[[View, ModelSnapshot], str]
    """What stands in the row of a model."""


_RAM_STAYS = 5
_GPU = Column("GPU", 5, 0, lambda _, model: ",".join(map(str, model.gpus)) or NONE)
_COLUMNS = (
    _GPU,
    Column("VRAM", 6, 7, lambda _, model: memory_words(model.vram_bytes)),
    Column("RAM", 6, _RAM_STAYS, lambda _, model: memory_words(model.ram_bytes)),
    Column("pinned", 8, 1, lambda _, model: memory_words(model.pinned_bytes)),
    Column("for", 8, 3, _time_in_state),
    Column("wakes in", 12, 6, lambda view, model: wakes_in(view.past, model)),
    Column("tok/s", 12, 4, _tokens),
    Column("KV", 6, 2, _kv_use),
    Column("queue", 7, 1, _queue),
)
"""From left to right; a new one is a row of this table."""


class Layout(NamedTuple):
    """The columns that fit."""

    name: int
    state: int
    columns: tuple[Column, ...]


def layout_for(width: int, longest_name: int, gpus: int = 1) -> Layout:
    """Which columns fit in `width` cells; names give way last, the last column never.

    Where there are several GPUs, a model's own says more than the RAM it takes.
    """
    name = min(max(longest_name, _MIN_NAME), _WIDE_NAME if width >= _WIDE else _MAX_NAME) + 1
    columns = list(_COLUMNS)
    stays: dict[Column, float] = {column: column.stays for column in columns}
    if gpus > 1:
        stays[_GPU] = _RAM_STAYS + 0.5
    while True:
        numbers = sum(column.width for column in columns)
        spare = width - _MARK_WIDTH - name - _MIN_STATE_WIDTH - numbers
        if spare >= 0:
            gap = min(spare, 1)  # as between all columns, before states take what they would like
            state = min(_MIN_STATE_WIDTH + spare - gap, _STATE_WIDTH)
            rest = spare - gap - (state - _MIN_STATE_WIDTH)
            return Layout(name + gap + min(rest // 2, 7), state + min(rest - rest // 2, 6), tuple(columns))
        if len(columns) == 1:
            name = max(4, width - _MARK_WIDTH - _MIN_STATE_WIDTH - numbers)
            return Layout(name, _MIN_STATE_WIDTH, tuple(columns))
        columns.remove(min(columns, key=stays.__getitem__))


def header(layout: Layout, shown: str) -> Line:
    """The titles of the columns; `shown` says which rows are, if not all, and in which order."""
    numbers = "".join(right(column.title, column.width) for column in layout.columns)
    names = f"model  {shown}".rstrip()
    if len(names) < layout.name:  # else what is shown takes the place of a word that states do without
        names = left(names, layout.name) + "state"
    titles = left(names, layout.name + layout.state)
    return ((" " * _MARK_WIDTH + titles + numbers, "muted"),)


def swatch(view: View, name: str) -> str:
    """The shape beside a model's colour, which tells apart those that share one."""
    return _SWATCHES[view.shapes[name] % len(_SWATCHES)]


def row(view: View, model: ModelSnapshot, layout: Layout, *, is_selected: bool, is_focused: bool) -> Line:
    """One model: its colour in a swatch, its state in the state's colour, everything else quiet."""
    ground = " on-panel" if is_selected else ""
    look = LOOKS[model.state]
    state = state_words(model.state, model.level)
    if model.state is State.STARTING and model.phase is not None:
        state = str(model.phase)
    spans: list[Span] = [
        ("▶ " if is_selected and is_focused else "▸ " if is_selected else "  ", f"accent{ground}"),
        (f"{swatch(view, model.name)} ", f"{view.colors[model.name]}{ground}"),
        (left(middle(model.name, layout.name - 1), layout.name), f"text bold{ground}"),
        (left(f"{look.glyph} {state}", layout.state - 1), f"{look.paint}{ground}"),
        ("!" if model.name in view.troubles else " ", f"bad bold{ground}"),
    ]
    for column in layout.columns:
        text = column.text(view, model)
        spans.append((right(text, column.width), ("muted" if text == NONE else "text") + ground))
    return tuple(spans)


class Order(NamedTuple):
    """A way to sort the rows."""

    name: str
    key: Callable[[ModelSnapshot], Any] | None


_URGENCY = (
    State.FAILED,
    State.AWAKE,
    State.WAKING,
    State.FALLING_ASLEEP,
    State.STARTING,
    State.STOPPING,
    State.ASLEEP,
    State.STOPPED,
)
ORDERS = (
    Order("the config", None),
    Order("state", lambda model: _URGENCY.index(model.state)),
    Order("GPU", lambda model: model.gpus),
    Order("VRAM", lambda model: -(model.vram_bytes or 0)),
    Order("name", lambda model: model.name.lower()),
)


def _matches(model: ModelSnapshot, wanted: str) -> bool:
    wanted = wanted.lower()
    if wanted.startswith("gpu ") and wanted[4:].isdecimal():
        return int(wanted[4:]) in model.gpus
    return wanted in f"{model.name} {model.source} {LOOKS[model.state].word}".lower()


def _group_line(gpus: tuple[int, ...], models: Sequence[ModelSnapshot], width: int) -> Line:
    """The title of the models of some GPUs, with how many there are and how many are awake."""
    members = [model for model in models if model.gpus == gpus]
    awake = sum(model.state is State.AWAKE for model in members)
    names = f"GPU {', '.join(map(str, gpus))}" if gpus else "no GPU"
    return rule([(names, "text"), (f"  {counted(len(members), 'model')}, {awake} awake", "muted")], width)


class ModelTable(Shown, can_focus=True):
    """The models, one a row, with a cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("down,j", "move(1)", "down", show=False),
        Binding("home", "move(-999)", "first", show=False),
        Binding("end", "move(999)", "last", show=False),
    ]

    class Selected(Message):
        """The cursor went to another model."""

    class Chosen(Message):
        """The selected row was clicked once more."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._first = 0
        self._seen: list[str | None] = []
        """The model of each row on the screen; None: the title of a group."""
        self.selected: str | None = None
        """The model under the cursor; the key after the one that moved it must find it moved."""

        self.wanted = ""
        """What the name, the source, the state or a GPU (`gpu 1`) of a model must hold to have a row."""
        self.order = ORDERS[0]

    def find(self, wanted: str) -> None:
        """Show only what holds this text; the cursor goes to the first of it if its model has no row now."""
        self.wanted, self._first = wanted, 0
        models = self._view.snapshot.models if self._view else ()
        names = [model.name for model in models if _matches(model, wanted)]
        if self.selected not in names:
            # With no row, keys act on nobody.
            self._select(names[0] if names else None)
        self.refresh(layout=True)
        self.repaint()

    @property
    def no_match(self) -> str:
        """Why there is no row, and what brings them back."""
        count = len(self._view.snapshot.models) if self._view else 0
        return f"No model matches /{self.wanted}; esc shows all {count}."

    def reorder(self) -> None:
        """Sort the rows by the next of the orders."""
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self._first = 0
        self.refresh(layout=True)
        self.repaint()

    def _models(self) -> list[ModelSnapshot]:
        """Those that have a row, in their order."""
        if self._view is None:
            return []
        # The selected one keeps its row when its state leaves what is looked for: keys act on it.
        models = [
            model
            for model in self._view.snapshot.models
            if model.name == self.selected or _matches(model, self.wanted)
        ]
        return models if self.order.key is None else sorted(models, key=self.order.key)

    def draw(self, view: View, size: Size) -> list[Line]:
        """The titles and as many rows as fit, the selected one among them."""
        models = self._models()
        if not models and view.snapshot.models:
            return [((self.no_match, "warning"),)]
        longest, gpus = max((len(model.name) for model in models), default=0), len(view.snapshot.gpus)
        layout = layout_for(size.width, longest, gpus)
        rows = self._rows(models)
        self._first = self._scrolled_to(rows, size.height - 1)
        last = self._first + max(1, size.height - 1)
        seen = rows[self._first : last]
        lines = [
            row(view, each, layout, is_selected=each.name == self.selected, is_focused=self.has_focus)
            if isinstance(each, ModelSnapshot)
            else _group_line(each, models, size.width)
            for each in seen
        ]
        self._seen = [each.name if isinstance(each, ModelSnapshot) else None for each in seen]
        count = sum(isinstance(each, ModelSnapshot) for each in rows[: self._first])
        places = [number for number, name in enumerate(filter(None, self._seen), count + 1)]
        shown = f"{places[0]}–{places[-1]} of {len(models)}" if places and len(places) < len(models) else ""
        by = "" if self.order.key is None else f"by {self.order.name}"
        return [header(layout, ", ".join(filter(None, [shown, by]))), *lines]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """One line for each model and group, and one for the titles."""
        return 1 + self.rows

    @property
    def rows(self) -> int:
        """The lines below the titles, if there is room for all."""
        return len(self._rows(self._models()))

    def _rows(self, models: Sequence[ModelSnapshot]) -> list[ModelSnapshot | tuple[int, ...]]:
        """What stands in the table: models, and before the first one of each group its GPUs."""
        if self.order.name != "GPU":
            return list(models)
        rows: list[ModelSnapshot | tuple[int, ...]] = []
        for gpus, group in groupby(models, key=lambda model: model.gpus):
            rows += [gpus, *group]
        return rows

    def _scrolled_to(self, rows: Sequence[ModelSnapshot | tuple[int, ...]], room: int) -> int:
        count = len(rows)
        if room <= 0 or count <= room:
            return 0
        names = [each.name if isinstance(each, ModelSnapshot) else None for each in rows]
        index = names.index(self.selected) if self.selected in names else 0
        return min(max(self._first, index - room + 1), index, count - room)

    def _names(self) -> list[str]:
        return [model.name for model in self._models()]

    def _index(self) -> int:
        names = self._names()
        return names.index(self.selected) if self.selected in names else 0

    def action_move(self, step: int) -> None:
        """Move the cursor, stopping at the ends."""
        if names := self._names():
            self._select(names[min(len(names) - 1, max(0, self._index() + step))])

    def _select(self, name: str | None) -> None:
        self.selected = name
        self.repaint()  # at once; what the rest of the screen says of it takes a look at the fleet
        self.post_message(self.Selected())

    def on_click(self, event: events.Click) -> None:
        """A click selects; a double click does what enter does."""
        index = event.get_content_offset_capture(self).y - 1
        name = self._seen[index] if 0 <= index < len(self._seen) else None
        if name is None:
            return
        self._select(name)
        if event.chain == 2:
            self.post_message(self.Chosen())

    def on_mouse_scroll_down(self) -> None:
        """The wheel moves the cursor."""
        self.action_move(1)

    def on_mouse_scroll_up(self) -> None:
        """The wheel moves the cursor."""
        self.action_move(-1)

    def on_focus(self) -> None:
        """The cursor looks different with the focus."""
        self.repaint()

    def on_blur(self) -> None:
        """The cursor looks different without the focus."""
        self.repaint()


class FindInput(Input):
    """The line above the table that says which models have a row; the arrows move the table's cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "screen.move_selection(-1)", "up", show=False),
        Binding("down", "screen.move_selection(1)", "down", show=False),
    ]
