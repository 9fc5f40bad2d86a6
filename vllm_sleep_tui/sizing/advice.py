"""The decision guide with this machine's numbers: who sleeps at which level, and who stays awake.

Level 1 where the RAM is there, level 2 where it is not, no sleep where nothing is to be gained by it: for a
model that is alone on its GPUs, fits beside all others, or is hardly ever switched to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum

import msgspec

from vllm_sleep_tui.sizing.figures import Figures, Machine
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD
from vllm_sleep_tui.sizing.residents import Level0, level_0
from vllm_sleep_tui.sizing.sharing import GpuAdvice, asleep_on, listed, on_gpu, share_out
from vllm_sleep_tui.units import GIB, gib, start_time, took

RARELY = 1.0
"""Switches a day below which a sleeper's memory is not worth its time."""


class Verdict(StrEnum):
    """What to do with a model."""

    LEVEL_1 = "level 1"
    LEVEL_2 = "level 2"
    NONE = "no sleep"
    TOGETHER = "keep awake"
    ALONE = "run alone"
    TOO_LARGE = "does not fit"
    UNKNOWN = "start it once"
    UNREADABLE = "broken files"
    ATTACHED = "not ours"


class ModelAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with one model, and why."""

    name: str
    verdict: Verdict
    why: str
    """One sentence with figures."""
    level: str | None = None
    """What the config's `level` should be; None if that is not for us to say."""
    utilization: float | None = None
    """What its `gpu-memory-utilization` should be; None: as it is."""
    beside: tuple[str, ...] = ()
    """The models that it can be awake with."""
    is_estimate: bool = False
    """Some of the figures were not measured yet."""
    level_0: Level0 | None = None
    """What it would be to sleep with the weights in VRAM; None if nobody on its GPUs can."""


class Advice(msgspec.Struct, frozen=True, kw_only=True):
    """The whole of it."""

    models: tuple[ModelAdvice, ...]
    gpus: tuple[GpuAdvice, ...]


def advise(machine: Machine, models: Sequence[Figures]) -> Advice:
    """Say what to do with each model and each GPU."""
    residues = asleep_on(machine, models)
    gpus = tuple(on_gpu(machine, residues, models, gpu) for gpu in sorted(machine.totals))
    early = {figures.name: _without_ram(machine, residues, models, gpus, figures) for figures in models}
    sleepers = [figures for figures in models if early[figures.name] is None]
    levels = _levels(machine, models, gpus, sleepers)
    decided = ((figures, early[figures.name] or levels[figures.name]) for figures in models)
    with_level_0 = (
        msgspec.structs.replace(advised, level_0=level_0(figures, _neighbours(models, figures)))
        for figures, advised in decided
    )
    return Advice(models=tuple(with_level_0), gpus=gpus)


# ── what each model should do ────────────────────────────────────────────────────────────────────────────


def _without_ram(
    machine: Machine,
    residues: Mapping[int, int],
    models: Sequence[Figures],
    gpus: Sequence[GpuAdvice],
    figures: Figures,
) -> ModelAdvice | None:
    """The advice where it does not hang on RAM; None: it sleeps at some level."""
    if figures.is_attached:
        return _advice(figures, Verdict.ATTACHED, "Who started this server decides how it sleeps.", None)
    if not figures.gpus:
        return _advice(figures, Verdict.NONE, "It runs on the CPU, where sleeping frees no memory.")
    if not figures.awake or not set(figures.gpus) <= set(machine.totals):
        why = "Its GPUs' memory is not known, and it has not run here."
        return _advice(figures, Verdict.UNKNOWN, why, None)
    if figures.unreadable is not None:
        return _advice(figures, Verdict.UNREADABLE, f"Its files tell nothing: {figures.unreadable}", None)
    neighbours = _neighbours(models, figures)
    if (large := _too_large(machine, figures)) is not None:
        return _advice(figures, Verdict.TOO_LARGE, large, None)
    if not neighbours:
        why = f"It is the only model of {_gpus(figures.gpus)}: a sleep would make room for nobody."
        return _advice(figures, Verdict.ALONE, why)
    return (
        _company(machine, residues, gpus, figures, neighbours)
        or _crowded_out(machine, figures, neighbours)
        or _hardly_used(figures)
        or _unmeasured(figures)
    )


def _too_large(machine: Machine, figures: Figures) -> str | None:
    """Why it cannot run on its GPUs even alone; None if it can."""
    room = min(machine.room(gpu) for gpu in figures.gpus)
    if figures.fixed is None or "memory" not in figures.estimated:
        return None
    least = figures.fixed + (figures.context or 0)
    if least <= room:
        return None
    return (
        f"It needs {gib(least)} on each GPU with the KV cache of one context, and {gib(room)} are there: "
        "give it more GPUs, a smaller max-model-len or quantised weights (estimate)."
    )


def _company(
    machine: Machine,
    residues: Mapping[int, int],
    gpus: Sequence[GpuAdvice],
    figures: Figures,
    neighbours: Sequence[Figures],
) -> ModelAdvice | None:
    """It can stay awake beside all its neighbours, as it is or with smaller caches."""
    own = [gpu for gpu in gpus if gpu.index in figures.gpus]
    names = tuple(neighbour.name for neighbour in neighbours)
    if all(set(gpu.together).issuperset((figures.name, *names)) for gpu in own):
        why = f"It fits awake beside {listed(names)} on {_gpus(figures.gpus)}: nobody has to make room."
        return _advice(figures, Verdict.TOGETHER, why, beside=names)
    sharing = share_out(machine, residues, [figures, *neighbours])
    if sharing is None or not sharing.is_comfortable:
        return None
    cache = gib(sharing.kv_cache_memory_bytes[figures.name])
    contexts = sharing.contexts[figures.name]
    room = f", {contexts:.0f} full contexts," if contexts is not None else ""
    why = (
        f"With a KV cache of {cache}{room} it fits awake beside {listed(names)}, without a switch (estimate)."
    )
    share = sharing.utilization[figures.name]
    return _advice(figures, Verdict.TOGETHER, why, beside=names, utilization=share)


def _crowded_out(machine: Machine, figures: Figures, neighbours: Sequence[Figures]) -> ModelAdvice | None:
    """It does not fit while the others only sleep, and not with a smaller KV cache either."""
    gpu, left = _tightest(machine, figures, neighbours)
    if figures.awake[gpu] <= left or _smaller(machine, figures, neighbours) is not None:
        return None
    others = listed(neighbour.name for neighbour in neighbours)
    why = (
        f"It needs {gib(figures.awake[gpu])} on GPU {gpu}, and {gib(left)} are left while {others} only "
        f"{'sleeps' if len(neighbours) == 1 else 'sleep'}: it runs while they are stopped."
    )
    return _advice(figures, Verdict.ALONE, why)


def _smaller(machine: Machine, figures: Figures, neighbours: Sequence[Figures]) -> float | None:
    """The `gpu-memory-utilization` with which it fits beside sleepers; None: as it is, or none."""
    gpu, left = _tightest(machine, figures, neighbours)
    if figures.awake[gpu] <= left or figures.fixed is None:
        return None
    if figures.fixed + (figures.context or GIB) > left:
        return None
    return math.floor((left - AWAKE_OVERHEAD) / machine.totals[gpu] * 1000) / 1000


def _tightest(machine: Machine, figures: Figures, neighbours: Sequence[Figures]) -> tuple[int, int]:
    """The GPU on which it is tightest, and the VRAM there while the others sleep."""
    left = {g: machine.room(g) - sum(n.asleep.get(g, 0) for n in neighbours) for g in figures.gpus}
    gpu = min(left, key=lambda index: left[index] - figures.awake[index])
    return gpu, left[gpu]


def _hardly_used(figures: Figures) -> ModelAdvice | None:
    if figures.per_day is None or figures.per_day >= RARELY or figures.start is None:
        return None
    kept = gib(sum(figures.asleep.values()))
    why = (
        f"It is switched to {figures.per_day * 7:.1f} times a week: stopped, it leaves the others {kept} of "
        f"VRAM more, and a start takes {_time(figures, 'start')}."
    )
    return _advice(figures, Verdict.NONE, why)


def _unmeasured(figures: Figures) -> ModelAdvice | None:
    if figures.pinned is not None or figures.weights is not None:
        return None
    why = "It has not run here and its files are not on this machine, so nothing is known of its weights."
    return _advice(figures, Verdict.UNKNOWN, why, None)


def _levels(
    machine: Machine, models: Sequence[Figures], gpus: Sequence[GpuAdvice], sleepers: Sequence[Figures]
) -> dict[str, ModelAdvice]:
    """Level 1 for whom it helps most for its RAM, while there is RAM; level 2 for the rest."""
    left, advice_by_name = machine.ram, {}
    for figures in sorted(sleepers, key=_gain_per_byte, reverse=True):
        verdict, why = _level(figures, left)
        if verdict is Verdict.LEVEL_1 and left is not None:
            left -= figures.pinned or 0
        share = _smaller(machine, figures, _neighbours(models, figures))
        if share is not None:
            why += f" It fits beside the sleepers with gpu-memory-utilization {share:g}."
        level = {Verdict.LEVEL_1: "1", Verdict.LEVEL_2: "2"}.get(verdict, "none")
        if level != "none" and figures.resident is not None and figures.configured in ("auto", "0"):
            level = figures.configured  # a number would keep its weights from staying in VRAM
        advice_by_name[figures.name] = _advice(
            figures, verdict, why, level, beside=_beside(gpus, figures), utilization=share
        )
    return advice_by_name


def _level(figures: Figures, left: int | None) -> tuple[Verdict, str]:
    """The level with `left` bytes of RAM to be had, and why."""
    if left is None or figures.pinned is None or figures.pinned <= left:
        return Verdict.LEVEL_1, _why_level1(figures, left)
    short = f"Its copy would take {_ram(figures)} of RAM and {gib(max(0, left))} are left for it"
    if figures.no_level2 is not None:
        return Verdict.NONE, f"{short}, and {figures.no_level2}: stop it and start it again."
    return Verdict.LEVEL_2, f"{short}: its weights are read again instead{_against(figures, '2')}."


def _gain_per_byte(figures: Figures) -> float:
    """Seconds a day that level 1 saves over level 2, for each byte that it pins."""
    if figures.no_level2 is not None:
        return math.inf
    saved = (figures.wake2 or 1.0) - (figures.wake1 or 0.0)
    rate = figures.per_day if figures.per_day is not None else 1.0
    return saved * rate / max(1, figures.pinned or GIB)


def _why_level1(figures: Figures, left: int | None) -> str:
    copy = "its copy in RAM" if figures.pinned is None else f"its copy takes {_ram(figures)} of RAM"
    ram = f"{copy}, and {gib(left)} are there for it" if left is not None and figures.pinned else copy
    return f"{_capital(ram)}{_against(figures, '1')}."


def _against(figures: Figures, level: str) -> str:
    """How fast it wakes at a level, against the other ways."""
    wake = figures.wake1 if level == "1" else figures.wake2
    if wake is None:
        return ""
    others = [f"{_time(figures, 'wake2')} at level 2"] if level == "1" and figures.wake2 is not None else []
    others += [f"{_time(figures, 'start')} for a start"] if figures.start is not None else []
    against = f" against {listed(others)}" if others else ""
    return f"; a wake by itself takes {_time(figures, f'wake{level}')}{against}"


# ── words ────────────────────────────────────────────────────────────────────────────────────────────────


def _advice(
    figures: Figures,
    verdict: Verdict,
    why: str,
    level: str | None = "none",
    *,
    beside: tuple[str, ...] = (),
    utilization: float | None = None,
) -> ModelAdvice:
    return ModelAdvice(
        name=figures.name,
        verdict=verdict,
        why=why,
        level=level,
        beside=beside,
        utilization=utilization,
        is_estimate="memory" in figures.estimated,
    )


def _neighbours(models: Iterable[Figures], figures: Figures) -> list[Figures]:
    mine = set(figures.gpus)
    return [each for each in models if each is not figures and mine & set(each.awake)]


def _beside(gpus: Sequence[GpuAdvice], figures: Figures) -> tuple[str, ...]:
    """Who is in the largest set of each of its GPUs with it."""
    sets = [set(gpu.together) for gpu in gpus if gpu.index in figures.gpus]
    common = set.intersection(*sets) if sets else set()
    return tuple(sorted(common - {figures.name})) if figures.name in common else ()


def _time(figures: Figures, what: str) -> str:
    seconds: float = getattr(figures, what)
    words = start_time(seconds) if what == "start" else took(seconds)
    return f"{words}{' (estimate)' if what in figures.estimated else ''}"


def _ram(figures: Figures) -> str:
    return f"{gib(figures.pinned or 0)}{' (estimate)' if 'pinned' in figures.estimated else ''}"


def _gpus(gpus: Sequence[int]) -> str:
    return f"GPU{'s' if len(gpus) > 1 else ''} {listed(map(str, gpus))}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def changes(advice: Advice, configured: Mapping[str, str]) -> dict[str, tuple[str | None, float | None]]:
    """What the advice would change in the config: level and utilization by model, None where nothing."""
    advice_by_name = {}
    for model in advice.models:
        level = model.level if model.level != configured.get(model.name) else None
        if level is not None or model.utilization is not None:
            advice_by_name[model.name] = (level, model.utilization)
    return advice_by_name
