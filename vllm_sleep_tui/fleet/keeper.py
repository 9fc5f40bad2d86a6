"""The keeper: one small process per server, its parent for life (standard library only).

It is run as a file, apart from the package: ``python -I -S keeper.py``, with what to keep as JSON on stdin:
argv, env, cwd, launch, log, log_bytes, lock (the keeper's own file), tmp_dir, grace.

It holds a flock on its file for as long as it lives; that is the proof that it lives. SIGTERM asks it to
stop the server, SIGINT to kill it at once. When the server ends, for whatever reason, it ends what is left
of the group before it says so. If the keeper itself is killed, the kernel ends the API server with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

WORD_SIZE = 2048
"""The keeper's file is one padded write of this size, so that no reader sees half of it."""
GENERATIONS = 3
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TERM_AGAIN_SECONDS = 1.0
"""vLLM swallows one SIGTERM while it starts (0.32); the second ends it."""
TRACKER_SECONDS = 2.0
"""After an orderly exit the resource tracker needs a moment to clear /dev/shm."""


class Log:
    """The server's log file: capped, a few generations kept; a full disk loses lines, never the server."""

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit, self.size = path, limit, 0
        self.file: Any = None
        self.rotate()

    def rotate(self) -> None:
        """Begin a new file, the old ones one generation older."""
        with contextlib.suppress(OSError):
            if self.file:
                self.file.close()
            for age in range(GENERATIONS - 1, 0, -1):
                older = f"{self.path}.{age}"
                newer = f"{self.path}.{age - 1}" if age > 1 else self.path
                if os.path.exists(newer):
                    os.replace(newer, older)
        self.file, self.size = None, 0
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            self.file = os.fdopen(descriptor, "wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Append; drops the data if the disk refuses."""
        if self.size + len(data) > self.limit or self.file is None:
            self.rotate()
        if self.file is not None:
            with contextlib.suppress(OSError):
                self.file.write(data)
                self.size += len(data)


class Keeper:
    """Keeps one server."""

    def __init__(self, order: dict[str, Any], lock: int, log: Log) -> None:
        self.order, self.lock, self.log = order, lock, log
        self.word: dict[str, Any] = {"launch": order["launch"], "keeper": identity(os.getpid())}
        self.asked_at: float | None = None
        self.terms = 0
        self.kill = False

    def say(self, **more: Any) -> None:
        """Write what is known into the keeper's file, in one write."""
        self.word.update(more)
        with contextlib.suppress(OSError):
            os.pwrite(self.lock, json.dumps(self.word).encode().ljust(WORD_SIZE), 0)

    def run(self, report: int) -> None:
        """Start the server, tell the launcher through `report`, and stay until the group is gone."""
        woken = self.heed_signals()  # before anybody can read whom to signal
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            self.server = subprocess.Popen(
                self.order["argv"],
                env=self.order["env"],
                cwd=self.order["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                start_new_session=True,
                preexec_fn=prepare_child,
            )
        except OSError as error:
            self.say(error=error.strerror, exit={"code": None, "asked": False, "at": time.time()})
            tell(report, self.word)
            return
        finally:
            os.close(writer)
        self.say(server=identity(self.server.pid))
        tell(report, self.word)
        os.close(report)  # the launcher waits for that; a keeper without a server hangs up by its end
        self.watch(reader, woken)

    def heed_signals(self) -> int:
        """Begin to heed signals; a pipe that becomes readable with each."""
        reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGTERM, self.on_term)
        signal.signal(signal.SIGINT, self.on_kill)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        return reader

    def watch(self, reader: int, woken: int) -> None:
        """Copy the log and do what signals ask for until the server exits, then end its group."""
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        poll.register(reader, select.POLLIN)
        while not self.server_exited():
            for descriptor, _ in poll.poll(self.escalate()):
                if descriptor == woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
                elif not self.copy(reader):
                    poll.unregister(reader)
        self.end_group()
        os.set_blocking(reader, False)
        while self.copy(reader):
            pass
        shutil.rmtree(self.order["tmp_dir"], ignore_errors=True)
        self.say(exit={"code": self.server.returncode, "asked": self.asked_at is not None, "at": time.time()})

    def copy(self, reader: int) -> bool:
        """Move what the server said to the log; False once there is no more to come."""
        try:
            data = os.read(reader, 65536)
        except BlockingIOError:
            return False
        self.log.write(data)
        return bool(data)

    def on_term(self, *_: object) -> None:
        """SIGTERM: stop the server, kindly at first."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()
            self.say(asked=True)

    def on_kill(self, *_: object) -> None:
        """SIGINT: end the group now."""
        self.on_term()
        self.kill = True

    def escalate(self) -> int | None:
        """Do what a requested stop needs by now; milliseconds until the next step, None if none is due."""
        if self.asked_at is None:
            return None
        elapsed = time.monotonic() - self.asked_at
        if self.kill or elapsed >= self.order["grace"]:
            self.signal_group(signal.SIGKILL)
            return 100
        if elapsed >= self.terms * TERM_AGAIN_SECONDS:
            self.terms += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.server.pid, signal.SIGTERM)
        return 100

    def server_exited(self) -> bool:
        """Whether the API server has ended; it is not reaped yet, so that its group number stays ours."""
        return os.waitid(os.P_PID, self.server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def signal_group(self, number: int) -> None:
        """Signal the server's process group, which is ours while its leader is not reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.server.pid, number)

    def end_group(self) -> None:
        """End every descendant: the group, and what left it for a session of its own."""
        deadline = time.monotonic() + (TRACKER_SECONDS if self.asked_at is not None and not self.kill else 0)
        while time.monotonic() < deadline and self.descendants_left():
            time.sleep(0.02)
        self.signal_group(signal.SIGKILL)
        self.server.wait()
        while children := self.descendants_left():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def descendants_left(self) -> list[int]:
        """Our children besides the server, after reaping the dead: as subreaper we inherit all orphans."""
        left = []
        for pid in children_of(os.getpid()):
            if pid == self.server.pid:
                continue
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    left.append(pid)
        return left


def tell(report: int, word: dict[str, Any]) -> None:
    """Answer the launcher; one that died meanwhile must not take the server along."""
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(word).encode())


def identity(pid: int) -> dict[str, int]:
    """A process by pid and start time in clock ticks since boot, which no later process shares."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        return {"pid": pid, "start": int(file.read().rpartition(b")")[2].split()[19])}


def children_of(parent: int) -> list[int]:
    """The pids whose parent is `parent`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
                if int(file.read().rpartition(b")")[2].split()[1]) == parent:
                    found.append(int(entry))
    return found


def prctl(option: int, value: int) -> None:
    """Linux's prctl(2) with one argument."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def prepare_child() -> None:
    """In the server before exec: die with the keeper, and heed signals that our starter may have ignored."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def take_lock(path: str) -> int:
    """The keeper's file, locked for life; raises BlockingIOError while another keeper lives."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for attempt in range(50):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:  # a reader tests the lock for an instant
            if attempt == 49:
                raise
            time.sleep(0.02)
    raise AssertionError


def main() -> None:
    """Read the order, leave the launcher's side, keep the server."""
    order = json.load(sys.stdin)
    report = os.dup(1)
    os.set_inheritable(report, False)
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        lock = take_lock(order["lock"])
        # Room for what it will say: a server whose keeper cannot be heard counts as dead.
        os.pwrite(lock, b"".ljust(WORD_SIZE), 0)
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        tell(report, {} if busy else {"error": error.strerror})
        return
    keeper = Keeper(order, lock, Log(order["log"], order["log_bytes"]))
    keeper.run(report)


if __name__ == "__main__":
    main()
