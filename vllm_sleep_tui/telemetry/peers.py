"""Whose program is at the other end of a connection on this machine, from what the kernel says."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass

LISTENING = "0A"
TIME_WAIT = "06"
ESTABLISHED = 1
"""States in /proc/net/tcp and of TCP_INFO (Linux, include/net/tcp_states.h)."""
Address = tuple[str, int]


@dataclass(frozen=True, slots=True)
class _Row:
    local: Address
    remote: Address
    state: str
    user: int
    inode: int


def is_here(connection: socket.socket) -> bool:
    """Whether both ends are on this machine, as far as the addresses tell."""
    if connection.family == socket.AF_UNIX:
        return True
    own, other = _address(connection.getsockname()), _address(connection.getpeername())
    return own[0] == other[0] or ipaddress.ip_address(other[0]).is_loopback


def user_at_other_end(connection: socket.socket) -> int | None:
    """The number of the user who has the other end of a fresh connection; None if it cannot be seen.

    Of one that no program has taken up yet, the user who listens for it. So whoever may hear what is sent
    next is seen now, and nobody can hand the port on in between. Raises OSError if the other end is gone.
    """
    if connection.family == socket.AF_UNIX:
        # What the listener was when it began to listen.
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return int(user)
    user = _user_in_tables(connection)
    if user is None and connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != ESTABLISHED:
        # It was not hidden: it ended between our connecting and the look.
        raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
    return user


def _user_in_tables(connection: socket.socket) -> int | None:
    own, other = _address(connection.getsockname()), _address(connection.getpeername())
    rows = [row for table in ("tcp", "tcp6") for row in _rows(table, other[1])]
    ends = [row for row in rows if (row.local, row.remote) == (other, own) and row.state != TIME_WAIT]
    if not ends:
        return None
    if ends[0].inode:
        return ends[0].user
    listeners = {row.local[0]: row.user for row in rows if row.state == LISTENING}
    # The kernel gives a connection to who names the address before those who take every address.
    return next((listeners[name] for name in (other[0], "0.0.0.0", "::") if name in listeners), None)


def _rows(table: str, port: int) -> Iterator[_Row]:
    """The sockets of the port; none if the kernel does not show them."""
    try:
        with open(f"/proc/net/{table}", "rb") as file:
            text = file.read().decode("ascii")
    except OSError:
        return
    ending = f":{port:04X}"
    for line in text.splitlines()[1:]:
        fields = line.split(None, 10)
        if fields[1].endswith(ending):
            yield _Row(_parsed(fields[1]), _parsed(fields[2]), fields[3], int(fields[7]), int(fields[9]))


def _parsed(text: str) -> Address:
    """An address of the table: hexadecimal words in the machine's own byte order, then the port."""
    words, _, port = text.partition(":")
    packed = b"".join(
        int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8)
    )
    return _plain(ipaddress.ip_address(packed)), int(port, 16)


def _address(name: tuple[str, int]) -> Address:
    """An address as Python gives it; IPv6 ones have more fields."""
    return _plain(ipaddress.ip_address(name[0].partition("%")[0])), name[1]


def _plain(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str:
    """IPv4 as such, even where an IPv6 socket carries it."""
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)
