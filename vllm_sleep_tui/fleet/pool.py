"""The KV pools: memory of KV caches on its way from a sleeper to whoever wakes, one holder process a GPU.

A holder has no say and no CUDA, see `pool_holder`. Memory that was just released is cleared by the driver
before anybody gets it, which takes most of a switch; a second later it is as good as what a pool holds. So a
pool is worth something between the sleep and the wake of one switch, and is empty otherwise: whoever holds
the GPU's lock gives up what is left, and a holder does so by itself where nobody is left to.

Who uses a pool is a shared lock on its users' file, which each server's keeper inherits: the kernel counts.
"""

from __future__ import annotations

import contextlib
import fcntl
import fnmatch
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.engine.argv import POOL_VARIABLE
from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import private_dir, read_own
from vllm_sleep_tui.fleet import pool_holder
from vllm_sleep_tui.telemetry.gpus import GpuFault, GpuReader, GpuReading
from vllm_sleep_tui.telemetry.peers import user_at_other_end
from vllm_sleep_tui.telemetry.processes import ProcessId, is_alive, signal_process

ANSWER_SECONDS = 0.2
"""For a figure; a holder that is stopped must not hold up a look."""
GIVE_UP_SECONDS = 2.0
"""For memory to be given up: 60 GiB took 48 ms (H100)."""
START_SECONDS = 5.0
END_SECONDS = 2.0
LINGER_SECONDS = 10.0
"""That a holder keeps what nobody comes for: the whole of a switch, and no more."""
JOIN_ATTEMPTS = 50
MAX_ANSWER = 64 * 1024
MAX_WORD = 4096
"""Bytes of what a holder or an engine says in its file."""
MOST_PATH = 107
"""Bytes of a socket's path."""
MOST_FOLDER = MOST_PATH - len("/GPU-01234567-89ab-cdef-0123-456789abcdef.sock")
_NAME = re.compile(r"[A-Za-z0-9-]{1,80}")


SIMULATED = "SIM-"
"""Begins the uuid of a simulated GPU."""


class PoolUser(msgspec.Struct, frozen=True):
    """An engine that is connected."""

    pid: int
    launch: str = ""


class PoolState(msgspec.Struct, frozen=True):
    """What a holder answers."""

    free_bytes: int = 0
    engines: tuple[PoolUser, ...] = ()


class _Loan(msgspec.Struct, frozen=True):
    """What an engine says of itself: the bytes that it has mapped and the driver lists for nobody."""

    pid: int
    start: int
    boot: str
    bytes: int


class _Word(msgspec.Struct, frozen=True):
    """What a holder's file says."""

    holder: ProcessId | None = None


def folder() -> Path:
    """This user's folder of pools: the same for each config and working folder, and short, see MOST_PATH."""
    return Path(os.path.abspath(os.environ.get(POOL_VARIABLE) or f"/tmp/vst-pool-{os.getuid()}"))


def is_ours(place: Path) -> bool:
    """Whether it is a folder of this user; no word in another's counts: it could name any process of ours."""
    try:
        found = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def entries(place: Path, pattern: str) -> list[Path]:
    """What is in a folder of pools; nothing where there is none, or it is not ours or closed to us."""
    try:
        return [place / name for name in fnmatch.filter(os.listdir(place), pattern)] if is_ours(place) else []
    except OSError:
        return []


class Pool:
    """The pool of one GPU, from our side."""

    def __init__(self, uuid: str, where: Path | None = None) -> None:
        self.uuid = uuid
        self._path = (where or folder()) / (uuid if _NAME.fullmatch(uuid) else "unknown")

    def __repr__(self) -> str:
        return f"Pool({self.uuid!r})"

    @property
    def is_simulated(self) -> bool:
        """Whether it is of a GPU that a config made up."""
        return self.uuid.startswith(SIMULATED)

    def _file(self, kind: str) -> Path:
        return self._path.with_name(f"{self._path.name}.{kind}")

    # ── ask ──────────────────────────────────────────────────────────────────────────────────────────────

    def state(self) -> PoolState | None:
        """How it is; None without a holder that answers."""
        return self._state({"op": "state"}, ANSWER_SECONDS)

    def give_up(self, to_bytes: int = 0) -> None:
        """Give memory to the driver until no more than `to_bytes` are free in it.

        A holder that does not answer is ended, and all that it holds is free: that costs speed alone.
        """
        holder, request = self.holder(), {"op": "shrink", "to_bytes": to_bytes}
        if holder is not None and self._state(request, GIVE_UP_SECONDS) is None:
            end(holder)

    def _state(self, request: Mapping[str, Any], seconds: float) -> PoolState | None:
        try:
            return msgspec.convert(self._ask(request, seconds), PoolState)
        except (OSError, *NOT_JSON):
            return None

    def _ask(self, request: Mapping[str, Any], seconds: float) -> Any:
        """One answer; raises OSError or what NOT_JSON names."""
        path = self._file("sock")
        if not is_ours(path.parent) or not path.exists():
            raise FileNotFoundError(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(seconds)
            connection.connect(str(path))
            if user_at_other_end(connection) != os.getuid():
                raise PermissionError(path)
            connection.sendall(json.dumps(request).encode())
            return msgspec.json.decode(connection.recv(MAX_ANSWER))

    # ── who is there ─────────────────────────────────────────────────────────────────────────────────────

    def holder(self) -> ProcessId | None:
        """The living holder, by its own word; None if there is none."""
        if not is_ours(self._path.parent):
            return None
        try:
            word = read_own(self._file("holder"), MAX_WORD).strip(b"\0 ")
            holder = msgspec.json.decode(word or b"{}", type=_Word).holder
        except (OSError, *NOT_JSON):
            return None
        return holder if holder is not None and is_alive(holder) else None

    def lent(self) -> dict[int, int]:
        """Bytes by pid that engines have and the driver lists for nobody; files of the dead are removed."""
        lent = {}
        for path in entries(self._path.parent, f"{self._path.name}.lent-*"):
            with contextlib.suppress(OSError, *NOT_JSON):
                loan = msgspec.json.decode(read_own(path, MAX_WORD).strip(b"\0 "), type=_Loan)
                if is_alive(ProcessId(loan.pid, loan.start, loan.boot)):
                    lent[loan.pid] = loan.bytes
                else:
                    path.unlink()
        return lent

    def is_used(self) -> bool:
        """Whether a server's keeper lives that may use it, whoever's config the server is of."""
        if not is_ours(self._path.parent):
            return False
        try:
            descriptor = os.open(self._file("users"), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    # ── begin, end ───────────────────────────────────────────────────────────────────────────────────────

    def join(self) -> int:
        """A descriptor that makes whoever has it a user of the pool; raises OSError or OperationError."""
        private_dir(self._path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        for attempt in range(JOIN_ATTEMPTS):
            descriptor = os.open(self._file("users"), flags, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                if pool_holder.is_at(descriptor, str(self._file("users"))):
                    return descriptor
                os.close(descriptor)  # a holder that ended has just removed it
            except OSError as error:
                os.close(descriptor)
                # A look whether it is used holds it for an instant; anything else stays as it is.
                if not isinstance(error, BlockingIOError) or attempt == JOIN_ATTEMPTS - 1:
                    raise
                time.sleep(0.002)
        raise BlockingIOError

    def start_holder(self) -> None:
        """Have a holder; without one only speed is lost, so whatever is in the way is left there.

        Blocks until it listens, for as long as a Python takes to start.
        """
        if self.holder() is not None or len(os.fsencode(self._file("sock"))) > MOST_PATH:
            return
        order = {
            "folder": str(self._path.parent),
            "gpu": self._path.name,
            "limit_bytes": None,
            "linger": LINGER_SECONDS,
        }
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, "-I", "-S", pool_holder.__file__],
                input=json.dumps(order).encode(),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={"PATH": os.defpath},
                timeout=START_SECONDS,
            )

    def end_unless_used(self) -> None:
        """End the holder once no server is left that may use it, and see it gone."""
        holder = self.holder()
        if holder is None or self.is_used():
            return
        with contextlib.suppress(OSError, *NOT_JSON):
            self._ask({"op": "end"}, ANSWER_SECONDS)
        if not is_gone(holder, END_SECONDS):
            end(holder)


def end(holder: ProcessId) -> None:
    """Kill a holder and see it gone: it holds memory and knows nothing that would be lost."""
    signal_process(holder, signal.SIGKILL)
    is_gone(holder, END_SECONDS)


def is_gone(process: ProcessId, seconds: float) -> bool:
    """Whether it ends within so many seconds; blocks."""
    deadline = time.monotonic() + seconds
    while is_alive(process):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def pools_here() -> list[Pool]:
    """The pools of this user that have a holder, whatever config they are of."""
    found = (Pool(path.stem) for path in sorted(entries(folder(), "*.holder")))
    return [pool for pool in found if pool.holder() is not None]


def why_no_pool() -> str | None:
    """Why there can be no pool for this user, in words; None if there can."""
    place = folder()
    try:
        found: os.stat_result | None = os.lstat(place)
    except FileNotFoundError:
        found = None
    except OSError as error:
        return f"{place} cannot be looked at: {error.strerror}"
    if found is not None and not is_ours(place):
        return f"{place} is {'not a folder' if found.st_uid == os.getuid() else 'of another user'}"
    if len(os.fsencode(place)) > MOST_FOLDER:
        return f"{place} is too long for a socket in it ({MOST_FOLDER} bytes at most)"
    return None


@contextlib.contextmanager
def joined(uuids: Iterable[str]) -> Iterator[tuple[int, ...]]:
    """Descriptors for a keeper, so that its server counts as a user of these GPUs' pools.

    None where the folder cannot be had, or is another's: then there is no pool, and only speed is lost.
    """
    with contextlib.ExitStack() as stack:
        descriptors = []
        with contextlib.suppress(OSError, OperationError):
            for uuid in uuids:
                descriptors.append(Pool(uuid).join())
                stack.callback(os.close, descriptors[-1])
        yield tuple(descriptors)


class PooledReader:
    """A reader of GPUs that knows the pools: what an engine was handed is counted for it, and what is free
    in a pool is no longer anybody's."""

    def __init__(self, reader: GpuReader) -> None:
        self._reader = reader
        self._pools: dict[int, Pool] = {}

    @property
    def note(self) -> str | None:
        """As the driver's."""
        return self._reader.note

    @property
    def faults(self) -> tuple[GpuFault, ...]:
        """As the driver's."""
        return self._reader.faults

    def read(self) -> tuple[GpuReading, ...]:
        """All GPUs now."""
        readings = self._reader.read()
        self._pools |= {reading.index: Pool(reading.uuid) for reading in readings}
        return tuple(self._pooled(reading) for reading in readings)

    def memory(self, index: int) -> tuple[int | None, Mapping[int, int | None] | None]:
        """Taken bytes of one GPU without what its pool would give up, and bytes by pid."""
        used, by_pid = self._reader.memory(index)
        pool = self._pools.get(index)
        if pool is None:
            return used, by_pid
        state = pool.state()
        free = state.free_bytes if state is not None else 0
        return None if used is None else max(0, used - free), _counted(by_pid, pool.lent())

    def close(self) -> None:
        """Let go of the driver."""
        self._reader.close()

    def _pooled(self, reading: GpuReading) -> GpuReading:
        pool = self._pools[reading.index]
        state = pool.state()
        return msgspec.structs.replace(
            reading,
            processes=_counted(reading.processes, pool.lent()),
            pool_bytes=state.free_bytes if state is not None else None,
        )


def _counted(
    by_pid: Mapping[int, int | None] | None, lent: Mapping[int, int]
) -> Mapping[int, int | None] | None:
    """Bytes by pid with those that were lent; an engine is listed in any case, for its context."""
    if by_pid is None or not lent:
        return by_pid
    return {pid: None if held is None else held + lent.get(pid, 0) for pid, held in by_pid.items()}
