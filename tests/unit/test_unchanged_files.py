"""What was made of a file is kept while the file is the same, and never longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_sleep_tui.files import Mark, Unchanged, mark


def test_a_file_that_has_been_the_same_for_long_is_read_once() -> None:
    made: list[Path] = []
    files = Unchanged(lambda path, _: made.append(path) or len(made))  # type: ignore[func-returns-value]
    path, deadline = Path(os.__file__), time.monotonic() + 60
    while files.get(path) != files.get(path) and time.monotonic() < deadline:
        time.sleep(0.1)  # until no write can bear the time of the one before
    assert files.get(path) == len(made)


def test_writes_that_leave_size_and_perhaps_time_as_they_were_are_seen(tmp_path: Path) -> None:
    path, files = tmp_path / "word", Unchanged(lambda path, _: path.read_text())
    for number in range(1000, 1200):
        with path.open("r+" if path.exists() else "w") as file:
            file.write(str(number))
        assert files.get(path) == str(number)


def test_another_file_in_its_place_is_read_and_one_that_is_gone_is_missed(tmp_path: Path) -> None:
    path, files = tmp_path / "link", Unchanged(lambda path, _: os.readlink(path))
    path.symlink_to("one")
    assert files.get(path) == "one"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.get(path)
    path.symlink_to("two")
    assert files.get(path) == "two"


def test_a_change_of_what_was_read_beside_the_file_counts_as_one_of_the_file(tmp_path: Path) -> None:
    path, other = tmp_path / "config", tmp_path / "included"
    made = []

    def make(path: Path, marks: dict[Path, Mark]) -> str:
        marks[other] = mark(other)
        made.append(path)
        return path.read_text() + (other.read_text() if other.exists() else "")

    files = Unchanged(make, tick=0.0)
    path.write_text("one ")
    assert (files.get(path), files.get(path), len(made)) == ("one ", "one ", 1)
    other.write_text("two")
    assert (files.get(path), files.get(path), len(made)) == ("one two", "one two", 2)
    other.unlink()
    assert (files.get(path), len(made)) == ("one ", 3)


def test_of_more_files_than_are_kept_the_first_is_read_again(tmp_path: Path) -> None:
    made = []

    def make(path: Path, _: object) -> str:
        made.append(path.name)
        return path.name

    files = Unchanged(make, tick=0.0, most=2)
    for name in "abc":
        (tmp_path / name).touch()
    for name in "abcbca":
        files.get(tmp_path / name)
    assert "".join(made) == "abca"
