"""Proof that a woken model is itself: fixed token ids, their log-probabilities compared with a reference.

A greedy answer is not bit-stable (BF16, H100), so the comparison has a tolerance; garbage after a level 2
wake without reload is far outside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

PROMPT = (11, 42, 97, 19, 64, 150, 33, 121, 77, 58, 203, 25)
"""Token ids that every vocabulary has; the words do not matter."""
WARM_UP = (60, 31, 88, 45)
"""Another prompt, so that warming up leaves nothing of the proof in a cache."""
TOLERANCE = 0.1
"""Mean absolute difference in nats that still counts as the same model.

On H100s (vLLM 0.24, BF16, one GPU and TP 2) 255 wakes from both levels gave 0.00000, and a level 2 wake
without the reload 0.29 at the least, on random weights (docs/measurements.md).
"""


class Verdict(StrEnum):
    """What is known of the last wake or sleep."""

    PROVEN = "proven"
    UNPROVEN = "unproven"
    UNVERIFIED = "unverified"


def distance(answer: Sequence[float], reference: Sequence[float]) -> float:
    """Mean absolute difference of log-probabilities in nats; infinite if they cannot be compared."""
    if len(answer) != len(reference) or not reference:
        return math.inf
    total = sum(abs(a - b) for a, b in zip(answer, reference, strict=True))
    return total / len(reference) if math.isfinite(total) else math.inf


def is_same(answer: Sequence[float] | None, reference: Sequence[float]) -> bool:
    """Whether the answer is the reference's, within the tolerance."""
    return answer is not None and distance(answer, reference) <= TOLERANCE
