"""What was said, as rows that the widget paints itself: its cost does not grow with the conversation."""

from __future__ import annotations

from bisect import bisect_right

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip
from textual.timer import Timer

from vllm_sleep_tui.tui.drawing.code import Code, CodeRow
from vllm_sleep_tui.tui.drawing.flow import BLANK, LINE, Row
from vllm_sleep_tui.tui.drawing.paint import Line
from vllm_sleep_tui.tui.drawing.turns import Answer, FoldRow, Turn
from vllm_sleep_tui.tui.theme import palette_of

BAR = "▌ "
"""In the colour of who speaks, before each row."""
IDLE_SECONDS = 0.05
WORK_SECONDS = 0.008
"""How long one piece of work that nobody waits for may hold up a key."""


class Place:
    """Where the rows of a list of turns begin; of a turn that was not laid out yet it is a guess."""

    def __init__(self) -> None:
        self.heights: list[int] = []
        self.widths: list[int] = []
        self.starts: list[int] = [0]

    def put(self, number: int, height: int, width: int) -> None:
        """A turn's height, the blank row after it included."""
        if number == len(self.heights):
            self.heights.append(height)
            self.widths.append(width)
            self.starts.append(self.starts[-1] + height)
            return
        change = height - self.heights[number]
        self.heights[number], self.widths[number] = height, width
        if change:
            for at in range(number + 1, len(self.starts)):
                self.starts[at] += change

    @property
    def total(self) -> int:
        """All rows."""
        return self.starts[-1]

    def at(self, row: int) -> int:
        """The turn that a row belongs to."""
        return min(max(0, bisect_right(self.starts, row) - 1), len(self.heights) - 1)


class Transcript(ScrollView, can_focus=True):
    """Shows one list of turns; `show` turns to another one, `grew` tells that a turn has more to show."""

    class Folded(Message):
        """The person clicked the row that tells of an answer's reasoning."""

        def __init__(self, answer: Answer) -> None:
            super().__init__()
            self.answer = answer

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._turns: list[Turn] = []
        self._place = Place()
        self._hint: Line = ()
        self._follows = True
        self._uncolored: set[Code] = set()
        self._hovered: int | None = None
        self._idle: Timer | None = None

    def on_mount(self) -> None:
        """What nobody waits for is done bit by bit."""
        super().on_mount()  # type: ignore[no-untyped-call]
        self._idle = self.set_interval(IDLE_SECONDS, self._work, pause=True)

    @property
    def allow_select(self) -> bool:
        """The mouse selects text in it."""
        return True

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────

    def show(self, turns: list[Turn], hint: Line, *, at: int | None = None) -> None:
        """Turn to these turns; at their end, or with the row `at` at the top."""
        self._turns, self._hint = turns, hint
        self._place = Place()
        self._follows = at is None
        if self._inner:
            self._guess()
            self._settle(at)
        self.refresh()

    @property
    def row_at_top(self) -> int | None:
        """The first row that is seen; None if the end is followed."""
        return None if self._follows else self.scroll_offset.y

    def grew(self, turn: Turn | None = None) -> None:
        """A turn, or the last, has more to show; turns that are new are shown too."""
        if not self._inner:
            return
        top = self.scroll_offset.y
        number = self._turns.index(turn) if turn is not None else len(self._turns) - 1
        for each in range(min(number, len(self._place.heights)), len(self._turns)):
            if each == number or each >= len(self._place.heights):
                self._lay(each)
        self._resized(top)

    def to_end(self) -> None:
        """Go to the end, and follow it."""
        self._follows = True
        self._resized(self.scroll_offset.y)

    def scroll_pages(self, pages: float) -> None:
        """Go back or on by so much of what is seen."""
        self.scroll_relative(y=round(pages * self._height) or 1, animate=False, immediate=True)

    @property
    def _inner(self) -> int:
        """The cells that the text has; 0 before there is room for any."""
        return max(0, self.scrollable_content_region.width - len(BAR) - 1) if self.size.width else 0

    @property
    def _height(self) -> int:
        return self.scrollable_content_region.height

    def _lay(self, number: int) -> None:
        inner = self._inner
        self._place.put(number, self._turns[number].lay(inner) + 1, inner)

    def _guess(self) -> None:
        """Rows of which nothing is known yet: as many as there were in the width before."""
        before = self._place
        self._place = Place()
        for number in range(len(self._turns)):
            height = 8
            if number < len(before.heights) and before.heights[number]:
                height = max(2, before.heights[number] * max(1, before.widths[number]) // max(1, self._inner))
            self._place.put(number, height, 0)

    def _settle(self, top: int | None) -> None:
        """Lay out what is seen, and go on with the rest bit by bit."""
        for _ in range(1 + self._height):
            at = self._place.total - self._height if top is None else top
            if not self._lay_seen(max(0, at)):
                break
        if self._idle is not None:
            self._idle.resume()
        self._resized(self._place.total if top is None else top)

    def _lay_seen(self, top: int) -> bool:
        """Lay out the turns of a screen that begins at a row; False if they are."""
        if not self._turns:
            return False
        inner, changed = self._inner, False
        for number in range(self._place.at(top), self._place.at(top + self._height) + 1):
            if self._place.widths[number] != inner:
                self._lay(number)
                changed = True
        return changed

    def _resized(self, top: int) -> None:
        """Take over how many rows there are, and stay at the end or where the person is."""
        self.virtual_size = Size(self._inner, self._place.total)
        if self._follows:
            self.scroll_end(animate=False, immediate=True, x_axis=False, force=True)
        elif top != self.scroll_offset.y:
            self.scroll_to(y=top, animate=False, immediate=True, force=True)
        self.refresh()

    def on_resize(self) -> None:
        """Rows of another width; what is seen stays, the rest follows bit by bit."""
        if not self._inner or (self._place.widths and self._place.widths[-1] == self._inner):
            self._resized(self.scroll_offset.y)
            return
        number = self._place.at(self.scroll_offset.y) if self._turns else 0
        within = self.scroll_offset.y - self._place.starts[number] if number < len(self._place.starts) else 0
        self._guess()
        if self._follows or not self._turns:
            self._settle(None)
        else:
            self._lay(number)
            self._settle(self._place.starts[number] + min(within, self._place.heights[number] - 1))

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Follow the end again once the person is there; lay out what comes into sight."""
        super().watch_scroll_y(old_value, new_value)
        if round(old_value) == round(new_value) or not self._inner:
            return
        self._follows = round(new_value) >= self.max_scroll_y
        self._anchored_lay(round(new_value))

    def _anchored_lay(self, top: int) -> None:
        """Lay out what a screen shows; what stands above it may get other heights, and nothing moves."""
        if not self._turns:
            return
        number = self._place.at(top + self._height)
        below = self._place.starts[number + 1] - top
        was = self._place.total
        if self._lay_seen(top) and self._place.total != was:
            self._resized(max(0, self._place.starts[number + 1] - below))

    def _work(self) -> None:
        """One piece of what nobody waits for: colours of code that is seen, turns that are not."""
        for code in list(self._uncolored):
            if code.color(WORK_SECONDS):
                self.refresh()
                return
            self._uncolored.discard(code)
            self.refresh()
        inner = self._inner
        stale = [number for number, width in enumerate(self._place.widths) if width != inner]
        if stale and inner:
            number = stale[-1]
            top, was = self.scroll_offset.y, self._place.heights[number]
            is_above = self._place.starts[number] < top
            self._lay(number)
            change = self._place.heights[number] - was
            if change:
                self._resized(top + change if is_above else top)
        elif self._idle is not None and not self._uncolored:
            self._idle.pause()

    # ── painting ─────────────────────────────────────────────────────────────────────────────────────────

    def _row(self, y: int) -> tuple[Row, str]:
        """A row and the paint of who speaks; no paint between two turns."""
        if not self._turns or not 0 <= y < self._place.total:
            return BLANK, ""
        number = self._place.at(y)
        within = y - self._place.starts[number]
        if within >= self._place.heights[number] - 1:
            return BLANK, ""
        return self._turns[number].row(within), self._turns[number].paint

    def render_line(self, y: int) -> Strip:
        """One line for the compositor."""
        y += self.scroll_offset.y
        base, style = self.rich_style, palette_of(self).style
        width = self.scrollable_content_region.width
        if not self._turns:
            segments = [Segment(text, base + style(paint)) for text, paint in self._hint] if y == 0 else []
            return Strip(segments).adjust_cell_length(width, base)
        row, paint = self._row(y)
        segments = [Segment(BAR if paint else "  ", base + style(paint))]
        segments += [Segment(text, base + style(look)) for text, look in row.spans()]
        if isinstance(row, CodeRow) and row.code.is_uncolored:
            self._uncolored.add(row.code)
            if self._idle is not None:
                self._idle.resume()
        span = None if (selection := self.text_selection) is None else selection.get_span(y)
        if span is not None:
            segments = _selected(segments, *span, self.screen.get_component_rich_style("screen--selection"))
        return Strip(segments).adjust_cell_length(width, base).apply_offsets(0, y)

    # ── the mouse, and what is copied ────────────────────────────────────────────────────────────────────

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """What is selected, without bars, and with the line's ends that the text has."""
        last = self._place.total - 1
        start = selection.start.y if selection.start is not None else 0
        end = min(last, selection.end.y if selection.end is not None else last)
        parts: list[str] = []
        for y in range(max(0, start), end + 1):
            number = self._place.at(y)
            if self._place.widths[number] != self._inner:
                self._lay(number)
            row, _ = self._row(y)
            text = "".join(part for part, _ in row.spans())
            first, until = selection.get_span(y) or (0, -1)
            before = row.indent if parts and not parts[-1].endswith(LINE) else 0
            if isinstance(row, CodeRow):
                text, before = text.rstrip(), row.indent
            until = len(text) if until < 0 else until - len(BAR)
            parts.append(text[max(before, first - len(BAR)) : max(0, until)])
            parts.append(row.joint)
        return ("".join(parts[:-1]), LINE) if parts else None

    def selection_updated(self, selection: Selection | None) -> None:
        """Paint what is selected."""
        self.refresh()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Remember where the mouse is."""
        self._hovered = event.y + self.scroll_offset.y

    def on_leave(self) -> None:
        """The mouse is elsewhere."""
        self._hovered = None

    def on_click(self, event: events.Click) -> None:
        """Show or hide the reasoning."""
        y = event.get_content_offset_capture(self).y + self.scroll_offset.y
        row, _ = self._row(y)
        turn = self._turns[self._place.at(y)] if self._turns else None
        if isinstance(row, FoldRow) and isinstance(turn, Answer):
            self.post_message(self.Folded(turn))

    def answer_in_sight(self) -> Answer | None:
        """The answer under the mouse, else the last one."""
        turns = self._turns
        if self._hovered is not None and turns and self._hovered < self._place.total:
            turns = turns[: self._place.at(self._hovered) + 1]
        return next((turn for turn in reversed(turns) if isinstance(turn, Answer)), None)

    def code_in_sight(self) -> Code | None:
        """The block of code under the mouse, else the last one that is seen or stands above that."""
        if not self._turns:
            return None
        end = self.scroll_offset.y + self._height - 1
        y = end if self._hovered is None else self._hovered
        for number in range(self._place.at(y), -1, -1):
            row = y - self._place.starts[number]
            if (code := self._turns[number].code_near(row)) is not None:
                return code
        return None


def _selected(segments: list[Segment], start: int, end: int, look: Style) -> list[Segment]:
    """The segments with the characters from `start` to `end` (-1: all that follow) in another look."""
    painted: list[Segment] = []
    at = 0
    for text, style, _ in segments:
        first = max(0, min(len(text), start - at))
        last = len(text) if end < 0 else max(first, min(len(text), end - at))
        for part, own in ((text[:first], style), (text[first:last], look), (text[last:], style)):
            if part:
                painted.append(Segment(part, own))
        at += len(text)
    return painted
