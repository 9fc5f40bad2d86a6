"""Proof that a woken model is itself: fixed token ids, their log-probabilities compared with a reference.

A greedy answer is not bit-stable (BF16, H100), so the comparison has a tolerance; garbage after a level 2
wake without reload is far outside it. A model that embeds is compared by the cosine.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING

import msgspec

from vllm_sleep_tui.engine.failures import EngineRefused

if TYPE_CHECKING:
    from vllm_sleep_tui.engine.client import VllmClient

PROMPT = (11, 42, 97, 19, 64, 150, 33, 121, 77, 58, 203, 25)
"""Token ids that every vocabulary has; the words do not matter."""
WARM_UP = (60, 31, 88, 45)
"""Another prompt, so that warming up leaves nothing of the proof in a cache."""
TOLERANCE = 0.1
"""Mean absolute difference in nats that still counts as the same model.

On H100s (vLLM 0.24; BF16 and FP8, random and real weights, a mixture of experts, one GPU and TP 2) 369 wakes
from both levels gave 0.00000, and level 2 wakes without the reload 0.29 at the least (docs/measurements.md).
"""
SAME_COSINE = 0.999
"""The least cosine of two embeddings of one text by the same model; 1 is equality."""
COMPONENTS = 64
"""Of an embedding that are kept, evenly picked: a record has one page."""


class Reference(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the fixed question while the model was known to be well."""

    logprobs: tuple[float, ...] = ()
    embedding: tuple[float, ...] = ()
    """Of a model that embeds and does not complete; few enough of its components for the page."""


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


def picked(embedding: Sequence[float]) -> tuple[float, ...]:
    """At most COMPONENTS of its numbers, evenly picked, with six digits."""
    step = max(1, math.ceil(len(embedding) / COMPONENTS))
    return tuple(float(f"{number:.6g}") for number in embedding[::step])


def cosine(one: Sequence[float], other: Sequence[float]) -> float:
    """The cosine of two embeddings; -1 if they cannot be compared."""
    if len(one) != len(other):
        return -1.0
    lengths = math.hypot(*one) * math.hypot(*other)
    value = (
        sum(a * b for a, b in zip(one, other, strict=True)) / lengths if 0 < lengths < math.inf else math.nan
    )
    return value if math.isfinite(value) else -1.0


async def one_token(client: VllmClient, name: str, seconds: float) -> None:
    """Have the model give one token; returns as well if it is refused, which is an answer too.

    Raises the other EngineErrors: a sleeper and a frozen engine never answer.
    """
    with contextlib.suppress(EngineRefused):  # a task without completions, a key that is not known
        await client.complete(WARM_UP, model=name, max_tokens=1, timeout=seconds)


async def ask(client: VllmClient, name: str, seconds: float) -> Reference | None:
    """The answer to the proof's question by the model's task; None if it can be asked nothing of the kind."""
    try:
        answer = await client.complete(PROMPT, model=name, max_tokens=1, prompt_logprobs=1, timeout=seconds)
    except EngineRefused:
        pass
    else:
        return Reference(logprobs=answer.prompt_logprobs) if answer.prompt_logprobs else None
    try:
        return Reference(embedding=picked(await client.embed(PROMPT, model=name, timeout=seconds)))
    except EngineRefused:
        return None


def proven(replicas: int, reference: Reference) -> str:
    """The verdict of a proof that went well, on so many data parallel replicas."""
    # An embedding cannot be asked of a replica by number (vLLM 0.24 to 0.33, read in source).
    return f"1 of {replicas} {Verdict.PROVEN}" if replicas > 1 and reference.embedding else Verdict.PROVEN


async def is_itself(
    client: VllmClient, name: str, reference: Reference, seconds: float, replicas: int = 1
) -> bool:
    """Whether each replica answers as one did when `reference` was taken; raises EngineError."""
    if reference.embedding:
        now = picked(await client.embed(PROMPT, model=name, timeout=seconds))
        return cosine(now, reference.embedding) >= SAME_COSINE
    for replica in range(replicas) if replicas > 1 else (None,):
        answer = await client.complete(
            PROMPT, model=name, max_tokens=1, prompt_logprobs=1, timeout=seconds, replica=replica
        )
        if not is_same(answer.prompt_logprobs, reference.logprobs):
            return False
    return True
