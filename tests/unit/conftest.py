"""A holder of a KV pool, and the GPU whose memory it holds."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.made_engines import GPU, Gpu, Place, until


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    folder = tmp_path / "p"
    folder.mkdir(mode=0o700)
    users = os.open(folder / f"{GPU}.users", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(users, fcntl.LOCK_SH)
    made = Place(folder, users)
    yield made
    gc.collect()  # the engines' connections, while their warnings are expected
    made.unuse()
    if made.pid and made.lives():
        until(lambda: not made.lives())


@pytest.fixture
def gpu(place: Place) -> Iterator[Gpu]:
    place.start()
    made = Gpu(holders={place.pid})
    yield made
    made.end()
