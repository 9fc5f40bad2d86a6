"""Text as rows of a width: broken once, drawn when it is seen, and what grows is broken where it grows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from rich.cells import cell_len, split_graphemes

from vllm_sleep_tui.tui.drawing.paint import Line, Span

TAB = 4
LINE = "\n"
"""How a row that ends its line is joined to the next one, when it is copied."""


class Row(Protocol):
    """One row of the screen."""

    @property
    def joint(self) -> str:
        """What stood between it and the next row in the text: a line's end, a blank, nothing."""
        ...

    @property
    def indent(self) -> int:
        """How many characters at its beginning are not the text's own."""
        ...

    def spans(self) -> Line:
        """What it shows."""
        ...


class PlainRow(NamedTuple):
    """A row whose paint does not change."""

    line: Line
    joint: str = LINE
    indent: int = 0

    def spans(self) -> Line:
        """What it shows."""
        return self.line


BLANK = PlainRow(())


class Flow(NamedTuple):
    """One line of a text, and what stands before its first row and before the others."""

    line: Line
    first: Line = ()
    rest: Line = ()

    def rows(self, width: int) -> list[Row]:
        """The line in rows of at most `width` cells."""
        text = "".join(part for part, _ in self.line)
        before = max(width_of(self.first), width_of(self.rest))
        ranges = breaks(text, width - before)
        rows: list[Row] = []
        for number, (start, end) in enumerate(ranges):
            prefix = self.rest if rows else self.first
            last = number == len(ranges) - 1
            joint = LINE if last else text[end : ranges[number + 1][0]]
            indent = sum(len(part) for part, _ in self.rest) if rows else 0
            rows.append(PlainRow((*prefix, *slice_of(self.line, start, end)), joint, indent))
        return rows


def width_of(line: Iterable[Span]) -> int:
    """The cells that a line takes."""
    return sum(cell_len(text) for text, _ in line)


def slice_of(line: Line, start: int, end: int) -> Line:
    """The characters of a line from `start` to `end`."""
    spans: list[Span] = []
    at = 0
    for text, paint in line:
        if at >= end:
            break
        part = text[max(0, start - at) : end - at]
        if part:
            spans.append((part, paint))
        at += len(text)
    return tuple(spans)


def breaks(text: str, width: int, *, anywhere: bool = False) -> list[tuple[int, int]]:
    """Where a line is broken into rows of at most `width` cells, one at least: at blanks, or `anywhere`."""
    width = max(width, 2)  # the widest character has two cells
    if text.isascii():
        return _breaks_of_ascii(text, width, anywhere)
    return _breaks_of_any(text, width, anywhere)


def _breaks_of_ascii(text: str, width: int, anywhere: bool) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    start, length = 0, len(text)
    while length - start > width:
        end = -1 if anywhere else text.rfind(" ", start, start + width + 1)
        if end <= start or text[start:end].isspace():
            end = start + width
        ranges.append((start, end))
        start = end
        while not anywhere and start < length and text[start] == " ":
            start += 1
    if start < length or not ranges:
        ranges.append((start, length))
    return ranges


def _breaks_of_any(text: str, width: int, anywhere: bool) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    start = used = 0
    blank = -1  # the last blank of this row
    graphemes, _ = split_graphemes(text)
    cells_at: dict[int, int] = {}
    total = 0
    for at, _, cells in graphemes:
        cells_at[at] = total
        total += cells
    cells_at[len(text)] = total
    for at, end, cells in graphemes:
        if at < start:
            continue
        if used + cells > width:
            if text[at:end] == " " and not anywhere:
                cut, begin = at, end
            elif blank > start and not anywhere:
                cut, begin = blank, blank + 1
            else:
                cut = begin = at
            ranges.append((start, cut))
            start, blank = begin, -1
            used = cells_at[end] - cells_at[start] if end > start else 0
            continue
        used += cells
        if text[at:end] == " ":
            blank = at
    if start < len(text) or not ranges:
        ranges.append((start, len(text)))
    return ranges


class Growing:
    """Text that only grows, in one paint: what is fed costs its own length, whatever stands before it."""

    def __init__(self, paint: str, *, before: Line = ()) -> None:
        self.text = ""
        self.rows: list[Row] = []
        self._paint = paint
        self._before = before
        self._indent = sum(len(part) for part, _ in before)
        self._width = 0
        self._open = 0
        """Where the last row begins, which may go on."""

    def feed(self, text: str) -> None:
        """Add a piece."""
        self.text += text.replace("\t", " " * TAB)
        if self._width:
            self._lay(len(self.text))

    def lay(self, width: int) -> None:
        """Break it anew if the width is another."""
        if width != self._width:
            self._width, self._open = width, 0
            self.rows = []
            self._lay(len(self.text))

    def _lay(self, length: int) -> None:
        if self.rows:
            self.rows.pop()
        width = self._width - width_of(self._before)
        at = self._open
        while True:
            end = self.text.find("\n", at)
            line = self.text[at : end if end >= 0 else length]
            ranges = breaks(line, width)
            for number, (start, stop) in enumerate(ranges):
                last = number == len(ranges) - 1
                joint = LINE if last else line[stop : ranges[number + 1][0]]
                span = ((line[start:stop], self._paint),) if stop > start else ()
                self.rows.append(PlainRow((*self._before, *span), joint, self._indent))
            if end < 0:
                break
            at = end + 1
        self._open = at + ranges[-1][0]
