"""What a model's servers said: the log of the one that runs, and the end of that of one before it."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from vllm_sleep_tui.engine.logs import LogTail
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import path_of
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.snapshot import LastFailure
from vllm_sleep_tui.fleet.store.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.units import time_of_day

_ENDINGS = ("", ".1", ".2", ".died")
"""Of the files of a model's servers: the keeper's generations, and what `last_failure` put aside."""


class Earlier(msgspec.Struct, frozen=True, kw_only=True):
    """A server before the one whose log is followed."""

    log: Path | None
    """Where its last words are; None if they are kept no longer."""
    told: str
    """A sentence on it, for the line below them."""


class ServerLog:
    """Reads one model's log as it grows; lines may hold whatever a server wrote, escapes too."""

    def __init__(
        self, path: Path, earlier: Earlier | None, forget: Callable[[], Awaitable[None]] | None = None
    ) -> None:
        """The log at `path`, which need not exist yet; `forget` is awaited once that was looked at."""
        self.path = path
        self._earlier = earlier
        self._forget = forget
        self._tail = LogTail(path)

    def last_words(self, count: int) -> list[str]:
        """The last lines of the earlier server, and one that tells of it; none if none is told of."""
        if self._earlier is None or not count:
            return []
        lines: list[str] = []
        if self._earlier.log is not None:
            with contextlib.suppress(OSError):
                lines = LogTail(self._earlier.log).last(count)
        kept = "" if lines else " What it said is kept no longer."
        return [*lines, f"── {self._earlier.told}{kept} What follows is the log since then. ──"]

    def last(self, count: int) -> list[str]:
        """The last lines that are there now; `read_new` goes on after them. Raises OSError."""
        return self._tail.last(count)

    def read_new(self) -> list[str]:
        """The whole lines that came since the last call, none if there is no file. Raises OSError."""
        return self._tail.read_new()

    async def seen(self) -> None:
        """A person has looked at it: the death is not told of any longer."""
        if self._forget is not None:
            await self._forget()


def log_of(records: RecordStore, name: str, *, forgets: bool = True) -> ServerLog:
    """The log of a model; raises OperationError if its record cannot be read.

    Without `forgets` a look at it leaves the death that it tells of as it is, for the next who looks.
    """
    record = records.read(name)
    died = record.last_failure
    forget = (lambda: _forget(records, name)) if forgets and died is not None else None
    path = path_of(record.log) if record.log else records.log_path(name)
    return ServerLog(path, None if died is None else earlier_of(died), forget)


def log_at(
    records: RecordStore, name: str, event: FleetEvent, launches: tuple[float, float], *, forgets: bool = True
) -> ServerLog:
    """The log of a model as by `log_of`, but below the end of the server of an event, if that is another.

    `launches` is when the starts before and after the event began: `History.launches_around`.
    """
    log = log_of(records, name, forgets=forgets)
    died = records.read(name).last_failure
    earlier = earlier_at(log.path, event, *launches)
    if earlier is None or (died is not None and died.log is not None and earlier.log == path_of(died.log)):
        return log
    return ServerLog(log.path, earlier)


def earlier_of(died: LastFailure) -> Earlier:
    """The server that died and was started again."""
    return Earlier(log=None if died.log is None else path_of(died.log), told=died.sentence)


def earlier_at(path: Path, event: FleetEvent, began: float, following: float) -> Earlier | None:
    """The server of an event, by the logs beside `path`; None if it is the last one, or none is known.

    It is the one started at `began`, and the next was at `following` (UTC seconds): its log is the file
    that was written to last between the two, however often files were put aside since.
    """
    written: dict[float, Path] = {}
    for ending in _ENDINGS:
        file = path.with_name(path.name + ending)
        with contextlib.suppress(OSError):
            written[file.stat().st_mtime] = file
    last = max((moment for moment in written if began <= moment <= following), default=None)
    log = None if last is None else written[last]
    is_unknown = log is None and began == -math.inf
    if following == math.inf or log == path or is_unknown:
        return None
    return Earlier(log=log, told=f"{time_of_day(event.time, time.time())} {event.sentence().rstrip('.')}.")


async def _forget(records: RecordStore, name: str) -> None:
    """Drop the last failure from the record; it stays while somebody is at the model."""
    with contextlib.suppress(LockBusyError, OperationError, OSError):
        async with hold([records.path(name, "lock")], holder("looking", name), limit=0.0):
            record = records.read(name)
            if record.last_failure is not None:
                records.write(msgspec.structs.replace(record, last_failure=None))
