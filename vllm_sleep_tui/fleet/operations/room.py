"""From what is measured now to a plan: the figures that `plan` and `budget` reckon with."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from vllm_sleep_tui.config.load import parse_bytes
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.levels import installed_version, never_level2
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.pool import Pool
from vllm_sleep_tui.fleet.states import RUNNING, State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.sizing import budget
from vllm_sleep_tui.sizing.estimate import ACTIVATIONS, context_of, estimated_weights
from vllm_sleep_tui.sizing.placement import Neighbour, Room, make_room
from vllm_sleep_tui.sizing.sharing import COMFORT
from vllm_sleep_tui.telemetry.host import host_memory
from vllm_sleep_tui.telemetry.processes import ProcessTable, command_of, user_of
from vllm_sleep_tui.units import GIB, gib

LEAST_GONE = GIB // 2
"""Bytes that a sleep must have given up to be seen, where nothing else is known of it."""
LEAST_LISTED = GIB // 16
"""The same where only the sleeper's own processes are looked at, and only a KV cache can have gone."""


class GpuMemory(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's memory now, in bytes; None where it is not known."""

    total: int | None
    used: int | None
    by_pid: Mapping[int, int | None] | None

    def held_by(self, record: Record) -> int | None:
        """Bytes that the record's server holds here; None if they are not listed.

        An engine that runs is always listed, asleep too, unless NVML speaks of other pids than we see, as in
        a container, or of none: that is not 0.
        """
        pids = [engine.pid for engine in record.engines if engine.pid in (self.by_pid or {})]
        held = [(self.by_pid or {})[pid] for pid in pids]
        return None if not held or None in held else sum(part or 0 for part in held)

    @property
    def free(self) -> int | None:
        """Bytes that nobody holds."""
        return None if self.total is None or self.used is None else self.total - self.used


Memory = Mapping[int, GpuMemory]
"""Of GPUs by index, as it was at one moment; of others it is not known."""


def read_memory(core: Core, gpus: set[int]) -> dict[int, GpuMemory]:
    """The memory of these GPUs now; blocks for a millisecond or so."""
    readings = {gpu: core.reader.memory(gpu) for gpu in gpus}
    return {
        gpu: GpuMemory(total=core.total(gpu), used=used, by_pid=by_pid)
        for gpu, (used, by_pid) in readings.items()
    }


def has_gone(
    model: Model, before: GpuMemory, now: GpuMemory, gpu: int, level: int, least: int = LEAST_GONE
) -> bool | None:
    """Whether a GPU shows the sleep, by our processes, else by the device; None if neither is known.

    `least` are the bytes that a sleep at level 0 must have given up.
    """
    held_before, held_now = before.held_by(model.record), now.held_by(model.record)
    if level == 0 and held_before is not None and held_now is not None:
        return held_before - held_now >= least  # the KV cache's: what stays is most of a large model
    if held_before is not None and held_now is not None:
        measured = model.footprint.asleep.get(str(gpu))
        return held_now <= (held_before / 2 if measured is None else measured * 1.1 + GIB / 4)
    if before.used is None or now.used is None:
        return None
    return before.used - now.used >= (least if level == 0 else LEAST_GONE)


def needed_to_wake(model: Model, memory: Mapping[int, GpuMemory]) -> dict[int, int]:
    """Further bytes on each GPU that the sleeper will take when it wakes."""
    record, need = model.record, {}
    for gpu in record.gpus:
        held = memory[gpu].held_by(record) if gpu in memory else None
        if held is None:
            held = asleep_bytes(model, gpu, record.level)
        need[gpu] = max(0, awake_bytes(model, gpu) - held)
    return need


def give_up(core: Core, gpus: Collection[int]) -> None:
    """Have the pools of these GPUs give up all they hold; the caller holds the GPUs' locks."""
    for pool in core.pools(gpus).values():
        pool.give_up()


def have_holders(core: Core, gpus: Collection[int]) -> None:
    """Have holders again where one has died that servers may use: without one, switches are slower.

    Blocks for as long as a Python takes to start.
    """
    for pool in core.pools(gpus).values():
        if pool.holder() is None and pool.is_used():
            pool.start_holder()


def kept_pools(core: Core, gpus: Collection[int]) -> dict[int, Pool]:
    """The pools in which memory is left, by GPU, after those of these GPUs have their holders; blocks."""
    have_holders(core, gpus)
    states = ((gpu, pool, pool.state()) for gpu, pool in core.pools(gpus).items())
    return {gpu: pool for gpu, pool, state in states if state is not None and state.free_bytes}


def give_up_for_weights(model: Model, memory: Mapping[int, GpuMemory], level: int) -> None:
    """Have the pools keep no more than leaves room for the weights that a wake from `level` brings back.

    Those are new memory always; the KV cache takes what a pool has and makes the rest.
    """
    record = model.record
    weights = 0 if level == 0 else (weights_of(model) or 0) // max(1, len(record.gpus))
    for gpu, pool in model.core.pools(record.gpus).items():
        state, free = pool.state(), memory[gpu].free if gpu in memory else None
        if state is None or not state.free_bytes:
            continue
        kept = 0 if free is None else max(0, free - weights - budget.MARGIN)
        if kept < state.free_bytes:
            pool.give_up(kept)


def needed_to_start(model: Model, memory: Mapping[int, GpuMemory]) -> dict[int, int]:
    """Bytes on each GPU that must be free for a start: vLLM checks its share before it loads."""
    footprint = model.footprint
    share = share_of(model, memory) or budget.HIGHEST_UTILIZATION
    need = {}
    for gpu in model.config.gpus:
        total = model.core.total(gpu)
        if total is not None:
            need[gpu] = max(
                int(share * total), footprint.awake.get(str(gpu), budget.awake_estimate(share, total))
            )
    return need


def asleep_bytes(model: Model, gpu: int, level: int | None) -> int:
    """What the model leaves on a GPU at a sleep level: measured, else estimated; at 0 with its weights."""
    footprint = model.footprint
    if level == 0:
        weights = weights_of(model)
        return budget.resident_estimate(footprint, model.config, gpu, weights)
    return budget.asleep_estimate(footprint, model.config, gpu)


def awake_bytes(model: Model, gpu: int) -> int:
    """What the model holds on a GPU while awake: measured, else estimated."""
    measured = model.footprint.awake.get(str(gpu))
    total = model.core.total(gpu)
    if measured is not None or total is None:
        return measured or 0
    return budget.awake_estimate(budget.fixed_utilization(model.config), total)


def share_of(model: Model, memory: Mapping[int, GpuMemory]) -> float | None:
    """The model's `gpu-memory-utilization`: its own, else planned over all models of its GPUs."""
    return shares_of([model], memory)[model.name]


def shares_of(models: Sequence[Model], memory: Mapping[int, GpuMemory]) -> dict[str, float | None]:
    """`share_of` each of these models, by name; the records of all are read once."""
    shares = {model.name: budget.fixed_utilization(model.config) for model in models}
    planned = [model for model in models if shares[model.name] is None]
    return shares | {name: plan.share for name, plan in plans_of(planned, memory).items()}


def plans_of(models: Sequence[Model], memory: Mapping[int, GpuMemory]) -> dict[str, budget.Plan]:
    """The shares of these models, their own or planned, and whose weights have room beside them, by name."""
    planned = [model for model in models if model.config.gpus]
    if not planned:
        return {}
    core = planned[0].core
    everybody = core.readable()
    asleep = {model.name: max(left.values()) for model in everybody if (left := model.footprint.asleep)}
    staying = {model.name: size for model in everybody if (size := resident_weights(model))}
    others = {}
    for gpu, now in memory.items():
        ours = [held_here(model, now, gpu) for model in everybody]
        others[gpu] = max(0, (now.used or 0) - sum(ours))
    plans = {}
    for model in planned:
        totals = {gpu: total for gpu in model.config.gpus if (total := core.total(gpu)) is not None}
        fixed = budget.fixed_utilization(model.config)
        least = least_awake(model) if fixed is None else int(fixed * max(totals.values(), default=0))
        plan = budget.utilization(
            model.name, core.config, totals, others, asleep, staying=staying, least=least, bare=bare_of(model)
        )
        if plan is not None:
            plans[model.name] = plan if fixed is None else plan._replace(share=fixed)
    return plans


def resident_weights(model: Model) -> int | None:
    """What its weights take on each GPU beside what any sleeper leaves, if they may stay there; else None.

    They may at `level: auto` on our own sleep mode, and at 0 on vLLM's as well where that can.
    """
    config, weights = model.config, weights_of(model)
    if config.level not in ("auto", 0) or not config.gpus or not weights:
        return None
    record, version = model.record, installed_version(model)
    able = capabilities(version or "?")
    if record.state in RUNNING:
        is_own = record.sleep_backend == "own"
    else:
        is_own = able.own_sleep and config.sleep_backend == "auto"
    may_stay = is_own or (config.level == 0 and version is not None and able.releases_cache)
    return weights // len(config.gpus) if may_stay else None


def least_awake(model: Model) -> int | None:
    """What it is not cut below on each GPU for the weights of sleepers; None if that is not known.

    Its weights, what vLLM computes in, and the KV cache that the config asks for, else four full contexts.
    """
    weights, cache = weights_of(model), kv_floor(model)
    if weights is None or cache is None:
        return None
    return weights // max(1, len(model.config.gpus)) + ACTIVATIONS + cache


def bare_of(model: Model) -> int:
    """What it takes on each GPU before its KV cache has anything, and the least of that."""
    weights = weights_of(model)
    return 0 if weights is None else weights // max(1, len(model.config.gpus)) + ACTIVATIONS + LEAST_GONE


def kv_floor(model: Model) -> int | None:
    """What its KV cache is not cut below on each GPU; None if the size of a context is not known."""
    if model.config.kv_cache is not None:
        return parse_bytes(model.config.kv_cache)
    context = context_of(model.config, model.base)
    return None if context is None else int(COMFORT * context)


def kv_cache_note(model: Model, share: float | None) -> str | None:
    """Why the `kv_cache` that the config asks for is not what it gets, in words; None if it is."""
    if model.config.kv_cache is None or not model.config.gpus:
        return None
    if (flag := ServeArgs(model.config.args).sizes_its_cache) is not None:
        return f"its args say {flag}, so kv_cache: {model.config.kv_cache} changes nothing"
    least, totals = least_awake(model), [model.core.total(gpu) for gpu in model.config.gpus]
    if least is None or share is None or None in totals:
        return None
    missing = least - min(int(share * (total or 0)) for total in totals)
    asked = parse_bytes(model.config.kv_cache)
    if missing <= 0:
        return None
    left = gib(max(0, asked - missing))
    return f"kv_cache: {model.config.kv_cache} does not fit, about {left} are left for it"


def plan_for(
    model: Model,
    *,
    memory: Mapping[int, GpuMemory] | None = None,
    idle: Mapping[str, tuple[float, bool]] | None = None,
    everybody: Sequence[Model] | None = None,
) -> Room:
    """Who must make room so that the model can be awake.

    `memory`, and `everybody` whose files can be read, are read now unless given; `idle` tells of each model
    its last request and whether one is running.
    """
    if memory is None:
        memory = read_memory(model.core, set(model.config.gpus))
    if everybody is None:
        everybody = model.core.readable()
    free = {gpu: memory[gpu].free for gpu in model.config.gpus if gpu in memory}
    return make_room(needed(model, memory), free, neighbours(model, everybody, memory, idle or {}))


def needed(model: Model, memory: Mapping[int, GpuMemory]) -> dict[int, int]:
    """Further bytes on each GPU that the model takes to be awake, from where it is now."""
    record = model.read()
    if record.state in (State.ASLEEP, State.WAKING):
        return needed_to_wake(model, memory)
    return needed_to_start(model, memory)


def neighbours(
    model: Model,
    everybody: Iterable[Model],
    memory: Mapping[int, GpuMemory],
    idle: Mapping[str, tuple[float, bool]],
) -> list[Neighbour]:
    """Those on the model's GPUs that hold more than they must: awake, or asleep at level 0."""
    near = []
    mine = set(model.config.gpus)
    sleeps = model.record.state is State.ASLEEP  # a start needs more than it will hold
    for other in everybody:
        record = other.record
        resident = record.state is State.ASLEEP and record.level == 0
        if other.name == model.name or not mine & set(record.gpus):
            continue
        if not (record.state is State.AWAKE or resident):
            continue
        level = 1 if resident else own_level(record)
        last, answering = idle.get(other.name, (record.since, False))
        held = held_here if resident else held_awake
        near.append(
            Neighbour(
                name=other.name,
                awake={gpu: held(other, memory.get(gpu), gpu) for gpu in record.gpus},
                asleep={gpu: asleep_bytes(other, gpu, level) for gpu in record.gpus},
                resident={gpu: asleep_bytes(other, gpu, 0) for gpu in record.gpus}
                if sleeps and may_keep_weights(other)
                else None,
                idle_since=last,
                answering=answering,
                stops=record.resolved_level == "none",
                sleeps_already=resident,
            )
        )
    return near


def may_keep_weights(model: Model) -> bool:
    """Whether its weights may stay in VRAM where there is room: `level: auto`, on our own sleep mode."""
    record = model.record
    return (
        record.sleep_backend == "own" and model.config.level == "auto" and record.resolved_level in ("1", "2")
    )


def has_level_0(record: Record) -> bool:
    """Whether this launch can give up its KV cache alone: by our sleep mode, or vLLM's own from 0.31 on."""
    own_can = record.vllm_version is not None and capabilities(record.vllm_version).releases_cache
    return bool(record.gpus) and (record.sleep_backend == "own" or own_can)


def own_level(record: Record) -> int:
    """The level at which this launch sleeps unless it is told another.

    1 for one of level 0 that has fallen back to vLLM's own sleep mode, where that has no level 0.
    """
    if record.resolved_level == "0":
        return 0 if has_level_0(record) else 1
    return 2 if record.resolved_level == "2" else 1


def held_here(model: Model, now: GpuMemory | None, gpu: int) -> int:
    """What a model holds on a GPU: seen, else as measured before in its state; 0 if it does not run there.

    0 as well where the GPU's memory `now` is not known.
    """
    if now is None:
        return 0
    record, held = model.record, now.held_by(model.record)
    if held is not None:
        return held
    if gpu not in record.gpus or record.state not in (State.AWAKE, State.ASLEEP):
        return 0
    if record.state is State.AWAKE:
        return awake_bytes(model, gpu)
    return asleep_bytes(model, gpu, record.level)


def held_awake(model: Model, now: GpuMemory | None, gpu: int) -> int:
    """What an awake model holds on a GPU: seen now, else as measured before."""
    held = now.held_by(model.record) if now is not None else None
    return held if held else awake_bytes(model, gpu)


def refuse_without_room(model: Model, room: Room) -> None:
    """Raises RefusedError with the numbers if the target does not fit even after the plan."""
    if room.fits:
        return
    gpu, missing = max(room.missing.items(), key=lambda item: item[1])
    free = room.free[gpu]
    asleep = f" even with {' and '.join(room.leaving)} asleep" if room.leaving else ""
    what = (
        f"{model.name} needs {gib(free + missing - budget.MARGIN)} on GPU {gpu} "
        f"and {gib(budget.MARGIN)} to spare; {gib(free)} are free{asleep}."
    )
    raise RefusedError(what, who_else(model.core, gpu) or give_it_less(model, gpu))


def give_it_less(model: Model, gpu: int) -> str:
    """What a person can do about a model that is too large for a GPU."""
    if budget.fixed_utilization(model.config) is not None:
        return "Give it less: lower its gpu-memory-utilization."
    return f"Stop a model on GPU {gpu}, or give this one another GPU."  # its share is planned, not set


def too_large(model: Model, memory: Mapping[int, GpuMemory]) -> str | None:
    """Why a start of the model will fail, in a sentence; None if it may succeed.

    vLLM keeps its weights within its share of the GPU. What they take it told in an earlier launch, which may
    have failed over just that. It is no reason to refuse a start: the files may have changed since.
    """
    gpus, weights = model.config.gpus, model.footprint.weights
    share = share_of(model, memory)
    if weights is None or share is None or not gpus:
        return None
    each = weights // len(gpus)
    for gpu in gpus:
        total = model.core.total(gpu)
        if total is not None and each >= share * total:
            is_planned = budget.fixed_utilization(model.config) is None
            given = "are planned for it" if is_planned else "are its share"
            return (
                f"Does not fit: its weights take {gib(each)} of GPU {gpu} and {gib(share * total)} {given}."
            )
    return None


def who_else(core: Core, gpu: int) -> str | None:
    """Names the processes that hold memory on a GPU and are none of ours."""
    _, by_pid = core.reader.memory(gpu)
    ours = {engine.pid for model in core.readable() for engine in model.record.engines}
    strangers = sorted(
        ((size or 0, pid) for pid, size in (by_pid or {}).items() if pid not in ours), reverse=True
    )
    if not strangers:
        return None
    size, pid = strangers[0]
    server = server_of(pid)
    by = f"Pid {server} ({user_of(server)}, {command_of(server)})"
    return f"{by} holds {gib(size)}{'' if server == pid else f' in pid {pid}'}: end it or wait."


def server_of(pid: int) -> int:
    """The `vllm serve` above its engine or worker, whose own name says nothing; others are their own."""
    parents = ProcessTable.read().parents
    while (command_of(pid) or "").startswith("VLLM::") and (above := parents.get(pid, 0)) > 1:
        pid = above
    return pid


def weights_of(model: Model) -> int | None:
    """Bytes of weights: measured, else the size of a local checkpoint; None if neither is known."""
    measured = model.footprint.weights
    return measured or estimated_weights(model.config, model.base)


def check_ram(model: Model) -> None:
    """Raises RefusedError with the numbers if a first level 1 sleep would push the machine into swapping."""
    need = budget.pinned_estimate(model.footprint, weights_of(model))
    host = host_memory(model.core.simulated)
    if need is None or host.available_bytes is None or host.total_bytes is None:
        return
    margin = budget.ram_margin(host.total_bytes)
    if need + margin > host.available_bytes:
        raise RefusedError(
            f"{model.name} would pin {gib(need)} of RAM at level 1 and {gib(margin)} must stay free; "
            f"{gib(host.available_bytes)} are available.",
            "Sleep it at level 2, which needs no RAM."
            if never_level2(model.config, installed_version(model), model.base) is None
            else "Free RAM, or `stop` it instead: level 2 could not bring it back.",
        )
