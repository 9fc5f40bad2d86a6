"""Nobody else hears what is for a server alone: another user on its port, before it is there or after."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.fleet.conftest import LIMIT, SIMULATOR, Box, seen, until
from tests.squatter import UNUSED_UID, needs_root, squatter
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.keeper_client import KeeperSpec, KeeperStatus, launch
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record, RecordStore

pytestmark = pytest.mark.usefixtures("own_orphans")
MakeBox = Callable[..., Box]
FreePort = Callable[[], int]
KEY = "sk-the-key-of-this-test"
COPIED_TO_RAY = ("VLLM_", "FLASH_ATTENTION_", "LMCACHE_", "NCCL_", "UCX_", "HF_", "HUGGING_FACE_")
"""vLLM 0.32, ray/ray_env.py: DEFAULT_ENV_VAR_PREFIXES."""


def verb(machine: Box, *words: str) -> subprocess.CompletedProcess[str]:
    """A verb over the box's config and records."""
    link = machine.folder / "vllm-sleep-tui"
    if not link.exists():
        link.symlink_to(machine.state_dir)
    argv = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), *words]
    env = os.environ | {"XDG_STATE_HOME": str(machine.folder)}
    return subprocess.run(
        argv, env=env, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )


def record_of(machine: Box, name: str) -> Record:
    return RecordStore(machine.state_dir, load(machine.config).path).read(name)


@needs_root
def test_another_user_who_takes_the_port_of_a_start_hears_nothing_and_is_named(box: MakeBox) -> None:
    name = f"a{secrets.token_hex(4)}"  # so that this squatter finds no other test's server
    machine = box({name: {"model": "sim/1GiB"}}, speed="5")  # it has time to be the first
    with squatter(name) as other:
        done = verb(machine, "start", name)
        other.wait_for_port()
        heard = other.end()
    assert heard == []
    assert done.returncode == 1
    assert f"user {UNUSED_UID}" in done.stderr


async def test_a_launch_tells_nobody_how_to_reach_it(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    async with machine.open() as fleet:
        await fleet.start(["a"])
    record = record_of(machine, "a")
    assert record.socket is not None
    assert record.server is not None
    assert record.launch is not None
    assert stat.S_IMODE(os.stat(record.socket).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(os.path.dirname(record.socket)).st_mode) == 0o700
    environment = Path(f"/proc/{record.server.pid}/environ").read_text().split("\0")
    copied = "\n".join(line for line in environment if line.startswith(COPIED_TO_RAY))
    for word in (record.launch, record.socket, "SECRET"):
        assert word not in copied
        assert word not in " ".join(psutil.Process(record.server.pid).cmdline())


async def test_a_vllm_that_does_not_load_the_guard_is_not_left_running(box: MakeBox, tmp_path: Path) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    unguarded = tmp_path / "vllm"
    unguarded.write_text(
        "#!/bin/bash\n"
        "kept=()\n"
        'while (( $# )); do [[ $1 == --middleware ]] && shift 2 || { kept+=("$1"); shift; }; done\n'
        f'exec {" ".join(SIMULATOR)} "${{kept[@]}}"\n'
    )
    unguarded.chmod(0o755)
    machine.config.write_text(
        machine.config.read_text().replace(str(SIMULATOR).replace("'", '"'), f'["{unguarded}"]')
    )
    done = verb(machine, "start", "a")
    assert done.returncode == 1
    assert "a runs without its guard" in done.stderr
    assert "--middleware" in done.stderr
    record = record_of(machine, "a")
    assert (record.state, record.server) == (State.FAILED, None)


def test_a_body_that_does_not_come_holds_no_sleep_and_is_refused_once_it_is_there(box: MakeBox) -> None:
    machine = box({"a": {"model": "sim/1GiB"}})
    assert verb(machine, "start", "a").returncode == 0
    port = record_of(machine, "a").port
    body = b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=60) as slow:
        slow.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body[:10])
        done = verb(machine, "sleep", "a")
        assert done.returncode == 0, done.stderr
        assert "answers under way" not in done.stdout + done.stderr
        slow.sendall(body[10:])
        assert slow.recv(4096).startswith(b"HTTP/1.1 503 ")


# ── the key of a server that somebody else started ───────────────────────────────────────────────────────


@needs_root
def test_the_key_of_a_url_server_goes_to_no_other_user_unless_the_config_names_them(
    box: MakeBox, free_port: FreePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    port = free_port()
    with squatter(port=port) as other:
        other.wait_for_port()
        for host in ("127.0.0.1", "localhost"):
            machine = box({"far": {"url": f"http://{host}:{port}", "api_key": "${FAR_KEY}"}})
            told = f"User {UNUSED_UID} answers at {host}:{port}, so its API key was not sent."
            shown = verb(machine, "status")
            while "did not answer within" in shown.stdout:  # a look gives it 0.3 s
                shown = verb(machine, "status")
            asked = verb(machine, "chat", "far", "hi")
            assert told in shown.stdout
            assert told in asked.stderr
            assert f"`url_user: {UNUSED_UID}`" in asked.stderr
            assert asked.returncode == 1
        assert other.heard == []
        named = {"api_key": "${FAR_KEY}", "url_user": str(UNUSED_UID)}
        trusting = box({"far": {"url": f"http://127.0.0.1:{port}", **named}})
        deadline = time.monotonic() + LIMIT
        while not any(KEY in text for text in other.heard):
            assert time.monotonic() < deadline
            verb(trusting, "status")
        heard = other.end()
    assert any(KEY in text for text in heard)


# ── servers that the version before started ──────────────────────────────────────────────────────────────


async def start_as_before(machine: Box, argv: list[str], port: int, secret: str) -> Record:
    """A server under a keeper, with the guard, the environment and the record of the version before."""
    tmp_dir = tempfile.mkdtemp(prefix="vst-", dir="/tmp")
    guard = Path(tmp_dir) / "guard"
    guard.mkdir(mode=0o700)
    shutil.copy(Path(__file__).parent / "data" / "guard_of_the_version_before.py", guard / "panel_guard.py")
    store = RecordStore(machine.state_dir, load(machine.config).path)
    env = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_SIM_TIMES": "instant",
        "PYTHONPATH": f"{guard}:{Path(__file__).parents[2]}",
        "VLLM_SLEEP_TUI_LAUNCH": "of-before",
        "VLLM_SLEEP_TUI_SECRET": secret,
        "TMPDIR": tmp_dir,
        "CUDA_VISIBLE_DEVICES": "",
    }
    log = machine.state_dir / "logs" / "a.log"
    log.parent.mkdir(exist_ok=True)
    order = KeeperSpec(
        argv=tuple(argv),
        env=env,
        cwd="/",
        launch="of-before",
        log=str(log),
        lock=str(store.path("a", "keeper")),
        tmp_dir=tmp_dir,
    )
    word: KeeperStatus = await launch(order)
    record = Record(
        config=store.config,
        name="a",
        state=State.AWAKE,
        since=time.time(),
        launch="of-before",
        keeper=word.keeper,
        server=word.server,
        port=port,
        secret=secret,
        log=str(log),
        tmp_dir=tmp_dir,
        resolved_level="1",
        vllm_version="0.32.0",
    )
    store.write(record)
    return record


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_a_server_that_the_version_before_started_is_driven_as_before(
    box: MakeBox, free_port: FreePort
) -> None:
    port = free_port()
    machine = box({"a": {"model": "sim/1GiB", "gpus": []}})
    serve = [*SIMULATOR, "serve", "sim/1GiB", "--served-model-name", "a", "--max-model-len", "2048"]
    serve += ["--host", "127.0.0.1", "--port", str(port), "--middleware", "panel_guard.PanelGuard"]
    record = await start_as_before(machine, serve, port, secrets.token_urlsafe(32))
    await until(lambda: listening(port))
    slept = verb(machine, "sleep", "a")
    assert slept.returncode == 0, slept.stderr
    woken = verb(machine, "wake", "a")
    assert woken.returncode == 0, woken.stderr
    assert verb(machine, "orphans").stdout.count("of-before") == 0
    # Its record lost, it is taken back with its secret.
    RecordStore(machine.state_dir, load(machine.config).path).path("a").unlink()
    async with machine.open() as fleet:
        await until(lambda: seen(fleet, "a").state is State.AWAKE)
    again = record_of(machine, "a")
    assert (again.launch, again.secret, again.socket) == (record.launch, record.secret, None)
    stopped = verb(machine, "stop", "a", "--force")
    assert stopped.returncode == 0, stopped.stderr
    assert not listening(port)


@needs_root
async def test_the_secret_of_a_server_of_before_goes_to_no_other_user(
    box: MakeBox, free_port: FreePort
) -> None:
    port, secret = free_port(), secrets.token_urlsafe(32)
    machine = box({"a": {"model": "sim/1GiB", "gpus": []}})
    await start_as_before(machine, ["sleep", "300"], port, secret)
    with squatter(port=port) as other:
        other.wait_for_port()
        done = verb(machine, "sleep", "a")
        heard = other.end()
    assert done.returncode == 1
    assert f"User {UNUSED_UID} has the place of this server" in done.stderr
    assert heard == []
