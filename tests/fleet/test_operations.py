"""The operations, on simulated servers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable

import pytest

from tests.fleet.beside import client_of, record_of
from tests.fleet.conftest import GIB, Box, inject, seen, until, until_state
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import CancelledByUser, OperationError, RefusedError, UsageError
from vllm_sleep_tui.fleet.core import OperationLimits
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State

MakeBox = Callable[..., Box]


async def test_two_models_that_do_not_fit_together_are_switched(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a", "b"])
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.ASLEEP)
        ledger = await fleet.switch("b")
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.ASLEEP, State.AWAKE)
        assert seen(fleet, "b").proof == "proven"
        assert seen(fleet, "a").level == 1
        assert {phase for phase, took in ledger.phases.items() if took is not None} == {
            "drain",
            "sleep",
            "settle",
            "wake",
            "prove",
        }
        assert seen(fleet, "b").last_switch == ledger
        await until(lambda: (seen(fleet, "a").vram_bytes or 0) < 2 * GIB)
        await until(lambda: (seen(fleet, "b").vram_bytes or 0) > 16 * GIB)


async def test_level_2_goes_through_its_four_steps_and_is_proven(box: MakeBox) -> None:
    models = {"a": {"model": "sim/1GiB", "level": 2}, "b": {"model": "sim/2GiB", "level": 2}}
    async with box(models).open() as fleet:
        await fleet.start(["a", "b"])
        ledger = await fleet.switch("b")
        assert seen(fleet, "a").level == 2
        assert all(ledger.phases[step] is not None for step in ("weights", "reload", "kv_cache", "reset"))
        assert seen(fleet, "b").proof == "proven"


async def test_models_that_fit_together_stay_awake_together(box: MakeBox) -> None:
    share = {"args": {"gpu-memory-utilization": 0.3}}
    async with box(
        {"a": {"model": "sim/1GiB", **share}, "b": {"model": "sim/2GiB", **share}}
    ).open() as fleet:
        await fleet.start(["a", "b"])
        assert fleet.predict("b").action == "nothing"
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.AWAKE)


async def test_who_was_asked_last_stays_awake_where_one_of_two_must_sleep(box: MakeBox) -> None:
    half = {"args": {"gpu-memory-utilization": 0.4}}
    models = {name: {"model": "sim/1GiB", **half} for name in ("a", "b", "c")}
    async with box(models).open() as fleet:
        await fleet.start(["a"])
        await fleet.start(["b"])
        assert [event async for event in fleet.chat("a", [{"role": "user", "content": "hello"}])]
        await fleet.switch("c")  # `b` woke later than `a`, and `a` was asked later than that
        states = {name: seen(fleet, name).state for name in ("a", "b", "c")}
        assert states == {"a": State.AWAKE, "b": State.ASLEEP, "c": State.AWAKE}


async def test_level_none_is_stopped_and_started_with_the_same_keys(box: MakeBox) -> None:
    models = {"a": {"model": "sim/1GiB", "level": "none"}, "b": {"model": "sim/2GiB"}}
    async with box(models).open() as fleet:
        await fleet.start(["a"])
        await fleet.switch("b")
        assert seen(fleet, "a").state is State.STOPPED
        await fleet.switch("a")
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.ASLEEP)
        await fleet.sleep("a")
        assert seen(fleet, "a").state is State.STOPPED


async def test_a_model_on_two_gpus_sends_the_models_of_both_to_sleep(box: MakeBox) -> None:
    models = {
        "a": {"model": "sim/1GiB", "gpus": [0]},
        "b": {"model": "sim/1GiB", "gpus": [1]},
        "big": {"model": "sim/8GiB", "gpus": [0, 1], "args": {"tensor-parallel-size": 2}},
    }
    async with box(models, ["24GiB", "24GiB"]).open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.switch("big")
        assert [seen(fleet, name).state for name in ("a", "b", "big")] == [
            State.ASLEEP,
            State.ASLEEP,
            State.AWAKE,
        ]
        await until(lambda: set(seen(fleet, "big").vram_by_gpu or {}) == {"0", "1"})


async def test_sleep_again_is_done_and_another_level_is_refused(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await fleet.sleep("a")
        await fleet.sleep("a", level=1)
        with pytest.raises(RefusedError, match="without a wake"):
            await fleet.sleep("a", level=2)
        assert seen(fleet, "a").state is State.ASLEEP
        await fleet.wake("a")
        await fleet.sleep("a", level=2)
        assert seen(fleet, "a").level == 2


@pytest.mark.parametrize("verb", ["wake", "sleep"])
async def test_a_stopped_model_neither_wakes_nor_sleeps(box: MakeBox, verb: str) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        with pytest.raises(RefusedError, match="stopped"):
            await getattr(fleet, verb)("a")


async def test_an_unknown_name_is_refused_with_the_nearest(box: MakeBox) -> None:
    async with box({"qwen": {"model": "sim/1GiB"}}).open() as fleet:
        with pytest.raises(UsageError) as caught:
            await fleet.switch("qwem")
        assert "qwen" in caught.value.cure


async def test_stop_leaves_no_process_and_no_memory(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.stop(["a", "b"])
        assert {seen(fleet, name).state for name in ("a", "b")} == {State.STOPPED}
        assert {seen(fleet, name).vram_bytes for name in ("a", "b")} == {0}
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)


async def test_a_second_panel_sees_what_the_first_does_and_takes_over(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as first, machine.open() as second:
        await first.start(["a"])
        assert seen(second, "a").state is State.AWAKE
        await second.switch("b")
        assert (seen(first, "a").state, seen(first, "b").state) == (State.ASLEEP, State.AWAKE)
    async with machine.open() as later:
        assert (seen(later, "a").state, seen(later, "b").state) == (State.ASLEEP, State.AWAKE)
        await later.switch("a")
        assert seen(later, "a").proof == "proven"


async def test_two_switches_at_once_run_one_after_another(box: MakeBox) -> None:
    machine = box(speed="20")
    async with machine.open() as first, machine.open() as second:
        await first.start(["a", "b"])
        await asyncio.gather(first.switch("b"), second.switch("a", report=machine.report))
        states = {name: seen(first, name).state for name in ("a", "b")}
        assert sorted(states.values()) == [State.ASLEEP, State.AWAKE]


# ── things go wrong ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_api_server_is_failed_and_its_engine_ended(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        pid = seen(fleet, "a").pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        failed = await until_state(fleet, "a", State.FAILED)
        assert failed.reason is not None
        assert failed.cure is not None
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)


async def test_a_killed_engine_is_failed_and_the_rest_ended(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        engine = record_of(fleet, "a").engines[0]
        os.kill(engine.pid, signal.SIGKILL)
        await until_state(fleet, "a", State.FAILED)
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)
        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE


async def test_a_killed_keeper_takes_its_server_along_and_nothing_is_left(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        keeper = record_of(fleet, "a").keeper
        assert keeper is not None
        os.kill(keeper.pid, signal.SIGKILL)
        await until_state(fleet, "a", State.FAILED)
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)


async def test_a_start_that_fails_names_the_cause_from_the_log(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB", "env": {"VLLM_SIM_FAULTS": "gated"}}}).open() as fleet:
        with pytest.raises(OperationError) as caught:
            await fleet.start(["a"])
        failed = seen(fleet, "a")
        assert failed.state is State.FAILED
        assert "gated" in (failed.reason or "").lower() + caught.value.what.lower()
        assert failed.vram_bytes == 0


async def test_after_a_start_that_failed_over_its_plan_the_forecast_does_not_promise_it_again(
    box: MakeBox,
) -> None:
    small = {name: {"model": "sim/1GiB"} for name in ("b", "c", "d")}
    long = {"model": "sim/14GiB", "args": {"max-model-len": 200_000}}
    async with box({"large": {"model": "sim/17GiB"}, "long": long, **small}).open() as fleet:
        assert fleet.predict("large").action == "start"
        for name in ("large", "long"):
            with pytest.raises(OperationError):
                await fleet.start([name])
        large = fleet.predict("large")
        assert large.action == "refused"
        assert large.sentence.startswith("Does not fit: its weights take 17.0 GiB of GPU 0")
        assert "Its last start failed with the same settings." in fleet.predict("long").sentence


async def test_a_model_that_cannot_fit_is_refused_with_the_numbers(box: MakeBox) -> None:
    models = {"a": {"model": "sim/1GiB", "args": {"gpu-memory-utilization": 1.0}}}
    async with box(models).open() as fleet:
        with pytest.raises(RefusedError, match=r"needs 2\d\.\d GiB on GPU 0"):
            await fleet.start(["a"])
        assert seen(fleet, "a").state is State.STOPPED


@pytest.mark.parametrize("fault", ["sleep_500", "engine_dies_on_sleep"])
async def test_a_sleep_that_fails_leaves_it_failed_and_nothing_running(box: MakeBox, fault: str) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", fault)
        with pytest.raises(OperationError):
            await fleet.sleep("a")
        await until_state(fleet, "a", State.FAILED)
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)


@pytest.mark.parametrize("fault", ["wake_500", "engine_dies_on_wake"])
async def test_a_wake_that_fails_leaves_it_failed_and_the_other_asleep(box: MakeBox, fault: str) -> None:
    async with box().open() as fleet:
        await fleet.start(["a", "b"])
        await inject(fleet, "b", fault)
        with pytest.raises(OperationError):
            await fleet.switch("b")
        assert seen(fleet, "b").state is State.FAILED
        assert seen(fleet, "a").state is State.ASLEEP
        await fleet.switch("a")
        assert seen(fleet, "a").proof == "proven"


async def test_garbage_after_a_wake_is_cured_by_one_reload(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "garbage_after_wake:1")
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")


async def test_a_sleep_that_frees_nothing_is_not_called_proven(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB", "level": 2}}).open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", "sleep_frees_nothing")
        await fleet.sleep("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.ASLEEP, "unverified")


@pytest.mark.parametrize(("fault", "proof"), [(None, "proven"), ("sleep_frees_nothing:1", "unverified")])
async def test_where_the_gpus_tell_nothing_the_servers_log_is_the_proof(
    box: MakeBox, fault: str | None, proof: str
) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with Fleet(load(machine.config), machine.state_dir, limits=OperationLimits(settle=0.5)) as fleet:
        await fleet.start(["a"])
        if fault:
            await inject(fleet, "a", fault)
        [described] = machine.state_dir.rglob("gpus.json")
        content = json.loads(described.read_text())
        described.write_text(json.dumps(content | {"gpus": []}))
        await fleet.sleep("a")
        described.write_text(json.dumps(content))
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.ASLEEP, proof)
        await fleet.wake("a")
        assert seen(fleet, "a").proof == "proven"


# ── the person changes their mind ────────────────────────────────────────────────────────────────────────


async def test_a_cancelled_start_leaves_nothing(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}, speed="5").open() as fleet:
        task = asyncio.create_task(fleet.start(["a"]))
        await until(lambda: seen(fleet, "a").phase == "compiling")
        task.cancel()
        with pytest.raises(CancelledByUser):
            await task
        assert seen(fleet, "a").state is State.STOPPED
        assert record_of(fleet, "a").intent is None
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)


async def test_a_start_is_stopped_by_somebody_else(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}}, speed="5")
    async with machine.open() as first, machine.open() as second:
        task = asyncio.create_task(first.start(["a"]))
        await until(lambda: seen(second, "a").phase == "compiling")
        await second.stop(["a"])
        assert seen(second, "a").state is State.STOPPED
        with pytest.raises(CancelledByUser):
            await task


async def test_a_switch_cancelled_while_draining_changes_nothing(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await inject(fleet, "a", "hang")
        answer = fleet.chat("a", [{"role": "user", "content": "hello"}])
        reading = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
        client = client_of(fleet, "a")
        while not (await client.gate()).in_flight:
            await asyncio.sleep(0.01)
        task = asyncio.create_task(fleet.switch("b", report=machine.report))
        await until(lambda: any("answers under way" in step.detail for step in machine.progress))
        task.cancel()
        with pytest.raises(CancelledByUser):
            await task
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.ASLEEP)
        assert not (await client.gate()).closed
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def test_chat_with_a_sleeper_switches_first_and_says_how_long_it_took(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a", "b"])
        events = [event async for event in fleet.chat("b", [{"role": "user", "content": "hello there"}])]
        assert events[0].switch_seconds is not None
        assert "hello there" in "".join(event.text for event in events)
        assert [event for event in events if event.ttft is not None]
        assert events[-1].error is None
        assert seen(fleet, "b").state is State.AWAKE


async def test_first_sleeps_on_different_gpus_share_the_ram_one_after_another(box: MakeBox) -> None:
    models = {name: {"model": "sim/14GiB", "gpus": [gpu]} for gpu, name in enumerate("abc")}
    machine = box(models, ["24GiB"] * 3)  # 64 GiB of RAM: pools of 20 GiB, with the engines' own, for two
    async with machine.open() as fleet:
        await fleet.start(["a", "b", "c"], report=machine.report)
        levels = sorted(record_of(fleet, name).resolved_level or "" for name in models)
        assert levels == ["1", "1", "2"]
        assert {seen(fleet, name).state for name in models} == {State.AWAKE}


async def test_while_it_starts_nobody_elses_request_is_taken(box: MakeBox) -> None:
    slowly = {"VLLM_SIM_FAULTS": "sleep_slow:1"}  # so that its priming is seen: it takes 3 s
    machine = box({"a": {"model": "sim/1GiB", "level": 1, "env": slowly}}, speed="5")
    async with machine.open() as fleet:
        task = asyncio.create_task(fleet.start(["a"]))
        await until(lambda: seen(fleet, "a").phase in ("warming", "priming"))
        client = client_of(fleet, "a")
        await until(lambda: seen(fleet, "a").phase == "priming")
        assert (await client.gate()).closed
        await task
        assert not (await client.gate()).closed


async def test_launches_that_are_over_keep_no_connection(box: MakeBox) -> None:
    def sockets() -> int:
        found = 0
        for entry in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{entry}").startswith("socket")
        return found

    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        before = sockets()
        for _ in range(3):
            await fleet.restart(["a"], force=True)
        await until(lambda: sockets() <= before + 1)
