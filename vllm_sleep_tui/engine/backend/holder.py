"""The engine's side of the pool holder (`fleet/pool_holder.py` has the protocol), and of the ledger.

Nothing here raises: without a holder, or with one that is slow, dies or talks nonsense, there is just nothing
to take and nobody to give to, and memory comes from and goes to the driver.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Sequence
from typing import Any

ANSWER_SECONDS = 0.2
"""For the holder to answer all that one sleep or wake asks: what it saves is hardly more than that."""
MOST_DESCRIPTORS = 200
MOST_BYTES = 64 * 1024
WORD_SIZE = 256


class Holder:
    """The holder of one GPU, if there is a folder for them; it must be this user's alone.

    `answers_within` are the seconds that it has for all that one sleep or wake asks.
    """

    def __init__(
        self, folder: str | None, gpu: str, launch: str, answers_within: float = ANSWER_SECONDS
    ) -> None:
        self._folder = folder
        self._gpu = gpu
        self._launch = launch
        self._answers_within = answers_within
        self._connection: socket.socket | None = None
        self._patience = 0.0
        """Seconds that are left to it."""
        self._lent = 0

    def begin(self) -> bool:
        """A sleep or a wake begins: find out whether there is a holder, and let it have its time."""
        self._patience = self._answers_within
        if self._connection is not None:
            self._ask({"op": "state"})  # it may have died, and another one come, since the last time
        if self._connection is None and self._folder is not None:
            with contextlib.suppress(OSError):
                self._connection = self._connect(self._folder)
            self._ask({"op": "hello", "launch": self._launch})
        return self._connection is not None

    def take(self, size: int, count: int) -> list[int]:
        """Descriptors of at most `count` chunks of `size` bytes, the caller's to close."""
        found: list[int] = []
        while len(found) < count:
            answer, came = self._ask({"op": "take", "wanted": {str(size): count - len(found)}})
            if answer.get("sizes") != [size] * len(came):  # some got lost, or are not what was asked for
                _close(came)
                break
            found += came
            if not came or not answer.get("more"):
                break
        return found

    def give(self, size: int, descriptors: Sequence[int]) -> int:
        """Hand over chunks of `size` bytes and close our descriptors; how many are kept."""
        kept = 0
        for start in range(0, len(descriptors), MOST_DESCRIPTORS):
            part = descriptors[start : start + MOST_DESCRIPTORS]
            answer, _ = self._ask({"op": "give", "sizes": [size] * len(part)}, part)
            told = answer.get("kept")
            kept += told if isinstance(told, int) else 0
        _close(descriptors)
        return kept

    def note_lent(self, size: int) -> None:
        """Write down how many bytes of others' memory are mapped here: NVML names nobody for them.

        In a file of our own, FOLDER/GPU.lent-PID, which counts for as long as this process lives.
        """
        if self._folder is None or size == self._lent:
            return
        with contextlib.suppress(OSError, ValueError, IndexError):
            check_folder(self._folder)
            word = {**identity(), "bytes": size}
            path = os.path.join(self._folder, f"{self._gpu}.lent-{os.getpid()}")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.pwrite(descriptor, json.dumps(word).encode().ljust(WORD_SIZE), 0)
            finally:
                os.close(descriptor)
            self._lent = size

    def shrink(self) -> bool:
        """Have it give all that is free to the driver; whether there was any."""
        was_free = self._ask({"op": "state"})[0].get("free_bytes")
        self._ask({"op": "shrink", "to_bytes": 0})
        return bool(was_free)

    def _connect(self, folder: str) -> socket.socket:
        """Raises OSError, also where another user could be at the other end."""
        check_folder(folder)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(os.path.join(folder, f"{self._gpu}.sock"))
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", peer)[1] != os.geteuid():
                raise PermissionError(folder)
        except OSError:
            connection.close()
            raise
        return connection

    def _ask(
        self, request: dict[str, Any], descriptors: Sequence[int] = ()
    ) -> tuple[dict[str, Any], list[int]]:
        """Its answer with descriptors; an empty one, and no connection from then on, if there is none."""
        if self._connection is None:
            return {}, []
        came: list[int] = []
        began = time.monotonic()
        try:
            self._connection.settimeout(max(0.001, self._patience))
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
            self._connection.sendmsg([json.dumps(request).encode()], rights if descriptors else [])
            data, came, flags, _ = socket.recv_fds(
                self._connection, MOST_BYTES, MOST_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
            answer = json.loads(data)
            if isinstance(answer, dict) and "error" not in answer and not flags & socket.MSG_TRUNC:
                return answer, came
        except (OSError, ValueError, RecursionError):
            pass
        finally:
            self._patience -= time.monotonic() - began
        _close(came)
        self._connection.close()
        self._connection = None
        return {}, []


def check_folder(folder: str) -> None:
    """Raises OSError unless it is a folder of ours that nobody else may enter."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise PermissionError(folder)


def identity() -> dict[str, Any]:
    """This process by pid, start time in clock ticks since boot, and boot, which no later process shares."""
    with open("/proc/self/stat", "rb") as file:
        known: dict[str, Any] = {
            "pid": os.getpid(),
            "start": int(file.read().rpartition(b")")[2].split()[19]),
        }
    with open("/proc/sys/kernel/random/boot_id", "rb") as file:
        known["boot"] = file.read(8).decode("ascii", "replace")
    return known


def _close(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
