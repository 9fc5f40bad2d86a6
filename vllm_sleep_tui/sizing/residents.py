"""What level 0 costs and brings: whose weights stay in VRAM beside a model, and what KV cache that leaves."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from vllm_sleep_tui.sizing.figures import Figures
from vllm_sleep_tui.sizing.sharing import listed
from vllm_sleep_tui.units import gib, took

WAKE_SECONDS = 0.03
"""A wake from level 0 moves no weights, so its size hardly matters: 0.027 s measured for 0.6B and 3.8B (H100,
vLLM 0.26), without the other's sleep and the proof."""


class Level0(msgspec.Struct, frozen=True, kw_only=True):
    """Level 0 for one model: asleep, its weights in VRAM; awake, the others'."""

    resident: int | None
    """VRAM that its weights take on each of its GPUs while it sleeps so; None: they may not stay."""
    beside: tuple[str, ...]
    """The models that can be awake meanwhile."""
    wake: float
    """Seconds."""
    is_estimate: bool
    """Of `wake`."""
    stay: tuple[str, ...]
    """Whose weights can stay while it is awake itself."""
    kv_cache_bytes: int | None
    """What is left for its KV cache on each of its GPUs then, at its next start."""
    kv_tokens: int | None
    sentence: str


def level_0(figures: Figures, neighbours: Iterable[Figures]) -> Level0 | None:
    """What level 0 would be for a model; None if neither it nor a neighbour can sleep so."""
    others = list(neighbours)
    beside = tuple(other.name for other in others if figures.name in other.stay)
    if not others or (figures.resident is None and not figures.stay):
        return None
    wake, is_estimate = figures.wake0 or WAKE_SECONDS, figures.wake0 is None
    tokens = None
    if figures.kv_cache is not None and figures.kv_per_token:
        tokens = figures.kv_cache // figures.kv_per_token
    sentences = []
    if figures.resident is not None and beside:
        about = " (estimate)" if is_estimate else ""
        sentences.append(
            f"At level 0 its weights stay in VRAM beside {listed(beside)}: {gib(figures.resident)}, and it "
            f"wakes in {took(wake)}{about}."
        )
    elif figures.resident is not None:
        sentences.append(
            f"At level 0 its weights would take {gib(figures.resident)} of VRAM, which nobody awake on its "
            "GPUs has to spare."
        )
    if figures.stay and figures.kv_cache is not None:
        count = f", {tokens:,} tokens," if tokens is not None else ""
        sentences.append(
            f"Awake, it has a KV cache of {gib(figures.kv_cache)}{count} beside the weights of "
            f"{listed(figures.stay)} (estimate)."
        )
    if figures.kv_note is not None:
        sentences.append(f"But {figures.kv_note}.")
    return Level0(
        resident=figures.resident,
        beside=beside,
        wake=wake,
        is_estimate=is_estimate,
        stay=figures.stay,
        kv_cache_bytes=figures.kv_cache,
        kv_tokens=tokens,
        sentence=" ".join(sentences),
    )
