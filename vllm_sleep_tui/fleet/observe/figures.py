"""The figures that advice is reckoned from: measured ones first, estimates where there are none."""

from __future__ import annotations

import os
from collections.abc import Mapping

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.levels import why_no_level2
from vllm_sleep_tui.fleet.model import Model
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
    models = core.readable()
    used = {gpu for config in core.config.models.values() for gpu in config.gpus}
    memory = {gpu: now for gpu, now in read_memory(core, used).items() if now.total is not None}
    ours = {gpu: sum(held_here(model, now, gpu) for model in models) for gpu, now in memory.items()}
    host = host_memory(core.simulated)
    ram = None
    if host.available_bytes is not None and host.total_bytes is not None:
        stopped = sum(bool(each.config.gpus) and each.record.state not in RUNNING for each in models)
        pinned = sum(model.pinned_now() for model in models)
        ram = host.available_bytes + pinned - stopped * PRIVATE_BYTES - budget.ram_margin(host.total_bytes)
    return Machine(
        totals={gpu: now.total for gpu, now in memory.items() if now.total is not None},
        others={gpu: max(0, (now.used or 0) - ours[gpu]) for gpu, now in memory.items()},
        ram=ram,
    )


def read_figures(core: Core, per_day: Mapping[str, float] | None = None) -> list[Figures]:
    """The figures of every model of the config, in its order; `per_day` are its switches where known."""
    models = core.models()
    memory = read_memory(core, {gpu for model in models for gpu in model.config.gpus})
    commands = {model.vllm_command for model in models}
    versions = {command: vllm.version for command in commands if (vllm := find_command(command, os.environ))}
    shares = shares_of([model for model in models if model.config.model], memory)
    return [
        _figures(
            model,
            shares.get(model.name),
            versions.get(model.vllm_command),
            (per_day or {}).get(model.name),
        )
        for model in models
    ]


def _figures(model: Model, share: float | None, version: str | None, per_day: float | None) -> Figures:
    config, measured = model.config, model.footprint
    expected, unreadable = _estimate(model, share, version)
    seconds = _times(measured, expected.times or _times_of(measured, config))
    pinned = (
        measured.pinned or expected.pinned_bytes or budget.pinned_estimate(measured, expected.weights_bytes)
    )
    certain = {what for what in seconds if measured.typical(what) is not None}
    certain |= {"memory"} if set(measured.awake) >= {str(gpu) for gpu in config.gpus} else set()
    certain |= {"pinned"} if measured.pinned else set()
    return Figures(
        name=model.name,
        gpus=config.gpus,
        configured=str(config.level),
        is_attached=config.url is not None,
        awake=_awake(model, expected, share),
        asleep={gpu: budget.asleep_estimate(measured, config, gpu) for gpu in config.gpus},
        weights=_share_of_weights(measured, config) or expected.weights_per_gpu,
        context=expected.context_bytes,
        pinned=pinned,
        start=seconds["start"],
        wake1=seconds["wake1"],
        wake2=seconds["wake2"],
        estimated=frozenset({"memory", "pinned", *seconds} - certain),
        no_level2=why_no_level2(config, version, model.base),
        per_day=per_day,
        unreadable=None if measured.weights or measured.pinned else unreadable,
    )


def _estimate(model: Model, share: float | None, version: str | None) -> tuple[Estimate, str | None]:
    """The estimate, an empty one without files; and why the files that are here are no checkpoint."""
    config, base = model.config, model.base
    total = min((size for gpu in config.gpus if (size := model.core.total(gpu))), default=None)
    try:
        expected = estimate(config, base, total=total, utilization=share, version=version)
    except UsageError as error:
        is_here = config.model is not None and find_checkpoint(config.model, base, os.environ | config.env)
        return Estimate(), error.what if is_here else None
    return expected, expected.unknown.get("weights")


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


def _awake(model: Model, expected: Estimate, share: float | None) -> dict[int, int]:
    """VRAM by GPU, measured or estimated; empty if a GPU's size is not known."""
    sizes = {}
    for gpu in model.config.gpus:
        measured, total = model.footprint.awake.get(str(gpu)), model.core.total(gpu)
        if measured is None and total is None:
            return {}
        guess = expected.awake_per_gpu or budget.awake_estimate(share, total or 0)
        sizes[gpu] = guess if measured is None else measured
    return sizes
