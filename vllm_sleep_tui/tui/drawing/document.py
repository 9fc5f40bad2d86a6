"""An answer as rows while it streams in: what is finished is laid out once, the rest only grows."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import overload

from vllm_sleep_tui.tui.drawing.code import GROUND, Code
from vllm_sleep_tui.tui.drawing.flow import BLANK, TAB, Flow, Growing, Row
from vllm_sleep_tui.tui.drawing.markdown import Block

_FENCE = re.compile(r"( {0,3})(`{3,}|~{3,})([^\n]*)$")
_INNER_FENCE = re.compile(r"\s*(?:(?:[-*+]|\d{1,9}[.)])\s+)*(`{3,}|~{3,})([^`\n]*)$")
_ITEM = re.compile(r"([-*+]|\d{1,9}[.)])( |$)")
LONGEST = 4000
"""Characters of a list from which on its next item begins a block of its own."""
KEPT_PARTS = 64
"""Of so many parts the rows are kept: rows take five times as much memory as the words in them."""


class Parts(Sequence[Row]):
    """Finished parts as the rows of a width, none before `lay`: all are counted, and made when seen."""

    def __init__(self) -> None:
        self._parts: list[tuple[Block | Code, bool, str]] = []
        """Each with whether it goes on without a blank row before it, and what stands above it."""
        self._starts: list[int] = []
        """The first row of each."""
        self._length = 0
        self._width = 0
        self._made: dict[int, list[Row]] = {}
        """Of those that were looked at last, the latest last."""

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, at: int) -> Row: ...

    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...

    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(self._length))]
        if not 0 <= at < self._length:
            raise IndexError(at)
        number = bisect_right(self._starts, at) - 1
        rows = self._made.pop(number, None) or self._rows(number)
        self._keep(number, rows)
        return rows[at - self._starts[number]]

    @property
    def last(self) -> Block | Code:
        """The one that was added last."""
        return self._parts[-1][0]

    def add(self, part: Block | Code, *, goes_on: bool, above: str) -> None:
        """One more."""
        self._parts.append((part, goes_on, above))
        if self._width:
            self._lay_next()

    def grew(self) -> None:
        """The last one, which is code, has a line more."""
        code = self.last
        assert isinstance(code, Code)
        if self._width:
            rows = code.rows(self._width, len(code.lines) - 1)
            self._length += len(rows)
            if (made := self._made.get(len(self._parts) - 1)) is not None:
                made += rows

    def lay(self, width: int) -> None:
        """Lay them out for a width, unless they are."""
        if width != self._width:
            self._width, self._length = width, 0
            self._starts, self._made = [], {}
            for _ in self._parts:
                self._lay_next()

    def codes(self) -> list[tuple[int, Code]]:
        """Every block of code, with the first row of the part that it is in."""
        found: list[tuple[int, Code]] = []
        for number, (part, _, _) in enumerate(self._parts):
            start = self._starts[number] if self._width else 0
            inside = [part] if isinstance(part, Code) else part.pieces()
            found += [(start, piece) for piece in inside if isinstance(piece, Code)]
        return found

    def _lay_next(self) -> None:
        number = len(self._starts)
        self._starts.append(self._length)
        rows = self._rows(number)
        self._length += len(rows)
        self._keep(number, rows)

    def _rows(self, number: int) -> list[Row]:
        part, goes_on, above = self._parts[number]
        rows: list[Row] = [BLANK] if self._starts[number] and not goes_on else []
        if above:
            rows += Flow(((above, "muted"),)).rows(self._width)
        return rows + part.rows(self._width)

    def _keep(self, number: int, rows: list[Row]) -> None:
        self._made[number] = rows
        if len(self._made) > KEPT_PARTS:
            del self._made[next(iter(self._made))]


class Document:
    """Markdown that grows; `rows` is right after `lay` for its width."""

    def __init__(self) -> None:
        self.rows = Parts()
        """Of all that is finished."""
        self._width = 0
        self._pending = ""
        """Lines of the block under way, and the line that has not ended."""
        self._scanned = 0
        self._blank_at: int | None = None
        self._goes_on = False
        self._inner_fence = ""
        self._fence = ""
        self._tail = Growing("text")

    # ── what comes ───────────────────────────────────────────────────────────────────────────────────────

    def feed(self, text: str) -> None:
        """Add a piece."""
        self._pending += text
        moved = False
        while (end := self._pending.find("\n", self._scanned)) >= 0:
            moved = self._see(self._pending[self._scanned : end], end) or moved
        if moved:
            self._tail = Growing("text")
            self._tail.feed(self._pending)
            if self._width:
                self._tail.lay(self._width)
        else:
            self._tail.feed(text)

    def end(self) -> None:
        """No more comes."""
        if self._fence:
            if self._pending:
                self._add_code_line(self._pending)
            self._close_code()
        elif self._pending.strip():
            self._finish(len(self._pending))
        self._pending = ""
        self._tail = Growing("text")

    def _see(self, line: str, end: int) -> bool:
        """Take a line that has ended; True if what is pending begins anew."""
        if self._fence:
            fence = _FENCE.match(line)
            if fence and fence[2].startswith(self._fence) and not fence[3].strip():
                self._close_code()
            else:
                self._add_code_line(line)
            self._drop(end + 1)
            return True
        began = self._scanned
        first = self._pending[:began].lstrip("\n")
        in_list = bool(_ITEM.match(first))
        fence = _FENCE.match(line)
        inner = _INNER_FENCE.match(line)
        if self._inner_fence:
            if inner and inner[1].startswith(self._inner_fence) and not inner[2].strip():
                self._inner_fence = ""
            self._scanned = end + 1
            return False
        if fence and "`" not in fence[3] and (not fence[1] or not in_list):
            self._finish(began)
            self._drop(end + 1 - began)
            self._fence = fence[2]
            self._open_code(fence[3].strip())
            return True
        if inner:
            self._inner_fence = inner[1]
        ends = self._blank_at is not None and line.strip() and not line[0].isspace()
        splits = in_list and began > LONGEST and _ITEM.match(line) is not None and self._blank_at is None
        if ends or splits:
            self._finish(began)
            self._goes_on = splits
            self._scanned = end + 1 - began
            self._blank_at = None
            return True
        if line.strip():
            # An indented line after a blank one still belongs to the list's item above it.
            self._blank_at = None
        elif self._blank_at is None and self._pending[:end].strip():
            self._blank_at = end
        self._scanned = end + 1
        return False

    def _drop(self, length: int) -> None:
        self._pending = self._pending[length:]
        self._scanned = 0

    def _finish(self, end: int) -> None:
        """The pending text up to `end` is a block."""
        source, self._pending = self._pending[:end].strip("\n"), self._pending[end:]
        self._scanned = 0
        self._blank_at = None
        self._inner_fence = ""
        if source.strip():
            self._add(Block(source))
        self._goes_on = False

    # ── its parts ────────────────────────────────────────────────────────────────────────────────────────

    def _add(self, part: Block | Code, info: str = "") -> None:
        self.rows.add(part, goes_on=self._goes_on, above=info)

    def _open_code(self, info: str) -> None:
        self._add(Code(info.split(" ")[0].split("{")[0]), info)

    def _add_code_line(self, line: str) -> None:
        code = self.rows.last
        assert isinstance(code, Code)
        code.add(line)
        self.rows.grew()

    def _close_code(self) -> None:
        code = self.rows.last
        assert isinstance(code, Code)
        code.is_open = False
        self._fence = ""

    # ── what is shown ────────────────────────────────────────────────────────────────────────────────────

    def lay(self, width: int) -> None:
        """Lay everything out for a width, unless it is."""
        self._width = width
        self.rows.lay(width)
        self._tail.lay(width)

    @property
    def tail(self) -> list[Row]:
        """The rows of what may still change."""
        if not self._pending.strip():
            return []
        if self._fence:
            return Flow(((self._pending.replace("\t", " " * TAB), f"text {GROUND}"),)).rows(self._width)
        rows = self._tail.rows
        while rows and not any(text.strip() for text, _ in rows[-1].spans()):
            rows = rows[:-1]
        return [BLANK, *rows] if self.rows else rows

    @property
    def codes(self) -> list[tuple[int, Code]]:
        """Every block of code, with the first row of the part that it is in."""
        return self.rows.codes()
