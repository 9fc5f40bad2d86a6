"""The table of processes: ours as trees under their models, then everybody else's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from rich.text import Text
from textual.geometry import Size

from vllm_sleep_tui.fleet.snapshot import HeldProcess
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, cut, left, right
from vllm_sleep_tui.tui.words import memory_words, short_command
from vllm_sleep_tui.units import NONE

_WIDTHS = {"pid": 8, "user": 10, "GPU": 6, "VRAM": 7, "RAM": 7}
_NARROW = 90


class Order(NamedTuple):
    """A column to sort by, largest or first first."""

    name: str
    key: Callable[[HeldProcess], float | str]


ORDERS = (
    Order("VRAM", lambda process: -(process.vram_bytes or 0)),
    Order("RAM", lambda process: -(process.ram_bytes or 0)),
    Order("pid", lambda process: process.pid),
    Order("user", lambda process: process.user),
)


class Row(NamedTuple):
    """One line of the table: a process with its place in the tree, or the sums of a model."""

    title: str
    color: str
    pid: str
    user: str
    gpus: str
    vram: int | None
    ram: int | None


def rows(processes: Sequence[HeldProcess], order: Order, colors: dict[str, str]) -> list[Row]:
    """The models by the chosen column of their sums, each with its tree; the strangers last."""
    table: list[Row] = []
    by_model = {name: [each for each in processes if each.model == name] for name in colors}
    shown = [name for name in colors if by_model[name]]
    if order.name in {"VRAM", "RAM"}:
        attribute = f"{order.name.lower()}_bytes"
        shown.sort(key=lambda name: -(_sum(getattr(each, attribute) for each in by_model[name]) or 0))
    for name in shown:
        tree = by_model[name]
        vram, ram = _sum(each.vram_bytes for each in tree), _sum(each.ram_bytes for each in tree)
        table.append(Row(f"● {name}", f"{colors[name]} bold", "", "", _gpus(tree), vram, ram))
        for process, branch in _branches(tree, order):
            table.append(_row(process, branch))
    strangers = sorted((each for each in processes if each.model is None), key=order.key)
    if strangers:
        vram, ram = (
            _sum(each.vram_bytes for each in strangers),
            _sum(each.ram_bytes for each in strangers),
        )
        table.append(Row("● others", "others bold", "", "", _gpus(strangers), vram, ram))
        table += [_row(process, "  ") for process in strangers]
    return table


def _branches(tree: Sequence[HeldProcess], order: Order) -> list[tuple[HeldProcess, str]]:
    """The processes, parents first, each with the lines that lead to it."""
    children: dict[int | None, list[HeldProcess]] = {}
    for process in sorted(tree, key=order.key):
        children.setdefault(process.parent, []).append(process)
    branches: list[tuple[HeldProcess, str]] = []

    def walk(parent: int | None, before: str) -> None:
        siblings = children.get(parent, [])
        for process in siblings:
            is_last = process is siblings[-1]
            branches.append((process, f"{before}{'└ ' if is_last else '├ '}"))
            walk(process.pid, f"{before}{'  ' if is_last else '│ '}")

    walk(None, "  ")
    return branches


def _row(process: HeldProcess, branch: str) -> Row:
    command = branch + short_command(clean(process.command))
    return Row(
        command,
        "text",
        str(process.pid),
        process.user,
        _gpus([process]),
        process.vram_bytes,
        process.ram_bytes,
    )


def _sum(amounts: Iterable[int | None]) -> int | None:
    sizes = list(amounts)
    return None if None in sizes else sum(amount or 0 for amount in sizes)


def _gpus(processes: Iterable[HeldProcess]) -> str:
    return ",".join(sorted({gpu for each in processes for gpu in each.vram_by_gpu}, key=int)) or NONE


class ProcessTable(Painted):
    """The processes, sorted by one column."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.order = ORDERS[0]
        self._processes: Sequence[HeldProcess] | None = None
        self._colors: dict[str, str] = {}

    def show(self, processes: Sequence[HeldProcess], colors: dict[str, str]) -> None:
        """Show these processes."""
        self._processes, self._colors = processes, colors
        self.repaint()

    @property
    def height(self) -> int:
        """The lines that it fills; 0 while they are not known."""
        return (
            0 if self._processes is None else 1 + max(1, len(rows(self._processes, self.order, self._colors)))
        )

    def turn(self) -> None:
        """Sort by the next column."""
        self.order = ORDERS[(ORDERS.index(self.order) + 1) % len(ORDERS)]
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """The titles, and a line for each model and process."""
        if self._processes is None:
            return [(("looking …", "muted"),)]
        shown = [name for name in _WIDTHS if size.width >= _NARROW or name not in {"user", "GPU"}]
        room = max(10, size.width - sum(_WIDTHS[name] for name in shown) - 1)
        titles = [(left("process", room) + " ", "muted")]
        titles += [
            (right(name, _WIDTHS[name]), "accent bold" if name == self.order.name else "muted")
            for name in shown
        ]
        lines: list[Line] = [tuple(titles)]
        for row in rows(self._processes, self.order, self._colors):
            cells = {
                "pid": row.pid,
                "user": row.user,
                "GPU": row.gpus,
                "VRAM": memory_words(row.vram),
                "RAM": memory_words(row.ram),
            }
            numbers = "".join(right(cut(cells[name], _WIDTHS[name] - 1), _WIDTHS[name]) for name in shown)
            is_sum = not row.pid
            lines.append(
                ((left(row.title, room) + " ", row.color), (numbers, "text bold" if is_sum else "muted"))
            )
        return lines if len(lines) > 1 else [*lines, (("Nothing of ours runs, nobody holds VRAM.", "muted"),)]

    @property
    def title(self) -> str:
        """For the border, as markup."""
        return Text(f"Processes by {self.order.name}").markup
