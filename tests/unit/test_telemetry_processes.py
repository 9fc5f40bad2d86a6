"""Processes and ports as the kernel shows them, with real processes and sockets."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from vllm_sleep_tui.telemetry import processes
from vllm_sleep_tui.telemetry.processes import Memory, ProcessId, ProcessTable

MIB = 1 << 20


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


@contextmanager
def python(
    code: str, *arguments: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A Python process; the code prints a line when it is ready and ends when its input closes."""
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.kill()
        process.wait()


WAIT = "import sys; print(flush=True); sys.stdin.read()"
FAMILY = """
import sys
from subprocess import PIPE, Popen
child = Popen([sys.executable, "-S", "-c", %r], stdin=PIPE, stdout=PIPE, text=True)
child.stdout.readline()
print(flush=True)
sys.stdin.read()
child.stdin.close()
child.wait()
"""


def identity(pid: int) -> ProcessId:
    start = processes.start_ticks(pid)
    assert start is not None
    return ProcessId(pid, start)


def test_a_running_process_is_alive_and_a_dead_one_is_not() -> None:
    with python(WAIT) as process:
        this = identity(process.pid)
        assert processes.is_alive(this)
    assert not processes.is_alive(this)
    assert processes.start_ticks(process.pid) is None


def test_another_process_under_the_same_pid_is_not_taken_for_it() -> None:
    with python(WAIT) as process:
        other = ProcessId(process.pid, identity(process.pid).start - 1)
        assert not processes.is_alive(other)
        assert not processes.signal_process(other, signal.SIGKILL)
        assert process.poll() is None


def test_a_zombie_is_not_alive_and_takes_no_signal() -> None:
    with python(WAIT) as process:
        this = identity(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert processes.start_ticks(process.pid) == this.start
        assert not processes.is_alive(this)
        assert not processes.signal_process(this, signal.SIGTERM)


def test_a_process_that_was_asked_after_again_and_again_is_seen_to_end() -> None:
    with python(WAIT) as process:
        this = identity(process.pid)
        assert [processes.is_alive(this) for _ in range(5)] == [True] * 5
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert [processes.is_alive(this) for _ in range(3)] == [False] * 3
    assert not processes.is_alive(this)


def test_asking_after_many_that_are_gone_holds_no_descriptors() -> None:
    own = identity(os.getpid())
    before = len(os.listdir("/proc/self/fd"))
    for start in range(1, 400):
        gone = ProcessId(own.pid, own.start - start)
        assert [processes.is_alive(gone) for _ in range(3)] == [False] * 3
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_signal_reaches_the_process() -> None:
    with python(WAIT) as process:
        assert processes.signal_process(identity(process.pid), signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


def test_a_signal_reaches_only_this_very_process_where_the_kernel_has_no_pidfd() -> None:
    with python(WAIT) as process:
        this = identity(process.pid)
        assert not processes._signal_by_pid(ProcessId(this.pid, this.start - 1), signal.SIGKILL)
        assert processes._signal_by_pid(this, signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
        assert not processes._signal_by_pid(this, signal.SIGTERM)


def test_a_name_with_brackets_and_spaces_does_not_shift_the_fields() -> None:
    code = "open('/proc/self/comm', 'w').write('a) Z 1 (b'); " + WAIT
    with python(code) as process, open(f"/proc/{process.pid}/stat") as file:
        assert "(a) Z 1 (b)" in file.read()
        assert processes.is_alive(identity(process.pid))
        assert ProcessTable.read().parents[process.pid] == os.getpid()


def test_descendants_reach_grandchildren_parents_first() -> None:
    with python(FAMILY % (FAMILY % WAIT)) as process:
        child, grandchild = ProcessTable.read().descendants(process.pid)
        table = ProcessTable.read()
        assert table.parents[child] == process.pid
        assert table.parents[grandchild] == child
        assert table.descendants(process.pid, stop_at=frozenset({child})) == ()
        assert table.id_of(child) == identity(child)
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(60)


def test_a_table_read_on_from_an_earlier_one_equals_a_fresh_one_for_a_family_that_changed() -> None:
    with python(WAIT) as gone:
        before = ProcessTable.read()
        assert gone.pid in before
    with python(FAMILY % WAIT) as process:
        table = ProcessTable.read(before)
        assert gone.pid not in table
        assert table.descendants(process.pid) == ProcessTable.read().descendants(process.pid) != ()
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(60)


def test_a_child_that_outlives_its_parent_is_found_under_its_new_one() -> None:
    code = "import os, sys; child = os.fork(); child and print(child, flush=True); sys.stdin.read()"
    with python(code) as process:
        (child,) = ProcessTable.read().descendants(process.pid)
        this = identity(child)
        before = ProcessTable.read()
        process.kill()
        process.wait()
        table = ProcessTable.read(before)
        assert processes.is_alive(this)
        assert table.parents[child] == ProcessTable.read().parents[child] != process.pid
    wait_for(lambda: not processes.is_alive(this))


def test_private_and_shared_memory_are_told_apart() -> None:
    code = (
        "import mmap; a = mmap.mmap(-1, 32 << 20); a.write(b'x' * (32 << 20));"
        "b = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE); b.write(b'y' * (16 << 20)); " + WAIT
    )
    with python(WAIT) as small, python(code) as large:
        empty, full = processes.memory(small.pid), processes.memory(large.pid)
        assert isinstance(empty, Memory)
        assert isinstance(full, Memory)
        assert 32 * MIB <= full.pinned_bytes - empty.pinned_bytes < 34 * MIB
        assert 16 * MIB <= full.private_bytes - empty.private_bytes < 100 * MIB


def test_what_is_gone_has_no_memory_user_or_command() -> None:
    with python(WAIT) as process:
        pass
    assert processes.memory(process.pid) is None
    assert processes.user_of(process.pid) is None
    assert processes.command_of(process.pid) is None
    assert not processes.environment_has(process.pid, "HOME", os.environ.get("HOME", ""))


def test_the_user_is_named() -> None:
    assert processes.user_of(os.getpid()) == pwd.getpwuid(os.getuid()).pw_name


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--api-key", "s3cret", "s3cret2", "--port", "8000"], "--api-key *** --port 8000"),
        (["--api-key=s3cret", "x"], "--api-key *** x"),
        (["--hf-token", "s3cret"], "--hf-token ***"),
        (["HF_TOKEN=s3cret", "vllm"], "HF_TOKEN=*** vllm"),
        (["-H", "Authorization: Bearer s3cret"], "-H Authorization: Bearer ***"),
        (["http://me:s3cret@host/x"], "http://***@host/x"),
        (["hf_s3crets3cret"], "***"),
        (['{"api_key": "s3cret"}', "x"], '{"api_key": *** x'),
        (
            ["--max-num-batched-tokens", "8192", "--tokenizer", "t"],
            "--max-num-batched-tokens 8192 --tokenizer t",
        ),
        (["\x1b]0;title\x07\x1b[31mred\x1b[0m\r\nnext\x9b"], "red next"),
    ],
)
def test_a_command_is_shown_without_secrets_and_escapes(arguments: list[str], shown: str) -> None:
    with python(WAIT, *arguments) as process:
        command = processes.command_of(process.pid)
        assert command is not None
        assert command.endswith(f"sys.stdin.read() {shown}")
        assert "s3cret" not in command


def test_a_long_command_is_cut() -> None:
    with python(WAIT, "x" * 1000) as process:
        command = processes.command_of(process.pid)
        assert command is not None
        assert len(command) == processes.MAX_COMMAND
        assert command.endswith("x…")


def test_the_environment_is_compared_exactly() -> None:
    with python(WAIT, environment={"LAUNCH": "abc"}) as process:
        assert processes.environment_has(process.pid, "LAUNCH", "abc")
        assert not processes.environment_has(process.pid, "LAUNCH", "ab")
        assert not processes.environment_has(process.pid, "AUNCH", "abc")


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "::", "::1", "::ffff:127.0.0.1"])
def test_the_listener_of_a_port_is_found_on_every_address_that_takes_loopback(
    address: str, free_port: Callable[[], int]
) -> None:
    port = free_port()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as server:
        server.bind((address, port))
        assert processes.holder_of_port(port) is None, "bound is not listening"
        server.listen()
        assert processes.listens(port, [os.getpid()])
        holder = processes.holder_of_port(port)
        assert holder is not None
        assert holder.process == identity(os.getpid())
        assert holder.user == processes.user_of(os.getpid())
        assert holder.command == processes.command_of(os.getpid())
        assert not processes.listens(port, [os.getppid()])
    assert processes.holder_of_port(port) is None
    assert not processes.listens(port, [os.getpid()])


def test_a_child_that_inherited_the_socket_does_not_hide_the_process_that_opened_it(
    free_port: Callable[[], int],
) -> None:
    port = free_port()
    code = (
        "import os, socket, sys\n"
        "s = socket.create_server(('127.0.0.1', int(sys.argv[1])))\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True)\n"
        "sys.stdin.read()\n"
        "if child: os.waitpid(child, 0)"
    )
    with python(code, str(port)) as process:
        (child,) = ProcessTable.read().descendants(process.pid)
        assert processes.listens(port, [child])
        holder = processes.holder_of_port(port)
        assert holder is not None
        assert holder.process == identity(process.pid)
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(60)
