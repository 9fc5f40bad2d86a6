"""What `enter` on a model would do, in numbers, before it is pressed (reads records, asks nobody)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.levels import why_no_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.room import GpuMemory, needed, own_level, plan_for, too_large
from vllm_sleep_tui.fleet.snapshot import Prediction, Serving
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.locks import Holder, read_holder
from vllm_sleep_tui.sizing.placement import Room
from vllm_sleep_tui.telemetry.gpus import GpuReading
from vllm_sleep_tui.units import gib

BUSY = frozenset({State.STARTING, State.FALLING_ASLEEP, State.WAKING, State.STOPPING})
TOKENS_WORTH_WORDS = 256
"""A proof leaves some tokens in the cache as well, and so few are computed again in no time."""


def memory_in(readings: Sequence[GpuReading]) -> dict[int, GpuMemory]:
    """The GPUs' memory as the last sample saw it."""
    return {
        reading.index: GpuMemory(
            total=reading.total_bytes, used=reading.taken_bytes, by_pid=reading.processes
        )
        for reading in readings
    }


def predict(
    model: Model,
    state: State,
    memory: Mapping[int, GpuMemory],
    serving: Mapping[str, Serving],
) -> Prediction:
    """What a switch to the model in `state` would do, with the memory as it is and what is being served."""
    name = model.name
    if state is State.AWAKE:
        return Prediction(target=name, action="nothing", sentence=f"{name} is awake.")
    if state in BUSY:
        return Prediction(target=name, action="nothing", sentence=f"{name} is {state}.")
    if state is not State.ASLEEP and (large := too_large(model, memory)) is not None:
        return Prediction(target=name, action="refused", sentence=large)
    room = plan_for(model, memory=memory)
    need = needed(model, memory)
    action = action_of(state, room)
    seconds = seconds_of(model, state, room)
    return Prediction(
        target=name,
        action=action,
        sleeps=room.sleeps,
        stops=room.stops,
        seconds=seconds,
        needs_bytes={str(gpu): size for gpu, size in need.items()},
        free_bytes={str(gpu): size for gpu, size in room.free.items()},
        used_after=used_after(memory, room, need),
        sentence=sentence(name, action, room, need)
        + cache_lost(room, serving)
        + level_2_risks(model.core, room)
        + failed_so(model, state),
    )


def waits(model: Model) -> Holder | None:
    """Who holds a lock that an operation on the model needs; None if it could begin at once."""
    paths = [*model.core.gpu_locks(set(model.config.gpus)), model.lock]
    return next((who for path in paths if (who := read_holder(path)) is not None), None)


def action_of(state: State, room: Room) -> str:
    """One word for it."""
    if not room.fits:
        return "refused"
    if state is not State.ASLEEP:
        return "start"
    return "switch" if room.leaving else "wake"


def seconds_of(model: Model, state: State, room: Room) -> float | None:
    """How long it took here before, all of it; None if a part of it was never measured."""
    parts: list[float | None] = []
    for leaving in room.sleeps:
        other = model.core.model(leaving)
        measured = other.footprint
        level = 0 if leaving in room.keeps else own_level(other.record)
        parts.append(measured.typical(f"sleep{level}") or measured.typical("sleep1-first"))
    footprint = model.footprint
    if state is State.ASLEEP:
        at = model.record.level
        parts.append(footprint.typical(f"wake{1 if at is None else at}"))
    else:
        parts.append(footprint.typical("start"))
    return None if None in parts else sum(part or 0.0 for part in parts)


def used_after(memory: Mapping[int, GpuMemory], room: Room, need: Mapping[int, int]) -> dict[str, int]:
    """Bytes used on each GPU afterwards, where the GPU's size is known."""
    return {
        str(gpu): total - room.free.get(gpu, 0) + size
        for gpu, size in need.items()
        if gpu in memory and (total := memory[gpu].total) is not None
    }


def sentence(name: str, action: str, room: Room, need: Mapping[int, int]) -> str:
    """The prediction for a person, but for its time."""
    steps = [f"sleeps {who}" for who in room.sleeps] + [f"stops {who}" for who in room.stops]
    steps.append(f"{'starts' if action == 'start' else 'wakes'} {name}")
    if need:
        gpu = max(need, key=lambda index: need[index] - room.free.get(index, 0))
        then = " then" if room.leaving else ""
        figures = f": needs {gib(need[gpu])} on GPU {gpu}, {gib(room.free.get(gpu, 0))} are free{then}"
    else:
        figures = ""
    if action == "refused":
        return f"Does not fit{figures}."
    words = ", ".join(steps)
    return f"{words[:1].upper()}{words[1:]}{figures}."


def failed_so(model: Model, state: State) -> str:
    """Says of a model whose last start failed that its settings are the same still."""
    record = model.record
    never_ran = record.reference is None and record.fell is None and record.reason is not None
    same = never_ran and record.digest == model.digest
    return " Its last start failed with the same settings." if state is State.FAILED and same else ""


def level_2_risks(core: Core, room: Room) -> str:
    """What level 2 may lose of the models that would sleep at it, in words."""
    sentences = []
    for name in room.sleeps:
        model = core.model(name)
        record = model.record
        if record.resolved_level == "2" and (
            risk := why_no_level2(model.config, record.vllm_version, model.base)
        ):
            sentences.append(f" Level 2 of {name}: {risk}.")
    return "".join(sentences)


def cache_lost(room: Room, serving: Mapping[str, Serving]) -> str:
    """What the leaving models' caches hold, in words; nothing if it is soon computed again."""
    held = {name: serving[name].cached_tokens or 0 for name in room.leaving if name in serving}
    return "".join(
        f" {name} loses up to {tokens:,} cached tokens."
        for name, tokens in held.items()
        if tokens >= TOKENS_WORTH_WORDS
    )
