"""Every row of the table of cures, with its failure injected into a simulated server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from msgspec.structs import replace

from tests.fleet.beside import core_of, model_of, record_of, record_path
from tests.fleet.conftest import GIB, Box, inject, seen, until, until_state
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import OperationError, RefusedError, UsageError
from vllm_sleep_tui.fleet.core import OperationLimits
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.operations.failures import CURES, Failure
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, Progress
from vllm_sleep_tui.fleet.states import State

MakeBox = Callable[..., Box]
Test = TypeVar("Test", bound=Callable[..., Any])

SHORT = OperationLimits(drain=0.5, settle=0.3, call=2.5, call_per_gib=0.0)
PAGE = Path(__file__).parents[2] / "docs/cures.md"
COVERED: set[Failure] = set()
OLD = {"a": {"model": "sim/1GiB", "env": {"VLLM_SIM_VERSION": "0.24.0"}}}
LEVEL_2 = {"a": {"model": "sim/1GiB", "level": 2}}
WIDE = {"a": {"model": "sim/4GiB", "gpus": [0, 1], "args": {"tensor-parallel-size": 2}}}


def covers(failure: Failure) -> Callable[[Test], Test]:
    """This test injects the failure of that row."""
    COVERED.add(failure)
    return lambda test: test


@asynccontextmanager
async def impatient(machine: Box) -> AsyncIterator[Fleet]:
    """A fleet whose operations wait for seconds only."""
    async with Fleet(load(machine.config), machine.state_dir, limits=SHORT) as fleet:
        yield fleet


async def ended_as(fleet: Fleet, failure: Failure, name: str = "a") -> ModelSnapshot:
    """The model is failed, told as the row says, and nothing of it is left."""
    row, model = CURES[failure], seen(fleet, name)
    said = "engine process" if failure is Failure.ENGINE_DEAD else row.reason.partition("{why}")[0].strip()
    assert model.state is row.state is State.FAILED
    assert said in (model.reason or "")
    assert model.cure
    assert model.vram_bytes == 0
    await until(lambda: all(gpu.used_bytes == 0 for gpu in fleet.snapshot().gpus))
    return model


@covers(Failure.SLEEP_REFUSED)
async def test_a_refused_sleep_is_failed(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", "sleep_500:1")
        with pytest.raises(OperationError, match="refused to sleep"):
            await fleet.sleep("a")
        model = await ended_as(fleet, Failure.SLEEP_REFUSED)
        assert model.cure == CURES[Failure.SLEEP_REFUSED].advice


@covers(Failure.SLEEP_LATE)
async def test_a_sleep_that_is_late_is_asleep_all_the_same(box: MakeBox) -> None:
    async with impatient(box({"a": {"model": "sim/1GiB"}})) as fleet:
        await fleet.start(["a"])
        await inject(fleet, "a", "sleep_slow:1")
        ledger = await fleet.sleep("a")
        assert (ledger.phases["sleep"] or 0) > SHORT.call
        assert seen(fleet, "a").state is CURES[Failure.SLEEP_LATE].helped
        assert seen(fleet, "a").proof == "proven"
        await fleet.wake("a")


@covers(Failure.WAKE_REFUSED)
@pytest.mark.parametrize(
    ("models", "gpus", "fault"),
    [(OLD, 1, "wake_500:1"), (WIDE, 2, "wake_500:1"), (LEVEL_2, 1, "reload_500:1")],
    ids=["before 0.26", "two GPUs", "reload"],
)
async def test_a_refused_wake_that_must_not_be_repeated_is_failed(
    box: MakeBox, models: dict[str, dict[str, Any]], gpus: int, fault: str
) -> None:
    async with box(models, ["24GiB"] * gpus).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", fault)
        with pytest.raises(OperationError, match="could not wake"):
            await fleet.wake("a")
        await ended_as(fleet, Failure.WAKE_REFUSED)


@covers(Failure.RELOAD_UNKNOWN)
async def test_a_loader_that_cannot_reload_after_all_is_not_answered_with_start_it_again(
    box: MakeBox,
) -> None:
    async with box(LEVEL_2).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "reload_unknown:1")
        with pytest.raises(OperationError, match="cannot load its weights again") as caught:
            await fleet.wake("a")
        assert "level: 1" in caught.value.cure
        await ended_as(fleet, Failure.RELOAD_UNKNOWN)


@covers(Failure.WAKE_OUT_OF_MEMORY)
@pytest.mark.parametrize("level", [1, 2])
async def test_a_wake_out_of_memory_is_asked_once_more_when_the_others_sleep(
    box: MakeBox, level: int
) -> None:
    share = {"args": {"gpu-memory-utilization": 0.3}, "level": level}
    machine = box({"a": {"model": "sim/1GiB", **share}, "b": {"model": "sim/1GiB", **share}})
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await fleet.sleep("a")
        await inject(fleet, "a", "wake_500:1")
        await fleet.wake("a", report=machine.report)
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")
        assert seen(fleet, "b").state is State.ASLEEP
        assert any("once more" in step.detail for step in machine.progress)


@pytest.mark.parametrize("level", [1, 2])
async def test_a_model_that_grew_since_it_was_measured_wakes_half_and_then_whole(
    box: MakeBox, level: int
) -> None:
    share = {"args": {"gpu-memory-utilization": 0.55}, "level": level}
    machine = box({"a": {"model": "sim/1GiB", **share}, "b": {"model": "sim/2GiB", **share}})
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
    model_of(fleet, "b").remember(lambda known: replace(known, awake={"0": 2 * GIB}))
    core_of(fleet).flush()
    async with machine.open() as fleet:
        await until(lambda: fleet.snapshot().gpus)  # the memory has been read
        assert fleet.predict("b").sleeps == ()
        await fleet.switch("b")
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.ASLEEP, State.AWAKE)
        assert seen(fleet, "b").proof == "proven"
        assert "out of memory" in fleet.log("b").path.read_text()


async def test_a_wake_out_of_memory_twice_is_failed(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "wake_500:2")
        with pytest.raises(OperationError, match="ran out of VRAM"):
            await fleet.wake("a")
        await ended_as(fleet, Failure.WAKE_OUT_OF_MEMORY)


@covers(Failure.WAKE_LATE)
@pytest.mark.parametrize("models", [{"a": {"model": "sim/1GiB"}}, LEVEL_2], ids=["level 1", "level 2"])
async def test_a_wake_that_is_late_is_awake_all_the_same(
    box: MakeBox, models: dict[str, dict[str, Any]]
) -> None:
    async with impatient(box(models)) as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        engine = record_of(fleet, "a").engines[0]
        os.kill(engine.pid, signal.SIGSTOP)
        waking = asyncio.create_task(fleet.wake("a"))
        await until_state(fleet, "a", State.WAKING)
        await asyncio.wait({waking}, timeout=SHORT.call * 1.4)
        os.kill(engine.pid, signal.SIGCONT)
        await waking
        assert seen(fleet, "a").state is CURES[Failure.WAKE_LATE].helped
        assert seen(fleet, "a").proof == "proven"
        wake = (seen(fleet, "a").last_switch or pytest.fail("no ledger")).phases["wake"]
        assert (wake or 0) > SHORT.call


@covers(Failure.SILENT)
@pytest.mark.parametrize("verb", ["sleep", "wake"])
async def test_a_server_whose_engine_is_stuck_is_ended(box: MakeBox, verb: str) -> None:
    async with impatient(box({"a": {"model": "sim/1GiB"}})) as fleet:
        await fleet.start(["a"])
        if verb == "wake":
            await fleet.sleep("a")
        await inject(fleet, "a", f"{verb}_hangs")
        with pytest.raises(OperationError, match="does not answer"):
            await getattr(fleet, verb)("a")
        await ended_as(fleet, Failure.SILENT)


@covers(Failure.ENGINE_DEAD)
@pytest.mark.parametrize("verb", ["sleep", "wake"])
async def test_a_death_in_an_operation_is_failed_and_named(box: MakeBox, verb: str) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        if verb == "wake":
            await fleet.sleep("a")
        await inject(fleet, "a", f"engine_dies_on_{verb}")
        with pytest.raises(OperationError, match="engine process"):
            await getattr(fleet, verb)("a")
        await ended_as(fleet, Failure.ENGINE_DEAD)


async def test_a_death_while_nothing_is_done_is_failed_and_named(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        os.kill(record_of(fleet, "a").engines[0].pid, signal.SIGKILL)
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        await ended_as(fleet, Failure.ENGINE_DEAD)


async def test_the_log_tells_why_an_engine_died_before_its_server_has_ended(box: MakeBox) -> None:
    async with box(WIDE, ["24GiB"] * 2).open() as fleet:
        await fleet.start(["a"])
        os.kill(record_of(fleet, "a").engines[-1].pid, signal.SIGKILL)  # a worker of the engine
        await until(lambda: record_of(fleet, "a").state is State.FAILED)
        assert "worker process of the engine (VllmWorker-0) was killed" in (seen(fleet, "a").reason or "")


@covers(Failure.ANSWER_WRONG)
async def test_wrong_answers_are_cured_by_a_reload(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "garbage_after_wake:1")
        await fleet.wake("a", report=machine.report)
        assert seen(fleet, "a").state is CURES[Failure.ANSWER_WRONG].helped
        assert seen(fleet, "a").proof == "proven"
        assert any("loaded again" in step.detail for step in machine.progress)


async def test_wrong_answers_that_stay_are_failed(box: MakeBox) -> None:
    async with box({"a": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "garbage_after_wake", "reload_500")
        with pytest.raises(OperationError, match="answers nonsense"):
            await fleet.wake("a")
        await ended_as(fleet, Failure.ANSWER_WRONG)


@covers(Failure.PROOF_REFUSED)
async def test_a_woken_model_that_gives_no_token_is_failed(box: MakeBox) -> None:
    async with impatient(box({"a": {"model": "sim/1GiB"}})) as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await inject(fleet, "a", "hang")
        with pytest.raises(OperationError, match="woke and does not answer"):
            await fleet.wake("a")
        await ended_as(fleet, Failure.PROOF_REFUSED)


@covers(Failure.MEMORY_KEPT)
async def test_a_sleep_that_frees_nothing_is_told_with_the_figures_and_not_believed(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": 2}})
    async with impatient(machine) as fleet:
        await fleet.start(["a"])
        await fleet.sleep("a")
        await fleet.wake("a")
    measured = model_of(fleet, "a").footprint.asleep
    assert measured
    async with impatient(machine) as fleet:
        await inject(fleet, "a", "sleep_frees_nothing:1")
        await fleet.sleep("a")
        model = seen(fleet, "a")
        assert (model.state, model.proof) == (CURES[Failure.MEMORY_KEPT].state, "unverified")
        assert "GiB on GPU 0" in (model.reason or "")
        assert model.cure == CURES[Failure.MEMORY_KEPT].advice
        await fleet.wake("a")
        assert (seen(fleet, "a").reason, seen(fleet, "a").cure) == (None, None)
    assert model_of(fleet, "a").footprint.asleep == measured


@covers(Failure.NO_ROOM)
async def test_a_wake_without_room_is_not_begun(box: MakeBox) -> None:
    async with impatient(box()) as fleet:
        await fleet.start(["a", "b"])
        await inject(fleet, "a", "sleep_frees_nothing:1")
        with pytest.raises(RefusedError, match="GiB are free") as caught:
            await fleet.switch("b")
        assert caught.value.cure.startswith(CURES[Failure.NO_ROOM].advice)
        assert seen(fleet, "b").state is CURES[Failure.NO_ROOM].state
        await fleet.stop(["a"])
        await fleet.switch("b")
        assert seen(fleet, "b").proof == "proven"


@covers(Failure.TOO_OLD)
async def test_a_vllm_too_old_to_sleep_is_stopped_in_its_place(box: MakeBox) -> None:
    old = {"model": "sim/1GiB", "env": {"VLLM_SIM_VERSION": "0.20.0"}}
    async with box({"a": old, "b": {"model": "sim/1GiB"}}).open() as fleet:
        await fleet.start(["a"])
        with pytest.raises(RefusedError, match=r"runs 0\.20\.0") as caught:
            await fleet.sleep("a", level=1)
        assert caught.value.cure == CURES[Failure.TOO_OLD].advice
        assert seen(fleet, "a").state is CURES[Failure.TOO_OLD].state
        await fleet.switch("b")
        assert seen(fleet, "a").state is State.STOPPED


# ── the proof of models that embed ───────────────────────────────────────────────────────────────────────


async def test_an_embedding_model_is_proven_by_its_embedding_and_garbage_is_seen(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": 2, "args": {"runner": "pooling"}}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
        record = record_of(fleet, "a")
        assert record.reference is not None
        assert len(record.reference.embedding) == 64
        assert record_path(fleet, "a").stat().st_size == 4096
        await fleet.sleep("a")
        await fleet.wake("a")
        assert (seen(fleet, "a").state, seen(fleet, "a").proof) == (State.AWAKE, "proven")
        await fleet.sleep("a")
        await inject(fleet, "a", "garbage_after_wake:9")
        told: list[Progress] = []
        await fleet.wake("a", report=told.append)
        assert any("loaded again" in step.detail for step in told)


# ── what level 2 cannot bring back ───────────────────────────────────────────────────────────────────────


async def test_level_2_of_a_model_that_drafts_is_warned_of_before_and_during_the_switch(box: MakeBox) -> None:
    drafts = {"model": "sim/1GiB", "level": 2, "args": {"speculative-config": {"method": "ngram"}}}
    machine = box({"a": drafts, "b": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        await until(lambda: "Level 2 of a: " in fleet.predict("b").sentence)
        await fleet.switch("b", report=machine.report)
        warned = [step for step in machine.progress if "draft model" in step.detail]
        assert [(step.model, step.phase) for step in warned] == [("a", "drain")]
        assert "Level 2" not in fleet.predict("a").sentence


async def test_level_2_of_dummy_weights_is_refused_before_anybody_sleeps_for_it(box: MakeBox) -> None:
    dummy = {"model": "sim/1GiB", "level": 2, "args": {"load-format": "dummy"}}
    async with box({"a": {"model": "sim/1GiB"}, "b": dummy}).open() as fleet:
        await fleet.start(["a"])
        for attempt in (fleet.switch("b"), fleet.start(["b"])):
            with pytest.raises(UsageError, match="dummy weights"):
                await attempt
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.STOPPED)


async def test_dummy_weights_without_ram_for_level_1_are_stopped_in_place_of_level_2(box: MakeBox) -> None:
    dummy = {"model": "sim/40GiB", "args": {"load-format": "dummy"}}
    async with box({"a": dummy}, ["80GiB"]).open() as fleet:
        await fleet.start(["a"])
        assert seen(fleet, "a").resolved_level == "none"
        await fleet.sleep("a")
        assert seen(fleet, "a").state is State.STOPPED


@pytest.mark.parametrize(
    ("arguments", "verdict", "what"),
    [
        ({"speculative-config": "{}"}, "warn", "draft"),
        ({"load-format": "sharded_state"}, "fail", "`sharded_state` cannot load weights again"),
        ({"load_format": "runai_streamer"}, None, ""),
        ({"enable-lora": True}, None, ""),
        ({}, None, ""),
    ],
)
def test_doctor_warns_of_level_2(
    tmp_path: Path, arguments: dict[str, Any], verdict: str | None, what: str
) -> None:
    model = {"model": "x/y", "gpus": [], "level": 2, "args": arguments}
    config = tmp_path / "fleet.yaml"
    config.write_text(json.dumps({"vllm_command": ["vllm"], "models": {"a": model}}))
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), "doctor", "--json"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False)
    found = [check for check in json.loads(done.stdout)["checks"] if check["name"] == "a.level"]
    assert [check["verdict"] for check in found] == ([verdict] if verdict else [])
    assert all(what in check["what"] for check in found)


# ── the table itself ─────────────────────────────────────────────────────────────────────────────────────


def as_table() -> str:
    """The table as the page shows it."""
    lines = ["| What goes wrong | What is tried | Where it ends | What you are told |", "|---|---|---|---|"]
    for row in CURES.values():
        ends = [f"{row.helped} if that helps" if row.state else f"{row.helped}"] if row.helped else []
        ends += [f"{'else ' if row.helped else ''}{row.state}"] if row.state else []
        told = " ".join(part for part in (row.reason.replace("{why}", "…"), row.advice) if part)
        lines.append(f"| {row.failure} | {row.tried} | {', '.join(ends)} | {told} |")
    return "\n".join(lines)


def test_the_page_shows_the_table_of_the_code() -> None:
    assert as_table() in PAGE.read_text()


def test_every_row_has_a_test_and_every_failure_a_row() -> None:
    assert set(CURES) == set(Failure) == COVERED
