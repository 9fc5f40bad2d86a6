"""The engine's side of the KV pool: chunks of simulated GPU memory as descriptors, from and to a real holder.

Whatever goes wrong with the holder, or with what it lends, costs the simulated seconds and nothing else.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sleep_tui.simulator import devices

FOLDER_VARIABLE = "VLLM_SLEEP_TUI_POOL"
LAUNCH_VARIABLE = "SLEEP_TUI_LAUNCH"
CHUNK = 1 << 30
"""Bytes; what a cache holds beyond whole chunks is made privately each time."""
PATIENCE = 0.2
"""Seconds for the holder's answer."""
MOST_DESCRIPTORS = 200
LOAN_SIZE = 256
MOST_BYTES = 1 << 16


class Pool:
    """One engine's chunks on one GPU, and its connection to the GPU's holder."""

    def __init__(
        self, devices_folder: Path, gpu: devices.SimulatedGpu, environment: Mapping[str, str]
    ) -> None:
        self._devices = devices_folder
        self._gpu = gpu
        self._folder = environment.get(FOLDER_VARIABLE)
        self._launch = environment.get(LAUNCH_VARIABLE, "")
        self._socket: socket.socket | None = None
        self._mine: dict[int, devices.Chunk] = {}
        """Mapped chunks by descriptor."""

    @property
    def mapped(self) -> int:
        """Bytes that are mapped."""
        return sum(chunk.bytes for chunk in self._mine.values())

    def fill(self, size: int, *, stale: bool = False) -> tuple[int, int]:
        """Map `size` bytes in whole chunks, from the pool as far as it goes: bytes mapped, of them new ones.

        `stale`: the first one that is lent cannot be mapped. Fewer bytes than asked: the GPU is full.
        """
        wanted = (size - self.mapped) // CHUNK
        for descriptor in self._take(wanted):
            chunk = devices.chunk_of(self._devices, descriptor)
            if chunk is None or chunk.gpu != self._gpu.index or chunk.bytes != CHUNK or stale:
                os.close(descriptor)
                stale = False
            else:
                self._mine[descriptor] = chunk
        created = 0
        while self.mapped + CHUNK <= size:
            try:
                descriptor, chunk = devices.create_chunk(self._devices, self._gpu.index, CHUNK)
            except devices.OutOfMemory:
                break
            self._mine[descriptor] = chunk
            created += CHUNK
        self._tell()
        return self.mapped, created

    def hand_over(self) -> None:
        """Give all chunks to the holder, or to the driver where nobody takes them."""
        own = [chunk for chunk in self._mine.values() if chunk.pid == os.getpid()]
        devices.disown_chunks(self._devices, own)
        given = list(self._mine.items())
        self._mine.clear()
        self._tell()
        for start in range(0, len(given), MOST_DESCRIPTORS):
            part = given[start : start + MOST_DESCRIPTORS]
            self._ask({"op": "give", "sizes": [chunk.bytes for _, chunk in part]}, [each for each, _ in part])
        for descriptor, _ in given:
            os.close(descriptor)

    def _take(self, count: int) -> list[int]:
        """Descriptors of up to `count` chunks."""
        lent: list[int] = []
        while len(lent) < count:
            answer, descriptors = self._ask({"op": "take", "wanted": {str(CHUNK): count - len(lent)}})
            lent += descriptors
            if not answer.get("more"):
                break
        return lent

    def _tell(self) -> None:
        """Say what we have that the driver lists for nobody, in a file that needs no holder."""
        if self._folder is None:
            return
        own = {
            "pid": os.getpid(),
            "start": devices.start_ticks(os.getpid()),
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text()[:8],
            "bytes": sum(chunk.bytes for chunk in self._mine.values() if chunk.pid != os.getpid()),
        }
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError):
            file = os.open(f"{self._folder}/{self._gpu.uuid}.lent-{os.getpid()}", flags, 0o600)
            os.pwrite(file, json.dumps(own).encode().ljust(LOAN_SIZE), 0)
            os.close(file)

    def _ask(
        self, request: Mapping[str, Any], descriptors: list[int] | None = None
    ) -> tuple[dict[str, Any], list[int]]:
        """The holder's answer; an empty one where there is no holder, and then the connection is dropped."""
        try:
            connection = self._connected()
            return _exchange(connection, request, descriptors or []) if connection else ({}, [])
        except (OSError, ValueError):
            self._hang_up()
            return {}, []

    def _connected(self) -> socket.socket | None:
        if self._socket is None and self._folder is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.settimeout(PATIENCE)
            self._socket.connect(f"{self._folder}/{self._gpu.uuid}.sock")
            _exchange(self._socket, {"op": "hello", "launch": self._launch}, [])
        return self._socket

    def _hang_up(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.close()
        self._socket = None


def _exchange(
    connection: socket.socket, request: Mapping[str, Any], descriptors: list[int]
) -> tuple[dict[str, Any], list[int]]:
    """One request and its answer; raises OSError or ValueError if there is none."""
    socket.send_fds(connection, [json.dumps(request).encode()], descriptors)
    space = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(MOST_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    lent = array.array("i")
    for _, _, content in ancillary:
        lent.frombytes(content[: len(content) // lent.itemsize * lent.itemsize])
    try:
        answer = json.loads(data)
        if not isinstance(answer, dict) or "error" in answer:
            raise ValueError(data)
    except ValueError:
        for descriptor in lent:
            os.close(descriptor)
        raise
    return answer, list(lent)
