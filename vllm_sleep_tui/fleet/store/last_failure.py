"""Why the server before this one died: kept over an automatic restart until a person has seen it.

Seen is: its log was looked at (`logs`, key l), or the person stopped or started the model.
"""

from __future__ import annotations

import contextlib
import os

from vllm_sleep_tui.files import as_text, path_of
from vllm_sleep_tui.fleet.snapshot import LastFailure
from vllm_sleep_tui.fleet.store.records import Record


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
