"""Locks between processes: one per model, one per GPU.

The kernel frees them with their holder, however it dies; one that it has stopped (Ctrl-Z) keeps them, and is
named. Order, always: GPUs by index, then models by name; nobody waits for a GPU while holding a model.

Who holds a lock is asked of the kernel; what a holder says of itself, which every user may write into the
file, counts only if it is the kernel's holder that says it.

A lock is of the file and not of its name, and root, or who made it, may remove a file that is held (a cleaner
of temporary folders, say). So who gets a lock looks whether its file still has the name, and who holds one
looks every WATCH_SECONDS and locks the name's new file as well. Until then a second may come in: a removed
file cannot be given its name again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import getpass
import logging
import os
import stat
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.files import lock_within
from vllm_sleep_tui.telemetry.kernel import file_locks, own_pids
from vllm_sleep_tui.telemetry.processes import is_stopped, user_name, user_of
from vllm_sleep_tui.text import one_line

POLL_SECONDS = 0.02
LIMIT_SECONDS = 1800.0
AT_ONCE = 0.0
"""A deadline that has always passed."""
WATCH_SECONDS = 1.0
"""Between two looks at whether a lock that is held still has its name."""
LOOK_SECONDS = 1.0
"""Between two looks at who is waited for."""
SILENT_SECONDS = 30.0
"""How long a holder is waited for that does not say for what it holds the lock: none of ours is silent."""
FOLDER_VARIABLE = "VLLM_SLEEP_TUI_LOCKS"
OWN_FOLDER = (
    f"Or set {FOLDER_VARIABLE} to a folder of your own for the locks: what others do is not seen there, "
    "and two may use one GPU at once."
)
log = logging.getLogger(__name__)

SIMULATED = "-SIM-"
"""In the names of locks of simulated GPUs, by their uuid."""
WORD_SIZE = 1024
"""Bytes of a lock file."""
MAX_WORD = 64
A_DAY = 86400.0


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lock and for what; advice for people, never proof."""

    user: str
    pid: int
    operation: str = ""
    """Empty if the holder does not say."""
    model: str = ""
    since: float = 0.0
    until: float | None = None
    stopped: bool = False
    """Whether the kernel has stopped the process, which then holds on and does nothing."""


def holder(operation: str, model: str, seconds: float | None = None) -> Holder:
    """This process as a holder, expected to be done in `seconds`."""
    now = time.time()
    until = None if seconds is None else now + seconds
    return Holder(user=own_name(), pid=os.getpid(), operation=operation, model=model, since=now, until=until)


def own_name() -> str:
    """This user's name; the number where there is none, as in a container with a user of its own."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def gpu_lock_path(uuid: str) -> Path:
    """The machine-wide lock file of a GPU; simulated ones have a name space of their own in their uuid."""
    return shared_folder() / f"vllm-sleep-tui-{uuid}.lock"


def shared_folder(preferred: Path = Path("/run/lock")) -> Path:
    """The same for every user and any TMPDIR, or two would not see each other's locks.

    On some systems only root may write to /run/lock. The person may name a folder, see OWN_FOLDER.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    try:
        everybodys = preferred.stat().st_mode & stat.S_IWOTH and os.access(preferred, os.W_OK)
    except OSError:
        everybodys = False
    return preferred if everybodys else Path("/tmp")


def check_folder() -> None:
    """Raises UsageError if the person names a folder for the locks that is none."""
    named = os.environ.get(FOLDER_VARIABLE)
    if named and not (os.path.isabs(named) and os.path.isdir(named)):
        raise UsageError(
            f"{FOLDER_VARIABLE}={named}: not the full path of a folder.",
            "Make the folder, or unset the variable: the locks are then where everybody sees them.",
        )


def open_shared(path: Path) -> int:
    """Open a lock file, usable by every user; raises OSError.

    Never creates over what is there (fs.protected_regular), never follows a link nor waits for a pipe's
    other end.
    """
    with contextlib.suppress(FileNotFoundError):
        return open_there(path)
    descriptor, unnamed = make_unnamed(path)
    try:
        os.link(unnamed, path)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, FileExistsError):
            raise
    finally:
        os.unlink(unnamed)
    return open_there(path)


def make_unnamed(path: Path) -> tuple[int, Path]:
    """A lock file that is to get the name `path`, under one of its own; raises OSError.

    It gets its name when its mode is right: a user who comes in between could not open it.
    """
    unnamed = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
    descriptor = os.open(unnamed, flags, 0o666)
    os.fchmod(descriptor, 0o666)  # the umask does not know that it is shared
    return descriptor, unnamed


def open_there(path: Path) -> int:
    """Open the file that is there, if it is a file; raises OSError.

    One that may only be read can be locked as well; then nobody learns for what.
    """
    flags = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, os.O_RDWR | flags)
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a file", str(path))
    return descriptor


def open_lock(path: Path) -> int:
    """Open a lock file; raises OperationError that names it, and what is in its place, if that cannot be."""
    try:
        return open_shared(path)
    except OSError as error:
        raise not_openable(path, error) from error


KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFDIR: "a folder", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}


def not_openable(path: Path, error: OSError) -> OperationError:
    """What is wrong with a lock file that cannot be opened, whose doing it is, and what to do."""
    try:
        there = os.lstat(path)
    except OSError:
        return OperationError(
            f"The lock {path} cannot be opened: {error.strerror}.",
            "Make its folder writable for you; without the lock nothing is done.",
        )
    kind = KINDS.get(
        stat.S_IFMT(there.st_mode), f"a file that you may not open (mode {there.st_mode & 0o777:o})"
    )
    owner = user_name(there.st_uid)
    if os.getuid() in (0, there.st_uid):
        cure = f"Remove {path}; the lock is made anew."
    else:
        cure = f"Ask {owner} or root to remove it. {OWN_FOLDER}"
    return OperationError(f"The lock {path} is {kind}, put there by {owner}: no lock that can be used.", cure)


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock; None if nobody does or it is no lock."""
    try:
        descriptor = open_there(path)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return who_holds(descriptor)
    finally:
        os.close(descriptor)


def who_holds(descriptor: int) -> Holder | None:
    """Who holds the open file's lock, by the kernel; by its own word where the kernel does not show it.

    The kernel does not show holders of another pid namespace. None if neither tells.
    """
    try:
        said = decode_holder(os.pread(descriptor, 4096, 0))
    except OSError:
        said = None
    pid = next(iter(locking(os.fstat(descriptor))), None)
    if pid is None:
        return said
    if said is None or said.pid not in own_pids(pid):
        return process_as_holder(pid)
    return msgspec.structs.replace(said, pid=pid, user=user_of(pid) or said.user, stopped=is_stopped(pid))


def process_as_holder(pid: int) -> Holder:
    """A process that does not say for what it holds a lock."""
    return Holder(user=user_of(pid) or "another user", pid=pid, stopped=is_stopped(pid))


def locking(*files: os.stat_result, exclusive: bool = False) -> list[int]:
    """The pids that hold a lock of these files, whichever kind, exclusive ones first (or alone)."""
    devices = {file.st_ino: f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}" for file in files}
    held = [
        lock
        for lock in file_locks()
        if lock.inode in devices and lock.pid > 0 and (lock.exclusive or not exclusive)
    ]
    exact = [lock for lock in held if lock.device == devices[lock.inode]] or held
    return [lock.pid for lock in sorted(exact, key=lambda lock: (not lock.exclusive, lock.pid))]


def describe(who: Holder | None) -> str:
    """A holder in words, such as: ada's switch of phi, about 12 s; what is our own is "the switch"."""
    if who is None:
        return "another operation"
    stopped = " (stopped)" if who.stopped else ""
    if not who.operation:
        return f"{who.user}'s process {who.pid}{stopped}, which does not say for what"
    what = f"{who.operation} of {who.model}" if who.model else who.operation
    if who.stopped:
        return f"{who.user}'s {what} (process {who.pid}, which is stopped)"
    left = "" if who.until is None else f", about {max(1, round(who.until - time.time()))} s"
    whose = "the" if who.pid == os.getpid() else f"{who.user}'s"
    return f"{whose} {what}{left}"


def cure_for(who: Holder | None, path: Path) -> str:
    """What the person can do about a holder that does not let go."""
    if who is None:
        return "Wait for it, or cancel it where it was begun."
    is_ours = os.getuid() == 0 or who.user == user_name(os.getuid())
    if who.stopped and is_ours:
        return f"It is stopped (Ctrl-Z): `kill -CONT {who.pid}` continues it, `kill -9 {who.pid}` ends it."
    if is_ours and who.operation:
        return f"Wait for it, or cancel it where it was begun (pid {who.pid})."
    ask = f"End pid {who.pid}." if is_ours else f"Ask {who.user} or root to continue or end pid {who.pid}."
    return f"{ask} {OWN_FOLDER}" if path.parent == shared_folder() else ask


def decode_holder(content: bytes) -> Holder | None:
    """A holder's word, fit to be shown: every user may write there. None if it cannot be read."""
    try:
        found = msgspec.json.decode(content.strip() or b"null", type=Holder | None)
    except NOT_JSON:
        return None
    if found is None:
        return None
    is_soon = found.until is not None and abs(found.until - time.time()) < A_DAY
    return msgspec.structs.replace(
        found,
        user=_word(found.user),
        operation=_word(found.operation),
        model=_word(found.model),
        until=found.until if is_soon else None,
        stopped=False,  # the kernel tells
    )


def _word(text: str) -> str:
    return one_line(text)[:MAX_WORD]


class LockBusyError(Exception):
    """A lock was not to be had in time; `holder` is who has it, if known."""

    def __init__(self, path: Path, who: Holder | None) -> None:
        super().__init__(f"{path} is held by {describe(who)}")
        self.path = path
        self.holder = who


def lock_soon(descriptor: int, path: Path, seconds: float) -> None:
    """Lock the open file, blocking for `seconds` at most; raises LockBusyError."""
    if not lock_within(descriptor, seconds):
        raise LockBusyError(path, who_holds(descriptor))


@contextlib.asynccontextmanager
async def hold(
    paths: Sequence[Path],
    who: Holder,
    *,
    limit: float = LIMIT_SECONDS,
    waiting: Callable[[Holder | None], None] = lambda _: None,
    checkpoint: Callable[[], None] = lambda: None,
) -> AsyncIterator[None]:
    """Hold all of `paths`, taken in the order given; raises LockBusyError after `limit` seconds.

    With a limit of 0 that does not tell who holds it: to find that out takes 10 ms, on the loop.
    Raises OperationError if a lock file cannot be opened or has no room for a word.
    """
    held: list[tuple[Path, int]] = []
    deadline = time.monotonic() + limit if limit else AT_ONCE
    word = msgspec.json.encode(who).ljust(WORD_SIZE)
    watching = asyncio.create_task(watch(held, word), name="locks")
    try:
        for path in paths:
            descriptor = await take(path, deadline, waiting, checkpoint)
            held.append((path, descriptor))
            write_word(descriptor, word)
        yield
    finally:
        watching.cancel()
        for path, descriptor in reversed(held):
            # Nobody has a simulated GPU for long: without that its lock would lie in /run/lock for ever.
            if SIMULATED in path.name and has_name(descriptor, path):
                with contextlib.suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def make_room(descriptor: int, path: Path) -> None:
    """Room for a holder's word; raises OperationError without: nobody waits long for a silent one.

    A file that may only be read, and a file system that cannot tell, are taken as they are.
    """
    try:
        os.posix_fallocate(descriptor, 0, WORD_SIZE)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OperationError(
                f"The lock {path} has no space left for who holds it: {error.strerror}.",
                f"Make room in {path.parent}. {OWN_FOLDER}",
            ) from None


def write_word(descriptor: int, word: bytes) -> None:
    """Say who holds it, in the room that was made; the lock itself is the kernel's."""
    with contextlib.suppress(OSError):
        os.pwrite(descriptor, word, 0)


def has_name(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that others find under `path`."""
    try:
        found, own = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


async def watch(held: list[tuple[Path, int]], word: bytes) -> None:
    """Keep what is held from looking old, and lock anew what was removed; `held` grows by that."""
    while True:
        await asyncio.sleep(WATCH_SECONDS)
        for path in {path for path, _ in held}:
            own = [descriptor for other, descriptor in held if other == path and has_name(descriptor, path)]
            if not own and (again := lock_again(path)) is not None:
                held.append((path, again))
                write_word(again, word)
            for descriptor in own:
                with contextlib.suppress(OSError):
                    os.utime(descriptor)  # cleaners of temporary folders go by age


def lock_again(path: Path) -> int | None:
    """The lock of the file that has the name now; None while somebody else has that."""
    try:
        descriptor = open_lock(path)
    except OperationError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    log.warning("%s was removed while it was held; it is locked again", path)
    return descriptor


async def take(
    path: Path,
    deadline: float,
    waiting: Callable[[Holder | None], None],
    checkpoint: Callable[[], None],
) -> int:
    """Wait until the lock is ours, with room for our word: its open file."""
    while True:
        descriptor = open_lock(path)
        try:
            await wait_for(descriptor, path, deadline, waiting, checkpoint)
            if has_name(descriptor, path):
                make_room(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # removed meanwhile: others lock the file that has its name now
        if time.monotonic() >= deadline:
            raise LockBusyError(path, None)
        await asyncio.sleep(POLL_SECONDS)


async def wait_for(
    descriptor: int,
    path: Path,
    deadline: float,
    waiting: Callable[[Holder | None], None],
    checkpoint: Callable[[], None],
) -> None:
    """Wait until the open file is locked for us; says who is waited for, and again when that changes."""
    told: list[Holder | None] = []
    next_look = 0.0
    who: Holder | None = None
    silent_since: float | None = None
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        now = time.monotonic()
        if deadline == AT_ONCE:
            raise LockBusyError(path, None)
        if now >= next_look:
            next_look = now + LOOK_SECONDS
            who = who_holds(descriptor)
            is_silent = who is not None and not who.operation
            # Who only looks whether it is free holds it for an instant as well, and says nothing.
            was_silent, silent_since = silent_since, (silent_since or now) if is_silent else None
            if told != [who] and not (is_silent and was_silent is None):
                told = [who]
                waiting(who)
        is_for_nothing = silent_since is not None and now - silent_since >= SILENT_SECONDS
        if now >= deadline or is_for_nothing:
            raise LockBusyError(path, who)
        checkpoint()
        await asyncio.sleep(POLL_SECONDS)
