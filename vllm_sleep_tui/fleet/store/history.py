"""What happened and how long it took: switches, states, cold starts and what was served, in ``history.db``.

All of it runs on one thread of its own, in order: `record_…` returns at once, a question waits for what was
recorded before it. A database that is locked, full or broken costs its entries and one note, never an
operation; who holds it for too long, a process that was stopped say, is named there and not waited for again
for a while, so that the end of a verb does not wait once for each entry.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from vllm_sleep_tui.files import as_text
from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.past import Past, PastSwitch, Percentiles, Saved, Served, StateSpan
from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history_tables import ADD, BUCKET, DAY, FAILURES, drop_old, prepare
from vllm_sleep_tui.fleet.store.locks import (
    Holder,
    LockBusyError,
    cure_for,
    describe,
    lock_soon,
    locking,
    process_as_holder,
)

Value = str | float | None

RATE_DAYS = 30
RATE_MINIMUM_DAYS = 7
LOCK_SECONDS = 0.5
"""How long another process's write is waited for."""
BUSY_SECONDS = 5.0
"""How long nobody is waited for after that was in vain."""


STRETCHES = 120
"""So many of them make up the window in which requests and tokens are told; none is shorter than is kept."""


class History:
    """The past of one config's models; opened when it is first needed, `close` writes what is left.

    What is too old is dropped then, and every `drop_every` seconds while it stays open. Another process's
    write is waited for `lock_seconds`.
    """

    def __init__(
        self,
        state_dir: Path,
        config: Path | str = "",
        *,
        drop_every: float = DAY,
        lock_seconds: float = LOCK_SECONDS,
    ) -> None:
        self._path = state_dir / "history.db"
        self._config = as_text(config)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="history")
        self._waiting: deque[tuple[str, Sequence[Value]]] = deque()
        self._connection: sqlite3.Connection | None = None
        self._note: str | None = None
        self._drop_every = drop_every
        self._lock_seconds = lock_seconds
        self._next_drop = 0.0
        self._impatient_until = 0.0

    @property
    def note(self) -> str | None:
        """One line on what is wrong with the history; None if all is well."""
        return self._note

    def close(self) -> None:
        """Write what was recorded and let go of the file; nothing may be called after it."""
        self._worker.submit(self._disconnect)
        self._worker.shutdown()

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────

    def record_switch(
        self,
        model: str,
        times: SwitchTimes,
        *,
        level: int | None,
        from_state: State,
        left: Sequence[str] = (),
        at: float | None = None,
    ) -> None:
        """Keep a switch to `model` that went well; `at` is its end, now unless told."""
        phases = msgspec.json.encode(times.phases).decode()
        others = msgspec.json.encode(tuple(left)).decode()
        self._write("switches", at, model, level, from_state.value, phases, times.total, others)

    def record_state(
        self, model: str, state: State, level: int | None = None, *, at: float | None = None
    ) -> None:
        """Keep that `model` entered a state."""
        self._write("states", at, model, state.value, level)

    def record_cold_start(self, model: str, seconds: float, *, at: float | None = None) -> None:
        """Keep how long a start took, until the model could answer."""
        self._write("cold_starts", at, model, seconds)

    def record_served(
        self, model: str, requests: int, prompt_tokens: int, generated_tokens: int, *, at: float | None = None
    ) -> None:
        """Keep what `model` served, on top of what is known of the same `BUCKET` seconds."""
        now = int(time.time() if at is None else at)
        self._write(
            "served", now - now % BUCKET, model, requests, prompt_tokens, generated_tokens, ending=ADD
        )

    def record_event(self, event: FleetEvent) -> None:
        """Keep something that happened, for `events_after`."""
        content = msgspec.json.encode(event).decode()
        statement = "INSERT INTO events (time, config, event) VALUES (?1, ?2, ?3)"
        if event.kind is Kind.CONFIG:  # whoever has the same file open hears of the same change
            statement = (
                "INSERT INTO events (time, config, event) SELECT ?1, ?2, ?3 WHERE NOT EXISTS (SELECT 1 "
                "FROM events WHERE config = ?2 AND json_valid(event) AND "
                "json_extract(event, '$.kind') = ?4 AND json_extract(event, '$.config') = ?5 AND "
                "json_extract(event, '$.model') = ?6 AND json_extract(event, '$.detail') = ?7)"
            )
            more: tuple[Value, ...] = (event.kind.value, event.config, event.model, event.detail)
        else:
            more = ()
        self._keep(statement, (event.time, self._config, content, *more))

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    def past(self, models: Sequence[str], window: float) -> Past:
        """All that a timeline of the last `window` seconds shows, and today's sums (blocks for ms)."""
        now = time.time()
        starts = {name: self.usual_cold_start(name) for name in models}
        return Past(
            percentiles={name: self.percentiles(name) for name in models},
            cold_starts={name: seconds for name, seconds in starts.items() if seconds is not None},
            switches_today=sum(past.from_state is State.ASLEEP for past in self.switches_today()),
            saved_today=self.saved_since(midnight(now)),
            spans=tuple(self.states_between(now - window, now)),
            switches=tuple(self.switches_since(now - window)),
            served=tuple(self.served_between(now - window, now, max(BUCKET, int(window / STRETCHES)))),
        )

    def percentiles(self, model: str) -> dict[int, Percentiles]:
        """The seconds of switches to `model` from asleep, by level; a level that was not used is left out."""
        rows = self._read(
            "SELECT level, total FROM switches WHERE config = ? AND model = ? AND from_state = ?",
            (self._config, model, State.ASLEEP.value),
        )
        by_level: dict[int, list[float]] = {}
        for level, total in rows:
            if level is not None:
                by_level.setdefault(level, []).append(total)
        return {level: _percentiles(by_level[level]) for level in sorted(by_level)}

    def switches_since(self, start: float) -> list[PastSwitch]:
        """The switches from a moment on, the oldest first."""
        rows = self._read(
            "SELECT time, model, level, from_state, phases, total, left FROM switches "
            "WHERE config = ? AND time >= ? ORDER BY time",
            (self._config, start),
        )
        return [_past_switch(row) for row in rows]

    def switches_today(self) -> list[PastSwitch]:
        """The switches since midnight, local time."""
        return self.switches_since(midnight(time.time()))

    def rates(self) -> dict[str, float]:
        """Switches to each model a day, over the last 30 days; empty until there is a week of them."""
        now = time.time()
        past = self.switches_since(now - RATE_DAYS * DAY)
        days = (now - past[0].time) / DAY if past else 0.0
        if days < RATE_MINIMUM_DAYS:
            return {}
        return {model: count / days for model, count in Counter(each.model for each in past).items()}

    def saved_since(self, start: float) -> Saved:
        """What the switches since then saved, each against the usual cold start of its own model."""
        slept = [past for past in self.switches_since(start) if past.from_state is State.ASLEEP]
        usual = {model: self.usual_cold_start(model) for model in {past.model for past in slept}}
        gains = [cold - past.times.total for past in slept if (cold := usual[past.model]) is not None]
        return Saved(switches=len(slept), seconds=sum(gains), unknown=len(slept) - len(gains))

    def usual_cold_start(self, model: str) -> float | None:
        """The median of a model's cold starts, in seconds; None if none is known."""
        rows = self._read(
            "SELECT seconds FROM cold_starts WHERE config = ? AND model = ? ORDER BY time DESC LIMIT 50",
            (self._config, model),
        )
        return median(row[0] for row in rows) if rows else None

    def states_between(self, start: float, end: float) -> list[StateSpan]:
        """Who was in which state when, cut to these moments; by model, the oldest first."""
        rows = self._read(
            "SELECT model, time, state, level FROM states WHERE config = ?1 AND time < ?3 AND time >= "
            "COALESCE((SELECT MAX(time) FROM states AS earlier WHERE earlier.config = ?1 "
            "AND earlier.model = states.model AND earlier.time <= ?2), ?2) ORDER BY model, time, rowid",
            (self._config, start, end),
        )
        spans = []
        for row, following in zip(rows, [*rows, None][1:], strict=True):
            model, began, state, level = row
            ended = following[1] if following is not None and following[0] == model else end
            if ended > max(began, start):
                spans.append(
                    StateSpan(
                        model=model, state=State(state), level=level, start=max(began, start), end=ended
                    )
                )
        return spans

    def launches_around(self, model: str, moment: float) -> tuple[float, float]:
        """When the last start before a moment began and the first after it; -inf, inf where none is known."""
        ((before, after),) = self._read(
            "SELECT MAX(CASE WHEN time <= ?4 THEN time END), MIN(CASE WHEN time > ?4 THEN time END) "
            "FROM states WHERE config = ?1 AND model = ?2 AND state = ?3",
            (self._config, model, State.STARTING.value, moment),
        ) or ((None, None),)
        return -math.inf if before is None else before, math.inf if after is None else after

    def served_between(self, start: float, end: float, step: int = BUCKET) -> list[Served]:
        """What was served in stretches of `step` seconds, a multiple of `BUCKET`; by model, oldest first."""
        rows = self._read(
            "SELECT model, time - time % ?4, SUM(requests), SUM(prompt_tokens), SUM(generated_tokens) "
            "FROM served WHERE config = ?1 AND time > ?2 AND time < ?3 GROUP BY 1, 2 ORDER BY 1, 2",
            (self._config, start - BUCKET, end, step),
        )
        return [
            Served(
                model=model,
                time=began,
                seconds=step,
                requests=asked,
                prompt_tokens=read,
                generated_tokens=told,
            )
            for model, began, asked, read, told in rows
        ]

    def events_after(self, last: int, limit: int = 1000) -> tuple[list[FleetEvent], int]:
        """The events that were kept after the one with this id, the oldest first, and the id to go on after.

        `limit` at most; what a newer version wrote and this one does not know is left out. A history that was
        broken begins anew, and so do its ids.
        """
        rows = self._read(
            "SELECT * FROM (SELECT id, event FROM events WHERE config = ? AND id > ? ORDER BY id LIMIT ?)"
            " UNION ALL SELECT COALESCE(MAX(id), 0), NULL FROM events",
            (self._config, last, limit),
        )
        *rows, (newest, _) = rows or [(last, None)]
        if rows:
            return _events(rows), rows[-1][0]
        return [], last if newest >= last else 0

    def latest_events(self, count: int, *, only_failures: bool = False) -> list[FleetEvent]:
        """The last `count` events, or the last that are failures, the oldest first."""
        chosen = f" AND {FAILURES}" if only_failures else ""
        query = f"SELECT id, event FROM events WHERE config = ?{chosen} ORDER BY id DESC LIMIT ?"
        return _events(self._read(query, (self._config, count))[::-1])

    def last_event_id(self, since: float = math.inf) -> int | None:
        """The id after which the events since a moment come, or those still to come; 0 before the first.

        None if that cannot be known now: there is no history yet, or it is locked.
        """
        rows = self._read(
            "SELECT COALESCE((SELECT MIN(id) - 1 FROM events WHERE config = ?1 AND time >= ?2),"
            " (SELECT MAX(id) FROM events), 0)",
            (self._config, since),
        )
        return rows[0][0] if rows else None

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────

    def _write(self, table: str, at: float | None, *values: Value, ending: str = "") -> None:
        row = (time.time() if at is None else at, self._config, *values)
        statement = f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))}) {ending}"
        self._keep(statement, row)

    def _keep(self, statement: str, values: Sequence[Value]) -> None:
        self._waiting.append((statement, values))
        self._worker.submit(self._write_waiting)

    def _write_waiting(self) -> None:
        """Write all that waits in one transaction: each has its cost, and a switch leaves a dozen entries."""
        entries = []
        while self._waiting:
            entries.append(self._waiting.popleft())

        def write(connection: sqlite3.Connection) -> list[tuple[Any, ...]]:
            for statement, values in entries:
                connection.execute(statement, values)
            return []

        if entries:
            self._guarded(write)

    def _read(self, query: str, values: Sequence[Value]) -> list[tuple[Any, ...]]:
        return self._worker.submit(self._asked, query, values).result()

    def _asked(self, query: str, values: Sequence[Value]) -> list[tuple[Any, ...]]:
        """The answer; to ask makes no file."""
        if self._connection is None and not os.path.exists(self._path):
            return []
        return self._guarded(lambda connection: connection.execute(query, values).fetchall())

    def _guarded(self, work: Callable[[sqlite3.Connection], list[tuple[Any, ...]]]) -> list[tuple[Any, ...]]:
        """Do `work` in a transaction; nothing that the database does gets out of here."""
        for _ in range(2):
            try:
                with self._connected() as connection:
                    return work(connection)
            except LockBusyError as error:
                self._is_held(error.holder, error.path)
                break
            except (sqlite3.Error, OSError) as error:
                if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
                    self._is_held(self._who_writes(), self._path)
                    break
                if not self._is_broken(error):
                    self._tell(f"The history cannot be kept: {error}.")
                    break
                self._set_aside()
        return []

    def _connected(self) -> sqlite3.Connection:
        """The open database; raises sqlite3.Error or OSError."""
        if self._connection is None:
            with self._alone():
                connection = sqlite3.connect(self._path, timeout=self._lock_seconds, check_same_thread=False)
                try:
                    prepare(connection)
                except BaseException:
                    connection.close()
                    raise
            self._connection = connection
            self._next_drop = 0.0
        self._connection.execute(f"PRAGMA busy_timeout = {int(self._patience() * 1000)}")
        if time.monotonic() >= self._next_drop:
            self._next_drop = time.monotonic() + self._drop_every
            with contextlib.suppress(sqlite3.OperationalError), self._connection:
                drop_old(self._connection)  # a file that is locked or full is not worth an entry
        return self._connection

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Open one at a time: SQLite refuses at once if two processes change a new file to WAL together."""
        descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            lock_soon(descriptor, self._path.with_suffix(".lock"), self._patience())
            with contextlib.suppress(FileExistsError):
                # Never a file that is there: closing it would drop the locks of SQLite in this process.
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            yield
        finally:
            os.close(descriptor)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _is_broken(self, error: Exception) -> bool:
        """Whether the file is no database any more."""
        code = getattr(error, "sqlite_errorcode", None)
        return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

    def _set_aside(self) -> None:
        """Put the broken file out of the way, unless another process has; a new one takes its place."""
        self._disconnect()
        aside = self._path.with_name(f"{self._path.name}.broken-{int(time.time())}")
        with contextlib.suppress(OSError, LockBusyError), self._alone():
            if not _is_sound(self._path):
                self._path.rename(aside)
                for ending in ("-wal", "-shm"):
                    self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
        self._tell(f"The history was broken; it was kept as {aside.name} and begins anew.")

    def _is_held(self, who: Holder | None, path: Path) -> None:
        """Somebody was waited for in vain: say who."""
        if self._patience():
            self._impatient_until = time.monotonic() + BUSY_SECONDS
        by = f"{describe(who)}. {cure_for(who, path)}" if who else "another process."
        self._tell(f"The history has gaps: it is locked by {by}")

    def _patience(self) -> float:
        """How long to wait now, in seconds."""
        return self._lock_seconds if time.monotonic() >= self._impatient_until else 0.0

    def _who_writes(self) -> Holder | None:
        """Who holds SQLite's own locks; None if the kernel does not show it."""
        files = []
        for path in (self._path, self._path.with_name(f"{self._path.name}-shm")):
            with contextlib.suppress(OSError):
                files.append(os.stat(path))
        # In WAL mode every open connection holds a shared lock: only one that writes is in the way.
        pids = [pid for pid in locking(*files, exclusive=True) if pid != os.getpid()]
        return process_as_holder(pids[0]) if pids else None

    def _tell(self, sentence: str) -> None:
        """Say the first thing that is wrong; what follows is most often the same."""
        self._note = self._note or sentence


def midnight(now: float) -> float:
    """UTC seconds at which the local day of `now` began."""
    local = datetime.fromtimestamp(now).astimezone()
    return local.replace(hour=0, minute=0, second=0, microsecond=0).timestamp()


def _is_sound(path: Path) -> bool:
    """Whether a file is a database that can be read."""
    with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
        try:
            return bool(connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",))
        except sqlite3.DatabaseError as error:
            return isinstance(error, sqlite3.OperationalError)


def _percentiles(totals: Sequence[float]) -> Percentiles:
    """By the nearest rank."""
    ranked = sorted(totals)

    def rank(share: float) -> float:
        return ranked[max(0, math.ceil(share * len(ranked)) - 1)]

    return Percentiles(count=len(ranked), p50=rank(0.5), p95=rank(0.95))


def _events(rows: Sequence[Sequence[Any]]) -> list[FleetEvent]:
    events = []
    for number, content in rows:
        with contextlib.suppress(msgspec.DecodeError):
            event = msgspec.json.decode(content, type=FleetEvent)
            events.append(msgspec.structs.replace(event, id=number))
    return events


def _past_switch(row: Sequence[Any]) -> PastSwitch:
    ended, model, level, from_state, phases, total, left = row
    times = SwitchTimes(phases=msgspec.json.decode(phases, type=dict[str, float | None]), total=total)
    others = msgspec.json.decode(left, type=tuple[str, ...])
    return PastSwitch(
        time=ended, model=model, level=level, from_state=State(from_state), times=times, left=others
    )
