"""Attached servers that want an API key: given by name, sent as a header, shown nowhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fleet.by_hand import vllm
from tests.fleet.conftest import LIMIT, Box, seen, until, until_state
from tests.fleet.test_attached import HELLO, gpus_of, said
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.survey import read_once

MakeBox = Callable[..., Box]
FreePort = Callable[[], int]
KEY = "sk-the-right-key-of-this-test"


def keyed(box: MakeBox, port: int, **more: Any) -> Box:
    """A box whose only model is attached."""
    return box({"far": {"url": f"http://127.0.0.1:{port}", **more}})


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "far.key"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("place", ["variable", "file"])
async def test_a_server_with_a_key_is_asked_put_to_sleep_woken_and_proven(
    box: MakeBox, free_port: FreePort, monkeypatch: pytest.MonkeyPatch, key_file: Path, place: str
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    port = free_port()
    key = {"api_key": "${FAR_KEY}"} if place == "variable" else {"api_key_file": str(key_file)}
    machine = keyed(box, port, **key)
    with vllm(port, gpus=gpus_of(machine), VLLM_API_KEY=KEY):
        async with machine.open() as fleet:
            far = await until_state(fleet, "far", State.AWAKE)
            assert (far.reason, far.cure) == (None, None)
            assert "hello there" in said([event async for event in fleet.chat("far", HELLO)])
            await fleet.sleep("far")
            await fleet.wake("far")
            assert (seen(fleet, "far").state, seen(fleet, "far").proof) == (State.AWAKE, "proven")


@pytest.mark.parametrize(
    ("given", "wrong", "cure"),
    [
        (None, "wants an API key, and the config names none", "api_key_file: FILE"),
        ("sk-another-one", "does not take the API key", "Correct the key in the variable"),
    ],
)
async def test_a_missing_or_wrong_key_is_named_where_it_is_seen_and_where_it_is_needed(
    box: MakeBox,
    free_port: FreePort,
    monkeypatch: pytest.MonkeyPatch,
    given: str | None,
    wrong: str,
    cure: str,
) -> None:
    monkeypatch.setenv("FAR_KEY", given or "")
    port = free_port()
    machine = keyed(box, port, **({"api_key": "${FAR_KEY}"} if given else {}))
    with vllm(port, gpus=gpus_of(machine), VLLM_API_KEY=KEY):
        async with machine.open() as fleet:
            await until(lambda: seen(fleet, "far").state is State.AWAKE)
            await until(lambda: wrong in (seen(fleet, "far").reason or ""))
            assert cure in (seen(fleet, "far").cure or "")
            with pytest.raises(RefusedError, match=wrong) as caught:
                _ = [event async for event in fleet.chat("far", HELLO)]
            assert cure in caught.value.cure
            await fleet.sleep("far")  # vLLM wants the key under /v1 alone
            await fleet.wake("far")
            assert (seen(fleet, "far").state, seen(fleet, "far").proof) == (State.AWAKE, "unproven")

        def told() -> bool:  # again: a look gives 0.3 s, which is little on a busy machine
            shown = read_once(load(machine.config), machine.state_dir).model("far")
            return (shown.state, wrong in (shown.reason or "")) == (State.AWAKE, True)

        await until(told)


def verb(machine: Box, *words: str, here: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A verb over the box; with `here` in that folder, its config not named."""
    named = [] if here else ["--config", str(machine.config)]
    argv = [sys.executable, "-m", "vllm_sleep_tui", *named, *words]
    env = os.environ | {"XDG_STATE_HOME": str(machine.folder / "xdg")}
    return subprocess.run(
        argv,
        env=env,
        cwd=here,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def test_the_key_is_in_nothing_that_is_written_or_shown(
    box: MakeBox, free_port: FreePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    port = free_port()
    machine = keyed(box, port, api_key="${FAR_KEY}")
    commands = (["status"], ["status", "--json"], ["doctor"], ["advise", "--json"], ["chat", "far", "hi"])
    said = ("does not take the API key", '"awake"', "", "", "does not take the API key")
    done = []
    with vllm(port, VLLM_API_KEY="sk-not-ours"):  # so that there is something to complain about
        for words, wanted in zip(commands, said, strict=True):
            deadline = time.monotonic() + LIMIT
            done.append(verb(machine, *words))
            while wanted not in done[-1].stdout + done[-1].stderr:  # a look gives it 0.3 s
                assert time.monotonic() < deadline, done[-1]
                done.append(verb(machine, *words))
    shown = [json.loads(each.stdout) for each in done if each.args[-2:] == ["status", "--json"]]
    assert shown[-1]["models"][0]["state"] == "awake"
    for each in done:
        assert KEY not in each.stdout + each.stderr
    for path in machine.folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_config_that_lies_here_is_sent_no_key_before_anybody_agreed(
    box: MakeBox, free_port: FreePort, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAR_KEY", KEY)
    machine = keyed(box, free_port(), api_key="${FAR_KEY}")
    refused = verb(machine, "status", here=machine.folder)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "nobody has agreed to" in refused.stderr
    assert verb(machine, "status").returncode == 0


def test_doctor_warns_of_a_key_that_others_may_read(
    box: MakeBox, free_port: FreePort, key_file: Path
) -> None:
    machine = keyed(box, free_port(), api_key_file=str(key_file))
    assert f"{key_file} is yours alone" in verb(machine, "doctor").stdout
    key_file.chmod(0o644)
    assert f"chmod 600 {key_file}" in verb(machine, "doctor").stdout
