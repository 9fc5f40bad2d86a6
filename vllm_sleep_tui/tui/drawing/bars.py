"""Bars drawn in cells: stacked memory, progress, and the phases of a switch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.renderables.digits import Digits

from vllm_sleep_tui.tui.drawing.paint import Line, Span, cut, left

SOLID, HATCHED, FREE, WOVEN = "█", "▒", "░", "▞"
MARK, MARK_PAINT = "┃", "text on-background bold"


class Part(NamedTuple):
    """One stretch of a stacked bar."""

    label: str
    size: float
    color: str
    fill: str
    """SOLID, HATCHED, FREE or WOVEN."""


def cells_of(sizes: Sequence[float], total: float, width: int) -> list[int]:
    """The cells for each size on a bar of `width` cells for `total`; what is there gets one cell at least."""
    if total <= 0 or width <= 0:
        return [0] * len(sizes)
    exact = [max(0.0, size) / total * width for size in sizes]
    cells = [max(1, int(share)) if share > 0 else 0 for share in exact]
    while sum(cells) > width:
        widest = max(range(len(cells)), key=cells.__getitem__)
        if cells[widest] == 0:
            break
        cells[widest] -= 1
    spare = min(width, round(sum(exact))) - sum(cells)
    by_rest = sorted(range(len(cells)), key=lambda index: int(exact[index]) - exact[index])
    for index in by_rest[: max(0, spare)]:
        if cells[index]:
            cells[index] += 1
    return cells


def is_labelled(part: Part, width: int) -> bool:
    """Whether the part's label fits into its stretch of the bar."""
    return bool(part.label) and cell_len(part.label) + 4 <= width


def _stretch(part: Part, width: int) -> list[Span]:
    solid = part.fill == SOLID
    paint = f"{part.color} on-{part.color}" if solid else part.color
    if not is_labelled(part, width):
        return [(part.fill * width, paint)]
    label = f" {part.label} "
    before = (width - cell_len(label)) // 2
    ink = f"ink-{part.color} on-{part.color} bold" if solid else f"{part.color} bold"
    after = width - before - cell_len(label)
    return [(part.fill * before, paint), (label, ink), (part.fill * after, paint)]


def stacked(parts: Sequence[Part], total: float, width: int, *, mark: float | None = None) -> Line:
    """The parts side by side, the rest free; `mark` is a value pointed at by a thin upright."""
    cells = cells_of([part.size for part in parts], total, width)
    spans: list[Span] = []
    for part, count in zip(parts, cells, strict=True):
        if count:
            spans += _stretch(part, count)
    spans.append((FREE * (width - sum(cells)), "faint"))
    if mark is None:
        return tuple(spans)
    return _with_mark(spans, min(width - 1, max(0, round(mark / total * width))))


def _with_mark(spans: Sequence[Span], at: int) -> Line:
    """The spans with the cell number `at` replaced by the mark."""
    marked: list[Span] = []
    start = 0
    for text, paint in spans:
        offset = at - start
        start += len(text)
        if not 0 <= offset < len(text):
            marked.append((text, paint))
            continue
        marked += [(text[:offset], paint), (MARK, MARK_PAINT), (text[offset + 1 :], paint)]
    return tuple(span for span in marked if span[0])


def progress(fraction: float | None, width: int) -> Line:
    """A bar that is filled to `fraction`; all hatched when nobody knows how far it is."""
    if fraction is None:
        return (("╌" * width, "accent"),)
    done = round(min(1.0, max(0.0, fraction)) * width)
    return (("━" * done, "accent"), ("━" * (width - done), "faint"))


def phase_bar(phases: Sequence[tuple[str, float]], width: int, color: str) -> Line:
    """The phases one after the other on one bar, each as long as it took, with its name where it fits."""
    total = sum(seconds for _, seconds in phases)
    spans: list[Span] = []
    for number, (count, (name, _)) in enumerate(
        zip(cells_of([seconds for _, seconds in phases], total, width), phases, strict=True)
    ):
        ground = f"ink-{color} on-{color}" if number % 2 else "text on-panel"
        label = f" {name}" if cell_len(name) + 2 <= count else ""
        spans.append((left(label, count), ground))
    return tuple(span for span in spans if span[0])


def large(text: str, paint: str) -> list[Line]:
    """A figure three lines high, its unit as it is at the foot of it."""
    figure, _, unit = text.partition(" ")
    drawn = [part.text for part in Digits(figure).render(Style()) if isinstance(part, Segment)]
    rows = "".join(drawn).splitlines()
    beside = [" " * len(unit)] * (len(rows) - 1) + [unit]
    return [((f"{row} {end}", paint),) for row, end in zip(rows, beside, strict=True)]


def legend(parts: Sequence[Part], width: int) -> Line:
    """The parts by name, each behind a sample of its fill."""
    spans: list[Span] = []
    room = width
    for part in parts:
        text = f"{part.label}   "
        if not part.label or len(text) + 2 > room:
            continue
        spans += [(f"{part.fill} ", part.color), (cut(text, room), "text")]
        room -= len(text) + 2
    return tuple(spans)
