"""Units and how they are written: the one set of formatters, for every face and every sentence.

Where one quantity has several forms, each says what it is for: a cell of a table, a sentence, a comparison.
"""

from __future__ import annotations

import time

KIB = 2**10
MIB = 2**20
GIB = 2**30
NONE = "–"
UNKNOWN = "?"
"""For the panel, where NONE says that there is nothing; elsewhere NONE stands for both."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """So many of something: 1 model, 12 models; `plural` where an s does not make it."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────


def gib(size: float | None) -> str:
    """Bytes as people read them: 18.5 GiB; NONE for what is not known."""
    return NONE if size is None else f"{size / GIB:.1f} GiB"


def gib_number(size: int | None) -> str:
    """The number alone, where the unit stands beside it; UNKNOWN for what is not known."""
    return UNKNOWN if size is None else f"{size / GIB:.1f}"


def gib_cell(size: int | None) -> str:
    """The number alone in at most four characters, for a column: 18.5, 128."""
    return f"{size / GIB:.0f}" if size is not None and size >= 100 * GIB else gib_number(size)


# ── how long something takes ────────────────────────────────────────────────────────────────────────────


def took(seconds: float) -> str:
    """A time, measured or expected by what was, in at most six cells: 26 ms, 0.48 s, 12.3 s, 88 s."""
    if seconds < 0.0995:
        return milliseconds(seconds)
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 59.95 else f"{seconds:.0f} s"


def start_time(seconds: float) -> str:
    """What a start takes as a rule, which is known no better: <1 s, 5 s, 127 s."""
    return "<1 s" if seconds < 0.5 else f"{seconds:.0f} s"


def milliseconds(seconds: float) -> str:
    """A short measured time: 26 ms, <1 ms."""
    return "<1 ms" if 0 < seconds < 0.0005 else f"{seconds * 1000:.0f} ms"


def precise(seconds: float) -> str:
    """A time of the benchmark, with the figures that a comparison needs: 2.6 ms, 0.361 s, 1.23 s, 41.2 s."""
    if seconds < 0.1:
        return f"{1000 * seconds:.1f} ms" if seconds < 0.01 else milliseconds(seconds)
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"


def time_left(seconds: float) -> str:
    """A longer time that somebody waits for: 47 s, 11 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def time_sum(seconds: float) -> str:
    """Many times added up, in a few cells: 47 s, 11 min, 2.3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ── for how long, and when ──────────────────────────────────────────────────────────────────────────────


def clock(seconds: float) -> str:
    """For how long, in a cell of the panel's table: 0:07, 12:31, 3:05 h, 2 d."""
    whole = max(0, int(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d"


def age(seconds: float) -> str:
    """For how long, to the second however long it is: 0:07, 12:31, 27:05:12."""
    minutes, rest = divmod(max(0, int(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def time_of_day(moment: float, now: float | None = None) -> str:
    """The local time of a moment in UTC seconds: 21:30:05, or Tue 21:30:05 if `now` is on another day."""
    local = time.localtime(moment)
    is_today = now is None or local[:3] == time.localtime(now)[:3]
    return time.strftime("%H:%M:%S" if is_today else "%a %H:%M:%S", local)


def date_and_time(moment: float) -> str:
    """The local date and time of a moment in UTC seconds, to the minute: 2026-01-31 21:30."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))


def file_stamp() -> str:
    """Now, as part of a file's name, so that names sort by time: 20260131-213005."""
    return time.strftime("%Y%m%d-%H%M%S")
