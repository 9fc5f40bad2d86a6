"""The screen of events: what happened while nobody looked, and the way to its log and its moment."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.screen import Screen

from vllm_sleep_tui.fleet.events import FleetEvent, Kind, Outcome
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, Span, cut_line, left, rule, wrap
from vllm_sleep_tui.tui.screens.logs import show_log
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.tui.widgets.bands import FollowingBand, KeyLine
from vllm_sleep_tui.tui.words import LOOKS
from vllm_sleep_tui.units import time_of_day

KEPT_EVENTS = 1_000
BATCH_SECONDS = 0.2
"""A burst of events is painted once."""
_KEYS = "esc back   ⏎ its moment on the timeline   l its log   f failures only   ↑ ↓ move   end latest"
_DETAIL_LINES = 4
_NAME_WIDTH = 24


def _mark(event: FleetEvent) -> Span:
    if event.kind is Kind.STATE and event.state is not None:
        look = LOOKS[event.state]
        return look.glyph, look.paint
    if event.kind is Kind.CONFIG:
        return "≡", "accent"
    if event.is_failure:
        return "✗", "bad"
    return ("–", "warning") if event.outcome is Outcome.CANCELLED else ("✓", "muted")


def event_line(event: FleetEvent, name_width: int, now: float, width: int, ground: str = "") -> Line:
    """One event in one line: when, who, what."""
    glyph, paint = _mark(event)
    words = "bad" if event.is_failure else "text" if event.kind is Kind.STATE else "muted"
    spans = (
        (f"{time_of_day(event.time, now)}  ", f"muted{ground}"),
        (left(event.model, name_width) + " ", f"text bold{ground}"),
        (f"{glyph} ", paint + ground),
        (one_line(event.sentence()), words + ground),
    )
    line = cut_line(spans, width)
    used = sum(len(text) for text, _ in line)
    return (*line, (" " * max(0, width - used), ground.strip())) if ground else line


class EventList(Painted, can_focus=True):
    """The events, the latest at the bottom, with a cursor; below them the selected one in full."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "up", show=False),
        Binding("down,j", "move(1)", "down", show=False),
        Binding("pageup", "move(-20)", "page up", show=False),
        Binding("pagedown", "move(20)", "page down", show=False),
        Binding("home", "move(-99999)", "first", show=False),
        Binding("end,G", "move(99999)", "latest", show=False),
    ]

    class Chosen(Message):
        """The selected event was clicked once more."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._kept: deque[FleetEvent] = deque(maxlen=KEPT_EVENTS)
        self._failures: deque[FleetEvent] = deque(maxlen=KEPT_EVENTS)
        """By themselves, because a busy night has more switches than are kept here."""
        self._cursor: int | None = None
        """The id of the selected event; None: the latest, whatever comes."""
        self._top = 0
        self._is_read = False
        self.only_failures = False

    def begin(self, failures: Sequence[FleetEvent]) -> None:
        """Take the failures of before; what happened comes by `add`."""
        self._failures.extend(failures)

    def add(self, events: Sequence[FleetEvent]) -> None:
        """Append what happened, the oldest first."""
        self._kept.extend(events)
        last = self._failures[-1].id if self._failures else 0
        self._failures.extend(event for event in events if event.is_failure and event.id > last)
        self._is_read = True
        self.repaint()

    @property
    def latest_id(self) -> int:
        """The id of the last event that is here; 0 without any."""
        return self._kept[-1].id if self._kept else 0

    def _shown(self) -> Sequence[FleetEvent]:
        return self._failures if self.only_failures else self._kept

    def _index(self, shown: Sequence[FleetEvent]) -> int:
        """Where the cursor is: at its event, or at the one that came after it if that one is not shown."""
        if self._cursor is None:
            return len(shown) - 1
        return min(len(shown) - 1, bisect_left(shown, self._cursor, key=lambda event: event.id))

    @property
    def selected(self) -> FleetEvent | None:
        """The event under the cursor."""
        shown = self._shown()
        return shown[self._index(shown)] if shown else None

    def paint(self, size: Size) -> list[Line]:
        """As many events as fit, then the selected one in full."""
        shown, now = self._shown(), time.time()
        if not shown:
            words = "No failure is on record." if self.only_failures else "Nothing has happened yet."
            return [((words if self._is_read else "Reading the history …", "muted"),)]
        index = self._index(shown)
        chosen = shown[index]
        whole = wrap(one_line(chosen.sentence()), size.width)[:_DETAIL_LINES]
        room = max(1, size.height - len(whole) - 1)
        self._top = max(0, min(max(self._top, index - room + 1), index, len(shown) - room))
        window = list(islice(shown, self._top, self._top + room))
        name_width = min(_NAME_WIDTH, size.width // 4, max(len(event.model) for event in window))
        lines = [
            event_line(event, name_width, now, size.width, " on-panel" if at == index else "")
            for at, event in enumerate(window, self._top)
        ]
        lines += [((" ", ""),)] * (room - len(lines))
        chosen = shown[index]
        who = f"by process {chosen.pid}" if chosen.pid is not None else ""
        who = "by this panel" if chosen.pid == os.getpid() else who
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(chosen.time))
        title = [(f"{chosen.model} ", "text bold"), (f"{moment} {who}".rstrip(), "muted")]
        lines.append(rule(title, size.width))
        return lines + [((line, "bad" if chosen.is_failure else "text"),) for line in whole]

    def action_move(self, step: int) -> None:
        """Move the cursor, stopping at the ends; at the latest it follows."""
        shown = self._shown()
        if not shown:
            return
        index = min(len(shown) - 1, max(0, self._index(shown) + step))
        self._cursor = None if index == len(shown) - 1 else shown[index].id
        self.repaint()

    def show_only_failures(self, only: bool) -> None:
        """Leave out what went well, or show all again; the cursor stays as near as it can."""
        if (selected := self.selected) is not None and self._cursor is not None:
            self._cursor = selected.id
        self.only_failures, self._top = only, 0
        self.repaint()

    def on_click(self, event: events.Click) -> None:
        """A click selects; a double click goes to the moment."""
        shown = self._shown()
        index = self._top + event.get_content_offset_capture(self).y
        if 0 <= index < len(shown):
            self._cursor = shown[index].id
            self.repaint()
            if event.chain == 2:
                self.post_message(self.Chosen())

    def on_mouse_scroll_down(self) -> None:
        """The wheel moves the cursor."""
        self.action_move(3)

    def on_mouse_scroll_up(self) -> None:
        """The wheel moves the cursor."""
        self.action_move(-3)


class EventScreen(Screen["FleetEvent | None"]):
    """The whole screen for what happened; it ends with the event whose moment shall be shown, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n,q", "dismiss", "back", show=False),
        Binding("enter", "moment", "moment", show=False),
        Binding("l", "log", "log", show=False),
        Binding("f", "failures", "failures", show=False),
    ]

    def __init__(self, fleet: PanelFleet, *, only_failures: bool = False) -> None:
        super().__init__()
        self._fleet = fleet
        self._list = EventList(id="events")
        self._list.only_failures = only_failures

    def compose(self) -> ComposeResult:
        """The events and the keys."""
        yield FollowingBand(self._fleet.snapshot, id="top")
        yield self._list
        yield KeyLine(_KEYS, id="keys")

    def on_mount(self) -> None:
        """Read what is kept, then follow."""
        self._list.focus()
        self._say_what_is_shown()
        self._follow()

    @work(exclusive=True)
    async def _follow(self) -> None:
        self._list.begin(await self._fleet.recent_events(KEPT_EVENTS, only_failures=True))
        self._list.add(await self._fleet.recent_events(KEPT_EVENTS))
        happened: list[FleetEvent] = []

        async def collect() -> None:
            async with contextlib.aclosing(self._fleet.events(self._list.latest_id)) as stream:
                async for event in stream:
                    happened.append(event)  # noqa: PERF401 - the stream has no end: it is read as it comes

        # A group, so that what nobody foresaw in the stream is told and does not just end the following.
        async with asyncio.TaskGroup() as group:
            collecting = group.create_task(collect())
            while not collecting.done():
                await asyncio.sleep(BATCH_SECONDS)
                if happened:
                    self._list.add(happened)
                    happened.clear()

    def _say_what_is_shown(self) -> None:
        self._list.border_title = "Events: failures only" if self._list.only_failures else "Events"

    def action_failures(self) -> None:
        """Only what failed, or everything again."""
        self._list.show_only_failures(not self._list.only_failures)
        self._say_what_is_shown()

    def action_moment(self) -> None:
        """Back to the dashboard, the timeline's cursor at the selected event."""
        if (event := self._list.selected) is not None:
            self.dismiss(event)

    def on_event_list_chosen(self) -> None:
        """A double click."""
        self.action_moment()

    async def action_log(self) -> None:
        """What the server said that the selected event is about, though others were started since."""
        if (event := self._list.selected) is not None and event.models:
            await show_log(self, self._fleet, event.models[0], event)
