"""Two runs side by side: is a difference more than what repeats of the same thing differ by?

The test is the exact permutation test of rank sums (Mann and Whitney's), which asks nothing of the shape of
the figures and says by itself when there are too few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb

import msgspec

from vllm_sleep_tui.bench import figures
from vllm_sleep_tui.bench.document import Table
from vllm_sleep_tui.bench.figures import Spread
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.units import precise

CHANCE = 0.05
"""A difference that chance makes less often than this is called one."""


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One thing measured in both runs; seconds."""

    what: str
    first: Spread
    second: Spread
    ratio: float
    """Second by first, of the medians."""
    probability: float
    """How often chance alone makes at least this difference."""
    verdict: str


def compare(first: Run, second: Run) -> tuple[Difference, ...]:
    """What both runs measured; models are matched by their place, so that pairs of other names compare."""
    mine, theirs = series(first), series(second)
    return tuple(
        _difference(what.format(a=first.plan.a, b=first.plan.b), mine[what], theirs[what])
        for what in mine
        if mine[what] and theirs.get(what)
    )


def series(run: Run) -> dict[str, list[float]]:
    """Every series of figures by what it is, the models as {a} and {b}."""
    all_series: dict[str, list[float]] = {}
    for mode in figures.modes(run):
        for place, name in zip(("{a}", "{b}"), run.plan.pair, strict=True):
            made = figures.steps(run, mode, name)
            all_series[f"{mode}: switch to {place}"] = figures.switches(run, mode, name)
            all_series[f"{mode}: first token of {place}"] = [s.ttft for s in made if s.ttft is not None]
            all_series[f"{mode}: inference of {place}"] = [s.inference for s in made]
        all_series[f"{mode}: whole pass"] = [t for each in run.of_mode(mode) if (t := each.total) is not None]
    for place, name in zip(("{a}", "{b}"), run.plan.pair, strict=True):
        all_series[f"initial load of {place}"] = figures.loads(run, name)
    return all_series


def _difference(what: str, first: Sequence[float], second: Sequence[float]) -> Difference:
    mine, theirs = figures.spread(first), figures.spread(second)
    assert mine is not None
    assert theirs is not None
    probability = chance_of(first, second)
    return Difference(
        what=what,
        first=mine,
        second=theirs,
        ratio=theirs.median / mine.median if mine.median else float("inf"),
        probability=probability,
        verdict=_verdict(mine, theirs, probability),
    )


def _verdict(first: Spread, second: Spread, probability: float) -> str:
    if 2 / comb(first.count + second.count, first.count) >= CHANCE:
        return "too few to tell"
    if probability >= CHANCE:
        return "within the spread"
    return "slower, beyond the spread" if second.median > first.median else "faster, beyond the spread"


def chance_of(first: Sequence[float], second: Sequence[float]) -> float:
    """How often a random division of the figures has rank sums this far apart or farther (exact)."""
    everything = sorted([*first, *second])
    # Twice the rank, so that shared ranks stay whole numbers.
    rank = {value: 2 * everything.index(value) + everything.count(value) + 1 for value in everything}
    ranks = [rank[value] for value in everything]
    size, seen = len(first), sum(rank[value] for value in first)
    ways: list[dict[int, int]] = [{0: 1}, *({} for _ in range(size))]
    for each in ranks:
        for chosen in range(size, 0, -1):
            for total, count in ways[chosen - 1].items():
                ways[chosen][total + each] = ways[chosen].get(total + each, 0) + count
    middle = size * (len(ranks) + 1)
    extreme = sum(count for total, count in ways[size].items() if abs(total - middle) >= abs(seen - middle))
    return extreme / comb(len(ranks), size)


def table(rows: Sequence[Difference], first: str, second: str) -> Table:
    """The comparison for people."""
    header = ("measured", first, second, "ratio", "the difference is")
    cells = tuple(
        (each.what, _shown(each.first), _shown(each.second), f"{each.ratio:.2f}", each.verdict)
        for each in rows
    )
    return Table(header=header, rows=cells)


def _shown(spread: Spread) -> str:
    return f"{precise(spread.median)} ({precise(spread.low)} to {precise(spread.high)}, n={spread.count})"
