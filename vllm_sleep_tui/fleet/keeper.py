"""The keeper: one small process per server, its parent for life (standard library only).

It is run as a file, apart from the package: ``python -I -S keeper.py``, with what to keep as JSON on stdin:
argv, env, cwd, launch, mark (words that the API server's command line holds), log, log_bytes, lock (the
keeper's own file), tmp_dir, grace.

It holds a flock on its file for as long as it lives; that is the proof that it lives. SIGTERM asks it to
stop the server, SIGINT to kill it at once. When the server ends, for whatever reason, it ends what is left
of the group before it says so. If the keeper itself is killed, the kernel ends its child, the API server or
what wraps it, at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from typing import Any

WORD_SIZE = 4096
"""The keeper's file is one padded write of this size, so that no reader sees half of it."""
MOST_ENGINES = 40
"""So many that hide their launch find room there."""
GENERATIONS = 3
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
TERM_AGAIN_SECONDS = 1.0
"""vLLM swallows one SIGTERM while it starts (0.32); the second ends it."""
TRACKER_SECONDS = 2.0
"""After an orderly exit the resource tracker needs a moment to clear /dev/shm."""
FRESH_SECONDS = 3600.0
"""Cleaners of /tmp wait for days."""
LOOK_SECONDS = 0.2
"""At least, between two looks for engines; a tenth of the server's age once that is more."""


class Log:
    """The server's log file: capped, a few generations kept; a full disk loses lines, never the server.

    A person may cut or remove it meanwhile: what is said next stands at its new end, or in a new file.
    """

    def __init__(self, path: str, limit: int) -> None:
        self.path, self.limit = path, limit
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
        self.file = None
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC
        with contextlib.suppress(OSError):
            self.file = os.fdopen(open_regular(self.path, flags), "wb", buffering=0)

    def write(self, data: bytes) -> None:
        """Append; drops the data if the disk refuses."""
        with contextlib.suppress(OSError):
            if self.file is None or self.is_over(len(data)):
                self.rotate()
            if self.file is not None:
                self.file.write(data)

    def is_over(self, more: int) -> bool:
        """Whether the file is full with `more` bytes, or has no name any longer."""
        now = os.fstat(self.file.fileno())
        return now.st_nlink == 0 or now.st_size + more > self.limit


class Keeper:
    """Keeps one server."""

    def __init__(self, order: dict[str, Any], lock: int, log: Log) -> None:
        self.order, self.lock, self.log = order, lock, log
        self.word: dict[str, Any] = {"launch": order["launch"], "keeper": identity(os.getpid())}
        self.began = time.monotonic()
        self.fresh_until = self.began + FRESH_SECONDS
        self.look_at: float | None = None
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
            child = subprocess.Popen(
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
        self.pid = child.pid
        self.say(server=identity(self.pid))
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
        while not self.server_exited() or self.goes_on():
            for descriptor, _ in poll.poll(self.next_step()):
                if descriptor == woken:
                    with contextlib.suppress(BlockingIOError):
                        os.read(woken, 4096)
                elif not self.copy(reader):
                    poll.unregister(reader)
        code = self.end_group()
        os.set_blocking(reader, False)
        while self.copy(reader):
            pass
        shutil.rmtree(self.order["tmp_dir"], ignore_errors=True)
        self.say(exit={"code": code, "asked": self.asked_at is not None, "at": time.time()})

    def copy(self, reader: int) -> bool:
        """Move what the server said to the log; False once there is no more to come."""
        try:
            data = os.read(reader, 65536)
        except BlockingIOError:
            return False
        self.log.write(data)
        if self.look_at is None:  # who is silent has no new engines
            now = time.monotonic()
            self.look_at = now + max(LOOK_SECONDS, (now - self.began) / 10)
        return bool(data)

    def next_step(self) -> int:
        """Do what is due by now; milliseconds until the next step."""
        steps = (self.escalate(), self.note_engines(), self.freshen())
        return min(step for step in steps if step is not None)

    def freshen(self) -> int:
        """Mark the server's folder as used, once an hour; milliseconds until the next time."""
        if time.monotonic() >= self.fresh_until:
            keep_fresh(self.order["tmp_dir"])
            self.fresh_until = time.monotonic() + FRESH_SECONDS
        return 1 + int((self.fresh_until - time.monotonic()) * 1000)

    def note_engines(self) -> int | None:
        """Write down who below us hides its launch, as engines do: their only proof once we are gone."""
        if self.look_at is None:
            return None
        left = self.look_at - time.monotonic()
        if left > 0:
            return 1 + int(left * 1000)
        self.look_at = None
        mark = f"={self.order['launch']}".encode()
        hidden = []
        for pid in below(os.getpid(), parents()):
            with contextlib.suppress(OSError):
                if not any(word.endswith(mark) for word in words_of(pid, "environ")):
                    hidden.append(identity(pid))
        if hidden[:MOST_ENGINES] != self.word.get("engines", []):
            self.say(engines=hidden[:MOST_ENGINES])
        return None

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
            self.signal_below(self.api_server(), signal.SIGTERM)
        return 100

    def signal_below(self, pid: int, number: int) -> None:
        """Signal a process below us, unless its number is another's by now: a wrapper may have reaped it."""
        handle = None
        try:
            with contextlib.suppress(AttributeError, OSError):  # none before Linux 5.3 or in a sandbox
                handle = os.pidfd_open(pid)
            if pid not in below(os.getpid(), parents()):  # the handle's own, if it was ours at all
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if handle is None:
                    os.kill(pid, number)
                else:
                    signal.pidfd_send_signal(handle, number)
        finally:
            if handle is not None:
                os.close(handle)

    def api_server(self) -> int:
        """Whom to ask for an orderly end: the last in a row of programs whose command lines hold `mark`.

        Our child may be a script that does not `exec` vLLM: a shell dies of SIGTERM and leaves the API server
        to be killed. Nor is the group asked: vLLM's workers break off what they do, and the engine calls that
        a failure. They are told by their names without the words, a fork by words equal to its parent's.
        """
        found, table = self.pid, parents()
        while True:
            own = words_of(found, "cmdline")
            held = {pid: words_of(pid, "cmdline") for pid in below(found, table)}
            last = next((pid for pid, words in held.items() if words != own and self.has_mark(words)), None)
            if last is None:
                return found
            found = last

    def has_mark(self, words: list[bytes]) -> bool:
        """Whether a command line is the API server's, or of something that passes it on."""
        mark = [word.encode() for word in self.order["mark"]]
        starts = range(len(words) - len(mark) + 1)
        return bool(mark) and any(words[at : at + len(mark)] == mark for at in starts)

    def server_exited(self) -> bool:
        """Whether our child has ended; it is not reaped yet, so that its group number stays ours."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def goes_on(self) -> bool:
        """Whether the API server lives on though our child has ended: then that is our child from now on.

        `setsid` forks where it is asked to lead, and a wrapper may be killed alone.
        """
        for pid in children_of(os.getpid()):
            if pid != self.pid and self.has_mark(words_of(pid, "cmdline")):
                os.waitpid(self.pid, 0)
                self.pid = pid
                self.say(server=identity(pid))
                return True
        return False

    def signal_group(self, number: int) -> None:
        """Signal the server's process group, which is ours while our child, one of it, is not reaped."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            group = os.getpgid(self.pid)
            if group != os.getpgrp():
                os.killpg(group, number)

    def end_group(self) -> int:
        """End every descendant, also what left for a session of its own; our child's exit code."""
        deadline = time.monotonic() + (TRACKER_SECONDS if self.asked_at is not None and not self.kill else 0)
        while time.monotonic() < deadline and self.descendants_left():
            time.sleep(0.02)
        self.signal_group(signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        while children := self.descendants_left():
            for pid in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(status)

    def descendants_left(self) -> list[int]:
        """Our children besides the server, after reaping the dead: as subreaper we inherit all orphans."""
        left = []
        for pid in children_of(os.getpid()):
            if pid == self.pid:
                continue
            with contextlib.suppress(ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0):
                    left.append(pid)
        return left


def tell(report: int, word: dict[str, Any]) -> None:
    """Answer the launcher; one that died meanwhile must not take the server along."""
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(word).encode())


def identity(pid: int) -> dict[str, Any]:
    """A process by pid, start time in clock ticks since boot, and boot, which no later process shares."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        known: dict[str, Any] = {"pid": pid, "start": int(file.read().rpartition(b")")[2].split()[19])}
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as file:
        known["boot"] = file.read(8).decode("ascii", "replace")
    return known


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{entry}/stat", "rb") as file:
                found[int(entry)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def children_of(parent: int) -> list[int]:
    """The pids whose parent is `parent`."""
    return [pid for pid, above in parents().items() if above == parent]


def below(top: int, table: dict[int, int]) -> list[int]:
    """The pids below `top`, parents first."""
    found = [top]
    for pid in found:
        found += [child for child, above in table.items() if above == pid]
    return found[1:]


def words_of(pid: int, what: str) -> list[bytes]:
    """A process's `cmdline` or `environ`, word by word; empty if it is gone or hides it."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/{what}", "rb") as file:
        return file.read().split(b"\0")
    return []


def open_regular(path: str, flags: int) -> int:
    """Open or make a file of ours; raises OSError for a pipe, a folder or a link in its place."""
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return descriptor


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
    descriptor = open_regular(path, os.O_RDWR | os.O_CREAT)
    for attempt in range(50):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:  # a reader tests the lock for an instant
            if attempt == 49:
                raise
            time.sleep(0.02)
    raise AssertionError


def keep_from_cleaners(folder: str) -> None:
    """Lock the server's folder for as long as we live: systemd-tmpfiles leaves a locked one and all in it."""
    with contextlib.suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_SH | fcntl.LOCK_NB)


def keep_fresh(folder: str) -> None:
    """Mark a folder and all in it as just used: cleaners of /tmp that know no locks go by that."""
    for root, _, names in os.walk(folder):
        for path in (root, *(os.path.join(root, name) for name in names)):
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)


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
    keep_from_cleaners(order["tmp_dir"])
    keeper = Keeper(order, lock, Log(order["log"], order["log_bytes"]))
    keeper.run(report)


if __name__ == "__main__":
    main()
