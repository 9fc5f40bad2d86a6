"""Which models fit on a GPU awake together, and with how much KV cache (pure)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import msgspec

from vllm_sleep_tui.sizing.estimate import ACTIVATIONS
from vllm_sleep_tui.sizing.figures import Figures, Machine
from vllm_sleep_tui.units import GIB, gib

COMFORT = 4.0
"""Full contexts that a model should keep to be cut down for company, awake or with its weights in VRAM."""


class Sharing(msgspec.Struct, frozen=True, kw_only=True):
    """How models could be awake together with smaller KV caches."""

    models: tuple[str, ...]
    kv_cache_memory_bytes: dict[str, int]
    """On each GPU."""
    utilization: dict[str, float]
    """The `gpu-memory-utilization` that gives it."""
    contexts: dict[str, float | None]
    """Full contexts that fit into it; None if a context's size is not known."""

    @property
    def is_comfortable(self) -> bool:
        """Whether each model keeps enough to work with."""
        return all(held is not None and held >= COMFORT for held in self.contexts.values())


class GpuAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """What fits on one GPU."""

    index: int
    together: tuple[str, ...]
    """The largest set that fits awake together as configured, everybody else asleep."""
    sentence: str
    sharing: Sharing | None = None
    """The two that could be awake together with the most cache left, if they cannot as configured."""


def largest_set(machine: Machine, models: Iterable[Figures], gpu: int) -> tuple[str, ...]:
    """The most models that fit awake together on a GPU while its others sleep, in the config's order."""
    there = [figures for figures in models if gpu in figures.awake]
    left = machine.room(gpu) - sum(figures.asleep[gpu] for figures in there)
    chosen = set()
    for figures in sorted(there, key=lambda each: _further(each, gpu)):
        left -= _further(figures, gpu)
        if left < 0:
            break
        chosen.add(figures.name)
    return tuple(figures.name for figures in there if figures.name in chosen)


def asleep_on(machine: Machine, models: Iterable[Figures]) -> dict[int, int]:
    """VRAM by GPU that all models hold together while all of them sleep."""
    return {gpu: sum(figures.asleep.get(gpu, 0) for figures in models) for gpu in machine.totals}


def share_out(machine: Machine, residues: Mapping[int, int], chosen: Sequence[Figures]) -> Sharing | None:
    """KV caches with which `chosen`, all on the same GPUs, fit awake together; None if there are none.

    `residues` are `asleep_on` of all models, `chosen` among them.
    """
    gpus = chosen[0].gpus
    fixed = [figures.fixed for figures in chosen]
    if any(figures.gpus != gpus for figures in chosen) or not set(gpus) <= set(machine.totals):
        return None
    if None in fixed:
        return None
    spare = min(_room_awake(machine, residues, chosen, gpu) for gpu in gpus) - sum(
        size or 0 for size in fixed
    )
    if spare <= 0:
        return None
    is_known = all(figures.context for figures in chosen)
    needs = [(figures.context or 0) if is_known else 1 for figures in chosen]
    caches = {f.name: spare * need // sum(needs) for f, need in zip(chosen, needs, strict=True)}
    total = min(machine.totals[gpu] for gpu in gpus)
    shares = {f.name: ((f.weights or 0) + ACTIVATIONS + caches[f.name]) / total for f in chosen}
    return Sharing(
        models=tuple(caches),
        kv_cache_memory_bytes=caches,
        utilization={name: math.floor(share * 1000) / 1000 for name, share in shares.items()},
        contexts={f.name: caches[f.name] / f.context if f.context else None for f in chosen},
    )


def _room_awake(machine: Machine, residues: Mapping[int, int], chosen: Sequence[Figures], gpu: int) -> int:
    """VRAM of a GPU for `chosen` while all others sleep."""
    return machine.room(gpu) - residues[gpu] + sum(figures.asleep.get(gpu, 0) for figures in chosen)


def on_gpu(machine: Machine, residues: Mapping[int, int], models: Sequence[Figures], gpu: int) -> GpuAdvice:
    """What fits on one GPU; `residues` as for `share_out`."""
    there = [figures for figures in models if gpu in figures.awake]
    together = largest_set(machine, models, gpu)
    sharing = None if len(together) == len(there) else _best_pair(machine, residues, there, together)
    return GpuAdvice(
        index=gpu, together=together, sharing=sharing, sentence=_gpu_sentence(machine, gpu, there, together)
    )


def _best_pair(
    machine: Machine, residues: Mapping[int, int], there: Sequence[Figures], together: Sequence[str]
) -> Sharing | None:
    """The two that keep the most cache, among those that cannot be awake together as they are."""
    fitting = set(together)
    pairs = (pair for pair in combinations(there, 2) if not fitting.issuperset(each.name for each in pair))
    shared = (share_out(machine, residues, pair) for pair in pairs)
    return max(filter(None, shared), key=_least_kept, default=None)


def _least_kept(sharing: Sharing) -> float:
    """What the worse off of them keeps, in contexts, or in GiB."""
    contexts = [held for held in sharing.contexts.values() if held is not None]
    if len(contexts) == len(sharing.models):
        return min(contexts)
    return min(sharing.kv_cache_memory_bytes.values()) / GIB


def _further(figures: Figures, gpu: int) -> int:
    """What being awake costs on a GPU beyond being asleep."""
    return max(0, figures.awake[gpu] - figures.asleep[gpu])


def _gpu_sentence(machine: Machine, gpu: int, there: Sequence[Figures], together: Sequence[str]) -> str:
    held = {f.name: f.awake[gpu] if f.name in together else f.asleep[gpu] for f in there}
    figures = f"{gib(sum(held.values()))} of {gib(machine.room(gpu))}"
    if not there:
        return "No model is configured for it."
    if not together:
        return f"None of its models fits while the others sleep ({gib(machine.room(gpu))} are there)."
    if len(together) == len(there):
        return f"{listed(together)} {'fit awake together' if there[1:] else 'fits awake'}: {figures}."
    one = "At most one model fits" if len(together) == 1 else f"{listed(together)} fit"
    return f"{one} awake at a time: {figures} with the others asleep."


def listed(words: Iterable[str]) -> str:
    """A list as people write it."""
    *first, last = list(words)
    return f"{', '.join(first)} and {last}" if first else last
