"""The figures that advice is reckoned from: measured ones first, estimates where there are none."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.levels import why_no_level2
from vllm_sleep_tui.fleet.observe.discovery import find_command
from vllm_sleep_tui.fleet.operations.room import held_here, read_memory, shares_of
from vllm_sleep_tui.fleet.states import RUNNING
from vllm_sleep_tui.sizing import budget
from vllm_sleep_tui.sizing.advice import Advice, advise
from vllm_sleep_tui.sizing.checkpoint import find_checkpoint
from vllm_sleep_tui.sizing.estimate import ACTIVATIONS, Estimate, Times, estimate, times
from vllm_sleep_tui.sizing.figures import PRIVATE_BYTES, Figures, Machine
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD, Footprint
from vllm_sleep_tui.telemetry.host import host_memory


def advise_fleet(core: Core, per_day: Mapping[str, float] | None = None) -> Advice:
    """The advice on all models of a config, with what is measured and free now (blocks for ms).

    `per_day` are the switches to each model a day, once a week of them is known.
    """
    return advise(read_machine(core), read_figures(core, per_day))


def read_machine(core: Core) -> Machine:
    """The machine as it is, without what our own models hold now."""
    records = core.readable()
    used = {gpu for model in core.config.models.values() for gpu in model.gpus}
    memory = {gpu: now for gpu, now in read_memory(core, used).items() if now.total is not None}
    ours = {gpu: sum(held_here(core, record, now, gpu) for record in records) for gpu, now in memory.items()}
    host = host_memory(core.simulated)
    ram = None
    if host.available_bytes is not None and host.total_bytes is not None:
        stopped = sum(bool(core.model(r.name).gpus) and r.state not in RUNNING for r in records)
        pinned = sum(core.pinned_now(record) for record in records)
        ram = host.available_bytes + pinned - stopped * PRIVATE_BYTES - budget.ram_margin(host.total_bytes)
    return Machine(
        totals={gpu: now.total for gpu, now in memory.items() if now.total is not None},
        others={gpu: max(0, (now.used or 0) - ours[gpu]) for gpu, now in memory.items()},
        ram=ram,
    )


def read_figures(core: Core, per_day: Mapping[str, float] | None = None) -> list[Figures]:
    """The figures of every model of the config, in its order; `per_day` are its switches where known."""
    memory = read_memory(core, {gpu for model in core.config.models.values() for gpu in model.gpus})
    commands = {core.vllm_command(name) for name in core.config.models}
    versions = {command: vllm.version for command in commands if (vllm := find_command(command, os.environ))}
    shares = shares_of(core, [key for key, model in core.config.models.items() if model.model], memory)
    return [
        _figures(
            core, name, shares.get(name), versions.get(core.vllm_command(name)), (per_day or {}).get(name)
        )
        for name in core.config.models
    ]


def _figures(
    core: Core, name: str, share: float | None, version: str | None, per_day: float | None
) -> Figures:
    model, known = core.model(name), core.footprint(name)
    expected, unreadable = _estimate(core, model, share, version)
    seconds = _times(known, expected.times or _times_of(known, model))
    pinned = known.pinned or expected.pinned_bytes or budget.pinned_estimate(known, expected.weights_bytes)
    awake = _awake(core, model, known, expected, share)
    measured = {what for what in seconds if known.typical(what) is not None}
    measured |= {"memory"} if set(known.awake) >= {str(gpu) for gpu in model.gpus} else set()
    measured |= {"pinned"} if known.pinned else set()
    return Figures(
        name=name,
        gpus=model.gpus,
        configured=str(model.level),
        is_attached=model.url is not None,
        awake=awake,
        asleep={gpu: budget.asleep_estimate(known, model, gpu) for gpu in model.gpus},
        weights=_share_of_weights(known, model) or expected.weights_per_gpu,
        context=expected.context_bytes,
        pinned=pinned,
        start=seconds["start"],
        wake1=seconds["wake1"],
        wake2=seconds["wake2"],
        estimated=frozenset({"memory", "pinned", *seconds} - measured),
        no_level2=why_no_level2(model, version, core.loaded.path.parent),
        per_day=per_day,
        unreadable=None if known.weights or known.pinned else unreadable,
    )


def _estimate(
    core: Core, model: ModelConfig, share: float | None, version: str | None
) -> tuple[Estimate, str | None]:
    """The estimate, an empty one without files; and why the files that are here are no checkpoint."""
    total = min((size for gpu in model.gpus if (size := core.total(gpu))), default=None)
    base: Path = core.loaded.path.parent
    try:
        found = estimate(model, base, total=total, utilization=share, version=version)
    except UsageError as error:
        is_here = model.model is not None and find_checkpoint(model.model, base, os.environ | model.env)
        return Estimate(), error.what if is_here else None
    return found, found.unknown.get("weights")


def _times(known: Footprint, expected: Times | None) -> dict[str, float | None]:
    return {
        what: known.typical(what) if known.typical(what) is not None else getattr(expected, what, None)
        for what in ("start", "wake1", "wake2")
    }


def _share_of_weights(known: Footprint, model: ModelConfig) -> int | None:
    """Bytes of weights on one GPU, as the log told for all of them."""
    return None if known.weights is None else known.weights // (len(model.gpus) or 1)


def _times_of(known: Footprint, model: ModelConfig) -> Times | None:
    """Expected times of a model that has run, where its files tell nothing."""
    share = _share_of_weights(known, model)
    if share is None or known.weights is None:
        return None
    cache = max(0, max(known.awake.values(), default=0) - share - ACTIVATIONS - AWAKE_OVERHEAD)
    return times(
        share,
        checkpoint_bytes=known.weights,
        kv=cache,
        pinned_bytes=known.pinned or known.weights,
        gpus=len(model.gpus) or 1,
    )


def _awake(
    core: Core, model: ModelConfig, known: Footprint, expected: Estimate, share: float | None
) -> dict[int, int]:
    """VRAM by GPU, measured or estimated; empty if a GPU's size is not known."""
    found = {}
    for gpu in model.gpus:
        measured, total = known.awake.get(str(gpu)), core.total(gpu)
        if measured is None and total is None:
            return {}
        guess = expected.awake_per_gpu or budget.awake_estimate(share, total or 0)
        found[gpu] = guess if measured is None else measured
    return found
