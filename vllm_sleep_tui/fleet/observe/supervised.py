"""How a model whose server we started is now, by its record, its keeper and its processes (reads alone)."""

from __future__ import annotations

from vllm_sleep_tui.engine.causes import Diagnosis
from vllm_sleep_tui.fleet.keeper_client import is_kept, read_status
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.end import RECORD_LOST, SERVER_GONE, cause_in_log
from vllm_sleep_tui.fleet.server_keys import KEY_DIFFERS, differs
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, OperationSnapshot, Serving
from vllm_sleep_tui.fleet.states import RUNNING, SETTLED, State
from vllm_sleep_tui.fleet.store.records import Intent
from vllm_sleep_tui.paths import APP
from vllm_sleep_tui.telemetry.attribution import ModelMemory
from vllm_sleep_tui.telemetry.processes import is_alive


def observe(model: Model, memory: ModelMemory | None, serving: Serving | None) -> ModelSnapshot:
    """The model with the `memory` that its processes hold; raises OperationError without a record."""
    state, cause = observed_state(model)
    record, config = model.record, model.config
    settled = state in SETTLED
    runs = state not in (State.STOPPED, State.FAILED)
    intent = None if settled and state is not record.state else record.intent
    holds_nothing = state is State.STOPPED or record.state is State.FAILED
    if cause is None and state in (State.AWAKE, State.ASLEEP) and differs(record, config):
        cause = Diagnosis(KEY_DIFFERS, f"To apply the config's: {APP} restart {model.name}")
    vram = {} if not config.gpus or holds_nothing else vram_of(memory, config.gpus)
    return ModelSnapshot(
        name=model.name,
        state=state,
        level=record.level if state in (State.ASLEEP, State.FALLING_ASLEEP, State.WAKING) else None,
        phase=intent.phase if intent and not settled else None,
        operation=operation_of(intent),
        pid=record.server.pid if record.server and runs else None,
        port=record.port if runs else config.port,
        gpus=config.gpus,
        vram_bytes=None if vram is None else sum(vram.values()),
        vram_by_gpu=vram,
        ram_bytes=0 if holds_nothing else (memory.ram_bytes if memory else None),
        pinned_bytes=0 if holds_nothing else (memory.pinned_bytes if memory else None),
        since=record.since or None,
        reason=cause.reason if cause else record.reason,
        cure=cause.cure if cause else record.cure,
        last_switch=record.last_switch,
        last_failure=record.last_failure,
        progress=intent.detail if intent else None,
        configured_level=str(config.level),
        kv_cache=config.kv_cache,
        resolved_level=record.resolved_level,
        sleep_backend=None if holds_nothing else record.sleep_backend,
        sleep_backend_why=None if holds_nothing else record.sleep_backend_why,
        proof=record.proof,
        frees_memory=bool(config.gpus),
        source=config.model or "",
        serving=serving if state is State.AWAKE else None,
    )


def observed_state(model: Model) -> tuple[State, Diagnosis | None]:
    """The state as it is, and why, where the record does not know yet: servers die without asking."""
    path, record = model.keeper_file, model.read()
    if record.state in (State.STOPPED, State.FAILED):
        return (State.FAILED, RECORD_LOST) if is_kept(path) else (record.state, None)
    status = read_status(path)
    if status.launch != record.launch:  # its keeper is about to be started
        return (record.state, None) if record.intent else (State.FAILED, SERVER_GONE)
    if not is_kept(path):
        if record.state is State.STOPPING or (status.exit is not None and status.exit.asked):
            return State.STOPPED, None
        return State.FAILED, cause_of_death(model)
    if record.state in RUNNING and not all(is_alive(engine) for engine in record.engines):
        return State.FAILED, cause_of_death(model)
    return record.state, None


def cause_of_death(model: Model) -> Diagnosis:
    """What the log says, read once when the engine is gone and once when the server is."""
    status, causes = read_status(model.keeper_file), model.core.causes
    key = (model.record.launch, status.exit is not None)
    if key not in causes:
        causes[key] = cause_in_log(model, status) or SERVER_GONE
    return causes[key]


def operation_of(intent: Intent | None) -> OperationSnapshot | None:
    """What is under way, for whoever looks."""
    if intent is None:
        return None
    return OperationSnapshot(name=intent.operation, since=intent.since, eta=intent.eta)


def vram_of(memory: ModelMemory | None, gpus: tuple[int, ...]) -> dict[str, int] | None:
    """VRAM by GPU index as JSON keys; None unless it is known for each of the model's GPUs."""
    if memory is None or memory.vram_by_gpu is None or not set(gpus) <= set(memory.vram_by_gpu):
        return None
    return {str(gpu): memory.vram_by_gpu[gpu] for gpu in gpus}
