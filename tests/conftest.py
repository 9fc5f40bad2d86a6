"""What every test gets: folders of its own, ports nobody else takes, and no process left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.orphans import left_alone
from tests.ports import PORTS

MARKER = "VLLM_SLEEP_TUI_TEST"
"""In the environment of all processes a test starts: finds one left behind, whoever its parent is now."""
GRACE_SECONDS = 30.0
"""For processes that are already on their way out when the test's own work is done, on a busy machine."""
LEFT_OUT = pytest.StashKey[dict[str, int]]()
"""How many tests the marker expression left out, by marker."""

# Most tests run the product in processes of its own: what they import is compiled once, not each time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


def marked_processes(marker: str) -> dict[int, str]:
    """The living processes whose marker is `marker` or stands under it: pid and command line."""
    own = f"{MARKER}={marker}".encode()
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            if any(line == own or line.startswith(own + b"/") for line in environment):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(entry.name)] = command.decode(errors="replace")
        except OSError:
            continue  # gone meanwhile, or another user's
    return found


def wait_until_gone(marker: str) -> dict[int, str]:
    """The marked processes that are still there after the grace."""
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := marked_processes(marker)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def end_what_is_left(marker: str) -> None:
    """Fails if marked processes outlive their grace, after ending them by pid, kindly first.

    A keeper that gets SIGTERM ends its whole group; vLLM's engine, which overwrites its environment with its
    title, is found in no other way.
    """
    left = wait_until_gone(marker)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in marked_processes(marker):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if left and not wait_until_gone(marker):
            break
    if left:
        lines = "\n".join(f"  {pid}  {command[:200]}" for pid, command in left.items())
        pytest.fail(f"{len(left)} process(es) left behind, ended now:\n{lines}", pytrace=False)


@pytest.fixture(scope="session", autouse=True)
def session_marker() -> Iterator[str]:
    """Marks what fixtures of a wider scope start; checked when the last test of this process is done."""
    marker = uuid.uuid4().hex
    os.environ[MARKER] = marker
    yield marker
    del os.environ[MARKER]
    end_what_is_left(marker)


@pytest.fixture(autouse=True)
def own_surroundings(session_marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A test's own marker, XDG folders and temporary folder (short: a socket path has 107 characters)."""
    marker = f"{session_marker}/{uuid.uuid4().hex[:12]}"
    short = tempfile.mkdtemp(prefix="vst-", dir=tempfile.gettempdir())
    monkeypatch.setenv(MARKER, marker)
    monkeypatch.setenv("TMPDIR", short)
    monkeypatch.setenv("VLLM_SLEEP_TUI_POOL", f"{short}/pools")
    monkeypatch.setattr(tempfile, "tempdir", short)
    for kind in ("CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / f"xdg-{kind.lower()}"))
    try:
        yield
        end_what_is_left(marker)
    finally:
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """A call gives a port that nobody listens on and no other test of this run is given."""
    return lambda: next(PORTS)


@pytest.fixture
def own_orphans() -> Iterator[None]:
    """What this test leaves without a keeper, a record or a config is ended by no other test."""
    with left_alone():
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Starts the count of what is left out."""
    config.stash[LEFT_OUT] = {}


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Counts what the marker expression leaves out."""
    for item in items:
        for kind in ("real", "gpu"):
            if item.get_closest_marker(kind):
                counts = item.config.stash[LEFT_OUT]
                counts[kind] = counts.get(kind, 0) + 1


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Under xdist the workers deselect; the count travels to the process that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Every worker collects the same tests, so one worker's count is the count."""
    output = getattr(node, "workeroutput", {})
    getattr(node, "config").stash[LEFT_OUT].update(output.get("left_out", {}))  # noqa: B009 - xdist is untyped


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Says what this run left out and how to run it."""
    counts = config.stash[LEFT_OUT]
    parts = []
    if real := counts.get("real"):
        parts.append(f"{real} tests on real vLLM (CPU): `.ci/run` runs them")
    if gpu := counts.get("gpu"):
        parts.append(f"{gpu} tests on a GPU: `pytest -m gpu tests/gpu tests/contract` there")
    if parts:
        terminalreporter.write_line(f"left out: {'; '.join(parts)}")
