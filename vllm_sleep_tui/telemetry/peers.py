"""Whose program is at the other end of a connection on this machine, from what the kernel says."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import struct

from vllm_sleep_tui.telemetry import kernel

ESTABLISHED = 1
"""State of TCP_INFO (Linux, include/net/tcp_states.h)."""


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
    rows = list(kernel.sockets(other[1]))
    ends = [row for row in rows if (row.local, row.remote) == (other, own) and row.state != kernel.TIME_WAIT]
    if not ends:
        return None
    if ends[0].inode:
        return ends[0].user
    listeners = {row.local[0]: row.user for row in rows if row.state == kernel.LISTENING}
    # The kernel gives a connection to who names the address before those who take every address.
    return next((listeners[name] for name in (other[0], "0.0.0.0", "::") if name in listeners), None)


def _address(name: tuple[str, int]) -> kernel.Address:
    """An address as Python gives it; IPv6 ones have more fields."""
    return kernel.plain_address(ipaddress.ip_address(name[0].partition("%")[0])), name[1]
