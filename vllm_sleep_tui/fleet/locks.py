"""Locks between processes: one per model, one per GPU.

The kernel frees them with their holder, however it dies. Order, always: GPUs by index, then models by name;
nobody waits for a GPU while holding a model.

A lock is of the file and not of its name, and root, or who made it, may remove a file that is held (a cleaner
of temporary folders, say). So who gets a lock looks whether its file still has the name, and who holds one
looks every WATCH_SECONDS and locks the name's new file as well. Until then a second may come in: a removed
file cannot be given its name again.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.text import one_line

POLL_SECONDS = 0.02
LIMIT_SECONDS = 1800.0
WATCH_SECONDS = 1.0
"""Between two looks at whether a lock that is held still has its name."""
log = logging.getLogger(__name__)

SIMULATED = "-SIM-"
"""In the names of locks of simulated GPUs, by their uuid."""
MAX_WORD = 64
A_DAY = 86400.0


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who holds a lock and for what; advice for people, never proof."""

    user: str
    pid: int
    operation: str
    model: str
    since: float
    until: float | None = None


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

    On some systems only root may write to /run/lock.
    """
    try:
        everybodys = preferred.stat().st_mode & stat.S_IWOTH and os.access(preferred, os.W_OK)
    except OSError:
        everybodys = False
    return preferred if everybodys else Path("/tmp")


def open_shared(path: Path) -> int:
    """Open a lock file, usable by every user; never creates over what is there (fs.protected_regular)."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with contextlib.suppress(FileNotFoundError):
        return os.open(path, flags)
    # It gets its name when its mode is right: a user who comes in between could not open it.
    unnamed = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    descriptor = os.open(unnamed, flags | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        os.fchmod(descriptor, 0o666)  # the umask does not know that it is shared
        os.link(unnamed, path)
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, FileExistsError):
            raise
    finally:
        os.unlink(unnamed)
    return os.open(path, flags)


def open_lock(path: Path) -> int:
    """Open a lock file; raises OperationError that names it if that cannot be."""
    try:
        return open_shared(path)
    except OSError as error:
        raise OperationError(
            f"The lock {path} cannot be opened: {error.strerror}.",
            "Make its folder writable for you; without the lock nothing is done.",
        ) from error


def read_holder(path: Path) -> Holder | None:
    """Who holds the lock, as it says itself; None if nobody does or the word cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return decode_holder(os.pread(descriptor, 4096, 0))
    finally:
        os.close(descriptor)


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
    )


def _word(text: str) -> str:
    return one_line(text)[:MAX_WORD]


class LockBusyError(Exception):
    """A lock was not to be had in time; `holder` is who has it, if known."""

    def __init__(self, path: Path, who: Holder | None) -> None:
        super().__init__(str(path))
        self.holder = who


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

    Raises OperationError if a lock file cannot be opened.
    """
    held: list[tuple[Path, int]] = []
    deadline = time.monotonic() + limit
    word = msgspec.json.encode(who).ljust(1024)
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


def write_word(descriptor: int, word: bytes) -> None:
    """Say who holds it; a full disk refuses, and then it is not known: the lock is the kernel's."""
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
    """Wait until the lock is ours: its open file."""
    while True:
        descriptor = open_lock(path)
        try:
            await wait_for(descriptor, path, deadline, waiting, checkpoint)
            if has_name(descriptor, path):
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
    """Wait until the open file is locked for us; says once who is waited for."""
    said = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            who = decode_holder(os.pread(descriptor, 4096, 0))
        if time.monotonic() >= deadline:
            raise LockBusyError(path, who)
        if not said:
            waiting(who)
            said = True
        checkpoint()
        await asyncio.sleep(POLL_SECONDS)
