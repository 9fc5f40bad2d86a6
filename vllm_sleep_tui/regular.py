"""Reading files that may be something else by now: a pipe that never answers, a link elsewhere, a flood."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


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
