"""Conversations with models, kept in ``conversations.db`` of the state folder, unless the config says not to.

All of it runs on one thread of its own, in order: to keep something returns at once. A database that is
locked, full or broken costs what would have been kept and one note, never an answer.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec

from vllm_sleep_tui.config.parameters import Parameters
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.files import as_text, read_regular
from vllm_sleep_tui.fleet.pictures import Picture
from vllm_sleep_tui.fleet.snapshot import TokenChance
from vllm_sleep_tui.text import clean, one_line
from vllm_sleep_tui.units import date_and_time

if TYPE_CHECKING:
    import sqlite3  # imported where it is used: the panel's first screen needs none of it

T = TypeVar("T")
Role = Literal["user", "assistant"]
LOCK_SECONDS = 0.5
"""How long another process's write is waited for."""
TITLE_LENGTH = 60
"""Characters of the first question that become a conversation's title."""
Moment = Annotated[float, msgspec.Meta(ge=0, le=253_402_214_400)]
"""UTC seconds, as far as a clock can write them: up to the year 9999."""
MAX_IMPORT = 256 * 1024 * 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT, config TEXT NOT NULL, model TEXT NOT NULL, title TEXT NOT NULL,
    begun REAL NOT NULL, changed REAL NOT NULL, parameters TEXT NOT NULL DEFAULT '{}');
CREATE TABLE IF NOT EXISTS turns (
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE, number INTEGER NOT NULL,
    turn TEXT NOT NULL, PRIMARY KEY (conversation, number)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS presets (
    config TEXT NOT NULL, name TEXT NOT NULL, parameters TEXT NOT NULL, PRIMARY KEY (config, name))
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS conversations_by_model ON conversations (config, model, changed);
"""
_ADDED = "ALTER TABLE conversations ADD COLUMN parameters TEXT NOT NULL DEFAULT '{}'"
"""What a file of a version that knew no parameters lacks."""
_LISTED = (
    "SELECT id, model, title, begun, changed, "
    "(SELECT COUNT(*) FROM turns WHERE conversation = id AND json_extract(turn, '$.role') = 'user'"
    " AND json_extract(turn, '$.is_dropped') IS NULL) FROM conversations"
)


class KeptCall(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a model called, as it came; the arguments are JSON unless the model made a mistake."""

    name: str
    arguments: str
    id: str = ""


class KeptTurn(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One question or answer; times are UTC seconds, durations seconds, and what is not known is None."""

    role: Role
    text: str
    at: float
    model: str | None = None
    """Who answered."""
    reasoning: str = ""
    calls: tuple[KeptCall, ...] = ()
    chances: tuple[TokenChance, ...] = ()
    """Of each token, where `logprobs` were asked for."""
    parameters: Parameters = Parameters()
    """What it was asked with."""
    thought_seconds: float | None = None
    finish_reason: str | None = None
    error: str | None = None
    """What ended it before its end."""
    switch_seconds: float | None = None
    ttft: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens_per_s: float | None = None
    pictures: tuple[Picture, ...] = ()
    """What a question showed: where they lay and their digests, not what is in them."""
    is_dropped: bool = False
    """Another question or answer took its place: the model is not told of it any more."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One conversation of the list."""

    id: int
    model: str
    """Whom it was begun with, or went on with."""
    title: str
    begun: float
    """UTC seconds."""
    changed: float
    turns: int
    """Its questions, without those that others took the place of."""


class Whole(msgspec.Struct, frozen=True, kw_only=True):
    """A conversation with all that was said, as it is exported and imported."""

    model: str
    title: str
    begun: Moment
    changed: Moment
    turns: tuple[KeptTurn, ...]
    parameters: Parameters = Parameters()
    """What is asked with from here on."""
    version: int = 1


class Handle:
    """A conversation that is being kept; it has an id once its first turn was written.

    `turns` is how many of it were read, where it is gone on with.
    """

    def __init__(
        self, model: str, id: int | None = None, turns: int = 0, parameters: Parameters | None = None
    ) -> None:
        self.model = model
        self.id = id
        self.parameters = parameters or Parameters()
        """What its next question is asked with; `Conversations.keep_parameters` changes them."""
        self.known = set(range(turns))
        """The numbers of the turns that were read or written here; others are another process's."""


class Conversations:
    """The conversations of one config; `close` writes what is left.

    Questions are answered by a Future, whose result is empty where nothing can be read; `note` says why.
    """

    def __init__(self, state_dir: Path, config: Path | str = "", *, keeps: bool = True) -> None:
        self._path = state_dir / "conversations.db"
        self._config = as_text(config)
        self.keeps = keeps
        """False: what is said goes with the process, and what was kept before is left as it is."""
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="conversations")
        self._connection: sqlite3.Connection | None = None
        self._note: str | None = None

    @property
    def note(self) -> str | None:
        """One line on what could not be kept; None if all was."""
        return self._note

    def close(self) -> None:
        """Write what was given and let go of the file."""
        self._worker.submit(self._disconnect)
        self._worker.shutdown()

    # ── keeping ──────────────────────────────────────────────────────────────────────────────────────────

    def keep(self, handle: Handle, number: int, turn: KeptTurn) -> None:
        """Keep a turn in its place of a conversation, or what became of it meanwhile.

        Where another process went on with the conversation, this one goes on as a conversation of its own:
        neither loses a turn. What was deleted meanwhile stays deleted.
        """
        if self.keeps:
            with contextlib.suppress(RuntimeError):  # closed: the panel has ended
                self._worker.submit(self._write, handle, number, turn)

    def _write(self, handle: Handle, number: int, turn: KeptTurn) -> None:
        id = self._guarded(lambda connection: self._keep(connection, handle, number, turn), None)
        if id is not None:  # committed
            handle.id = id
            handle.known.add(number)

    def _keep(
        self, connection: sqlite3.Connection, handle: Handle, number: int, turn: KeptTurn
    ) -> int | None:
        """The id of the conversation that it is kept in; None if it was deleted."""
        connection.execute("BEGIN IMMEDIATE")  # nobody may come between the look and the write
        found = connection.execute("SELECT 1 FROM conversations WHERE id = ?", (handle.id,)).fetchone()
        if found is None and number in handle.known:
            return None
        later = connection.execute(
            "SELECT number FROM turns WHERE conversation = ? AND number >= ?", (handle.id, number)
        )
        is_elsewhere = number not in handle.known and any(at not in handle.known for (at,) in later)
        id = handle.id
        if id is None or found is None or is_elsewhere:
            id = self._begin(connection, handle, number, turn)
        written = msgspec.json.encode(turn).decode()
        connection.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", (id, number, written))
        connection.execute(
            "UPDATE conversations SET changed = ?, model = ? WHERE id = ?", (time.time(), handle.model, id)
        )
        return id

    def _begin(
        self, connection: sqlite3.Connection, handle: Handle, number: int, turn: KeptTurn
    ) -> int | None:
        """A new conversation, with what was said before the turn in the one that it goes on from."""
        before = connection.execute("SELECT title FROM conversations WHERE id = ?", (handle.id,)).fetchone()
        title = one_line(turn.text)[:TITLE_LENGTH] if before is None else before[0]
        made = connection.execute(
            "INSERT INTO conversations (config, model, title, begun, changed, parameters)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (self._config, handle.model, title, turn.at, turn.at, _written(handle.parameters)),
        )
        connection.execute(
            "INSERT INTO turns SELECT ?, number, turn FROM turns WHERE conversation = ? AND number < ?",
            (made.lastrowid, handle.id, number),
        )
        return made.lastrowid

    def keep_parameters(self, handle: Handle, parameters: Parameters) -> None:
        """Ask with these from now on."""
        handle.parameters = parameters
        if self.keeps:
            with contextlib.suppress(RuntimeError):
                self._worker.submit(self._write_parameters, handle, parameters)

    def _write_parameters(self, handle: Handle, parameters: Parameters) -> None:
        statement = "UPDATE conversations SET parameters = ? WHERE id = ?"
        if handle.id is not None:  # else its first turn writes them
            self._asked(
                lambda connection: connection.execute(statement, (_written(parameters), handle.id)), None
            )

    def rename(self, id: int, title: str) -> Future[bool]:
        """Give it another title; False if there is none of that id. Raises UsageError for an empty one."""
        if not one_line(title):
            raise UsageError("The title is empty.", "Write at least one character that can be seen.")
        return self._change("UPDATE conversations SET title = ? WHERE id = ?", one_line(title), id)

    def delete(self, id: int) -> Future[bool]:
        """Forget it: its words are overwritten in the file; False if there is none of that id."""
        return self._change("DELETE FROM conversations WHERE id = ?", id)

    def _change(self, statement: str, *values: str | int) -> Future[bool]:
        def act(connection: sqlite3.Connection) -> bool:
            return connection.execute(statement, values).rowcount > 0

        return self._worker.submit(self._asked, act, False)

    def add(self, whole: Whole) -> Future[int | None]:
        """Keep a conversation that was exported; its id, or None if it cannot be kept."""

        def act(connection: sqlite3.Connection) -> int | None:
            made = connection.execute(
                "INSERT INTO conversations (config, model, title, begun, changed, parameters)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    self._config,
                    whole.model,
                    one_line(whole.title),
                    whole.begun,
                    whole.changed,
                    _written(whole.parameters),
                ),
            )
            rows = [
                (made.lastrowid, number, msgspec.json.encode(turn).decode())
                for number, turn in enumerate(whole.turns)
            ]
            connection.executemany("INSERT INTO turns VALUES (?, ?, ?)", rows)
            return made.lastrowid

        return self._worker.submit(self._guarded, act, None)

    # ── questions ────────────────────────────────────────────────────────────────────────────────────────

    def listed(self, words: str = "", most: int = -1) -> Future[list[Kept]]:
        """The latest `most` conversations, or all; with `words` those whose title or turns hold them all."""

        def act(connection: sqlite3.Connection) -> list[Kept]:
            query = f"{_LISTED} WHERE config = ?"
            values: list[str | int] = [self._config]
            for word in one_line(words).split():
                query += (
                    " AND (title LIKE ? ESCAPE '\\' OR model LIKE ? ESCAPE '\\'"
                    " OR EXISTS (SELECT 1 FROM turns WHERE conversation = id"
                    " AND json_extract(turn, '$.text') LIKE ? ESCAPE '\\'))"
                )
                values += [f"%{_escaped(word)}%"] * 3
            query += " ORDER BY changed DESC, id DESC LIMIT ?"
            return [_kept(row) for row in connection.execute(query, [*values, most])]

        return self._worker.submit(self._asked, act, [])

    def latest(self, model: str | None = None) -> Future[Kept | None]:
        """The conversation that was last gone on with, of one model or of any; None if there is none."""

        def act(connection: sqlite3.Connection) -> Kept | None:
            query, values = f"{_LISTED} WHERE config = ?", [self._config]
            if model is not None:
                query, values = f"{query} AND model = ?", [*values, model]
            row = connection.execute(f"{query} ORDER BY changed DESC, id DESC LIMIT 1", values).fetchone()
            return None if row is None else _kept(row)

        return self._worker.submit(self._asked, act, None)

    def questions(self, count: int) -> Future[list[str]]:
        """The last `count` different questions of all conversations, the first one first."""

        def act(connection: sqlite3.Connection) -> list[str]:
            rows = connection.execute(
                "SELECT json_extract(turn, '$.text'), MAX(json_extract(turn, '$.at')) AS at FROM turns"
                " JOIN conversations ON id = conversation WHERE config = ?"
                " AND json_extract(turn, '$.role') = 'user' GROUP BY 1 ORDER BY at DESC LIMIT ?",
                (self._config, count),
            )
            return [text for text, _ in rows][::-1]

        return self._worker.submit(self._asked, act, [])

    def turns(self, id: int) -> Future[tuple[KeptTurn, ...]]:
        """All that was said in one, in order."""
        return self._worker.submit(self._asked, lambda connection: _turns(connection, id), ())

    def whole(self, id: int) -> Future[Whole | None]:
        """One with all that was said; None if there is none of that id."""

        def act(connection: sqlite3.Connection) -> Whole | None:
            row = connection.execute(f"{_LISTED} WHERE config = ? AND id = ?", (self._config, id)).fetchone()
            if row is None:
                return None
            kept = _kept(row)
            asked = connection.execute("SELECT parameters FROM conversations WHERE id = ?", (id,)).fetchone()
            return Whole(
                model=kept.model,
                title=kept.title,
                begun=kept.begun,
                changed=kept.changed,
                turns=_turns(connection, id),
                parameters=msgspec.json.decode(asked[0], type=Parameters),
            )

        return self._worker.submit(self._asked, act, None)

    # ── presets ──────────────────────────────────────────────────────────────────────────────────────────

    def presets(self) -> Future[dict[str, Parameters]]:
        """Those that were given a name in the panel, in the order of their names."""

        def act(connection: sqlite3.Connection) -> dict[str, Parameters]:
            query = "SELECT name, parameters FROM presets WHERE config = ? ORDER BY name"
            rows = connection.execute(query, (self._config,))
            return {name: msgspec.json.decode(text, type=Parameters) for name, text in rows}

        return self._worker.submit(self._asked, act, {})

    def keep_preset(self, name: str, parameters: Parameters) -> Future[bool]:
        """Keep a preset, in place of one of that name; False if it cannot be kept."""

        def act(connection: sqlite3.Connection) -> bool:
            values = (self._config, name, _written(parameters))
            connection.execute("INSERT OR REPLACE INTO presets VALUES (?, ?, ?)", values)
            return True

        return self._worker.submit(self._guarded, act, False)

    def forget_preset(self, name: str) -> Future[bool]:
        """Delete a preset that was kept here; False if there is none of that name."""
        return self._change("DELETE FROM presets WHERE config = ? AND name = ?", self._config, name)

    # ── on the thread ────────────────────────────────────────────────────────────────────────────────────

    def _asked(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """The same where there is a file; to ask makes none."""
        if self._connection is None and not os.path.exists(self._path):
            return otherwise
        return self._guarded(act, otherwise)

    def _guarded(self, act: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Act on the database; nothing that it does gets out of here."""
        import sqlite3

        try:
            with self._connected() as connection:
                return act(connection)
        except (sqlite3.Error, OSError, msgspec.MsgspecError) as error:
            if getattr(error, "sqlite_errorcode", None) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
                self._set_aside()
            else:
                self._note = self._note or f"Conversations cannot be kept: {error}."
            return otherwise

    def _connected(self) -> sqlite3.Connection:
        import sqlite3

        if self._connection is None:
            with contextlib.suppress(FileExistsError):
                # Never a file that is there: closing it would drop the locks of SQLite in this process.
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            connection = sqlite3.connect(self._path, timeout=LOCK_SECONDS, check_same_thread=False)
            try:
                connection.execute("PRAGMA secure_delete = ON")
                connection.execute("PRAGMA foreign_keys = ON")
                connection.executescript(_SCHEMA)
                _complete(connection)
            except BaseException:
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _set_aside(self) -> None:
        self._disconnect()
        aside = self._path.with_name(f"{self._path.name}.broken-{int(time.time())}")
        with contextlib.suppress(OSError):
            self._path.rename(aside)
        self._note = self._note or f"The conversations were broken; they were kept as {aside.name}."


def as_markdown(whole: Whole) -> str:
    """A conversation for a person to read."""
    parts = [f"# {whole.title}", f"{whole.model}, {date_and_time(whole.begun)}"]
    for turn in whole.turns:
        if turn.is_dropped:
            continue
        who = "You" if turn.role == "user" else turn.model or whole.model
        parts.append(f"## {who}")
        if turn.parameters != Parameters():
            parts.append(f"*{turn.parameters.words()}*")
        if turn.reasoning:
            parts.append("\n".join(f"> {line}".rstrip() for line in turn.reasoning.splitlines()))
        if turn.text:
            parts.append(turn.text)
        parts += [f"Calls `{call.name}`:\n\n```json\n{call.arguments}\n```" for call in turn.calls]
        parts += [f"*{picture.words}*" for picture in turn.pictures]
        if turn.error:
            parts.append(f"*{turn.error}*")
    return clean("\n\n".join(parts) + "\n")


def as_json(whole: Whole) -> bytes:
    """A conversation as `imported` reads it."""
    return msgspec.json.format(msgspec.json.encode(whole), indent=2) + b"\n"


def imported(path: Path) -> Whole:
    """A conversation from a file that `as_json` made; raises OperationError."""
    try:
        whole = msgspec.json.decode(read_regular(path, MAX_IMPORT), type=Whole)
    except OSError as error:
        raise OperationError(
            f"{path} cannot be read: {error.strerror}.", "Name a file of an export."
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OperationError(
            f"{path} is no exported conversation: {error}.", "Export one as JSON: it has the form."
        ) from None
    return whole


def _escaped(word: str) -> str:
    return word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")


def _kept(row: Sequence[Any]) -> Kept:
    id, model, title, begun, changed, turns = row
    return Kept(id=id, model=model, title=title, begun=begun, changed=changed, turns=turns)


def _turns(connection: sqlite3.Connection, id: int) -> tuple[KeptTurn, ...]:
    rows = connection.execute("SELECT turn FROM turns WHERE conversation = ? ORDER BY number", (id,))
    return tuple(msgspec.json.decode(row[0], type=KeptTurn) for row in rows)


def _written(parameters: Parameters) -> str:
    return msgspec.json.encode(parameters).decode()


def _complete(connection: sqlite3.Connection) -> None:
    """Give a file of an earlier version what it lacks."""
    with connection:
        connection.execute("BEGIN IMMEDIATE")  # two processes must not both find it missing
        columns = [row[1] for row in connection.execute("PRAGMA table_info(conversations)")]
        if "parameters" not in columns:
            connection.execute(_ADDED)
