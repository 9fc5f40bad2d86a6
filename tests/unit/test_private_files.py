"""Files of the person's own: none is written through a link, none lies open to others unsaid."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.unit.test_cli_usage import CONFIG, run

NAME = "vllm-sleep-tui.yaml"
SCHEMA = "vllm-sleep-tui.schema.json"
PRECIOUS = "what the person cannot lose\n"
STRANGER = 65_001
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act for another user")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of the person's that somebody laid a link to."""
    path = tmp_path / "precious"
    path.write_text(PRECIOUS)
    return path


def state() -> Path:
    return Path(os.environ["XDG_STATE_HOME"], "vllm-sleep-tui")


@pytest.mark.parametrize("arguments", [["init"], ["demo", "--init", "."], ["init", "--config", NAME]])
def test_nothing_is_written_through_a_link(here: Path, precious: Path, arguments: Sequence[str]) -> None:
    Path(NAME).symlink_to(precious)
    done = run(*arguments)
    assert done.returncode == 1
    assert "is there already" in done.stderr.splitlines()[0]
    assert len(done.stderr.splitlines()) == 2
    assert precious.read_text() == PRECIOUS
    assert Path(NAME).is_symlink()


@pytest.mark.parametrize("arguments", [["init"], ["demo", "--init", "."]])
def test_a_link_that_leads_nowhere_is_there_too(here: Path, tmp_path: Path, arguments: Sequence[str]) -> None:
    Path(NAME).symlink_to(tmp_path / "not yet")
    done = run(*arguments)
    assert (done.returncode, "is there already" in done.stderr) == (1, True)
    assert not (tmp_path / "not yet").exists()


@pytest.mark.parametrize("arguments", [["init"], ["demo", "--init", "."]])
def test_the_schema_beside_it_replaces_a_link_and_leaves_what_it_leads_to(
    here: Path, precious: Path, arguments: Sequence[str]
) -> None:
    Path(SCHEMA).symlink_to(precious)
    assert run(*arguments).returncode == 0
    assert precious.read_text() == PRECIOUS
    assert not Path(SCHEMA).is_symlink()
    for name in (NAME, SCHEMA):
        assert Path(name).stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in here.iterdir()) == sorted([NAME, SCHEMA])


def test_force_replaces_the_link_and_not_what_it_leads_to(precious: Path) -> None:
    Path(NAME).symlink_to(precious)
    assert run("init", "--force").returncode == 0
    assert precious.read_text() == PRECIOUS
    assert not Path(NAME).is_symlink()
    assert "models:" in Path(NAME).read_text()


@pytest.mark.parametrize("arguments", [["init", "--force"], ["demo", "--init", "."]])
def test_what_is_no_file_is_left_alone(here: Path, arguments: Sequence[str]) -> None:
    Path(NAME).mkdir()
    done = run(*arguments)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()[-2:]) == 2
    assert "Unexpected" not in done.stderr
    Path(NAME).rmdir()
    os.mkfifo(NAME)
    done = run("demo", "--init", ".")  # a pipe would be waited for
    assert (done.returncode, "is no demo" in done.stderr) == (1, True)


def test_advice_is_written_into_the_file_that_a_link_of_the_persons_own_leads_to(tmp_path: Path) -> None:
    assert run("demo", "--init", "dots").returncode == 0
    Path(NAME).symlink_to(Path("dots", NAME).absolute())
    text = Path("dots", NAME).read_text()
    Path("dots", NAME).write_text(text.replace("    gpus: [0]\n", "    gpus: [0]\n    level: none\n", 1))
    Path("dots", NAME).chmod(0o644)
    done = run("advise", "--apply", "--yes")
    assert done.returncode == 0, done.stderr
    if "Written" in done.stderr:
        assert Path("dots", NAME).stat().st_mode & 0o777 == 0o644
    assert Path(NAME).is_symlink()


# ── the state folder ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", [0o777, 0o755, 0o710, 0o701])
def test_a_state_folder_open_to_others_is_closed_and_that_is_said_once(here: Path, mode: int) -> None:
    Path(NAME).write_text(CONFIG)
    state().mkdir(parents=True)
    state().chmod(mode)
    done = run("status")
    assert done.returncode == 0, done.stderr
    assert f"{state()} was open to other users (mode {mode:04o}); it is yours alone now" in done.stderr
    assert state().stat().st_mode & 0o777 == 0o700
    assert run("status").stderr == ""


def test_the_folders_made_on_the_way_to_it_are_private_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(NAME).write_text(CONFIG)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "new" / "deep"))
    done = run("status")
    assert (done.returncode, done.stderr) == (0, "")
    for folder in (tmp_path / "new", tmp_path / "new/deep", state(), state() / "records"):
        assert folder.stat().st_mode & 0o777 == 0o700


@as_root
@pytest.mark.parametrize("what", ["folder", "link", "records"])
def test_a_state_folder_of_another_user_is_refused(here: Path, tmp_path: Path, what: str) -> None:
    Path(NAME).write_text(CONFIG)
    theirs = state()
    if what == "link":
        (tmp_path / "mine").mkdir(mode=0o700)
        state().parent.mkdir(parents=True)
        state().symlink_to(tmp_path / "mine")
    else:
        theirs = state() if what == "folder" else state() / "records"
        theirs.mkdir(parents=True, mode=0o700)
        state().chmod(0o700)
    os.chown(theirs, STRANGER, STRANGER, follow_symlinks=False)
    for arguments in (["status"], ["stop", "qwen", "--config", NAME]):
        done = run(*arguments)
        assert done.returncode == 1
        what_is_wrong, cure = done.stderr.splitlines()
        assert f"{theirs} belongs to another user (uid {STRANGER})" in what_is_wrong
        assert "XDG_STATE_HOME" in cure
