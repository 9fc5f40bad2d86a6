"""Widgets that paint their own lines: a fifth of the cost of stock widgets that change all the time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region, Size
from textual.strip import Strip
from textual.widget import Widget

from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.theme import Palette, palette_of

Span = tuple[str, str]
"""A text and its paint (see `theme.Palette`)."""
Line = tuple[Span, ...]


def line_width(line: Iterable[Span]) -> int:
    """The cells that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def cut(text: str, width: int) -> str:
    """The text in at most `width` cells, ending in … if something was left off."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)).rstrip() + "…" if width > 0 else ""


def middle(text: str, width: int) -> str:
    """The text in at most `width` cells, its middle left out: names often differ at their ends."""
    if cell_len(text) <= width or width < 4:
        return cut(text, width)
    end = (width - 1) // 2
    tail = text
    while cell_len(tail) > end:
        tail = tail[1:]
    return set_cell_size(text, width - 1 - cell_len(tail)).rstrip() + "…" + tail


def left(text: str, width: int) -> str:
    """The text in exactly `width` cells, at the left."""
    return set_cell_size(cut(text, width), width)


def right(text: str, width: int) -> str:
    """The text in exactly `width` cells, at the right."""
    short = cut(text, width)
    return " " * (width - cell_len(short)) + short


def cut_line(line: Iterable[Span], width: int) -> Line:
    """The line in at most `width` cells."""
    spans: list[Span] = []
    room = width
    for text, paint in line:
        short = cut(text, room)
        spans.append((short, paint))
        room -= cell_len(short)
        if room <= 0 or short != text:
            break
    return tuple(spans)


def beside(facts: Iterable[str]) -> str:
    """Facts in a row that breaks between them alone, each separator at the end of what it follows."""
    return "\N{NO-BREAK SPACE}· ".join(fact.replace(" ", "\N{NO-BREAK SPACE}") for fact in facts)


def spread(start: Sequence[Span], end: Sequence[Span], width: int) -> Line:
    """`start` at the left and `end` at the right edge; `end` is dropped when both do not fit."""
    gap = width - line_width(start) - line_width(end)
    if gap < 1:
        return cut_line(start, width)
    return (*start, (" " * gap, ""), *end)


def rule(title: Iterable[Span], width: int) -> Line:
    """A thin line with a title, across the box."""
    line = cut_line((("─ ", "border"), *title, (" ", "")), width)
    used = sum(len(text) for text, _ in line)
    return (*line, ("─" * max(0, width - used), "border"))


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width` cells, broken at blanks; lines of the text stay apart."""
    lines: list[str] = []
    for paragraph in text.splitlines() or [""]:
        current = ""
        for word in paragraph.split(" "):
            joined = f"{current} {word}" if current else word
            if cell_len(joined) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            while cell_len(word) > width > 0:
                head = set_cell_size(word, width)
                lines.append(head)
                word = word[len(head) :]
            current = word
        lines.append(current)
    return lines


class Looks(dict[str, Style]):
    """The style of each paint over a widget's own, which the empty paint stands for."""

    def __init__(self, base: Style, palette: Palette) -> None:
        super().__init__({"": base})
        self._base, self._palette = base, palette

    def __missing__(self, paint: str) -> Style:
        self[paint] = style = self._base + self._palette.style(paint)
        return style


class Painted(Widget):
    """A widget that paints lines of spans and repaints only the lines that changed."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._lines: list[Line] = []
        self._looks: Looks | None = None

    def paint(self, size: Size) -> list[Line]:
        """The lines for a content area of this size."""
        raise NotImplementedError

    def repaint(self) -> None:
        """Paint again, and refresh what differs from what is on the screen."""
        if not self.is_attached or self.content_size.width == 0:
            return
        before, self._lines = self._lines, self.paint(self.content_size)
        if len(before) != len(self._lines):
            self.refresh(layout=self.styles.is_auto_height)
            return
        width = self.content_size.width
        changed = [y for y, (old, new) in enumerate(zip(before, self._lines, strict=True)) if old != new]
        if changed:
            self.refresh(*(Region(0, y, width, 1) for y in changed))

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:
        """As many lines as there are to paint."""
        return len(self.paint(Size(width, container.height)))

    def on_resize(self) -> None:
        """Paint for the new size."""
        self._lines = []
        self.repaint()

    def render_lines(self, crop: Region) -> list[Strip]:
        """The lines of a part of it: what it looks like is asked once for all of them."""
        self._looks = None
        return super().render_lines(crop)

    def render_line(self, y: int) -> Strip:
        """One line for the compositor."""
        if self._looks is None:
            self._looks = Looks(self.rich_style, palette_of(self))
        width, looks = self.content_size.width, self._looks
        if not 0 <= y < len(self._lines):
            return Strip.blank(width, looks[""])
        segments = [Segment(text, looks[paint]) for text, paint in self._lines[y]]
        return Strip(segments).adjust_cell_length(width, looks[""])


class Shown(Painted):
    """Paints the moment that it was last shown, and nothing before the first."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._view: View | None = None

    def show(self, view: View) -> None:
        """Show this moment."""
        self._view = view
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The moment's lines."""
        return [] if self._view is None else self.draw(self._view, size)

    def draw(self, view: View, size: Size) -> list[Line]:
        """The lines of this moment for a content area of this size."""
        raise NotImplementedError
