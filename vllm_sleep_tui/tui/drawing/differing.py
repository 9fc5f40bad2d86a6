"""Two texts, word by word: what stands in one of them alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from vllm_sleep_tui.tui.drawing.flow import Flow, Row
from vllm_sleep_tui.tui.drawing.paint import Line, Span
from vllm_sleep_tui.tui.drawing.turns import Turn

EXACT_WORDS = 2000
"""Of the longer text; beyond it, words that stand everywhere are not lined up, or it would take a minute."""
_PARTS = re.compile(r"\s+|\S+")


class Difference(NamedTuple):
    """Which words of two texts stand in both, by their number in each, in one order."""

    left: frozenset[int]
    right: frozenset[int]
    share: float
    """Of the words of both, how many are the same; 1 for two empty texts."""


def difference(left: str, right: str) -> Difference:
    """Line the words of two texts up."""
    before, after = left.split(), right.split()
    is_long = max(len(before), len(after)) > EXACT_WORDS
    matcher = SequenceMatcher(None, before, after, autojunk=is_long)
    blocks = matcher.get_matching_blocks()
    return Difference(
        frozenset(block.a + step for block in blocks for step in range(block.size)),
        frozenset(block.b + step for block in blocks for step in range(block.size)),
        matcher.ratio(),
    )


class Differing(Turn):
    """An answer as it was written, with the words marked that the other one has not."""

    def __init__(self, speaker: str, paint: str, text: str, same: frozenset[int]) -> None:
        super().__init__(speaker, paint)
        self._lines = list(_lines(text, same))

    def _sections(self, width: int) -> list[Sequence[Row]]:
        return [[row for line in self._lines for row in Flow(line).rows(width)]]


def _lines(text: str, same: frozenset[int]) -> Iterator[Line]:
    """The text's lines; words that are not in `same` are marked, and the blanks between two of them."""
    word = 0
    line: list[Span] = []
    for match in _PARTS.finditer(text):
        part = match[0]
        if not part.isspace():
            line.append((part, "text" if word in same else "accent bold underline"))
            word += 1
            continue
        first, *others = part.replace("\t", "    ").split("\n")
        line.append((first, ""))
        for other in others:
            yield tuple(line)
            line = [(other, "")]
    yield tuple(line)
