"""Markdown as a person reads it in a chat: its marks become looks, and every word of it is shown.

HTML, entities and references are text. A block of which the marks would swallow a letter is shown as it was
written: what it shows is what the model said.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING
from urllib.parse import quote

from rich.cells import cell_len

from vllm_sleep_tui.tui.drawing.code import Code
from vllm_sleep_tui.tui.drawing.flow import BLANK, TAB, Flow, PlainRow, Row, breaks, slice_of, width_of
from vllm_sleep_tui.tui.drawing.paint import Line, Span

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.rules_inline import StateInline
    from markdown_it.token import Token

_ESCAPABLE = "*_`#|~<>+-.!"
"""Of the characters that a backslash may take the meaning from, those that are no part of formulas."""
_INTRAWORD = re.compile(r"(?<=[A-Za-z0-9)\]])(\*{1,2})(?=[A-Za-z0-9(])")
_STAR, _BAR = "\uf8ff", "\uf8fe"
"""Stand for a star between letters or figures, which multiplies, and for the line of a name like __init__."""
_PLAIN = str.maketrans({_STAR: "*", _BAR: "_"})
_LETTERS = re.compile(r"[\W_]+")
_HTML = re.compile(r" {0,3}<[/!?A-Za-z]")
_MARKS = re.compile(r"[*_`~\[]")
MOST_MARKS, MOST_CELLS = 2000, 4000
"""Of a block from which on it is shown as it was written: the parser takes the square of the marks, and
nobody's keys wait for a table of 600 columns."""
NARROWEST = 8
"""Cells of a column of a table that are still read; where there are fewer, its rows become lists."""


def _escape(state: StateInline, silent: bool) -> bool:
    """A backslash before a mark of Markdown; any other is a backslash."""
    if state.src[state.pos] != "\\":
        return False
    after = state.src[state.pos + 1 : state.pos + 2]
    if not silent:
        state.pending += after if after and after in _ESCAPABLE else "\\"
    state.pos += 2 if after and after in _ESCAPABLE else 1
    return True


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt  # a tenth of a second, which a panel that opens has better use for

    parser = MarkdownIt("commonmark", {"html": False})
    parser.enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline", "entity", "reference"])
    parser.inline.ruler.at("escape", _escape)
    return parser


class Table:
    """A table, whose columns share the width."""

    def __init__(self, rows: Sequence[Sequence[Line]], before: Line) -> None:
        self.cells = rows
        self._before = before

    def rows(self, width: int) -> list[Row]:
        """Its rows in a width: cells are broken where they do not fit."""
        columns = max(map(len, self.cells))
        inner = width - width_of(self._before)
        natural = [max(width_of(row[at]) for row in self.cells if at < len(row)) for at in range(columns)]
        room = inner - 3 * (columns - 1)
        widths = _shared(natural, room)
        if widths is None:
            return self._as_lists(width)
        rows: list[Row] = []
        for number, cells in enumerate(self.cells):
            rows += self._row(cells, widths, bold=number == 0)
            if number == 0:
                rule = "─┼─".join("─" * each for each in widths)
                rows.append(PlainRow((*self._before, (rule, "border"))))
        return rows

    def _row(self, cells: Sequence[Line], widths: Sequence[int], *, bold: bool) -> list[Row]:
        parts = []
        for cell, width in zip(cells, widths, strict=False):
            text = "".join(part for part, _ in cell)
            parts.append([slice_of(cell, start, end) for start, end in breaks(text, width)])
        rows: list[Row] = []
        for at in range(max(map(len, parts), default=0)):
            spans: list[Span] = list(self._before)
            for place, (lines, width) in enumerate(zip(parts, widths, strict=False)):
                line = lines[at] if at < len(lines) else ()
                spans += [(" │ ", "border")] if place else []
                spans += [(text, f"{paint} bold".strip() if bold else paint) for text, paint in line]
                spans.append((" " * max(0, width - width_of(line)), ""))
            rows.append(PlainRow(tuple(spans)))
        return rows

    def _as_lists(self, width: int) -> list[Row]:
        head, *body = self.cells
        rows: list[Row] = []
        for cells in body or [head]:
            for place, cell in enumerate(cells):
                title = head[place] if place < len(head) and body else ()
                line = (*((text, f"{paint} bold") for text, paint in title), (" ", ""), *cell)
                rows += Flow(line, self._before, (*self._before, ("  ", ""))).rows(width)
            rows.append(BLANK)
        if body:  # the titles of columns that no row has
            longest = max(map(len, body))
            for title in head[longest:]:
                rows += Flow(title, self._before, self._before).rows(width)
        return rows[:-1] if rows and rows[-1] is BLANK else rows


def _shared(natural: Sequence[int], room: int) -> list[int] | None:
    """The widths of columns in so many cells; None if one would get too little to be read."""
    if sum(natural) <= room:
        return [max(1, each) for each in natural]
    widths = [1] * len(natural)
    open_ones = sorted(range(len(natural)), key=lambda at: natural[at])
    left = room
    while open_ones:
        share = left // len(open_ones)
        at = open_ones.pop(0)
        widths[at] = min(max(1, natural[at]), share)
        left -= widths[at]
        if widths[at] < min(natural[at], NARROWEST):
            return None
    return widths


Piece = Flow | Table | Code


class Block:
    """One finished block of an answer."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._pieces: list[Piece] | None = None

    def rows(self, width: int) -> list[Row]:
        """Its rows in a width."""
        rows: list[Row] = []
        for piece in self.pieces():
            rows += piece.rows(width)
        return rows

    def pieces(self) -> list[Piece]:
        """What it is made of."""
        if self._pieces is None:
            self._pieces, self._source = _read(self._source), ""  # the pieces have all of it
        return self._pieces


def _read(source: str) -> list[Piece]:
    is_small = source.count("|") <= MOST_CELLS and len(_MARKS.findall(source)) <= MOST_MARKS
    if is_small and not _HTML.match(source):
        marked = source
        if _STAR not in source and _BAR not in source:
            marked = _INTRAWORD.sub(lambda found: _STAR * len(found[1]), source).replace("__", _BAR * 2)
        try:
            pieces = _Reader().read(_parser().parse(marked))
        except (
            RecursionError,
            IndexError,
            ValueError,
        ):  # a defect of the parser costs the looks, not the words
            return _verbatim(source)
        if _letters(source) == _letters(_text_of(pieces)):
            return pieces
    return _verbatim(source)


def _verbatim(source: str) -> list[Piece]:
    return [Flow(((line.expandtabs(TAB), "text"),)) for line in source.split("\n")]


def _letters(text: str) -> str:
    return _LETTERS.sub("", text)


def _text_of(pieces: Sequence[Piece]) -> str:
    parts: list[str] = []
    for piece in pieces:
        if isinstance(piece, Code):
            parts.append(piece.text)
        elif isinstance(piece, Table):
            parts += [text for row in piece.cells for cell in row for text, _ in cell]
        else:
            parts += [text for line in (piece.first, piece.line) for text, _ in line]
    return "".join(parts)


class _Reader:
    """Goes through the parser's tokens and keeps what stands before a line."""

    def __init__(self) -> None:
        self._pieces: list[Piece] = []
        self._before: list[list[Line]] = []
        """Of each container that is open: what stands before its next row, and before those that follow."""
        self._is_fresh = True
        """Nothing stands yet in the innermost container, so no blank line is wanted."""

    def read(self, tokens: Sequence[Token]) -> list[Piece]:
        """The pieces of a block."""
        cells: list[list[Line]] = []
        heading = ""
        for token in tokens:
            match token.type:
                case "blockquote_open":
                    self._blank()
                    self._before.append([(("▎ ", "border"),), (("▎ ", "border"),)])
                case "list_item_open":
                    mark = f"{token.info}{token.markup} " if token.info else "• "
                    self._before.append([((mark, "accent"),), ((" " * cell_len(mark), ""),)])
                    self._is_fresh = True
                case "bullet_list_open" | "ordered_list_open":
                    if not self._before:
                        self._blank()
                case "blockquote_close" | "list_item_close":
                    if token.type == "list_item_close" and self._before[-1][0] != self._before[-1][1]:
                        self._line(())  # an item without any words
                    self._before.pop()
                    self._is_fresh = False
                case "heading_open":
                    heading = "bold underline" if token.tag in ("h1", "h2") else "bold"
                    self._blank()
                case "heading_close":
                    heading = ""
                case "paragraph_open":
                    if not token.hidden:
                        self._blank()
                case "fence" | "code_block":
                    self._code(token)
                case "hr":
                    self._blank()
                    self._line(((token.markup or "───", "border"),))
                case "tr_open":
                    cells.append([])
                case "table_close":
                    self._blank()
                    first, rest = self._prefix()
                    if first != rest:
                        self._pieces.append(Flow((), first, rest))
                    self._pieces.append(Table(cells, rest))
                    self._is_fresh = False
                    cells = []
                case "inline":
                    lines = _inline(token.children or [], heading)
                    if cells:
                        cells[-1].append(tuple(span for line in lines for span in line))
                    else:
                        for line in lines:
                            self._line(line)
                case _:
                    pass
        return self._pieces

    def _prefix(self) -> tuple[Line, Line]:
        first = tuple(span for first, _ in self._before for span in first)
        rest = tuple(span for _, rest in self._before for span in rest)
        for container in self._before:
            container[0] = container[1]
        return first, rest

    def _line(self, line: Line) -> None:
        self._pieces.append(Flow(line, *self._prefix()))
        self._is_fresh = False

    def _blank(self) -> None:
        if self._pieces and not self._is_fresh:
            rest = tuple(span for _, rest in self._before for span in rest)
            self._pieces.append(Flow((), rest, rest))
        self._is_fresh = True

    def _code(self, token: Token) -> None:
        if not self._before:
            self._blank()
        first, rest = self._prefix()
        info = token.info.strip().translate(_PLAIN)
        if info or first != rest:  # the mark of a list's item has a row of its own
            self._pieces.append(Flow(((info, "muted"),), first, rest))
        code = Code(info.split(" ")[0], before=rest)
        for line in token.content.rstrip("\n").split("\n"):
            code.add(line.translate(_PLAIN))
        code.is_open = False
        self._pieces.append(code)
        self._is_fresh = False


def _inline(tokens: Sequence[Token], heading: str) -> list[Line]:
    """The lines of a paragraph: where its text has a line's end, one ends."""
    lines: list[list[Span]] = [[]]
    looks: list[str] = [heading] if heading else []
    links: list[tuple[str, int]] = []

    def put(text: str, paint: str) -> None:
        lines[-1].append((text.translate(_PLAIN), " ".join([paint, *looks])))

    for token in tokens:
        match token.type:
            case "text":
                if token.content:
                    put(token.content, "text")
            case "code_inline":
                put(token.content, "accent")
            case "softbreak" | "hardbreak":
                lines.append([])
            case "strong_open":
                looks.append("bold")
            case "em_open":
                looks.append("italic")
            case "s_open":
                looks.append("strike")
            case "strong_close" | "em_close" | "s_close":
                looks.pop()
            case "link_open":
                links.append((_attribute(token, "href"), len(lines[-1])))
                looks.append("underline")
            case "link_close":
                looks.pop()
                href, began = links.pop()
                shown = "".join(text for text, _ in lines[-1][began:])
                if shown != href and f"mailto:{shown}" != href:
                    # The address is shown: one behind other words is not for a model to choose.
                    put(f" ({href})", "muted")
            case "image":
                put(f"{token.content} ({_attribute(token, 'src')})".strip(), "muted")
            case _:
                put(token.content, "text")
    return [tuple(line) for line in lines]


def _attribute(token: Token, name: str) -> str:
    text = str(token.attrs.get(name, ""))
    for mark in (_STAR, _BAR):
        text = text.replace(quote(mark), mark)  # the parser writes addresses so
    return text.translate(_PLAIN)
