"""Prometheus' text format: only the wanted names of a page, rates and percentiles from two scrapes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

Labels = dict[str, str]
Scrape = dict[str, list[tuple[Labels, float]]]
"""Samples by name, each with its labels."""
Buckets = Mapping[float, float]
"""Of a histogram: upper bound (the last is infinite) → how many observations were at most that."""

_LABEL = re.compile(r'\s*([A-Za-z_]\w*)\s*=\s*"((?:[^"\\]|\\.)*)"\s*,?')
_ESCAPED = re.compile(r"\\(.)")


def parse(text: str, wanted: frozenset[str]) -> Scrape:
    """The samples whose name is wanted; comments, other names and lines that make no sense are skipped."""
    scrape: Scrape = {}
    for line in text.splitlines():
        brace = line.find("{")
        name = line[:brace] if brace > 0 else line.partition(" ")[0]
        if name in wanted and (sample := _sample(line, len(name))):
            scrape.setdefault(name, []).append(sample)
    return scrape


def _sample(line: str, position: int) -> tuple[Labels, float] | None:
    labels: Labels = {}
    if line[position : position + 1] == "{":
        position += 1
        while match := _LABEL.match(line, position):
            labels[match[1]] = _unescape(match[2])
            position = match.end()
        if line[position : position + 1] != "}":
            return None
        position += 1
    try:
        # A time stamp may follow the value.
        return labels, float(line[position:].split(None, 1)[0])
    except (IndexError, ValueError):
        return None


def _unescape(text: str) -> str:
    return _ESCAPED.sub(lambda m: "\n" if m[1] == "n" else m[1], text) if "\\" in text else text


def total(scrape: Scrape, name: str, /, **labels: str) -> float | None:
    """The sum over the samples that carry these labels; None if there is none."""
    values = [
        value for given, value in scrape.get(name, ()) if all(given.get(k) == v for k, v in labels.items())
    ]
    return sum(values) if values else None


def increase(before: float, now: float) -> float:
    """How much a counter grew; one that fell was reset to 0 in between, as after a restart."""
    return now - before if now >= before else now


def rate(before: float | None, now: float | None, seconds: float) -> float | None:
    """Growth of a counter per second between two scrapes; None if either is unknown or no time passed."""
    if before is None or now is None or seconds <= 0:
        return None
    return increase(before, now) / seconds


def buckets(scrape: Scrape, name: str) -> Buckets:
    """The buckets of the histogram called `name`, summed over engines; empty if it is not there."""
    counts: dict[float, float] = {}
    for labels, value in scrape.get(f"{name}_bucket", ()):
        try:
            bound = float(labels["le"])
        except (KeyError, ValueError):
            continue
        counts[bound] = counts.get(bound, 0.0) + value
    return dict(sorted(counts.items()))


def buckets_since(before: Buckets, now: Buckets) -> Buckets:
    """The observations between two scrapes; all of `now` if the histogram was reset in between."""
    if before.keys() != now.keys() or any(now[bound] < count for bound, count in before.items()):
        return now
    return {bound: now[bound] - count for bound, count in before.items()}


def percentile(counts: Buckets, share: float) -> float | None:
    """The value below which `share` (0 to 1) of the observations lie, even within a bucket; None without any.

    In the last bucket, which has no upper bound, it is the highest bound there is.
    """
    bounds = sorted(counts)
    if not bounds or counts[bounds[-1]] <= 0:
        return None
    rank = share * counts[bounds[-1]]
    lower, below = 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank and counts[bound] > below:
            if math.isinf(bound):
                return lower if len(bounds) > 1 else None
            return lower + (bound - lower) * (rank - below) / (counts[bound] - below)
        lower, below = bound, counts[bound]
    return _highest_finite(bounds)


def _highest_finite(bounds: Sequence[float]) -> float | None:
    return max((bound for bound in bounds if math.isfinite(bound)), default=None)
