"""What plans make of telemetry that cannot name our processes, as in a container or under WSL2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.predict import memory_in
from vllm_sleep_tui.fleet.operations.room import GpuMemory, held_here, needed_to_wake, share_of
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry.gpus import GpuReading
from vllm_sleep_tui.telemetry.processes import ProcessId

GIB = 2**30
ENGINE = ProcessId(pid=4242, start=1)
LISTS = {
    "the host's pids": {99: 20 * GIB},
    "pids without amounts": {4242: None},
    "nobody": {},
    "no list": None,
}
"""What NVML may say of a GPU that our engine uses, without saying what the engine holds."""
blind = pytest.mark.parametrize("by_pid", LISTS.values(), ids=list(LISTS))


@pytest.fixture
def core(tmp_path: Path) -> Core:
    """Two models on one simulated GPU of 24 GiB, `b` running."""
    config = tmp_path / "c.yaml"
    model = {"model": "sim/1GiB", "gpus": [0]}
    gpus = [{"name": "Test", "memory": "24GiB"}]
    config.write_text(json.dumps({"simulated_gpus": gpus, "models": {"a": model, "b": model}}))
    return Core(load(config), tmp_path)


def running(core: Core, state: State) -> Model:
    """The handle of `b`, its record written in this state."""
    model = core.model("b")
    model.write(state=state, engines=(ENGINE,), gpus=(0,))
    return model


def gpu(by_pid: dict[int, int | None] | None) -> GpuMemory:
    return GpuMemory(total=24 * GIB, used=20 * GIB, by_pid=by_pid)


@blind
def test_an_engine_that_is_not_listed_holds_an_unknown_amount_and_not_nothing(
    core: Core, by_pid: dict[int, int | None] | None
) -> None:
    assert gpu(by_pid).held_by(running(core, State.AWAKE).record) is None


def test_an_engine_that_is_listed_holds_what_it_holds(core: Core) -> None:
    model = running(core, State.AWAKE)
    now = gpu({4242: 17 * GIB, 99: GIB})
    assert now.held_by(model.record) == held_here(model, now, 0) == 17 * GIB


@blind
def test_our_own_server_is_no_stranger_that_makes_the_next_model_small(
    core: Core, by_pid: dict[int, int | None] | None
) -> None:
    running(core, State.AWAKE)
    seen = share_of(core.model("a"), {0: gpu({4242: 20 * GIB})})
    assert seen is not None
    assert seen > 0.5
    assert share_of(core.model("a"), {0: gpu(by_pid)}) == seen


@blind
def test_a_sleeper_that_cannot_be_seen_is_thought_to_hold_what_sleepers_leave(
    core: Core, by_pid: dict[int, int | None] | None
) -> None:
    model = running(core, State.ASLEEP)
    need = needed_to_wake(model, {0: gpu(by_pid)})
    all_of_it = needed_to_wake(model, {0: gpu({4242: 0})})
    assert 0 < need[0] < all_of_it[0]


def test_predictions_reckon_with_what_the_driver_reserves() -> None:
    reading = GpuReading(
        index=0, uuid="u", name="n", used_bytes=61 * GIB, free_bytes=18 * GIB, total_bytes=80 * GIB
    )
    assert memory_in([reading])[0].free == 18 * GIB


def test_a_gpu_that_tells_only_what_is_used_is_taken_at_its_word() -> None:
    assert GpuReading(index=0, uuid="u", name="n", used_bytes=5, total_bytes=8).taken_bytes == 5
