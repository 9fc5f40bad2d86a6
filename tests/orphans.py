"""`orphans` looks at all that this user runs: who has some in a test, and who ends what it finds, take turns.

Other processes run other tests meanwhile. Those that leave a server without its keeper, its record or its
config for a while are `left_alone`, many at once; an `orphans --end` is one of `ending`, and waits for them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

TURN, ROOM = (f"/tmp/vllm-sleep-tui-tests-{os.getuid()}.{kind}" for kind in ("turn", "room"))


@contextmanager
def _locked(path: str, how: int) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, how)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def left_alone() -> Iterator[None]:
    """Nobody ends what looks like an orphan meanwhile."""
    with _locked(TURN, fcntl.LOCK_EX):  # behind who waits to end some
        room = _locked(ROOM, fcntl.LOCK_SH)
        room.__enter__()
    try:
        yield
    finally:
        room.__exit__(None, None, None)


@contextmanager
def ending() -> Iterator[None]:
    """Nobody else has orphans meanwhile, or ends some."""
    with _locked(TURN, fcntl.LOCK_EX), _locked(ROOM, fcntl.LOCK_EX):
        yield
