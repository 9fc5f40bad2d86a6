"""One model's trouble, a config that changes, a process that is stopped for a while: the others go on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import pytest

from tests.fleet.beside import client_of, model_of, record_of, record_path
from tests.fleet.conftest import Box, seen, until
from tests.fleet.test_supervision import led
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.core import Core
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.fleet.supervision.restart import is_wanted

MakeBox = Callable[..., Box]
TWO = {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/1GiB"}}


@contextmanager
def unreadable(fleet: Fleet, name: str) -> Iterator[None]:
    """The model's record cannot be read meanwhile, and not because of what is in it."""
    path = record_path(fleet, name)
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
        with unreadable(fleet, "a"):
            await until(lambda: record_of(fleet, "b").state is State.ASLEEP)


async def test_a_record_that_cannot_be_read_is_shown_as_that(box: MakeBox) -> None:
    async with box(TWO).open() as fleet:
        await fleet.start(["b"])
        with unreadable(fleet, "a"):
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
        with unreadable(fleet, "a"):
            fleet._serving.figures.clear()
            await until(lambda: "b" in fleet._serving.figures)


# ── a config that changes meanwhile ──────────────────────────────────────────────────────────────────────


async def test_a_model_that_a_reload_removed_is_not_restarted(box: MakeBox) -> None:
    machine = box(TWO)
    async with machine.open() as fleet:
        fallen = model_of(fleet, "a")
        fallen.record = Record(config="c", name="a", state=State.FAILED, fell=State.AWAKE)
        assert is_wanted(fallen)
        machine.write({"b": {"model": "sim/1GiB"}}, ["24GiB"])
        fallen.core.reload(load(machine.config))
        assert not is_wanted(fallen)


# ── a connection that breaks ─────────────────────────────────────────────────────────────────────────────


class Breaking:
    """Stands between us and a server: the first request to `target` is lost on its way, or its answer is."""

    def __init__(self, socket: str, target: bytes, *, arrives: bool) -> None:
        self.came = 0
        self.connections: set[asyncio.Task[None]] = set()
        self._socket, self._target, self._arrives = socket, target, arrives

    def begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(asyncio.create_task(self._serve(reader, writer)))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_unix_connection(self._socket)
        lost = asyncio.Event()

        async def answer() -> None:
            while (part := await there.read(65536)) and not lost.is_set():
                writer.write(part)

        answering = asyncio.create_task(answer())
        try:
            while part := await reader.read(65536):
                self.came += self._target in part
                if self._target in part and self.came == 1:
                    lost.set()
                    if self._arrives:
                        back.write(part)
                        await answering
                    return
                back.write(part)
        except ConnectionError:
            pass
        finally:
            answering.cancel()
            await asyncio.wait({answering})
            for end in (writer, back):
                end.close()
                with suppress(ConnectionError):
                    await end.wait_closed()


@asynccontextmanager
async def breaking(
    machine: Box, name: str, target: bytes, *, arrives: bool
) -> AsyncIterator[tuple[Fleet, Breaking]]:
    """A fleet whose first call of `target` fails on its way to the model's server, or back."""
    model = Core(load(machine.config), machine.state_dir).model(name)
    socket = model.record.socket
    assert socket is not None
    between = Breaking(socket, target, arrives=arrives)
    listener = await asyncio.start_unix_server(between.begin, f"{socket}-between")
    model.write(socket=f"{socket}-between")
    try:
        async with machine.open() as fleet:
            yield fleet, between
    finally:
        model.read()
        model.write(socket=socket)
        await model.core.close()
        listener.close()
        await asyncio.gather(*between.connections)


@pytest.mark.parametrize("arrives", [True, False], ids=["answer lost", "request lost"])
@pytest.mark.parametrize("level", [1, 2])
async def test_a_sleep_whose_connection_breaks_ends_no_server(
    box: MakeBox, level: int, arrives: bool
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": level}})
    async with machine.open() as before:
        await before.start(["a"])
        pid = seen(before, "a").pid
    async with breaking(machine, "a", b"POST /sleep", arrives=arrives) as (fleet, between):
        await fleet.sleep("a")
        assert between.came == (1 if arrives else 2)
        assert (seen(fleet, "a").state, seen(fleet, "a").pid) == (State.ASLEEP, pid)
    assert await client_of(fleet, "a").is_sleeping(5)


@pytest.mark.parametrize("arrives", [True, False], ids=["answer lost", "request lost"])
@pytest.mark.parametrize(
    ("level", "target"),
    [(1, b"POST /wake_up"), (2, b"tags=weights"), (2, b"POST /collective_rpc"), (2, b"tags=kv_cache")],
)
async def test_a_wake_whose_connection_breaks_ends_no_server(
    box: MakeBox, level: int, target: bytes, arrives: bool
) -> None:
    machine = box({"a": {"model": "sim/1GiB", "level": level}})
    async with machine.open() as before:
        await before.start(["a"])
        await before.sleep("a")
        pid = seen(before, "a").pid
    async with breaking(machine, "a", target, arrives=arrives) as (fleet, between):
        await fleet.wake("a")
        assert between.came
        assert (seen(fleet, "a").state, seen(fleet, "a").pid) == (State.AWAKE, pid)
        assert seen(fleet, "a").proof == "proven"
    assert not (await client_of(fleet, "a").gate()).closed
