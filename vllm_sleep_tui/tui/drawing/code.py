"""A block of code as rows, coloured by and by: a lexer must not hold up a key."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len

from vllm_sleep_tui.tui.drawing.flow import LINE, TAB, Row, breaks, slice_of
from vllm_sleep_tui.tui.drawing.paint import Line, Span

if TYPE_CHECKING:  # slow to import, and seldom needed
    from pygments.lexer import Lexer

GROUND = "on-panel"
LONGEST = 2000
"""Characters of a line from which on the block is not coloured: some lexers take minutes for such lines."""
PAINTS = {
    "Comment": "muted italic",
    "Keyword": "accent",
    "String": "good",
    "Literal": "good",
    "Number": "warning",
    "Name.Function": "text bold",
    "Name.Class": "text bold",
    "Name.Decorator": "warning",
    "Name.Tag": "accent",
    "Generic.Deleted": "bad",
    "Generic.Inserted": "good",
    "Error": "text",
}
"""The paint of a kind of token; a kind that is not here has that of the kind it belongs to."""


class Code:
    """The lines of one block; while it is open, lines may be added."""

    def __init__(self, language: str = "", *, before: Line = ()) -> None:
        self.lines: list[str] = []
        self.is_open = True
        self.language = language
        self._before = before
        self._colored: list[Line | None] = []
        self._work: Iterator[None] | None = None
        self._is_final = False

    @property
    def text(self) -> str:
        """The code as it was written."""
        return "\n".join(self.lines)

    def add(self, line: str) -> None:
        """Add a line."""
        self.lines.append(line)
        self._colored.append(None)

    def rows(self, width: int, since: int = 0) -> list[Row]:
        """The rows of the lines from `since` on."""
        inner = width - 2 - sum(cell_len(text) for text, _ in self._before)
        rows: list[Row] = []
        for number in range(since, len(self.lines)):
            shown = self.lines[number].expandtabs(TAB)
            ranges = breaks(shown, inner, anywhere=True)
            rows += [
                CodeRow(self, number, start, end, self._before, "" if end < len(shown) else LINE, inner)
                for start, end in ranges
            ]
        return rows

    def spans(self, number: int) -> Line:
        """A line, coloured as far as that is known."""
        colored = self._colored[number]
        return colored if colored is not None else ((self.lines[number].expandtabs(TAB), "text"),)

    @property
    def is_uncolored(self) -> bool:
        """Whether `color` has something to do."""
        return not self.is_open and not self._is_final

    def color(self, seconds: float) -> bool:
        """Go on colouring for so long; False if nothing is left to do."""
        if not self.is_uncolored:
            return False
        if self._work is None:
            self._work = self._coloring()
        until = time.perf_counter() + seconds
        for _ in self._work:
            if time.perf_counter() > until:
                return True
        self._is_final = True
        self._work = None
        return False

    def _coloring(self) -> Iterator[None]:
        """Colours line by line, what goes over several lines included."""
        if not self.language or any(len(line) > LONGEST for line in self.lines):
            return
        lexer = _lexer(self.language)
        if lexer is None:
            return
        number = 0
        spans: list[Span] = []
        for kind, text in lexer.get_tokens("\n".join(line.expandtabs(TAB) for line in self.lines)):
            first, *others = text.split("\n")
            paint = _paint(str(kind))
            for part in (first, *(["\n", rest] for rest in others)):
                if isinstance(part, list):
                    if number < len(self.lines):
                        self._colored[number] = tuple(spans)
                    number, spans = number + 1, []
                    yield
                    part = part[1]
                if part:
                    spans.append((part, paint))
        if spans and number < len(self.lines):
            self._colored[number] = tuple(spans)


class CodeRow:
    """A part of a line of code, which takes its colours when it is drawn."""

    __slots__ = ("_before", "_end", "_number", "_start", "_width", "code", "indent", "joint")

    def __init__(
        self, code: Code, number: int, start: int, end: int, before: Line, joint: str, width: int
    ) -> None:
        self.code = code
        self.joint = joint
        self.indent = sum(len(text) for text, _ in before) + 1
        self._number, self._start, self._end = number, start, end
        self._before = before
        self._width = width

    def spans(self) -> Line:
        """The part on the ground of code, which goes to the edge."""
        inside = slice_of(self.code.spans(self._number), self._start, self._end)
        used = sum(cell_len(text) for text, _ in inside)
        painted: tuple[Span, ...] = tuple((text, f"{paint} {GROUND}") for text, paint in inside)
        return (*self._before, (" ", GROUND), *painted, (" " * (self._width - used + 1), GROUND))


def _lexer(language: str) -> Lexer | None:
    from pygments.lexers import get_lexer_by_name
    from pygments.util import ClassNotFound

    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False)
    except ClassNotFound:
        return None


def _paint(kind: str) -> str:
    """`kind` is a token's name with all that it belongs to, such as Token.Literal.String.Doc."""
    words = kind.removeprefix("Token.").split(".")
    for size in range(len(words), 0, -1):
        for start in range(len(words) - size + 1):
            if paint := PAINTS.get(".".join(words[start : start + size])):
                return paint
    return "text"
