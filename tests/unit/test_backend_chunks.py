"""Memory handed from engine to engine, and what there is too little room for."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.made_engines import KV, REST, WEIGHTS, Engine, Gpu, Place, pair
from vllm_sleep_tui.engine.backend.plan import BLOCK, CHUNK, SLACK, whole_chunks

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""An engine's connection ends with its process, and so does none here."""


def test_the_kv_cache_of_a_sleeper_goes_to_the_next_engine_and_is_cleared(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    assert one.mover.last["given_bytes"] == 6 * CHUNK
    assert place.ask(op="state")["free"] == {str(CHUNK): 6}
    before = gpu.used()
    made = other.memory.made
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 6 * CHUNK
    assert other.memory.made - made == 8 * BLOCK + 2 * REST, "the weights and the rests are its own"
    assert gpu.used() - before == other.memory.made - made
    assert not any(b"".join(other.content(address) for address in KV))
    assert place.ask(op="state")["free_bytes"] == 0
    assert place.lent == 6 * CHUNK
    assert place.ask(op="state")["engines"]


def test_memory_goes_round_and_nothing_grows(gpu: Gpu, place: Place) -> None:
    engines = pair(gpu, place)
    weights = {}
    for engine in engines:
        engine.mover.wake(None)
        weights[id(engine)] = engine.content(WEIGHTS)
        engine.mover.sleep(1)
    used = gpu.used()
    descriptors = len(os.listdir("/proc/self/fd"))
    for engine in engines * 10:
        engine.mover.wake(None)
        assert engine.mover.last["taken_bytes"] == 6 * CHUNK
        assert engine.content(WEIGHTS) == weights[id(engine)]
        for address in KV:
            engine.memory.write(address, os.urandom(len(engine.content(address))))
        engine.mover.sleep(1)
        assert engine.mover.last["given_bytes"] == 6 * CHUNK
    assert gpu.used() == used
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert place.lent == 0


@pytest.mark.parametrize("level", [0, 1, 2])
def test_every_level_hands_the_kv_cache_over(gpu: Gpu, place: Place, level: int) -> None:
    one, other = pair(gpu, place)
    other.mover.wake(None)
    if level == 0:
        other.mover.keep_weights()
    other.mover.sleep(max(level, 1))
    assert other.mover.last["given_bytes"] == 6 * CHUNK
    one.mover.wake(["weights"])
    assert one.mover.last["taken_bytes"] == 0
    one.mover.wake(["kv_cache"])
    assert one.mover.last["taken_bytes"] == 6 * CHUNK
    if level == 0:
        assert other.mover.sleep(1) == (8 * BLOCK, 8 * BLOCK)
    other.mover.wake(None)
    assert other.mover.level is None
    assert len(other.content(WEIGHTS)) == 8


def test_other_sizes_take_what_fits_and_make_the_rest(gpu: Gpu, place: Place) -> None:
    one, _ = pair(gpu, place)
    larger = Engine(gpu, str(place.folder), kv=5 * CHUNK + REST)
    larger.mover.sleep(1)
    larger.mover.wake(None)
    assert larger.mover.last["taken_bytes"] == 6 * CHUNK
    larger.mover.sleep(1)
    assert larger.mover.last["given_bytes"] == 10 * CHUNK
    one.mover.wake(None)
    assert place.ask(op="state")["free"] == {str(CHUNK): 4}


def test_vllm_frees_a_region_of_chunks_as_any_other(gpu: Gpu, place: Place) -> None:
    one, other = pair(gpu, place)
    other.mover.wake(None)
    other.free(KV[0])
    other.mover.sleep(1)
    assert place.lent == 0
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK, "its chunks are the pool's again"
    assert len(other.memory.pieces) == len(other.memory.handles) == 0
    one.mover.wake(None)
    assert one.mover.last["taken_bytes"] == 6 * CHUNK


def test_once_vllms_own_sleep_mode_takes_over_its_sleep_frees_what_was_lent(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    other.mover.wake(None)
    content = [other.content(address) for address in (WEIGHTS, *KV)]
    other.mover.let_go()
    assert (place.lent, other.mover.pool_bytes) == (0, 0)
    assert [other.content(address) for address in (WEIGHTS, *KV)] == content
    for found in other.allocations.values():
        other.unmap_and_release(found.handle)
    assert gpu.used() == 0


# ── without room ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_wake_without_room_gives_all_of_it_back_and_can_be_asked_again(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    used = gpu.used()
    gpu.room = used + 6 * BLOCK
    with pytest.raises(RuntimeError, match="out of memory"):
        other.mover.wake(None)
    assert (gpu.used(), len(other.memory.pieces), len(other.memory.handles)) == (used, 0, 0)
    assert place.ask(op="state")["free_bytes"] == 6 * CHUNK
    assert (other.mover.level, place.lent) == (1, 0)
    gpu.room = used + 8 * BLOCK + 2 * REST
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 6 * CHUNK


def test_what_the_pool_has_too_much_makes_room_for_a_wake(gpu: Gpu, place: Place) -> None:
    _, other = pair(gpu, place)
    small = Engine(gpu, str(place.folder), kv=CHUNK + 130 * BLOCK, weights=600)
    small.mover.sleep(1)
    gpu.room = gpu.used() + 700 * BLOCK  # weights and rests do not fit beside all six chunks
    small.mover.wake(None)
    assert small.mover.last["taken_bytes"] == 2 * CHUNK
    assert place.ask(op="state")["free_bytes"] == 0
    small.mover.sleep(1)
    gpu.room = 1 << 60
    other.mover.wake(None)
    assert other.mover.last["taken_bytes"] == 2 * CHUNK


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 5000).map(lambda blocks: blocks * BLOCK), max_size=40))
def test_chunks_leave_some_of_every_region_and_enough_of_all(sizes: list[int]) -> None:
    counts = whole_chunks(sizes)
    rests = [size - count * CHUNK for size, count in zip(sizes, counts, strict=True)]
    assert all(rest > 0 and count >= 0 for rest, count in zip(rests, counts, strict=True))
    assert sum(rests) >= min(SLACK, sum(sizes))
    if sum((size - 1) % CHUNK + 1 for size in sizes) >= SLACK:
        assert all(rest <= CHUNK for rest in rests)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_comes_each_engine_has_its_weights_and_no_kv_of_another(
    gpu: Gpu, place: Place, data: st.DataObject
) -> None:
    if not place.lives():
        place.start()
        gpu.holders = {place.pid}
    engines = pair(gpu, place)
    weights = {}
    for engine in engines:
        engine.mover.wake(None)
        weights[id(engine)] = engine.content(WEIGHTS)
        engine.mover.sleep(1)
    for _ in range(data.draw(st.integers(1, 8))):
        engine = data.draw(st.sampled_from(engines))
        if data.draw(st.integers(0, 5)) == 0 and place.lives():
            place.kill()
        elif data.draw(st.integers(0, 2)) == 0 and not place.lives():
            place.start()
            gpu.holders = {place.pid}
        if engine.mover.level is None:
            for address in KV:
                engine.memory.write(address, b"\xee" * len(engine.content(address)))
            if data.draw(st.booleans()):
                engine.mover.keep_weights()
            engine.mover.sleep(1)
        else:
            engine.mover.wake(None)
            assert not any(b"".join(engine.content(address) for address in KV))
            assert engine.content(WEIGHTS) == weights[id(engine)]
    for engine in engines:
        if engine.mover.level != 1:
            engine.mover.sleep(1)
    if place.lives():
        place.ask(op="shrink", to_bytes=0)
    assert gpu.used() == 0
