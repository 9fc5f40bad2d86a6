"""Who is at the other end, where the other end does not stay."""

from __future__ import annotations

import socket

import pytest

from vllm_sleep_tui.telemetry.peers import user_at_other_end


def connected() -> tuple[socket.socket, socket.socket, socket.socket]:
    listener = socket.create_server(("127.0.0.1", 0))
    near = socket.create_connection(listener.getsockname())
    far, _ = listener.accept()
    return listener, near, far


def test_a_peer_that_ended_and_left_no_listener_is_a_broken_connection_not_a_hidden_user() -> None:
    listener, near, far = connected()
    with listener, near, far:
        listener.close()
        far.close()
        with pytest.raises(ConnectionResetError):
            user_at_other_end(near)


def test_a_listener_that_ended_before_it_took_the_connection_is_a_broken_one() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
    with near, pytest.raises(OSError, match="not connected"):
        user_at_other_end(near)
