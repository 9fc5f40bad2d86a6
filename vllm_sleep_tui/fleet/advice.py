"""What to do with each model and GPU, reckoned from measured figures first, estimates where there are none.

The advice on a config, what a model would need that was never started, and the config as the advice has it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import closing
from pathlib import Path

from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.core import Core, simulated_folder
from vllm_sleep_tui.fleet.levels import why_no_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.discovery import find_command
from vllm_sleep_tui.fleet.operations.room import (
    held_here,
    kv_cache_note,
    plans_of,
    read_memory,
    resident_weights,
)
from vllm_sleep_tui.fleet.states import RUNNING
from vllm_sleep_tui.fleet.store.history import History
from vllm_sleep_tui.sizing import budget
from vllm_sleep_tui.sizing.advice import Advice, ModelAdvice, Verdict, advise
from vllm_sleep_tui.sizing.advice_config import AFTERWARDS, apply_text, proposed_text
from vllm_sleep_tui.sizing.budget import HIGHEST_UTILIZATION
from vllm_sleep_tui.sizing.checkpoint import find_checkpoint
from vllm_sleep_tui.sizing.estimate import ACTIVATIONS, Estimate, Times, checkpoint_of, estimate, times
from vllm_sleep_tui.sizing.figures import PRIVATE_BYTES, Figures, Machine
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD, Footprint
from vllm_sleep_tui.sizing.sharing import GpuAdvice
from vllm_sleep_tui.telemetry.gpus import GpuReading, open_reader
from vllm_sleep_tui.telemetry.host import host_memory

__all__ = [
    "AFTERWARDS",
    "HIGHEST_UTILIZATION",
    "Advice",
    "Estimate",
    "GpuAdvice",
    "ModelAdvice",
    "Verdict",
    "advise_config",
    "advise_fleet",
    "apply_text",
    "estimate_of",
    "proposed_text",
]


def advise_config(loaded: LoadedConfig, state_dir: Path, names: Collection[str]) -> Advice:
    """The advice on these models of a config, as `Fleet.advice` gives it; it is reckoned over all of them."""
    core = Core(loaded, state_dir)
    with closing(core.reader), closing(History(state_dir, loaded.path)) as history:
        whole = advise_fleet(core, history.rates())
    gpus = {gpu for name in names for gpu in loaded.config.models[name].gpus}
    return Advice(
        models=tuple(model for model in whole.models if model.name in names),
        gpus=tuple(gpu for gpu in whole.gpus if gpu.index in gpus),
    )


def advise_fleet(core: Core, per_day: Mapping[str, float] | None = None) -> Advice:
    """The advice on all models of a config, with what is measured and free now (blocks for ms).

    `per_day` are the switches to each model a day, once a week of them is known.
    """
    return advise(read_machine(core), read_figures(core, per_day))


def estimate_of(model: str, here: Path, loaded: LoadedConfig | None, state_dir: Path) -> Estimate:
    """What a model would need that no config names, a folder or a hub name; nothing is started or fetched.

    On the first GPU there is, and by the rules of the config's vLLM. Raises UsageError if it is not here.
    """
    entry = ModelConfig(model=model)
    checkpoint_of(entry, here)
    gpu = _first_gpu(loaded, state_dir)
    vllm = find_command(loaded.config.vllm_command, os.environ) if loaded else None
    return estimate(
        entry,
        here,
        total=gpu.total_bytes if gpu else None,
        gpu_name=gpu.name if gpu else "",
        utilization=HIGHEST_UTILIZATION,
        version=vllm.version if vllm else None,
    )


def _first_gpu(loaded: LoadedConfig | None, state_dir: Path) -> GpuReading | None:
    is_simulated = loaded is not None and loaded.config.simulated_gpus
    with closing(
        open_reader(simulated_folder(loaded, state_dir) if loaded and is_simulated else None)
    ) as reader:
        return next(iter(reader.read()), None)


# ── the figures ──────────────────────────────────────────────────────────────────────────────────────────


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
    plans = plans_of([model for model in models if model.config.model], memory)
    return [
        _figures(
            model,
            plans.get(model.name),
            versions.get(model.vllm_command),
            (per_day or {}).get(model.name),
        )
        for model in models
    ]


def _figures(model: Model, plan: budget.Plan | None, version: str | None, per_day: float | None) -> Figures:
    config, measured = model.config, model.footprint_as_configured
    share = plan.share if plan is not None else budget.fixed_utilization(config)
    expected, unreadable = _estimate(model, share, version)
    seconds = _times(measured, expected.times or _times_of(measured, config))
    pinned = (
        measured.pinned or expected.pinned_bytes or budget.pinned_estimate(measured, expected.weights_bytes)
    )
    certain = {what for what in seconds if measured.typical(what) is not None}
    certain |= {"memory"} if set(measured.awake) >= {str(gpu) for gpu in config.gpus} else set()
    certain |= {"pinned"} if measured.pinned else set()
    weights = _share_of_weights(measured, config) or expected.weights_per_gpu
    return Figures(
        name=model.name,
        gpus=config.gpus,
        configured=str(config.level),
        is_attached=config.is_attached,
        awake=_awake(model, expected, share),
        asleep={gpu: budget.asleep_estimate(measured, config, gpu) for gpu in config.gpus},
        weights=weights,
        resident=None if config.is_attached else resident_weights(model),
        stay=plan.stay if plan is not None else (),
        kv_cache=_kv_cache(model, weights, share),
        kv_per_token=expected.kv_bytes_per_token,
        kv_note=kv_cache_note(model, share),
        wake0=measured.typical("wake0"),
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


def _kv_cache(model: Model, weights: int | None, share: float | None) -> int | None:
    """What a share of its GPUs leaves for the KV cache on each of them, unless the config names that."""
    totals = [model.core.total(gpu) for gpu in model.config.gpus]
    if given := ServeArgs(model.config.args).kv_cache_memory_bytes:
        return given
    if weights is None or share is None or None in totals or not totals:
        return None
    return max(0, int(share * min(total or 0 for total in totals)) - weights - ACTIVATIONS)


def _times(footprint: Footprint, expected: Times | None) -> dict[str, float | None]:
    seconds: dict[str, float | None] = {}
    for what in ("start", "wake1", "wake2"):
        measured = footprint.typical(what)
        seconds[what] = getattr(expected, what, None) if measured is None else measured
    return seconds


def _share_of_weights(footprint: Footprint, model: ModelConfig) -> int | None:
    """Bytes of weights on one GPU, as the log told for all of them."""
    return None if footprint.weights is None else footprint.weights // (len(model.gpus) or 1)


def _times_of(footprint: Footprint, model: ModelConfig) -> Times | None:
    """Expected times of a model that has run, where its files tell nothing."""
    share = _share_of_weights(footprint, model)
    if share is None or footprint.weights is None:
        return None
    cache = max(0, max(footprint.awake.values(), default=0) - share - ACTIVATIONS - AWAKE_OVERHEAD)
    return times(
        share,
        checkpoint_bytes=footprint.weights,
        kv=cache,
        pinned_bytes=footprint.pinned or footprint.weights,
        gpus=len(model.gpus) or 1,
    )


def _awake(model: Model, expected: Estimate, share: float | None) -> dict[int, int]:
    """VRAM by GPU, measured or estimated; empty if a GPU's size is not known."""
    sizes = {}
    for gpu in model.config.gpus:
        measured, total = model.footprint_as_configured.awake.get(str(gpu)), model.core.total(gpu)
        if measured is None and total is None:
            return {}
        guess = expected.awake_per_gpu or budget.awake_estimate(share, total or 0)
        sizes[gpu] = guess if measured is None else measured
    return sizes
