"""The table of models."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message

from vllm_sleep_tui.fleet.snapshot import ModelSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, Shown, Span, left, right
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.words import LOOKS, memory_words, state_words
from vllm_sleep_tui.units import NONE, clock, took


class Column(NamedTuple):
    """A column of numbers."""

    title: str
    width: int


_VRAM = Column("VRAM", 6)
_RAM = Column("RAM", 7)
_PINNED = Column("pinned", 8)
_FOR = Column("for", 8)
_LAST = Column("switch", 9)
_COLUMNS = (_VRAM, _RAM, _PINNED, _FOR, _LAST)
_DROP_ORDER = (_PINNED, _RAM, _LAST, _FOR)
_MARK_WIDTH = 2
_STATE_WIDTH = 18
_MIN_STATE_WIDTH = 13


class Layout(NamedTuple):
    """The columns that fit."""

    name: int
    state: int
    columns: tuple[Column, ...]


def layout_for(width: int, longest_name: int) -> Layout:
    """Which columns fit in `width` cells; names give way last, the VRAM never."""
    name = min(max(longest_name, 5), 24) + 1
    columns = list(_COLUMNS)
    state = _STATE_WIDTH
    for dropped in (None, *_DROP_ORDER):
        if dropped is not None:
            columns.remove(dropped)
        numbers = sum(column.width for column in columns)
        for state in (_STATE_WIDTH, _MIN_STATE_WIDTH):
            if _MARK_WIDTH + name + state + numbers <= width:
                spare = width - _MARK_WIDTH - name - state - numbers
                return Layout(name + min(spare // 2, 8), state + min(spare - spare // 2, 6), tuple(columns))
    return Layout(max(4, width - _MARK_WIDTH - state - _VRAM.width), state, (_VRAM,))


def header(layout: Layout) -> Line:
    """The titles of the columns."""
    numbers = "".join(right(column.title, column.width) for column in layout.columns)
    return (
        (" " * _MARK_WIDTH + left("model", layout.name) + left("state", layout.state) + numbers, "muted"),
    )


def _cell(column: Column, model: ModelSnapshot, now: float) -> str:
    if column is _VRAM:
        return memory_words(model.vram_bytes)
    if column is _RAM:
        return memory_words(model.ram_bytes)
    if column is _PINNED:
        return memory_words(model.pinned_bytes)
    if column is _FOR:
        return NONE if model.since is None or model.state is State.STOPPED else clock(now - model.since)
    return NONE if model.last_switch is None else took(model.last_switch.total)


def row(view: View, model: ModelSnapshot, layout: Layout, *, is_focused: bool) -> Line:
    """One model."""
    is_selected = model.name == view.selected
    ground = " on-panel" if is_selected else ""
    look = LOOKS[model.state]
    state = state_words(model.state, model.level)
    if model.state is State.STARTING and model.phase is not None:
        state = str(model.phase)
    spans: list[Span] = [
        ("▶ " if is_selected and is_focused else "▸ " if is_selected else "  ", f"accent{ground}"),
        (left(model.name, layout.name), f"{view.colors[model.name]} bold{ground}"),
        (left(f"{look.glyph} {state}", layout.state - 1), f"{look.paint}{ground}"),
        ("!" if model.name in view.troubles else " ", f"bad bold{ground}"),
    ]
    for column in layout.columns:
        text = _cell(column, model, view.snapshot.time)
        spans.append((right(text, column.width), ("muted" if text == NONE else "text") + ground))
    return tuple(spans)


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
        self.selected: str | None = None
        """The model under the cursor; the key after the one that moved it must find it moved."""

    def draw(self, view: View, size: Size) -> list[Line]:
        """The titles and as many rows as fit, the selected one among them."""
        models = view.snapshot.models
        layout = layout_for(size.width, max((len(model.name) for model in models), default=0))
        rows = [row(view, model, layout, is_focused=self.has_focus) for model in models]
        self._first = self._scrolled_to(len(rows), size.height - 1)
        last = self._first + max(1, size.height - 1)
        return [header(layout), *rows[self._first : last]]

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """One line for each model and one for the titles."""
        return 1 + (len(self._view.snapshot.models) if self._view else 0)

    def _scrolled_to(self, count: int, room: int) -> int:
        if room <= 0 or count <= room:
            return 0
        index = self._index()
        return min(max(self._first, index - room + 1), index, count - room)

    def _names(self) -> list[str]:
        return [model.name for model in self._view.snapshot.models] if self._view else []

    def _index(self) -> int:
        names = self._names()
        return names.index(self.selected) if self.selected in names else 0

    def action_move(self, step: int) -> None:
        """Move the cursor, stopping at the ends."""
        if names := self._names():
            self._select(names[min(len(names) - 1, max(0, self._index() + step))])

    def _select(self, name: str) -> None:
        self.selected = name
        self.post_message(self.Selected())

    def on_click(self, event: events.Click) -> None:
        """A click selects; a double click does what enter does."""
        index = event.get_content_offset_capture(self).y - 1 + self._first
        names = self._names()
        if not 0 <= index < len(names):
            return
        self._select(names[index])
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
