"""The tables of ``history.db``, and how long what is in them is kept."""

from __future__ import annotations

import sqlite3
import time

from vllm_sleep_tui.fleet.events import Kind, Outcome

DAY = 86400.0
KEPT_DAYS = 90
BUCKET = 10
"""Seconds over which requests and tokens are summed."""
THIN_BUCKET, FINE_DAYS = 600, 2
"""Those that are older than so many days are summed over so many seconds."""
SCHEMA = """
CREATE TABLE IF NOT EXISTS switches (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, level INTEGER, from_state TEXT NOT NULL,
    phases TEXT NOT NULL, total REAL NOT NULL, left TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS states (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, state TEXT NOT NULL, level INTEGER);
CREATE TABLE IF NOT EXISTS cold_starts (
    time REAL NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, seconds REAL NOT NULL);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, time REAL NOT NULL, config TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS served (
    time INTEGER NOT NULL, config TEXT NOT NULL, model TEXT NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL,
    PRIMARY KEY (config, model, time)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS switches_by_time ON switches (config, time);
CREATE INDEX IF NOT EXISTS states_by_model ON states (config, model, time);
CREATE INDEX IF NOT EXISTS events_by_config ON events (config, id);
CREATE INDEX IF NOT EXISTS cold_starts_by_model ON cold_starts (config, model, time);
"""
FAILURES = (
    f"json_valid(event) AND (json_extract(event, '$.kind') = '{Kind.FAULT}'"
    f" OR json_extract(event, '$.outcome') = '{Outcome.FAILED}')"
)
"""What `FleetEvent.is_failure` says, for the database."""
TABLES = ("switches", "states", "cold_starts", "events", "served")
ADD = """
ON CONFLICT (config, model, time) DO UPDATE SET requests = requests + excluded.requests,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    generated_tokens = generated_tokens + excluded.generated_tokens
"""
"""How an insertion into `served` ends: what is there already grows."""
THIN = f"""
INSERT INTO served SELECT time - time % {THIN_BUCKET}, config, model, SUM(requests), SUM(prompt_tokens),
    SUM(generated_tokens) FROM served WHERE time < ? AND time % {THIN_BUCKET} <> 0 GROUP BY 1, 2, 3 {ADD}
"""


def prepare(connection: sqlite3.Connection) -> None:
    """Make the tables that are missing."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.executescript(SCHEMA)


def drop_old(connection: sqlite3.Connection) -> None:
    """Drop what is too old and thin what no timeline shows any more."""
    now = time.time()
    for table in TABLES:
        connection.execute(f"DELETE FROM {table} WHERE time < ?", (now - KEPT_DAYS * DAY,))
    fine = int(now - FINE_DAYS * DAY) // THIN_BUCKET * THIN_BUCKET
    connection.execute(THIN, (fine,))
    connection.execute(f"DELETE FROM served WHERE time < ? AND time % {THIN_BUCKET} <> 0", (fine,))
