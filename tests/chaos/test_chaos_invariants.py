"""The storm's looks at what must hold can see what they are for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import msgspec
import pytest

from tests.chaos.invariants import OVERLAP, violations
from tests.fleet.conftest import Box, until
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.telemetry.processes import is_alive

pytestmark = pytest.mark.usefixtures("own_orphans")
MakeBox = Callable[..., Box]


async def seen_by(core: Core) -> str:
    launch = core.records.read("a").launch
    return "\n".join(await violations(core, {launch} if launch else set()))


async def test_each_broken_invariant_is_seen(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
    core = Core(fleet.loaded, machine.state_dir)
    model = core.model("a")
    record = model.read()
    assert await seen_by(core) == ""

    model.write(state=State.ASLEEP, level=1)
    assert "the server says sleeping=False" in await seen_by(core)
    model.write(state=State.STOPPED, engines=())
    found = await seen_by(core)
    assert "a is stopped and has a keeper" in found
    assert "holds VRAM and is in no record" in found
    assert "orphan" in found
    core.records.write(record)

    log = machine.state_dir / "logs/a.log"
    log.write_text(OVERLAP)
    assert "overlap: a.log" in await seen_by(core)
    core.records.path("a").with_suffix(".broken-1").write_text("")
    assert "record lost" in await seen_by(core)

    assert record.keeper is not None
    os.kill(record.keeper.pid, signal.SIGSTOP)  # so that it does not end its group
    os.kill(record.engines[0].pid, signal.SIGKILL)
    await until(lambda: not is_alive(record.engines[0]))
    core.records.write(msgspec.structs.replace(record, port=None, state=State.FAILED))
    assert "a is failed and has a keeper" in await seen_by(core)
    os.kill(record.keeper.pid, signal.SIGCONT)
    await core.close()
