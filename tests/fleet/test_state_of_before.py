"""What a version before left in the state folder is taken over: its records, measurements and history."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import msgspec
import pytest

from tests.fleet import recorded
from tests.fleet.beside import record_of
from tests.fleet.conftest import Box, seen, until, until_state
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import midnight

MakeBox = Callable[..., Box]
ITS_OWN = ("config", "launch", "keeper", "server", "engines", "port", "socket", "log", "tmp_dir")
"""What a record says of one launch on one machine; all else is as it was recorded."""


@pytest.mark.parametrize("version", recorded.VERSIONS)
async def test_a_folder_whose_servers_are_gone_is_read_and_its_models_start_again(
    box: MakeBox, version: str
) -> None:
    machine = box(recorded.MODELS, speed=recorded.SPEED)
    recorded.restore(machine, version)
    kept = json.loads((machine.state_dir / "footprints.json").read_text())
    async with machine.open() as fleet:
        for name in ("a", "b"):
            died = await until_state(fleet, name, State.FAILED)
            await until(lambda name=name: record_of(fleet, name).state is State.FAILED)
            assert died.reason
        failed = recorded.record(version, "c", machine)
        assert (seen(fleet, "c").reason, seen(fleet, "c").cure) == (failed["reason"], failed["cure"])

        past = await fleet.past(3600.0)
        woken = [switch for switch in past.switches if switch.from_state is State.ASLEEP]
        today = [switch for switch in woken if switch.time >= midnight(time.time())]
        assert (len(woken), past.switches_today) == (3, len(today))  # fewer of today's just after midnight
        assert set(past.cold_starts) == {"a", "b"}
        assert past.percentiles["a"][1].count == 2
        assert {(span.model, span.state) for span in past.spans} >= {
            ("a", State.AWAKE),
            ("b", State.ASLEEP),
            ("c", State.FAILED),
        }

        await fleet.start(["a"])
        assert seen(fleet, "a").state is State.AWAKE
    async with machine.open() as fleet:
        assert len((await fleet.past(3600.0)).switches) == len(past.switches) + 1
        now = json.loads((machine.state_dir / "footprints.json").read_text())
        assert set(kept) <= set(now)  # what is not measured anew is not forgotten


@pytest.mark.parametrize("version", recorded.VERSIONS)
async def test_records_of_before_drive_servers_that_run(box: MakeBox, version: str) -> None:
    models = {name: recorded.MODELS[name] for name in ("a", "b")}
    machine = box(models, speed=recorded.SPEED)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        own = {name: msgspec.to_builtins(record_of(fleet, name)) for name in models}
        secrets = {name: record_of(fleet, name).secret for name in models}
    for name in models:
        fields = recorded.record(version, name, machine) | {key: own[name][key] for key in ITS_OWN}
        recorded.write(machine, fields | {"secret": secrets[name]})
    recorded.restore_measurements(machine, version)
    async with machine.open() as fleet:
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.ASLEEP)
        reference = record_of(fleet, "b").reference
        await fleet.sleep("a")
        assert (seen(fleet, "a").proof, seen(fleet, "a").level) == ("proven", 1)
        await fleet.switch("b")
        await fleet.switch("a")
        assert (seen(fleet, "a").state, seen(fleet, "b").state) == (State.AWAKE, State.ASLEEP)
        assert seen(fleet, "a").proof == "proven"
        assert record_of(fleet, "b").reference == reference  # proven by what the version before had kept
        await fleet.stop(["a", "b"])
        await until(lambda: fleet.snapshot().gpus[0].used_bytes == 0)
        assert record_of(fleet, "a").last_switch is not None
