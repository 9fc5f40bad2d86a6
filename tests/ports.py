"""Ports that no other test of this run is given, nor the kernel to whoever connects somewhere."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Iterator


def hand_out_ports() -> Iterator[int]:
    """Free loopback ports below those that the kernel gives to outgoing connections, each once a process."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    ports = list(range(10_000 + worker % 20 * 1_000, 11_000 + worker % 20 * 1_000))
    random.Random(os.getpid()).shuffle(ports)
    for port in ports:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


PORTS = hand_out_ports()
