"""Memory handed from engine to engine, whatever happens to the holder or to one of them."""

from __future__ import annotations

import array
import json
import os
import select
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.unit.made_engines import (
    GPU,
    KV,
    PATIENT,
    REST,
    WEIGHTS,
    Engine,
    Gpu,
    Memory,
    Place,
    pair,
    short,
    until,
)
from vllm_sleep_tui.engine.backend.chunks import Chunks
from vllm_sleep_tui.engine.backend.holder import ANSWER_SECONDS, Holder
from vllm_sleep_tui.engine.backend.plan import CHUNK

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""An engine's connection ends with its process, and so does none here."""


def test_what_a_neighbour_takes_during_a_sleep_is_made_up_for_from_the_pool(gpu: Gpu, place: Place) -> None:
    engine, _ = pair(gpu, place)
    engine.mover.wake(None)
    gpu.room = gpu.used() + CHUNK
    neighbour = Memory(gpu)
    gpu.memories.append(neighbour)
    engine.neighbour_grows = lambda: neighbour.make(CHUNK, exportable=False)
    free = engine.memory.free()
    engine.mover.keep_weights()
    engine.mover.sleep(1)
    assert engine.memory.free() >= free  # or vLLM would end the sleep as failed
    assert engine.mover.level == 0
    assert place.ask(op="state")["free_bytes"] == 0


def test_without_a_holder_the_driver_gives_and_takes(tmp_path: Path) -> None:
    gpu = Gpu()
    for folder in (None, str(tmp_path), str(tmp_path / "none")):
        engine = Engine(gpu, folder)
        before = engine.content(WEIGHTS)
        engine.mover.sleep(1)
        assert gpu.used() == 0
        engine.mover.wake(None)
        assert len(engine.memory.pieces) == 3, "a piece for each region"
        assert engine.content(WEIGHTS) == before
        engine.mover.sleep(1)


def test_a_holder_that_dies_takes_the_free_memory_with_it_and_nothing_else(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    place.kill()
    assert gpu.used() == 0
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 0
    other.mover.sleep(1)
    assert gpu.used() == 0
    place.start()
    gpu.holders = {place.pid}
    one.mover.wake(None)
    place.kill()
    one.mover.sleep(1)
    assert (gpu.used(), one.mover.level) == (0, 1)
    place.start()
    for engine in (one, other):
        engine.mover.wake(None)
        engine.mover.sleep(1)
    gpu.holders = {place.pid}
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK


def test_a_holder_that_hangs_is_left_after_a_moment(gpu: Gpu, place: Place) -> None:
    other = Engine(gpu, str(place.folder), answers_within=ANSWER_SECONDS)
    other.mover.sleep(1)
    os.kill(place.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        other.mover.wake(None)
        other.mover.sleep(1)
        assert time.monotonic() - began < 60  # stopped, it would say nothing for ever
        assert other.mover.level == 1
    finally:
        os.kill(place.pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", ["stale", "short", "foreign"])
def test_a_descriptor_that_is_not_what_it_should_be_is_replaced(gpu: Gpu, place: Place, kind: str) -> None:
    _, other = pair(gpu, place)
    place.ask(op="shrink", to_bytes=3 * CHUNK)
    bad = os.memfd_create(gpu.name) if kind == "short" else os.open(os.devnull, os.O_RDWR)
    if kind == "foreign":
        os.close(bad)
        bad = os.memfd_create("something")
    with place.connect() as connection:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [bad] * 3))]
        connection.sendmsg([json.dumps({"op": "give", "sizes": [CHUNK] * 3}).encode()], rights)
        assert json.loads(connection.recv(1000)) == {"kept": 3}
    os.close(bad)
    descriptors = len(os.listdir("/proc/self/fd"))
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 3 * CHUNK
    assert all(len(other.content(address)) == short(3 * CHUNK + REST) for address in KV)
    other.mover.sleep(1)
    assert len(os.listdir("/proc/self/fd")) <= descriptors


def test_an_engine_that_dies_leaves_no_memory(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    ready, tell = os.pipe()
    os.set_blocking(ready, False)
    child = os.fork()
    if child == 0:
        try:
            other.chunks = Chunks(other.memory, Holder(str(place.folder), GPU, "launch-2", PATIENT))
            other.mover.wake(None)
            os.write(tell, b"%d" % other.mover.last["taken_bytes"])
            signal.pause()
        finally:
            os._exit(1)
    gpu.holders.add(child)
    until(lambda: bool(select.select([ready], [], [], 0)[0]))
    assert int(os.read(ready, 20)) == 6 * CHUNK
    assert gpu.used() > 6 * CHUNK
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert gpu.used() == 0
    until(lambda: len(place.ask(op="state")["engines"]) == 2)
    os.close(ready)
    os.close(tell)
