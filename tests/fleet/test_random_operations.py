"""A short run of random sequences; `python -m tests.fleet.random_operations` is the long one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.fleet.conftest import Box
from tests.fleet.random_operations import RandomOperations
from tests.fleet.watch import Watch
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.states import State

SEED = 20261123
MakeBox = Callable[..., Box]


async def test_twelve_random_sequences_break_nothing(tmp_path: Path) -> None:
    tally = await RandomOperations(tmp_path, SEED).run(12)
    assert tally.problems == []
    assert tally.sequences == 12
    assert tally.ends["done"] > 12


async def test_the_watch_sees_two_models_of_one_gpu_that_are_moved_at_once(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        core = Core(fleet.loaded, machine.state_dir)
        watch = Watch(core)
        core.model("a").write(state=State.WAKING)
        watch.look()
        assert watch.take() == []
        core.model("b").write(state=State.FALLING_ASLEEP)
        watch.look()
        assert watch.take() == ["overlap: a is waking and b is falling-asleep"]
        for name in ("a", "b"):
            core.model(name).write(state=State.STOPPED)
        await core.close()
