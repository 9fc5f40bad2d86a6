"""Why the server before this one died: kept over an automatic restart until a person has seen it.

Seen is: its log was looked at (`logs`, key l), or the person stopped or started the model.
"""

from __future__ import annotations

import contextlib
import os

import msgspec

from vllm_sleep_tui.engine.logs import LogTail
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.files import as_text, path_of
from vllm_sleep_tui.fleet.snapshot import LastFailure
from vllm_sleep_tui.fleet.store.locks import LockBusyError, hold, holder
from vllm_sleep_tui.fleet.store.records import Record, RecordStore


def keep(record: Record) -> LastFailure:
    """The failure of a record, its log put where those of its successors do not push it out.

    One is kept for each model: the next death takes its place.
    """
    log = record.log
    if log is not None:
        with contextlib.suppress(OSError):
            path = path_of(log)
            aside = path.with_name(f"{path.name}.died")
            os.replace(path, aside)
            log = as_text(aside)
    return LastFailure(reason=record.reason or "", cure=record.cure or "", at=record.since, log=log)


def last_words(died: LastFailure | None, count: int) -> list[str]:
    """The last lines of the server that died, and one that says so; none if none died."""
    if died is None or not count:
        return []
    lines: list[str] = []
    if died.log is not None:
        with contextlib.suppress(OSError):
            lines = LogTail(path_of(died.log)).last(count)
    return [*lines, f"── {died.told()} What follows is the log since then. ──"]


async def seen(records: RecordStore, name: str) -> None:
    """The person has looked at it: it is not told of any longer. It is while somebody is at the model."""
    with contextlib.suppress(LockBusyError, OperationError, OSError):
        async with hold([records.path(name, "lock")], holder("looking", name), limit=0.0):
            record = records.read(name)
            if record.last_failure is not None:
                records.write(msgspec.structs.replace(record, last_failure=None))
