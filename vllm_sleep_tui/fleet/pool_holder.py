"""The pool holder keeps GPU memory between two engines: a process per GPU and user (standard library only).

It is run as a file, apart from the package: ``python -I -S pool_holder.py``, with what to do as JSON on
stdin: folder (ours, 0700), gpu (its UUID), limit_bytes (None: no limit), linger (seconds).

GPU memory comes as file descriptors from the engine that goes to sleep and leaves with the next one that
wakes; who holds none of a chunk's descriptors does not keep it. So what is lent out dies with its engine and
what is here dies with us: to kill either costs speed and nothing else. There is no CUDA here.

It holds a flock on FOLDER/GPU.holder for as long as it lives; that is the proof that it lives. It listens at
FOLDER/GPU.sock: SOCK_SEQPACKET, one JSON object a packet, one answer for each, see `Holder.answers`. Whoever
keeps a server that may use it holds a shared flock on FOLDER/GPU.users: without any, the holder ends.

What is lent out the driver lists for nobody, and is no business of the holder's: engines tell of it in files
of their own beside these, FOLDER/GPU.lent-PID.
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import json
import os
import re
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from typing import Any, TypeGuard

MOST_DESCRIPTORS = 200
"""In one packet; the kernel takes 253."""
MOST_BYTES = 16 * 1024
"""Of one packet."""
MOST_CLIENTS = 64
LARGEST = 2**40
"""Bytes of one chunk; more is no chunk."""
MOST_DIGITS = 20
"""Of a size that is asked for: Python reads no number of thousands."""
LOOK_SECONDS = 1.0
"""Between two looks whether anybody uses us."""
FRESH_SECONDS = 3600.0
"""Cleaners of /tmp wait for days."""
WORD_SIZE = 4096


class Rubbish(Exception):  # noqa: N818 - what it is, not that it is an error
    """What a client said is no request; it is told so and hung up on."""


class Client:
    """One connection, and what it has told of itself."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.connection, self.pid = connection, pid
        self.launch: str | None = None
        """Of an engine; anybody else does not say hello."""

    def receive(self) -> tuple[bytes, list[int]]:
        """The next packet and its descriptors, which are the caller's; nothing once it has hung up.

        Raises Rubbish for a packet that is too long; descriptors that did not fit our table are lost.
        """
        space = socket.CMSG_SPACE(MOST_DESCRIPTORS * array.array("i").itemsize)
        data, ancillary, flags, _ = self.connection.recvmsg(MOST_BYTES, space, socket.MSG_CMSG_CLOEXEC)
        found = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                found.frombytes(content[: len(content) // found.itemsize * found.itemsize])
        if flags & socket.MSG_TRUNC:
            close(found.tolist())
            raise Rubbish(f"a packet holds {MOST_BYTES} bytes at the most")
        return data, found.tolist()

    def send(self, answer: dict[str, Any], descriptors: list[int]) -> None:
        """Answer it; raises OSError if it does not read its answers."""
        rights = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        )
        self.connection.sendmsg([json.dumps(answer).encode()], rights, socket.MSG_NOSIGNAL)


class Holder:
    """The free chunks of one GPU, and who is connected."""

    def __init__(self, server: socket.socket, path: str, limit: int | None, linger: float) -> None:
        self.server, self.path = server, path
        self.limit, self.linger = limit, linger
        self.free: dict[int, list[int]] = {}
        """Descriptors of chunks by their size in bytes."""
        self.clients: dict[int, Client] = {}
        self.given_at = 0.0
        self.look_at = time.monotonic() + LOOK_SECONDS
        self.freshen_at = time.monotonic() + FRESH_SECONDS
        self.ends = False
        self.answers: dict[str, Callable[[Client, dict[str, Any], list[int]], dict[str, Any]]] = {
            "hello": self.hello,
            "give": self.give,
            "state": lambda *_: self.state(),
            "shrink": self.shrink,
            "end": self.end,
        }
        """What may be asked, by its name; `take` besides, whose answer has descriptors."""

    @property
    def free_bytes(self) -> int:
        """Of all free chunks."""
        return sum(size * len(held) for size, held in self.free.items())

    def run(self) -> None:
        """Serve until asked to end, or until nobody uses us."""
        while not self.ends:
            poll = select.poll()
            for descriptor in (self.server.fileno(), *self.clients):
                poll.register(descriptor, select.POLLIN)
            for descriptor, _ in poll.poll(LOOK_SECONDS * 1000):
                if descriptor == self.server.fileno():
                    self.accept()
                elif (client := self.clients.get(descriptor)) is not None:
                    self.serve(client)
            self.look_at_the_time()
        self.shrink_to(0)  # before our files go: who sees them gone takes the memory for free

    def look_at_the_time(self) -> None:
        """Give up what nobody came for: by now the driver has clean memory of its own; end without users."""
        now = time.monotonic()
        if self.free and now - self.given_at >= self.linger:
            self.shrink_to(0)
        if now >= self.look_at:
            self.look_at = now + LOOK_SECONDS
            self.ends = self.ends or not self.is_used()
        if now >= self.freshen_at:
            self.freshen_at = now + FRESH_SECONDS
            keep_fresh(self.path)

    def is_used(self) -> bool:
        """Whether anybody holds the users' file."""
        try:
            descriptor = os.open(
                f"{self.path}.users", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            )
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(descriptor)
        return False

    def accept(self) -> None:
        """Let one in, if it is of our own user."""
        try:
            connection, _ = self.server.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self.shrink_to(0)  # or it would be tried again and again
            return
        size = struct.calcsize("3i")
        pid, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if user != os.geteuid() or len(self.clients) >= MOST_CLIENTS:
            connection.close()
            return
        connection.setblocking(False)
        self.clients[connection.fileno()] = Client(connection, pid)

    def serve(self, client: Client) -> None:
        """Answer one packet; whoever is gone, sends rubbish or does not read is hung up on."""
        try:
            data, descriptors = client.receive()
            if not data:
                close(descriptors)
                self.hang_up(client)
                return
            self.answer(client, data, descriptors)
        except OSError:
            self.hang_up(client)
        except Rubbish as error:
            with contextlib.suppress(OSError):
                client.send({"error": f"{error}."}, [])
            self.hang_up(client)

    def answer(self, client: Client, data: bytes, descriptors: list[int]) -> None:
        """Answer one request; raises Rubbish, or OSError if the answer cannot be sent."""
        try:
            request = request_of(data)
            name = request.get("op")
            if name == "take":
                answer, lent = self.take(request)
            elif isinstance(name, str) and name in self.answers:
                answer, lent = self.answers[name](client, request, descriptors), []
            else:
                raise Rubbish(f"op is one of {', '.join(sorted([*self.answers, 'take']))}")
        finally:
            close(descriptors)  # those that were kept are no longer in the list
        try:
            client.send(answer, lent)
        finally:
            close(lent)  # they are the engine's now, or nobody's

    def hang_up(self, client: Client) -> None:
        """Forget it and what it said."""
        del self.clients[client.connection.fileno()]
        client.connection.close()

    # ── what may be asked ────────────────────────────────────────────────────────────────────────────────

    def hello(self, client: Client, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """An engine of a launch; the answer is the state."""
        launch = request.get("launch")
        if not isinstance(launch, str) or len(launch) > 200:
            raise Rubbish("launch is a text")
        client.launch = launch
        return self.state()

    def give(self, client: Client, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Chunks of these sizes, a descriptor each; the number that is kept, the others go to the driver."""
        sizes = request.get("sizes")
        if not isinstance(sizes, list) or not all(is_size(size) for size in sizes):
            raise Rubbish("sizes are bytes")
        if len(sizes) < len(descriptors):
            raise Rubbish(f"{len(sizes)} sizes for {len(descriptors)} descriptors")
        kept = 0
        for size in sizes[: len(descriptors)]:  # fewer have come where our table was full
            if self.limit is not None and self.free_bytes + size > self.limit:
                break
            self.free.setdefault(size, []).append(descriptors.pop(0))
            kept += 1
        self.given_at = time.monotonic()
        return {"kept": kept}

    def take(self, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """As many of each size as there are and go into one packet; `more` if another would bring some."""
        wanted = request.get("wanted")
        if not isinstance(wanted, dict) or not all(
            size.isdecimal() and len(size) <= MOST_DIGITS and is_amount(count)
            for size, count in wanted.items()
        ):
            raise Rubbish("wanted are counts by bytes")
        sizes: list[int] = []
        lent: list[int] = []
        more = False
        for size, count in wanted.items():
            held = self.free.get(int(size), [])
            there = min(count, len(held))
            now = min(there, MOST_DESCRIPTORS - len(lent))
            lent += [held.pop() for _ in range(now)]
            sizes += [int(size)] * now
            more = more or now < there
        self.forget_empty()
        return {"sizes": sizes, "more": more}, lent

    def state(self) -> dict[str, Any]:
        """What is free, and which engines are connected."""
        return {
            "free_bytes": self.free_bytes,
            "free": {str(size): len(held) for size, held in self.free.items()},
            "engines": [
                {"pid": client.pid, "launch": client.launch}
                for client in self.clients.values()
                if client.launch is not None
            ],
            "limit_bytes": self.limit,
        }

    def shrink(self, client: Client, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Give free chunks to the driver until `to_bytes` are left; `limit_bytes` is set if told."""
        target = request.get("to_bytes")
        limit = request.get("limit_bytes", self.limit)
        if not is_amount(target) or not (limit is None or is_amount(limit)):
            raise Rubbish("to_bytes and limit_bytes are numbers")
        self.limit = limit
        self.shrink_to(target)
        return self.state()

    def end(self, client: Client, request: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """End; what is free goes to the driver."""
        self.ends = True
        return {}

    # ── chunks ───────────────────────────────────────────────────────────────────────────────────────────

    def shrink_to(self, target: int) -> None:
        """Close chunks, the largest first, until no more than `target` bytes are free."""
        left = self.free_bytes
        for size in sorted(self.free, reverse=True):
            while self.free[size] and left > target:
                close([self.free[size].pop()])
                left -= size
        self.forget_empty()

    def forget_empty(self) -> None:
        """No size stays that has no chunk."""
        self.free = {size: held for size, held in self.free.items() if held}


def request_of(data: bytes) -> dict[str, Any]:
    """One JSON object; raises Rubbish."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise Rubbish("a packet is one JSON object") from None
    if not isinstance(found, dict):
        raise Rubbish("a packet is one JSON object")
    return found


def is_amount(value: Any) -> TypeGuard[int]:
    """Whether it can be a number of bytes."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_size(value: Any) -> TypeGuard[int]:
    """Whether it can be the size of a chunk."""
    return is_amount(value) and 0 < value <= LARGEST


def close(descriptors: list[int]) -> None:
    """Close and forget all of them."""
    while descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptors.pop())


def identity(pid: int) -> dict[str, Any]:
    """A process by pid, start time in clock ticks since boot, and boot, which no later process shares."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        known: dict[str, Any] = {"pid": pid, "start": int(file.read().rpartition(b")")[2].split()[19])}
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", "rb") as file:
        known["boot"] = file.read(8).decode("ascii", "replace")
    return known


def check_name(gpu: str) -> None:
    """Raises OSError unless it names a GPU and no path."""
    if not re.fullmatch("[A-Za-z0-9-]{1,80}", gpu):
        raise OSError(errno.EINVAL, "it is not the UUID of a GPU")


def check_folder(folder: str) -> int:
    """The folder, opened; raises OSError unless it is ours and nobody else may enter."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid() or found.st_mode & 0o077:
        os.close(descriptor)
        raise OSError(errno.EPERM, "it is not a folder of this user alone (mode 0700)")
    return descriptor


def keep_from_cleaners(folder: int) -> None:
    """Lock our folder for as long as we live: systemd-tmpfiles leaves a locked one and all in it."""
    with contextlib.suppress(OSError):
        fcntl.flock(folder, fcntl.LOCK_SH | fcntl.LOCK_NB)


def take_lock(path: str) -> int:
    """The holder's file, locked for life; raises BlockingIOError while another holder lives."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    for attempt in range(50):
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # the holder before us has just removed it
        except BlockingIOError:  # a reader tests the lock for an instant
            os.close(descriptor)
            if attempt == 49:
                raise
            time.sleep(0.02)
    raise BlockingIOError


def is_at(descriptor: int, path: str) -> bool:
    """Whether an open file is the one that is at a path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def remove_files(path: str, lock: int) -> None:
    """Leave nothing of us behind, who hold `lock`; whoever uses the pool by now keeps the users' file.

    Who has a file open, and its lock only after it was removed, looks again whether it is there (`is_at`).
    """
    if not is_at(lock, f"{path}.holder"):
        return  # somebody has removed it: what is there is another holder's
    for kind in ("sock", "holder"):
        with contextlib.suppress(OSError):
            os.unlink(f"{path}.{kind}")
    with contextlib.suppress(OSError):
        users = os.open(f"{path}.users", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(users) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(f"{path}.users")
            for name in os.listdir(os.path.dirname(path)):
                if name.startswith(f"{os.path.basename(path)}.lent-"):  # of engines that are gone
                    os.unlink(os.path.join(os.path.dirname(path), name))


def keep_fresh(path: str) -> None:
    """Mark our files as just used: cleaners of /tmp that know no locks go by that."""
    for name in (os.path.dirname(path), *(f"{path}.{kind}" for kind in ("sock", "holder", "users"))):
        with contextlib.suppress(OSError):
            os.utime(name, follow_symlinks=False)


def listen(path: str) -> socket.socket:
    """The socket at `path`, in the place of what a dead holder has left; raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(path)
    os.chmod(path, 0o600)
    server.listen(MOST_CLIENTS)
    server.setblocking(False)
    return server


def raise_limit() -> None:
    """As many open descriptors as we may have: each chunk is one."""
    with contextlib.suppress(OSError, ValueError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def leave(*_: object) -> None:
    """SIGTERM."""
    raise SystemExit(0)


def main() -> None:
    """Read the order, leave the launcher's side, tell it {holder}, {error} or {} beside another; hold."""
    order = json.load(sys.stdin)
    report = os.dup(1)
    os.set_inheritable(report, False)
    if os.fork():
        os._exit(0)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, leave)
    raise_limit()
    word: dict[str, Any] = {"holder": identity(os.getpid())}
    try:
        check_name(order["gpu"])
        keep_from_cleaners(check_folder(order["folder"]))
        path = os.path.join(order["folder"], order["gpu"])
        lock = take_lock(f"{path}.holder")
        server = listen(f"{path}.sock")
        os.pwrite(lock, json.dumps(word).encode().ljust(WORD_SIZE), 0)
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        word = {} if busy else {"error": error.strerror}
        with contextlib.suppress(BrokenPipeError):
            os.write(report, json.dumps(word).encode())
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(report, json.dumps(word).encode())
    os.close(report)  # the launcher waits for that
    try:
        Holder(server, path, order["limit_bytes"], order["linger"]).run()
    finally:
        remove_files(path, lock)


if __name__ == "__main__":
    main()
