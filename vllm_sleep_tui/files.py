"""Files: regular ones read with bounds, folders kept private, files replaced whole, what was agreed to.

A name may stand for something else by now: a pipe that never answers, a link elsewhere, a flood.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.text import one_line

LOCK_PAUSE = 0.005
MAX_AGREEMENTS = 4 * 2**20
MAX_HASHED = 16 * 2**20
"""Of a larger file that a config names, size and time stand for its content."""
LOCK_SECONDS = 5.0
SAME_TICK = 2.0
"""Seconds within which a file system may give two writes the same time."""
_AS_BYTES = "bytes:"
T = TypeVar("T")
log = logging.getLogger(__name__)


class NotAFileError(OSError):
    """The name is that of a pipe or device, or the file is larger than its kind ever is."""


def open_regular(path: Path, *, follow: bool = False) -> int:
    """A descriptor of a regular file, opened for reading; it never waits.

    With `follow` the name may be a link to one. Raises NotAFileError for a pipe or a device, and OSError,
    also for a link or a folder: those are left where they are.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket, or a device without a driver
            raise NotAFileError(error.errno, "it is not a regular file", str(path)) from None
        raise
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise NotAFileError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, limit: int, *, follow: bool = False) -> bytes:
    """The whole of a regular file; raises NotAFileError if it is larger than `limit` bytes, and OSError.

    With `follow` the name may be a link to one.
    """
    with os.fdopen(open_regular(path, follow=follow), "rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise NotAFileError(errno.EFBIG, f"it is larger than {limit} bytes", str(path))
    return content


Mark = tuple[int, ...] | None
"""By which a file, and a link to it, is known to be the same; None if it is not there."""


def mark(path: Path) -> Mark:
    """The mark of a file as it is now, links followed."""
    try:
        found = os.lstat(path)
        there = os.stat(path) if stat.S_ISLNK(found.st_mode) else None
    except OSError:  # gone, or for a moment: editors rename
        return None
    return _mark(found) if there is None else (*_mark(found), *_mark(there))


def _mark(found: os.stat_result) -> tuple[int, ...]:
    return (
        found.st_dev,
        found.st_ino,
        found.st_mode,
        found.st_size,
        found.st_mtime_ns,
        found.st_ctime_ns,
    )


class _Made(NamedTuple, Generic[T]):
    """What was made of files."""

    marks: dict[Path, Mark]
    since: float
    """When the files were seen first as they were then, by our own clock."""
    is_kept: bool
    what: T

    def is_so(self) -> bool:
        """Whether the files are the same still."""
        return all(mark(file) == seen for file, seen in self.marks.items())


class Unchanged(Generic[T]):
    """What was made of small files, kept while they are the same: another look costs a `stat` each."""

    def __init__(
        self, make: Callable[[Path, dict[Path, Mark]], T], *, tick: float = SAME_TICK, most: int = 1024
    ) -> None:
        """`make` notes the marks of what it reads beside its file; of more than `most` the oldest goes.

        Two writes within `tick` seconds may leave a file's mark as it is.
        """
        self._make = make
        self._tick = tick
        self._most = most
        self._made: dict[Path, _Made[T]] = {}

    def get(self, path: Path) -> T:
        """What `make` made of the file as it is now; raises what `make` raises."""
        before = self._made.get(path)
        if before is not None and before.is_kept and before.is_so():
            return before.what
        now, marks = time.monotonic(), {path: mark(path)}
        what = self._make(path, marks)
        since = before.since if before is not None and before.marks == marks else now
        # A write from now on bears another time, whoever's clock tells it.
        is_kept = marks[path] is not None and now - since >= self._tick
        self._made[path] = _Made(marks, since, is_kept, what)
        if len(self._made) > self._most:
            self._made.pop(next(iter(self._made)), None)
        return what


def private_dir(folder: Path) -> Path:
    """Make a folder, and the missing ones around it, for this user alone; raises OperationError.

    One that others could enter is closed to them, and that is said: what lies in it may be theirs.
    """
    try:
        missing = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
        _check_owner(folder)
        before = os.stat(folder)
        if not stat.S_ISDIR(before.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if before.st_mode & 0o077:
            os.chmod(folder, 0o700)
            if os.stat(folder).st_mode & 0o077:
                raise PermissionError(errno.EPERM, "its file system keeps no permissions")
            log.warning(
                "%s was open to other users (mode %04o); it is yours alone now (0700).",
                one_line(str(folder)),
                stat.S_IMODE(before.st_mode),
            )
    except OSError as error:
        raise OperationError(
            f"The folder {folder} cannot be made private: {error.strerror}.",
            "Make it writable for you, or name another with XDG_STATE_HOME.",
        ) from None
    return folder


def _check_owner(folder: Path) -> None:
    """Raises OperationError if the folder, or the link that stands for it, is another user's."""
    link, found = os.lstat(folder), os.stat(folder)
    allowed = (os.geteuid(), 0) if stat.S_ISLNK(link.st_mode) else (os.geteuid(),)
    if link.st_uid not in allowed or found.st_uid != os.geteuid():
        owner = found.st_uid if found.st_uid != os.geteuid() else link.st_uid
        raise OperationError(
            f"The folder {folder} belongs to another user (uid {owner}), who could change what is in it.",
            "Name a folder of your own with XDG_STATE_HOME.",
        )


def write_atomically(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Replace what has the name `path`, in one step; raises OSError.

    A link of that name is replaced, never followed.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".vst-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if mode != 0o600:
                os.fchmod(file.fileno(), mode)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_private(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """The same with the error in words; raises OperationError."""
    try:
        write_atomically(path, content, mode=mode)
    except OSError as error:
        raise OperationError(
            f"{path} cannot be written: {error.strerror}.", "Free space or correct the folder's permissions."
        ) from None


def is_taken(path: Path) -> bool:
    """Whether anything has this name, a link that leads nowhere included."""
    return os.path.lexists(path)


def read_own(path: Path, limit: int) -> bytes:
    """A regular file that only this user may write; raises OSError if it is anything else, or larger."""
    with os.fdopen(open_regular(path), "rb") as file:
        found = os.fstat(file.fileno())
        if found.st_uid != os.geteuid() or found.st_mode & 0o022 or found.st_size > limit:
            raise PermissionError(errno.EPERM, "not a file that only you may write")
        return file.read(limit)


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────


def as_text(path: Path | str) -> str:
    """The path as text that any file can hold, also if its bytes are not UTF-8; `path_of` reads it."""
    return str(path) if is_text(path) else _AS_BYTES + quote_from_bytes(os.fsencode(path))


def is_text(path: Path | str) -> bool:
    """Whether the path's bytes are UTF-8, as a config demands of what it names."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def path_of(text: str) -> Path:
    """The path that `as_text` wrote."""
    if text.startswith(_AS_BYTES):
        return Path(os.fsdecode(unquote_to_bytes(text.removeprefix(_AS_BYTES))))
    return Path(text)


# ── trust ───────────────────────────────────────────────────────────────────────────────────────────────


def trusted(path: Path, digest: str, state: Path) -> bool:
    """Whether the person has agreed to do what the file of this name says, with this content."""
    return _agreements(state).get(as_text(path)) == digest


def trust(path: Path, digest: str, state: Path) -> None:
    """Keep the person's agreement; a change of what it was about ends it. Raises OperationError."""
    with _one_at_a_time(state / "trusted.lock"):
        agreements = {**_agreements(state), as_text(path): digest}
        write_private(state / "trusted.json", msgspec.json.format(msgspec.json.encode(agreements)))


@contextlib.contextmanager
def _one_at_a_time(path: Path) -> Iterator[None]:
    """Between processes, for a change of a file that is read first.

    Who holds `path` for LOCK_SECONDS is frozen, and a lock that cannot be made is none: then it goes on
    without, which may lose the other's agreement, to be asked for again.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError:
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            lock_within(descriptor, LOCK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def digest_with(digest: str, files: Iterable[Path]) -> str:
    """`digest` together with the content of these files; unchanged if none of them is there."""
    whole = [f"{as_text(path)}\0{found}" for path in files if (found := _digest_of(path))]
    return hashlib.sha256("\0".join([digest, *whole]).encode()).hexdigest() if whole else digest


def _digest_of(path: Path) -> str | None:
    """What a regular file holds; None of anything else."""
    try:
        if not path.is_file():  # to open a device can do something
            return None
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            found = os.fstat(file.fileno())
            if found.st_size > MAX_HASHED:
                return f"{found.st_size} {found.st_mtime_ns}"
            return hashlib.sha256(file.read(MAX_HASHED)).hexdigest()
    except (OSError, ValueError):
        return None


def _agreements(state: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(read_own(state / "trusted.json", MAX_AGREEMENTS), type=dict[str, str])
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}


def lock_within(descriptor: int, seconds: float) -> bool:
    """Lock the open file for this process alone, `seconds` at most; False if that was too short."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(LOCK_PAUSE)
