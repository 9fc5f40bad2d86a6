"""What was made of a file is kept while the file is the same, and never longer."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from vllm_sleep_tui.files import Unchanged


def test_a_file_that_has_been_the_same_for_long_is_read_once() -> None:
    made: list[Path] = []
    files = Unchanged(lambda path: made.append(path) or len(made))  # type: ignore[func-returns-value]
    path, deadline = Path(os.__file__), time.monotonic() + 60
    while files.get(path) != files.get(path) and time.monotonic() < deadline:
        time.sleep(0.1)  # until no write can bear the time of the one before
    assert files.get(path) == len(made)


def test_writes_that_leave_size_and_perhaps_time_as_they_were_are_seen(tmp_path: Path) -> None:
    path, files = tmp_path / "word", Unchanged(Path.read_text)
    for number in range(1000, 1200):
        with path.open("r+" if path.exists() else "w") as file:
            file.write(str(number))
        assert files.get(path) == str(number)


def test_another_file_in_its_place_is_read_and_one_that_is_gone_is_missed(tmp_path: Path) -> None:
    path, files = tmp_path / "link", Unchanged(lambda path: os.readlink(path))
    path.symlink_to("one")
    assert files.get(path) == "one"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        files.get(path)
    path.symlink_to("two")
    assert files.get(path) == "two"
