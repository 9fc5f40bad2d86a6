"""The holder of a KV pool itself: whom it serves, what it gives up, how it ends."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.unit.made_engines import GPU, Gpu, Place, pair, until
from vllm_sleep_tui.engine.backend.holder import Holder
from vllm_sleep_tui.engine.backend.plan import CHUNK
from vllm_sleep_tui.fleet import keeper, pool_holder
from vllm_sleep_tui.fleet.pool import Pool

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""An engine's connection ends with its process, and so does none here."""


def test_one_holder_lives_per_gpu_and_ends_when_nobody_uses_it(place: Place) -> None:
    assert "holder" in place.start()
    assert place.start() == {}
    place.unuse()
    until(lambda: not place.lives())
    assert not (place.folder / f"{GPU}.sock").exists()


def test_a_holder_that_ends_leaves_nothing_and_whoever_waited_for_its_file_gets_a_new_one(
    place: Place,
) -> None:
    place.start()
    (place.folder / f"{GPU}.lent-1").write_text("of an engine that is gone")
    pool = Pool(GPU, place.folder)
    with ThreadPoolExecutor(4) as threads:
        joining = [threads.submit(pool.join) for _ in range(4)]
        place.unuse()
        joined = [each.result() for each in joining]
    assert all(pool_holder.is_at(each, str(place.folder / f"{GPU}.users")) for each in joined)
    for each in joined:
        os.close(each)
    until(lambda: not list(place.folder.iterdir()))


def test_what_lies_in_tmp_is_marked_as_used_by_who_holds_it(place: Place, tmp_path: Path) -> None:
    place.start()
    guard = tmp_path / "server" / "guard"
    guard.mkdir(parents=True)
    (guard / "panel_guard.py").touch()
    paths = [guard, guard / "panel_guard.py", place.folder / f"{GPU}.sock", place.folder / f"{GPU}.users"]
    for path in paths:
        os.utime(path, (0, 0))
    keeper.keep_fresh(str(tmp_path / "server"))
    pool_holder.keep_fresh(str(place.folder / GPU))
    assert all(time.time() - path.stat().st_mtime < 60 for path in paths)


def test_free_memory_that_nobody_comes_for_is_given_up(place: Place) -> None:
    place.start(linger=0.2)
    gpu = Gpu(holders={place.pid})
    pair(gpu, place)
    until(lambda: gpu.used() == 0)
    assert place.lives()


def test_a_limit_and_a_shrink_hold(place: Place) -> None:
    place.start(limit_bytes=4 * CHUNK)
    gpu = Gpu(holders={place.pid})
    one, _ = pair(gpu, place)
    assert one.mover.last["given_bytes"] == 4 * CHUNK
    assert gpu.used() == 4 * CHUNK
    assert place.ask(op="shrink", to_bytes=CHUNK, limit_bytes=2 * CHUNK)["free"] == {str(CHUNK): 1}
    assert gpu.used() == CHUNK
    assert place.ask(op="end") == {}
    until(lambda: not place.lives())
    assert gpu.used() == 0


@pytest.mark.parametrize(
    "packet",
    [
        b"{",
        b"[]",
        b"\xff" * 20,
        b"[" * 3000,
        b"{}",
        b'{"op": "fly"}',
        b'{"op": ["give"]}',
        b'{"op": "give"}',
        b'{"op": "give", "sizes": [0]}',
        b'{"op": "give", "sizes": [true]}',
        b'{"op": "take", "wanted": {"x": 1}}',
        b'{"op": "take", "wanted": {"5": -1}}',
        b'{"op": "take", "wanted": {"5": "1"}}',
        b'{"op": "take", "wanted": []}',
        b'{"op": "take", "wanted": {"' + b"9" * 5000 + b'": 1}}',
        b'{"op": "shrink"}',
        b'{"op": "shrink", "to_bytes": -1}',
        b'{"op": "shrink", "to_bytes": 0, "limit_bytes": "0"}',
        b'{"op": "hello"}',
        b"x" * 60000,
    ],
)
def test_rubbish_is_answered_with_a_sentence_and_hung_up_on(place: Place, packet: bytes) -> None:
    place.start()
    gpu = Gpu(holders={place.pid})
    descriptor = os.memfd_create(gpu.name)
    os.ftruncate(descriptor, 10)
    with place.connect() as connection:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor] * 3))]
        connection.sendmsg([packet], rights)
        assert json.loads(connection.recv(65536))["error"].endswith(".")
        assert connection.recv(65536) == b""
    os.close(descriptor)
    assert gpu.used() == 0, "no descriptor stays"
    assert place.ask(op="state")["free_bytes"] == 0


def test_a_client_that_does_not_read_its_answers_stops_nobody(place: Place) -> None:
    place.start()
    with place.connect() as connection:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                connection.send(b'{"op": "state"}')
        assert place.ask(op="state")["free_bytes"] == 0


def test_a_folder_that_others_may_enter_is_refused_by_both(place: Place) -> None:
    place.folder.chmod(0o755)
    assert "error" in place.start()
    place.folder.chmod(0o700)
    place.start()
    place.folder.chmod(0o750)
    assert not Holder(str(place.folder), GPU, "x").begin()
    place.folder.chmod(0o700)
    assert "error" in place.start(gpu="../x")
