"""Conversations on disk: kept, found, exported, forgotten, and never in the way."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_sleep_tui.cli.chat import Talk
from vllm_sleep_tui.config.parameters import Parameters
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.fleet.conversations import (
    Conversations,
    Handle,
    KeptTurn,
    Role,
    as_json,
    as_markdown,
    imported,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Conversations]:
    made = Conversations(tmp_path, "a.yaml")
    yield made
    made.close()


def said(store: Conversations, model: str, *texts: str) -> Handle:
    handle = Handle(model)
    for number, text in enumerate(texts):
        role = "assistant" if number % 2 else "user"
        store.keep(handle, number, KeptTurn(role=role, text=text, at=time.time(), model=model))
    return handle


def test_who_goes_on_from_the_shell_sends_no_two_messages_of_one_role(store: Conversations) -> None:
    said(store, "a", "lost")  # nobody answered
    kept = store.latest("a").result()
    assert kept is not None
    handle = Handle("a", kept.id, 1)
    turns: list[tuple[Role, str]] = [
        ("user", "one"),
        ("assistant", "first"),
        ("assistant", "another model's"),
        ("user", "lost, too"),
    ]
    for number, (role, text) in enumerate(turns, 1):
        store.keep(handle, number, KeptTurn(role=role, text=text, at=1.0, model="a"))
    told = Talk(store, "a", goes_on=True).messages("two", (), None)
    assert [(each["role"], each["content"]) for each in told] == [
        ("user", "one"),
        ("assistant", "first"),
        ("user", "two"),
    ]


def test_what_was_said_is_there_for_the_next_one_and_private(store: Conversations, tmp_path: Path) -> None:
    said(store, "qwen", "Why <b>?", "Because.")
    store.turns(0).result()
    other = Conversations(tmp_path, "a.yaml")
    kept = other.latest("qwen").result()
    assert kept is not None
    assert (kept.title, kept.turns) == ("Why <b>?", 1)
    assert [turn.text for turn in other.turns(kept.id).result()] == ["Why <b>?", "Because."]
    assert other.latest("phi").result() is None
    other.close()
    elsewhere = Conversations(tmp_path, "b.yaml")
    assert elsewhere.listed().result() == []
    elsewhere.close()
    assert stat.S_IMODE((tmp_path / "conversations.db").stat().st_mode) == 0o600


def test_they_are_found_by_their_words_renamed_and_forgotten_for_good(
    store: Conversations, tmp_path: Path
) -> None:
    said(store, "qwen", "About the sea", "It is 100% blue_ish.")
    handle = said(store, "phi", "About my secret-xyzzy", "I keep it.")
    assert [kept.model for kept in store.listed().result()] == ["phi", "qwen"]
    assert [kept.title for kept in store.listed("SEA blue").result()] == ["About the sea"]
    assert [kept.model for kept in store.listed("100%").result()] == ["qwen"]
    assert store.listed("100_").result() == []
    assert store.listed("\udcff").result() == []  # an argument that is not UTF-8
    assert handle.id is not None
    assert store.rename(handle.id, "Another\nname").result()
    assert store.listed("another name").result()[0].id == handle.id
    assert b"xyzzy" in (tmp_path / "conversations.db").read_bytes()
    assert store.delete(handle.id).result()
    assert not store.delete(handle.id).result()
    assert b"xyzzy" not in (tmp_path / "conversations.db").read_bytes()
    assert [kept.model for kept in store.listed().result()] == ["qwen"]


def test_two_processes_that_go_on_with_one_lose_nothing_of_each_other(
    store: Conversations, tmp_path: Path
) -> None:
    first = said(store, "qwen", "q", "a")
    assert store.latest().result() is not None
    assert first.id is not None
    other = Conversations(tmp_path, "a.yaml")
    second = Handle("qwen", first.id, turns=2)
    for keeper, handle, words in ((store, first, "here"), (other, second, "there")):
        keeper.keep(handle, 2, KeptTurn(role="user", text=words, at=1.0))
        keeper.keep(handle, 3, KeptTurn(role="assistant", text="half of", at=2.0))
        keeper.keep(handle, 3, KeptTurn(role="assistant", text=f"answer {words}", at=2.0))
        keeper.latest().result()
    assert second.id is not None
    for id, words in ((first.id, "here"), (second.id, "there")):
        assert [turn.text for turn in store.turns(id).result()] == ["q", "a", words, f"answer {words}"]
    other.close()


def test_what_is_deleted_while_it_goes_on_stays_so_and_what_follows_is_kept(store: Conversations) -> None:
    handle = said(store, "qwen", "secret", "half of")
    assert store.latest().result() is not None
    assert handle.id is not None
    assert store.delete(handle.id).result()
    store.keep(handle, 1, KeptTurn(role="assistant", text="half of a secret", at=2.0))
    assert store.listed().result() == []
    store.keep(handle, 2, KeptTurn(role="user", text="another matter", at=3.0))
    kept = store.latest().result()
    assert kept is not None
    assert (kept.title, kept.turns, store.note) == ("another matter", 1, None)


def test_one_is_exported_and_comes_back_whole(store: Conversations, tmp_path: Path) -> None:
    handle = Handle("qwen")
    store.keep(handle, 0, KeptTurn(role="user", text="<b>\n\x1b[31mred", at=1.0))
    answer = KeptTurn(
        role="assistant",
        text="```\nx\n```",
        at=2.0,
        model="qwen",
        reasoning="Hm.",
        ttft=0.1,
        finish_reason="length",
    )
    store.keep(handle, 1, answer)
    store.keep(handle, 1, answer)  # again, as while it streams
    assert store.latest().result() is not None
    whole = store.whole(handle.id or 0).result()
    assert whole is not None
    text = as_markdown(whole)
    assert "## You\n\n<b>\nred\n\n## qwen\n\n> Hm.\n\n```\nx\n```" in text
    path = tmp_path / "export.json"
    path.write_bytes(as_json(whole))
    number = store.add(imported(path)).result()
    assert number is not None
    again = store.whole(number).result()
    assert again == whole
    never = path.read_text().replace('"begun": 1.0', '"begun": 1e18')
    for wrong in ('{"turns": 1}', never):
        path.write_text(wrong)
        with pytest.raises(OperationError, match="no exported conversation"):
            imported(path)


def test_nothing_is_kept_where_the_config_says_so(tmp_path: Path) -> None:
    store = Conversations(tmp_path, keeps=False)
    said(store, "qwen", "secret", "answer")
    assert store.listed().result() == []
    store.close()
    assert not (tmp_path / "conversations.db").exists()


def test_a_broken_file_is_put_aside_and_told_and_a_folder_in_its_place_too(tmp_path: Path) -> None:
    (tmp_path / "conversations.db").write_bytes(b"no database" * 1000)
    store = Conversations(tmp_path)
    assert store.listed().result() == []
    said(store, "qwen", "q")
    assert len(store.listed().result()) == 1
    assert store.note is not None
    assert "conversations.db.broken-" in store.note
    store.close()
    folder = tmp_path / "other"
    (folder / "conversations.db").mkdir(parents=True)
    store = Conversations(folder)
    said(store, "qwen", "q")
    assert store.listed().result() == []
    assert store.note is not None
    assert "cannot be kept" in store.note
    store.close()


def test_how_a_model_is_asked_is_kept_also_in_a_file_of_before(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "conversations.db") as before:  # as the version before made it
        before.execute(
            "CREATE TABLE conversations (id INTEGER PRIMARY KEY AUTOINCREMENT, config TEXT NOT NULL,"
            " model TEXT NOT NULL, title TEXT NOT NULL, begun REAL NOT NULL, changed REAL NOT NULL)"
        )
        before.execute("INSERT INTO conversations VALUES (1, 'a.yaml', 'qwen', 'old', 1.0, 1.0)")
    before.close()
    store = Conversations(tmp_path, "a.yaml")
    old = store.whole(1).result()
    assert old is not None
    assert (old.title, old.parameters, store.note) == ("old", Parameters(), None)
    handle = Handle("qwen", 1)
    store.keep_parameters(handle, Parameters(temperature=0, stop=("a",)))
    said(store, "phi", "q", "a")
    found = store.whole(1).result()
    assert found is not None
    assert found.parameters == Parameters(temperature=0, stop=("a",))
    assert len(store.listed("", 1).result()) == 1
    with pytest.raises(UsageError, match="title is empty"):
        store.rename(1, " \x1b[2J\n")
    assert store.keep_preset("wild", Parameters(temperature=2)).result()
    assert store.presets().result() == {"wild": Parameters(temperature=2)}
    store.close()
