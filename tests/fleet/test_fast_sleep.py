"""Our own sleep mode as the panel uses it, on simulated servers that model it (vLLM 0.26) or refuse it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fleet.beside import client_of, model_of, record_of, record_path
from tests.fleet.conftest import GIB, Box, inject, seen, until
from tests.unit.made_checkpoints import PHI, QWEN, SMOLLM, write_model
from vllm_sleep_tui.engine.sleeping import keep_weights
from vllm_sleep_tui.errors import CancelledByUser, OperationError, RefusedError
from vllm_sleep_tui.fleet.states import Event, State
from vllm_sleep_tui.fleet.store.records import Intent
from vllm_sleep_tui.telemetry.processes import ProcessId

MakeBox = Callable[..., Box]
FITS = {"VLLM_SIM_VERSION": "0.26.0"}


def fast(model: str, **other: object) -> dict[str, object]:
    return {"model": model, "env": dict(FITS)} | other


def verb(machine: Box, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A verb in a process of its own, on the box's state."""
    home = machine.folder / "home"
    home.mkdir(exist_ok=True)
    there = home / "vllm-sleep-tui"
    if not there.exists():
        there.symlink_to(machine.state_dir)
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *arguments]
    env = os.environ | {"XDG_STATE_HOME": str(home)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("version", ["0.24.0", "0.25.1", "0.26.0"])
async def test_level_1_pins_just_the_weights_and_level_2_gives_the_ram_back(
    box: MakeBox, version: str
) -> None:
    async with box({"a": fast("sim/4GiB", env={"VLLM_SIM_VERSION": version})}).open() as fleet:
        await fleet.start(["a"])
        assert seen(fleet, "a").sleep_backend == "own"
        await fleet.sleep("a", level=1)
        await until(lambda: seen(fleet, "a").pinned_bytes == 4 * GIB)
        await fleet.wake("a")
        await fleet.sleep("a", level=2)
        await until(lambda: seen(fleet, "a").pinned_bytes == 0)
        await fleet.wake("a")
        assert seen(fleet, "a").proof == "proven"


@pytest.mark.parametrize("version", ["0.24.0", "0.25.1", "0.26.0"])
async def test_at_level_0_the_weights_stay_and_the_wake_is_proven(box: MakeBox, version: str) -> None:
    async with box({"a": fast("sim/4GiB", level=0, env={"VLLM_SIM_VERSION": version})}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        model = seen(fleet, "a")
        assert (model.state, model.level, model.proof) == (State.ASLEEP, 0, "proven")
        await until(lambda: 4 * GIB < (seen(fleet, "a").vram_bytes or 0) < 6 * GIB)
        assert seen(fleet, "a").pinned_bytes == 0
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


async def test_from_level_0_it_goes_deeper_without_a_wake_and_comes_back(box: MakeBox) -> None:
    async with box({"a": fast("sim/4GiB")}).open() as fleet:
        await fleet.start(["a"])
        for level in (1, 2):
            await fleet.sleep("a", level=0)
            await fleet.sleep("a", level=level)
            model = seen(fleet, "a")
            assert (model.state, model.level) == (State.ASLEEP, level)
            await until(lambda: 0 < (seen(fleet, "a").vram_bytes or 0) < 2 * GIB)
            await fleet.wake("a")
            assert seen(fleet, "a").proof == "proven"
        await fleet.sleep("a", level=1)
        with pytest.raises(RefusedError, match="sleeps at level 1"):
            await fleet.sleep("a", level=0)


async def test_two_models_change_places_with_their_weights_in_vram(box: MakeBox) -> None:
    models = {"a": fast("sim/1GiB", level=0), "b": fast("sim/4GiB", level=0)}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b"])
        for name, other in (("b", "a"), ("a", "b"), ("b", "a")):
            await fleet.switch(name)
            assert seen(fleet, name).state is State.AWAKE
            assert (seen(fleet, other).state, seen(fleet, other).level) == (State.ASLEEP, 0)
            assert seen(fleet, name).proof == "proven"


async def test_weights_stay_by_themselves_where_there_is_room_and_the_longest_idle_leave(
    box: MakeBox,
) -> None:
    models = {name: fast("sim/5GiB", args={"gpu-memory-utilization": 0.5}) for name in "abc"}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b", "c"])
        for name in ("b", "c", "a", "b"):
            await fleet.switch(name)
            assert (seen(fleet, name).state, seen(fleet, name).proof) == (State.AWAKE, "proven")
        assert (seen(fleet, "a").state, seen(fleet, "a").level) == (State.ASLEEP, 0)
        assert (seen(fleet, "c").state, seen(fleet, "c").level) == (State.ASLEEP, 1)
        await fleet.switch("a")
        await fleet.sleep("a")
        assert seen(fleet, "a").level == 1


async def test_shares_leave_room_for_the_weights_of_sleepers_and_each_keeps_its_kv_cache(
    box: MakeBox, tmp_path: Path
) -> None:
    files = {"a": QWEN, "b": SMOLLM, "c": PHI}
    models = {name: fast(str(write_model(tmp_path / name, config))) for name, config in files.items()}
    models["c"]["args"] = {"max-model-len": 4096}  # four contexts take 6 GiB, its weights 7.5
    machine = box(models)
    async with machine.open() as fleet:
        await fleet.start(["a", "b", "c"])
        await fleet.stop(["a", "b"])  # as they started, nobody knew whose sleep mode the others would have
        await fleet.start(["a", "b"])
        for name in ("c", "a", "b"):  # those that a start put to sleep come up from RAM, once
            await fleet.switch(name)
        for name in ("a", "c", "b"):
            await fleet.switch(name)
            others = [seen(fleet, other) for other in files if other != name]
            assert [(other.state, other.level) for other in others] == [(State.ASLEEP, 0)] * 2
            assert seen(fleet, name).proof == "proven"


async def test_a_kv_cache_that_cannot_be_had_is_told(box: MakeBox, tmp_path: Path) -> None:
    model = str(write_model(tmp_path / "phi", PHI))
    machine = box(
        {
            "a": fast(model, kv_cache="20GiB"),
            "b": fast(model, kv_cache="9GiB", args={"gpu-memory-utilization": 0.6}),
        }
    )
    async with machine.open() as fleet:
        await fleet.start(["a"], report=machine.report)
        await fleet.sleep("a")
        await fleet.start(["b"], report=machine.report)
    told = {each.model: each.detail for each in machine.progress if each.phase == "kv cache"}
    assert "20GiB does not fit, about" in told["a"]
    assert "its args say gpu-memory-utilization" in told["b"]


async def test_a_level_that_the_config_names_is_kept_though_there_is_room(box: MakeBox) -> None:
    small = {"gpu-memory-utilization": 0.5}
    models = {"a": fast("sim/1GiB", level=1, args=small), "b": fast("sim/5GiB", args=small)}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("b")
        assert (seen(fleet, "a").state, seen(fleet, "a").level) == (State.ASLEEP, 1)
        await fleet.switch("a")
        assert (seen(fleet, "b").state, seen(fleet, "b").level) == (State.ASLEEP, 0)


async def test_a_sleeper_gives_up_its_weights_where_a_model_needs_the_room(box: MakeBox) -> None:
    models = {
        "a": fast("sim/12GiB", args={"gpu-memory-utilization": 0.85}),
        "b": fast("sim/12GiB", args={"gpu-memory-utilization": 0.85}),
    }
    async with box(models).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a", level=0)
        await fleet.switch("b")
        assert (seen(fleet, "a").state, seen(fleet, "a").level) == (State.ASLEEP, 1)
        assert seen(fleet, "b").state is State.AWAKE
        await fleet.switch("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


@pytest.mark.parametrize(
    ("env", "why"),
    [
        (FITS | {"VLLM_SIM_FAULTS": "backend_refuses"}, "has no create_and_map"),
        ({"VLLM_SIM_VERSION": "0.30.0"}, "has not been seen with it on a GPU"),
    ],
)
async def test_where_it_does_not_fit_vllms_own_is_used_and_that_is_said(
    box: MakeBox, env: dict[str, str], why: str
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": 0, "env": env}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        assert seen(fleet, "a").sleep_backend == "stock"
        with pytest.raises(RefusedError, match="cannot sleep at level 0") as refused:
            await fleet.sleep("a", level=0)
        assert why in refused.value.what
        await fleet.sleep("a")
        assert seen(fleet, "a").level == 1
    assert why in verb(machine, "status").stdout
    checks = json.loads(verb(machine, "doctor", "--json").stdout)["checks"]
    check = next(check for check in checks if check["name"] == "a.sleep_backend")
    assert (check["verdict"], why in check["what"]) == ("warn", True)


async def test_vllms_own_sleep_mode_has_a_level_0_from_0_31_on(box: MakeBox) -> None:
    env = {"VLLM_SIM_VERSION": "0.33.0"}
    async with box({"a": {"model": "sim/4GiB", "level": 0, "env": env}}).open() as fleet:
        await fleet.start(["a"])
        assert seen(fleet, "a").sleep_backend == "stock"
        await fleet.sleep("a")
        model = seen(fleet, "a")
        assert (model.state, model.level, model.proof) == (State.ASLEEP, 0, "proven")
        await until(lambda: 4 * GIB < (seen(fleet, "a").vram_bytes or 0) < 6 * GIB)
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")
        for level in (1, 2):
            await fleet.sleep("a", level=0)
            await fleet.sleep("a", level=level)
            assert seen(fleet, "a").level == level
            await until(lambda: 0 < (seen(fleet, "a").vram_bytes or 0) < 2 * GIB)
            await fleet.wake("a")
            assert seen(fleet, "a").proof == "proven"


async def test_vllms_own_gives_up_a_small_kv_cache_and_takes_over_where_ours_fell_back(box: MakeBox) -> None:
    env = {"VLLM_SIM_VERSION": "0.33.0"}
    small = {"kv-cache-memory-bytes": "300M"}
    async with box({"a": {"model": "sim/1GiB", "env": env, "args": small}}).open() as fleet:
        await fleet.start(["a"])
        model = model_of(fleet, "a")
        model.read()
        model.write(sleep_backend="own")  # as it was when a worker fell back
        with pytest.raises(RefusedError, match="cannot sleep at level 0") as refused:
            await fleet.sleep("a", level=0)
        assert "Ask for it again: that of vLLM 0.33.0" in refused.value.cure
        assert (seen(fleet, "a").state, seen(fleet, "a").sleep_backend) == (State.AWAKE, "stock")
        await fleet.sleep("a", level=0)
        assert (seen(fleet, "a").level, seen(fleet, "a").proof) == (0, "proven")
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


async def test_stock_is_stock(box: MakeBox) -> None:
    machine = box({"a": fast("sim/1GiB", sleep_backend="stock")})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        assert seen(fleet, "a").sleep_backend == "stock"
        record = record_of(fleet, "a")
        assert not (Path(record.tmp_dir or "") / "guard" / "panel_sleep").exists()
        assert "panel-sleep-backend" not in Path(record.log or "").read_text()
    assert "Sleep mode" not in verb(machine, "status").stdout


async def test_verbs_know_level_0(box: MakeBox) -> None:
    machine = box({"a": fast("sim/1GiB")})
    async with machine.open() as fleet:
        await fleet.start(["a"])
    slept = verb(machine, "sleep", "a", "--level", "0", "--json")
    assert slept.returncode == 0, slept.stderr
    status = json.loads(verb(machine, "status", "--json").stdout)["models"][0]
    assert (status["state"], status["level"]) == ("asleep", 0)
    assert "asleep L0" in verb(machine, "status").stdout
    assert verb(machine, "wake", "a").returncode == 0


async def test_garbage_after_a_wake_from_level_0_is_cured(box: MakeBox) -> None:
    async with box({"a": fast("sim/1GiB", level=0)}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "garbage_after_wake:1")
        await fleet.wake("a")
        assert seen(fleet, "a").proof == "proven"


async def test_a_wake_that_fails_does_not_wait_for_the_question_that_was_asked_meanwhile(
    box: MakeBox,
) -> None:
    async with box({"a": fast("sim/1GiB", level=0)}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "engine_dies_on_wake:1")
        with pytest.raises(OperationError):
            await fleet.wake("a")
        assert seen(fleet, "a").state is State.FAILED
        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE


@pytest.mark.parametrize("fault", ["sleep_500:1", "engine_dies_on_sleep:1"])
async def test_an_engine_that_fails_at_level_0_is_failed_and_leaves_nothing(box: MakeBox, fault: str) -> None:
    async with box({"a": fast("sim/1GiB")}).open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", fault)
        with pytest.raises(OperationError):
            await fleet.sleep("a", level=0)
        assert seen(fleet, "a").state is State.FAILED
        await until(lambda: all(gpu.used_bytes == 0 for gpu in fleet.snapshot().gpus))


async def test_a_panel_that_dies_while_weights_move_to_ram_leaves_a_sleeper_that_wakes(box: MakeBox) -> None:
    machine = box({"a": fast("sim/4GiB")}, speed="2")
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a", level=0)
        deeper = asyncio.ensure_future(fleet.sleep("a", level=1))
        while record_of(fleet, "a").intent is None:
            await asyncio.sleep(0.005)
        deeper.cancel()
        await asyncio.gather(deeper, return_exceptions=True)
    async with machine.open() as fleet:
        await until(lambda: record_of(fleet, "a").intent is None)
        assert seen(fleet, "a").level == 1  # as its workers say: nobody was there to write it down
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


async def test_a_sleeper_whose_weights_get_no_ram_sleeps_on_and_gives_them_up_for_others(
    box: MakeBox,
) -> None:
    small = {"gpu-memory-utilization": 0.7}
    models = {"a": fast("sim/8GiB", args=small), "b": fast("sim/8GiB", args=dict(small))}
    async with box(models).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a", level=0)
        await inject(fleet, "a", "no_pool:1")
        with pytest.raises(RefusedError, match=r"weights to RAM: .*Cannot allocate"):
            await fleet.sleep("a", level=1)
        assert (seen(fleet, "a").state, seen(fleet, "a").level) == (State.ASLEEP, 0)
        await inject(fleet, "a", "no_pool:1")
        await fleet.switch("b")
        assert (seen(fleet, "a").state, seen(fleet, "a").level) == (State.ASLEEP, 2)
        await fleet.switch("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


async def test_a_small_kv_cache_is_seen_gone(box: MakeBox) -> None:
    async with box({"a": fast("sim/1GiB", args={"kv-cache-memory-bytes": "300M"})}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a", level=0)
        assert seen(fleet, "a").proof == "proven"


async def test_a_panel_that_dies_before_its_sleep_at_level_0_leaves_no_wish(box: MakeBox) -> None:
    machine = box({"a": fast("sim/1GiB")})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        model = model_of(fleet, "a")
        model.read()
        await keep_weights(model.client(), 10)
        dead = ProcessId(2**22, 1, "")
        intent = Intent(operation="sleep a", phase="drain", since=0.0, actor=dead, level=0)
        model.enter(Event.SLEEP, intent=intent)
        await until(lambda: seen(fleet, "a").state is State.AWAKE)
        await fleet.sleep("a", level=1)
        await until(lambda: 0 < (seen(fleet, "a").vram_bytes or 0) < GIB)  # its weights have left


async def test_a_sleep_at_level_0_that_is_cancelled_while_it_drains_leaves_no_wish(box: MakeBox) -> None:
    machine = box({"a": fast("sim/1GiB")})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", "hang")
        answer = fleet.chat("a", [{"role": "user", "content": "Go on."}])
        reading = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
        client = client_of(fleet, "a")
        while not (await client.gate()).in_flight:
            await asyncio.sleep(0.01)
        asking = asyncio.ensure_future(fleet.sleep("a", level=0, report=machine.report))
        await until(lambda: any("answers under way" in step.detail for step in machine.progress))
        asking.cancel()
        with pytest.raises(CancelledByUser):
            await asking
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await fleet.sleep("a", level=1)
        await until(lambda: 0 < (seen(fleet, "a").vram_bytes or 0) < GIB)  # its weights have left


async def test_a_lost_record_finds_the_level_again(box: MakeBox) -> None:
    machine = box({"a": fast("sim/1GiB")})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a", level=0)
        record_path(fleet, "a").write_bytes(b"not a record")
        await fleet.switch("a")
        assert seen(fleet, "a").state is State.AWAKE
        assert record_of(fleet, "a").sleep_backend == "own"
