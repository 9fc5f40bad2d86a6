"""The history: what is kept, what is told of it, and that a bad file harms nobody."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from vllm_sleep_tui.fleet.events import FleetEvent, Kind
from vllm_sleep_tui.fleet.past import Served, StateSpan
from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import History, midnight
from vllm_sleep_tui.fleet.store.history_tables import DAY, FINE_DAYS, KEPT_DAYS


@pytest.fixture
def history(tmp_path: Path) -> Iterator[History]:
    """A new one."""
    with closing(History(tmp_path)) as opened:
        yield opened


def switch(
    history: History,
    model: str,
    total: float,
    level: int | None = 1,
    at: float | None = None,
    from_state: State = State.ASLEEP,
) -> None:
    """Record a switch that slept `other`."""
    times = SwitchTimes(phases={"sleep": total / 4, "wake": total / 2, "reload": None}, total=total)
    history.record_switch(model, times, level=level, from_state=from_state, left=["other"], at=at)


def test_a_switch_comes_back_as_it_was_recorded(history: History) -> None:
    switch(history, "qwen", 0.48, at=1000.0)
    (past,) = history.switches_since(999.0)
    assert (past.time, past.model, past.level, past.from_state) == (1000.0, "qwen", 1, State.ASLEEP)
    assert past.times == SwitchTimes(phases={"sleep": 0.12, "wake": 0.24, "reload": None}, total=0.48)
    assert past.left == ("other",)
    assert history.switches_since(1000.1) == []


def test_percentiles_are_by_level_and_leave_starts_out(history: History) -> None:
    for hundredths in range(100, 0, -1):
        switch(history, "qwen", hundredths / 100)
    switch(history, "qwen", 1.5, level=2)
    switch(history, "qwen", 50.0, level=None, from_state=State.STOPPED)
    switch(history, "phi", 9.0)
    found = history.percentiles("qwen")
    assert {level: (p.count, p.p50, p.p95) for level, p in found.items()} == {
        1: (100, 0.5, 0.95),
        2: (1, 1.5, 1.5),
    }
    assert history.percentiles("nobody") == {}


def test_time_saved_is_reckoned_against_each_models_own_cold_start(history: History) -> None:
    for seconds in (40.0, 50.0, 90.0):
        history.record_cold_start("qwen", seconds)
    now = time.time()
    switch(history, "qwen", 0.5)
    switch(history, "qwen", 1.5)
    switch(history, "unmeasured", 1.0)
    switch(history, "qwen", 50.0, level=None, from_state=State.STOPPED)
    switch(history, "qwen", 0.5, at=now - 100)
    saved = history.saved_since(now - 1)
    assert (saved.switches, saved.seconds, saved.unknown) == (3, 98.0, 1)


def test_todays_switches_begin_at_local_midnight(history: History) -> None:
    start = midnight(time.time())
    switch(history, "early", 1.0, at=start)
    switch(history, "yesterday", 1.0, at=start - 0.001)
    assert [past.model for past in history.switches_today()] == ["early"]
    assert time.localtime(start)[3:6] == (0, 0, 0)


def test_spans_are_cut_to_what_was_asked_and_know_what_was_before(history: History) -> None:
    history.record_state("qwen", State.STOPPED, at=5.0)
    history.record_state("qwen", State.AWAKE, at=10.0)
    history.record_state("qwen", State.ASLEEP, 1, at=30.0)
    history.record_state("phi", State.AWAKE, at=30.0)
    history.record_state("qwen", State.AWAKE, at=200.0)

    def span(model: str, state: State, start: float, end: float, level: int | None = None) -> StateSpan:
        return StateSpan(model=model, state=state, level=level, start=start, end=end)

    assert history.states_between(20.0, 100.0) == [
        span("phi", State.AWAKE, 30.0, 100.0),
        span("qwen", State.AWAKE, 20.0, 30.0),
        span("qwen", State.ASLEEP, 30.0, 100.0, level=1),
    ]
    assert history.states_between(0.0, 7.0) == [span("qwen", State.STOPPED, 5.0, 7.0)]


def served(history: History, model: str, at: float, requests: int = 1, generated: int = 20) -> None:
    """Record that so much was served, of ten tokens of prompt a request."""
    history.record_served(model, requests, 10 * requests, generated, at=at)


def stretch(model: str, time: float, requests: int, generated: int, seconds: float = 10) -> Served:
    return Served(
        model=model,
        time=time,
        seconds=seconds,
        requests=requests,
        prompt_tokens=10 * requests,
        generated_tokens=generated,
    )


def test_what_is_served_within_ten_seconds_is_one_entry_whoever_wrote_it(tmp_path: Path) -> None:
    then = time.time() // 10 * 10 - 100
    with closing(History(tmp_path)) as first, closing(History(tmp_path)) as next_leader:
        served(first, "qwen", then + 3.2, requests=0)
        served(first, "qwen", then + 5.9)
        assert first.served_between(0, then) == []
        served(next_leader, "qwen", then + 9.9, generated=5)
        served(next_leader, "qwen", then + 10.0)
        served(next_leader, "phi", then + 9.0)
        ten = [stretch("phi", then, 1, 20), stretch("qwen", then, 2, 45)]
        after = [stretch("qwen", then + 10, 1, 20)]
        assert next_leader.served_between(then, then + 20) == ten + after
        assert first.served_between(then + 9, then + 20) == ten + after, "the entry it lies in is told too"
        assert first.served_between(then + 10, then + 20) == after
    with closing(sqlite3.connect(tmp_path / "history.db")) as database:
        assert database.execute("SELECT COUNT(*) FROM served").fetchone() == (3,)


def test_over_a_long_time_what_was_served_is_told_in_longer_stretches(history: History) -> None:
    for at in (1200.0, 1250.0, 1310.0):
        served(history, "qwen", at)
    assert history.served_between(0, 2000.0, 60) == [
        stretch("qwen", 1200, 2, 40, seconds=60),
        stretch("qwen", 1260, 1, 20, seconds=60),
    ]


def test_what_was_served_is_thinned_after_two_days_and_forgotten_after_90(tmp_path: Path) -> None:
    hour = time.time() // 3600 * 3600
    old, forgotten = hour - (FINE_DAYS + 1) * DAY, hour - (KEPT_DAYS + 1) * DAY
    with closing(History(tmp_path)) as first:
        for at in (forgotten, old + 10, old + 20, old + 590, old + 600, hour, hour + 10):
            served(first, "qwen", at)
        assert len(first.served_between(0, hour + 60)) == 7
    for _ in range(2):  # the second time there is nothing left to thin
        with closing(History(tmp_path)) as later:
            assert later.served_between(0, hour + 60) == [
                stretch("qwen", old, 3, 60),
                stretch("qwen", old + 600, 1, 20),
                stretch("qwen", hour, 1, 20),
                stretch("qwen", hour + 10, 1, 20),
            ]
            assert later.note is None


EARLIER_SCHEMA = """
CREATE TABLE switches (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, level INTEGER, from_state TEXT NOT NULL,
    phases TEXT NOT NULL, total REAL NOT NULL, left TEXT NOT NULL);
CREATE TABLE states (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL, level INTEGER);
CREATE TABLE cold_starts (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, seconds REAL NOT NULL);
CREATE INDEX switches_by_time ON switches (config, time);
CREATE INDEX states_by_model ON states (config, model, time);
CREATE INDEX cold_starts_by_model ON cold_starts (config, model, time);
"""


def test_a_file_from_before_requests_were_kept_goes_on(tmp_path: Path) -> None:
    now = time.time()
    with closing(sqlite3.connect(tmp_path / "history.db")) as before:
        before.executescript(EARLIER_SCHEMA)
        before.execute("INSERT INTO states VALUES (?, '', 'qwen', 'awake', NULL)", (now - 60,))
        before.commit()
    with closing(History(tmp_path)) as history:
        assert history.served_between(0, now + 60) == []
        served(history, "qwen", now)
        assert [entry.requests for entry in history.served_between(0, now + 60)] == [1]
        assert [span.state for span in history.states_between(now - 100, now)] == [State.AWAKE]
        assert history.note is None


def test_two_configs_in_one_state_folder_do_not_mix(tmp_path: Path) -> None:
    with closing(History(tmp_path, "/a.yaml")) as first, closing(History(tmp_path, "/b.yaml")) as second:
        switch(first, "qwen", 1.0)
        second.record_state("qwen", State.AWAKE, at=1.0)
        assert first.switches_today()
        assert second.switches_today() == []
        assert first.states_between(0, 2) == []


def test_it_outlives_its_process_and_forgets_after_90_days(tmp_path: Path) -> None:
    now = time.time()
    with closing(History(tmp_path)) as first:
        switch(first, "old", 1.0, at=now - (KEPT_DAYS + 1) * DAY)
        switch(first, "kept", 1.0, at=now - (KEPT_DAYS - 1) * DAY)
    with closing(History(tmp_path)) as second:
        assert [past.model for past in second.switches_since(0)] == ["kept"]
        assert second.note is None
    assert stat.S_IMODE((tmp_path / "history.db").stat().st_mode) == 0o600


def test_a_rate_is_told_once_there_is_a_week(tmp_path: Path) -> None:
    now = time.time()
    with closing(History(tmp_path)) as history:
        switch(history, "qwen", 1.0, at=now - 6 * DAY)
        assert history.rates() == {}
        for day in (1, 2, 3, 10):
            switch(history, "qwen", 1.0, at=now - day * DAY)
        switch(history, "phi", 1.0, at=now - 40 * DAY)
        assert history.rates() == {"qwen": pytest.approx(0.5, rel=0.01)}


def test_to_ask_makes_no_file(tmp_path: Path) -> None:
    with closing(History(tmp_path)) as history:
        assert history.switches_today() == []
        assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_set_aside_and_a_new_one_begins(tmp_path: Path) -> None:
    (tmp_path / "history.db").write_bytes(b"this is no database at all" * 100)
    with closing(History(tmp_path)) as history:
        switch(history, "qwen", 1.0)
        assert [past.model for past in history.switches_today()] == ["qwen"]
        assert history.note is not None
        assert "kept as history.db.broken-" in history.note
    assert len(list(tmp_path.glob("history.db.broken-*"))) == 1


def test_who_follows_a_history_that_begins_anew_is_told_what_happens_from_then_on(tmp_path: Path) -> None:
    def happen(history: History, *times: float) -> None:
        for at in times:
            history.record_event(FleetEvent(time=at, kind=Kind.STATE, model="qwen"))

    with closing(History(tmp_path)) as history:
        happen(history, 1.0, 2.0, 3.0)
        told, last = history.events_after(0)
        assert [event.time for event in told] == [1.0, 2.0, 3.0]
        assert history.events_after(last) == ([], last)
    for path in tmp_path.glob("history.db*"):
        path.unlink()
    with closing(History(tmp_path)) as history:
        happen(history, 4.0)
        told, last = history.events_after(last)
        assert [event.time for event in history.events_after(last)[0]] == [4.0]


def test_a_new_file_is_not_set_aside_by_who_saw_the_broken_one_too(tmp_path: Path) -> None:
    (tmp_path / "history.db").write_bytes(b"this is no database at all" * 100)
    with closing(History(tmp_path)) as first, closing(History(tmp_path)) as second:
        for _ in range(20):
            switch(first, "a", 1.0)
            switch(second, "b", 1.0)
        first.switches_today()
        models = [past.model for past in second.switches_today()]
    assert (models.count("a"), models.count("b")) == (20, 20)
    assert len(list(tmp_path.glob("history.db.broken-*"))) == 1


def test_a_file_that_breaks_while_it_is_open_is_set_aside_too(tmp_path: Path) -> None:
    with closing(History(tmp_path)) as before:
        for _ in range(200):
            switch(before, "qwen", 1.0)
    content = (tmp_path / "history.db").read_bytes()
    (tmp_path / "history.db").write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
    with closing(History(tmp_path)) as history:
        history.switches_today()
        switch(history, "phi", 1.0)
        assert [past.model for past in history.switches_today()] == ["phi"]
        assert history.note is not None


def test_a_locked_file_costs_entries_and_a_note_but_no_error(tmp_path: Path) -> None:
    with closing(History(tmp_path)) as history, closing(sqlite3.connect(tmp_path / "history.db")) as other:
        switch(history, "before", 1.0)
        assert history.switches_today()
        other.execute("BEGIN IMMEDIATE")
        switch(history, "lost", 1.0)
        assert [past.model for past in history.switches_today()] == ["before"]
        assert history.note is not None
        assert "locked" in history.note
        other.rollback()
        switch(history, "after", 1.0)
        assert [past.model for past in history.switches_today()] == ["before", "after"]


def test_recording_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    with closing(History(tmp_path)) as history, closing(sqlite3.connect(tmp_path / "history.db")) as other:
        switch(history, "before", 1.0)
        assert history.switches_today()
        other.execute("BEGIN IMMEDIATE")
        began = time.perf_counter()
        for _ in range(40):
            switch(history, "waits", 1.0)
        assert time.perf_counter() - began < 10, "had each waited for the lock, it would have been 20 s"
        other.rollback()


def test_a_folder_that_cannot_be_written_costs_a_note(tmp_path: Path) -> None:
    with closing(History(tmp_path / "not/there")) as history:
        switch(history, "qwen", 1.0)
        assert history.switches_today() == []
        assert history.percentiles("qwen") == {}
        assert history.states_between(0, 1) == []
        assert history.note is not None


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    # On a busy machine one may be held up in a write.
    patient = partial(History, tmp_path, lock_seconds=60.0)
    with closing(patient()) as first, closing(patient()) as second:
        for _ in range(50):
            switch(first, "a", 1.0)
            switch(second, "b", 1.0)
        assert len(second.switches_today()) >= 50
        first.switches_today()
        models = [past.model for past in second.switches_today()]
        assert (models.count("a"), models.count("b")) == (50, 50)
        assert first.note is None


@pytest.mark.parametrize(("pause", "left"), [(DAY, ["old", "kept"]), (0.0, ["kept"])])
def test_what_is_too_old_is_dropped_while_the_file_stays_open(
    tmp_path: Path, pause: float, left: list[str]
) -> None:
    now = time.time()
    with closing(History(tmp_path, drop_every=pause)) as history:
        switch(history, "old", 1.0, at=now - (KEPT_DAYS + 1) * DAY)
        switch(history, "kept", 1.0, at=now - (KEPT_DAYS - 1) * DAY)
        assert [past.model for past in history.switches_since(0)] == left
        assert history.note is None
