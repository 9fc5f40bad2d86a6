"""Where files live, and what the person agreed to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.types import CONFIG_NAME
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.files import trust, trusted, write_private
from vllm_sleep_tui.paths import config_dir, find_config, state_dir


def test_the_state_folder_is_made_for_this_user_alone() -> None:
    folder = state_dir()
    assert folder == Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert state_dir() == folder


def test_a_state_folder_that_cannot_be_made_is_an_error_with_a_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(OperationError) as caught:
        state_dir()
    assert "XDG_STATE_HOME" in caught.value.cure


def test_the_given_config_wins_over_the_folders_and_that_over_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        find_config(None)
    assert "init" in caught.value.cure
    assert "demo" in caught.value.cure
    config_dir().mkdir(parents=True)
    users = config_dir() / CONFIG_NAME
    users.write_text("")
    assert find_config(None) == users
    Path(CONFIG_NAME).write_text("")
    assert find_config(None) == Path(CONFIG_NAME)
    assert find_config(users) == users
    with pytest.raises(UsageError, match="no such file"):
        find_config(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="a folder, not a file"):
        find_config(tmp_path)


def test_an_agreement_is_for_one_file_with_one_content(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    assert not trusted(first, "1", tmp_path)
    trust(first, "1", tmp_path)
    trust(second, "2", tmp_path)
    assert trusted(first, "1", tmp_path)
    assert trusted(second, "2", tmp_path)
    assert not trusted(first, "2", tmp_path)
    (tmp_path / "trusted.json").write_text("broken")
    assert not trusted(first, "1", tmp_path)


def test_a_private_file_is_replaced_whole_and_read_by_nobody_else(tmp_path: Path) -> None:
    write_private(tmp_path / "f", b"one")
    write_private(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".f")] == []
    with pytest.raises(OperationError, match="cannot be written"):
        write_private(tmp_path / "none" / "f", b"")


def test_a_pipe_in_the_place_of_the_config_is_not_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "vllm-sleep-tui.yaml"
    os.mkfifo(path)
    with pytest.raises(UsageError, match="it is not a regular file"):
        load(path)
