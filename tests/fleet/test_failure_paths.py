"""One model's trouble, a config that changes, a process that is stopped for a while: the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from tests.fleet.conftest import Box, seen, until
from tests.fleet.test_supervision import led
from vllm_sleep_tui.config_file import load
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.records import Record
from vllm_sleep_tui.fleet.restart import is_wanted
from vllm_sleep_tui.fleet.states import State

MakeBox = Callable[..., Box]
TWO = {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB"}}


@contextmanager
def unreadable(core: Core, name: str) -> Iterator[None]:
    """The model's record cannot be read meanwhile, and not because of what is in it."""
    path = core.records.path(name)
    kept = path.with_suffix(".kept")
    if path.exists():
        path.rename(kept)
    path.symlink_to(path)
    try:
        yield
    finally:
        path.unlink()
        if kept.exists():
            kept.rename(path)


# ── a record that cannot be read ─────────────────────────────────────────────────────────────────────────


async def test_a_record_that_cannot_be_read_ends_no_care_of_the_others(box: MakeBox) -> None:
    idle = {"idle": {"sleep_after": "1s"}}
    apart = {"a": {"model": "sim/1GiB", "gpus": [0]}, "b": {"model": "sim/1GiB", "gpus": [1], **idle}}
    async with led(box(apart, ["24GiB", "24GiB"])) as fleet:
        await fleet.start(["b"])
        with unreadable(fleet._core, "a"):
            await until(lambda: fleet._core.records.read("b").state is State.ASLEEP)


async def test_a_record_that_cannot_be_read_is_shown_as_that(box: MakeBox) -> None:
    async with box(TWO).open() as fleet:
        await fleet.start(["b"])
        with unreadable(fleet._core, "a"):
            model = seen(fleet, "a")
            assert model.state is State.FAILED
            assert "record" in (model.reason or "")
            assert "symbolic links" in (model.reason or "")
            assert seen(fleet, "b").state is State.AWAKE
            with pytest.raises(OperationError, match="record"):
                await fleet.switch("a")
        assert seen(fleet, "a").state is State.STOPPED


async def test_a_record_that_cannot_be_read_does_not_end_the_figures_of_the_others(box: MakeBox) -> None:
    machine = box(TWO)
    async with Fleet(load(machine.config), machine.state_dir, leads=True) as fleet:
        await fleet.start(["b"])
        with unreadable(fleet._core, "a"):
            fleet._serving.figures.clear()
            await until(lambda: "b" in fleet._serving.figures)


# ── a config that changes meanwhile ──────────────────────────────────────────────────────────────────────


async def test_a_model_that_a_reload_removed_is_not_restarted(box: MakeBox) -> None:
    machine = box(TWO)
    async with machine.open() as fleet:
        fallen = Record(config="c", name="a", state=State.FAILED, fell=State.AWAKE)
        assert is_wanted(fleet._core, fallen)
        machine.write({"b": {"model": "sim/1GiB"}}, ["24GiB"])
        fleet.reload(load(machine.config))
        assert not is_wanted(fleet._core, fallen)
