"""What a model's servers said: the log of the one that runs, and the end of that of one that died before."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.logs import LogTail
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import path_of
from vllm_sleep_tui.fleet.snapshot import LastFailure
from vllm_sleep_tui.fleet.store.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.store.records import RecordStore


class ServerLog:
    """Reads one model's log as it grows; lines may hold whatever a server wrote, escapes too."""

    def __init__(
        self, path: Path, died: LastFailure | None, forget: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """The log at `path`, which need not exist yet; `forget` is awaited once a death was looked at."""
        self.path = path
        self._died = died
        self._forget = forget
        self._tail = LogTail(path)

    def last_words(self, count: int) -> list[str]:
        """The last lines of the server that died, and one that says so; none if none died."""
        if self._died is None or not count:
            return []
        lines: list[str] = []
        if self._died.log is not None:
            with contextlib.suppress(OSError):
                lines = LogTail(path_of(self._died.log)).last(count)
        return [*lines, f"── {self._died.sentence} What follows is the log since then. ──"]

    def last(self, count: int) -> list[str]:
        """The last lines that are there now; `read_new` goes on after them. Raises OSError."""
        return self._tail.last(count)

    def read_new(self) -> list[str]:
        """The whole lines that came since the last call, none if there is no file. Raises OSError."""
        return self._tail.read_new()

    async def seen(self) -> None:
        """A person has looked at it: the death is not told of any longer."""
        if self._died is not None and self._forget is not None:
            await self._forget()


def log_of(records: RecordStore, name: str, *, forgets: bool = True) -> ServerLog:
    """The log of a model; raises OperationError if its record cannot be read.

    Without `forgets` a look at it leaves the death that it tells of as it is, for the next who looks.
    """
    record = records.read(name)
    path = path_of(record.log) if record.log else records.log_path(name)
    forget = (lambda: _forget(records, name)) if forgets else None
    return ServerLog(path, record.last_failure, forget)


async def _forget(records: RecordStore, name: str) -> None:
    """Drop the last failure from the record; it stays while somebody is at the model."""
    with contextlib.suppress(LockBusyError, OperationError, OSError):
        async with hold([records.path(name, "lock")], holder("looking", name), limit=0.0):
            record = records.read(name)
            if record.last_failure is not None:
                records.write(msgspec.structs.replace(record, last_failure=None))
