"""How much a model may take: `gpu-memory-utilization: auto` and `level: auto` (pure)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from vllm_sleep_tui.config.types import Config, ModelConfig
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD, Footprint, asleep_guess
from vllm_sleep_tui.units import GIB

HIGHEST_UTILIZATION = 0.9
"""vLLM's own default before 0.20.2, 0.92 since; what docs/measurements.md shows was measured with it."""
LOWEST_UTILIZATION = 0.1
"""Where others hold nearly all of a GPU there is still a share, which vLLM takes and can refuse in words."""
MARGIN = GIB // 2
"""VRAM left over beside an awake model, for what the driver and vLLM's temporaries take."""
PINNED_PER_WEIGHTS = 2.0
"""Pinned allocations round up to powers of two: 1.4 and 2.6 times the weights were measured."""


def fixed_utilization(model: ModelConfig) -> float | None:
    """The model's own `gpu-memory-utilization`, None if it is left to us."""
    return ServeArgs(model.args).utilization


class Plan(NamedTuple):
    """A planned share, and for whose weights there is room beside it."""

    share: float
    stay: tuple[str, ...]
    """The neighbours that may sleep at level 0 while the model is awake, as far as their GPUs are its own."""


def utilization(
    name: str,
    config: Config,
    totals: Mapping[int, int],
    others: Mapping[int, int],
    asleep: Mapping[str, int],
    *,
    staying: Mapping[str, int] | None = None,
    least: int | None = None,
    bare: int = 0,
) -> Plan | None:
    """The share of each GPU that `name` may take, so that all its neighbours' residues still fit.

    `totals` and `others` are bytes by GPU index (`others`: held by processes that are none of ours),
    `asleep` what each model was measured to leave behind, in bytes. None if a GPU's size is not known.

    `staying` are the bytes that the weights of neighbours take on each of their GPUs if they sleep at level
    0: room is left for as many as leave this one `least` bytes, those of `level: 0` first, then the smallest.
    Where `least` is not known there is room for those of `level: 0` alone, as long as `bare` bytes are left:
    below that it could not even start.
    """
    model = config.models[name]
    if not set(model.gpus) <= totals.keys():
        return None
    room = {}
    for gpu in model.gpus:
        neighbours = [key for key, other in config.models.items() if key != name and gpu in other.gpus]
        residues = sum(asleep.get(key, asleep_guess(config.models[key].gpus)) for key in neighbours)
        room[gpu] = totals[gpu] - others.get(gpu, 0) - residues - AWAKE_OVERHEAD - MARGIN
    stay = []
    guests = {key: size for key, size in (staying or {}).items() if key != name}
    for key in sorted(guests, key=lambda key: (config.models[key].level != 0, guests[key])):
        shared = [gpu for gpu in model.gpus if gpu in config.models[key].gpus]
        is_bound = config.models[key].level == 0 and least is None
        enough = bare if is_bound else least or math.inf
        if shared and all(room[gpu] - guests[key] >= enough for gpu in shared):
            stay.append(key)
            room |= {gpu: room[gpu] - guests[key] for gpu in shared}
    share = min([HIGHEST_UTILIZATION, *(room[gpu] / totals[gpu] for gpu in model.gpus)])
    return Plan(max(LOWEST_UTILIZATION, math.floor(share * 1000) / 1000), tuple(stay))


def awake_estimate(share: float | None, total: int) -> int:
    """VRAM a model will hold on a GPU of `total` bytes at a utilization of `share`."""
    return min(total, int((share if share is not None else HIGHEST_UTILIZATION) * total) + AWAKE_OVERHEAD)


def asleep_estimate(footprint: Footprint, model: ModelConfig, gpu: int) -> int:
    """What the model leaves on `gpu` when it sleeps, measured or assumed."""
    measured = footprint.asleep.get(str(gpu))
    return measured if measured is not None else asleep_guess(model.gpus)


def resident_estimate(footprint: Footprint, model: ModelConfig, gpu: int, weights: int | None) -> int:
    """What the model leaves on `gpu` at level 0: measured, else its weights beside what a sleeper leaves."""
    measured = footprint.resident.get(str(gpu))
    if measured is not None:
        return measured
    return asleep_estimate(footprint, model, gpu) + (weights or 0) // max(1, len(model.gpus))


def pinned_estimate(footprint: Footprint, weights: int | None) -> int | None:
    """Bytes of RAM that level 1 will pin: measured, else twice the weights; None if those are not known."""
    if footprint.pinned:
        return footprint.pinned
    copied = footprint.weights or weights
    return None if copied is None else int(copied * PINNED_PER_WEIGHTS)


def ram_margin(total: int) -> int:
    """RAM that level 1 must leave free: a twentieth of the machine, 2 GiB at least."""
    return max(2 * GIB, total // 20)


def level_for(
    model: ModelConfig, pinned: int | None, available: int | None, total: int | None, *, reloads: bool = True
) -> str:
    """What `level: auto` becomes: 1 while the RAM for its pinned pool is there with a margin, else 2.

    Level 2 needs a loader that `reloads`; without, it is 1, whatever was asked for.
    """
    if not reloads:
        return "none" if model.level == "none" else "1"
    if model.level != "auto":
        return str(model.level)
    if not model.gpus or pinned is None or available is None or total is None:
        return "1"
    return "1" if pinned + ram_margin(total) <= available else "2"
