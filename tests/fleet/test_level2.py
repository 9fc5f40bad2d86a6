"""Level 2 where vLLM's loader cannot load weights again: refused or made level 1 before anybody sleeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.command_line import CommandLine, write_config
from tests.fleet.conftest import SIMULATOR
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.store.records import RecordStore

Make = Callable[..., CommandLine]


@pytest.fixture
def panel(tmp_path: Path) -> Iterator[Make]:
    """Makes the command line over one simulated model `m`; stops it at the end."""
    made: list[CommandLine] = []

    def make(
        *,
        version: str = "0.32.0",
        command: list[str] | None = None,
        model: str = "sim/1GiB",
        memory: str = "24GiB",
        **settings: Any,
    ) -> CommandLine:
        env = {"VLLM_SIM_TIMES": "instant", "VLLM_SIM_VERSION": version}
        args = {"max-model-len": 2048, **settings.pop("args", {})}
        config = write_config(
            tmp_path / "vllm-sleep-tui.yaml",
            command or SIMULATOR,
            {"m": {"model": model, "args": args, "env": env, **settings}},
            simulated_gpus=[{"name": "Test", "memory": memory}],
        )
        made.append(CommandLine(config, tmp_path / "state"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def installed(folder: Path, version: str) -> list[str]:
    """An environment whose `vllm` is the simulator and whose metadata names that version."""
    (folder / f"lib/python3.11/site-packages/vllm-{version}.dist-info").mkdir(parents=True)
    binary = folder / "bin/vllm"
    binary.parent.mkdir()
    binary.write_text(f'#!/bin/sh\nexec {sys.executable} -m vllm_sleep_tui.simulator "$@"\n')
    binary.chmod(0o755)
    return [str(binary)]


NEVER = ["dummy", "sharded_state", "runai_streamer_sharded", "tensorizer", "modelexpress", "ipc_cache"]


@pytest.mark.parametrize("loader", [*NEVER, "a_plugins_own", "Sharded_State"])
def test_level_2_is_refused_before_the_start_where_the_loader_cannot_reload(panel: Make, loader: str) -> None:
    refused = panel(level=2, args={"load-format": loader}).run("start", "m")
    assert refused.returncode == 2
    assert "level: 2 could not bring it back" in refused.stderr
    assert "Set `level: 1` or `level: auto`." in refused.stderr


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        ("0.31.0", {"args": {"load-format": "runai_streamer"}}),
        ("0.31.0", {"model": "s3://bucket/1GiB"}),
        ("0.27.1", {"args": {"enable-lora": True}}),
        ("0.27.1", {"args": {"quantization": "bitsandbytes"}}),
    ],
    ids=["runai_streamer", "s3", "lora", "bitsandbytes"],
)
def test_a_vllm_that_cannot_reload_this_yet_is_told_from_one_that_can(
    panel: Make, tmp_path: Path, version: str, changes: dict[str, Any]
) -> None:
    old_command = installed(tmp_path / "old", version)
    old = panel(level=2, command=old_command, version=version, **changes)
    refused = old.run("start", "m")
    assert refused.returncode == 2
    assert "level: 2 could not bring it back" in refused.stderr
    found = {check["name"]: check for check in json.loads(old.run("doctor", "--json").stdout)["checks"]}
    assert found["m.level"]["verdict"] == "fail"

    new = panel(level=2, vllm_command=installed(tmp_path / "new", "0.32.0"), command=old_command, **changes)
    found = {check["name"]: check for check in json.loads(new.run("doctor", "--json").stdout)["checks"]}
    assert "m.level" not in found, "the model's own vLLM counts"
    new("start", "m")
    new("sleep", "m")
    new("wake", "m")
    assert new.look("m").proof == "proven"


def test_a_version_that_is_known_only_once_it_runs_makes_level_2_level_1(panel: Make) -> None:
    old = panel(level=2, version="0.31.0", args={"load-format": "runai_streamer"})
    started = old.run("start", "m")
    assert started.returncode == 0
    assert "level 1  in place of 2: vLLM's loader `runai_streamer`" in started.stderr
    old("sleep", "m")
    assert old.look("m").level == 1
    old("wake", "m")


def test_sleep_at_level_2_is_refused_and_the_model_stays_awake(panel: Make) -> None:
    awake = panel(args={"load-format": "tensorizer"})
    awake("start", "m")
    refused = awake.run("sleep", "m", "--level", "2")
    assert refused.returncode == 1
    assert "Level 2 could not bring m back: vLLM's loader `tensorizer`" in refused.stderr
    assert "Sleep it at level 1." in refused.stderr
    assert awake.look("m").state == "awake"


def test_auto_never_takes_level_2_when_ram_is_short(panel: Make) -> None:
    tight = panel(model="sim/40GiB", memory="80GiB", args={"load-format": "sharded_state"})
    tight("start", "m")
    assert tight.look("m").resolved_level == "none"
    refused = tight.run("sleep", "m", "--level", "2")
    assert refused.returncode == 1
    tight("sleep", "m")
    assert tight.look("m").state == "stopped"


@pytest.mark.parametrize(
    ("version", "args", "said"),
    [
        ("0.32.0", {"load-format": "sharded_state"}, "Model reloading with `sharded_state` format"),
        ("0.31.0", {"load-format": "runai_streamer"}, "Model reloading with `runai_streamer` format"),
        ("0.27.1", {"quantization": "bitsandbytes"}, "Model reloading with `bitsandbytes` format"),
        ("0.27.1", {"enable-lora": True}, "qkv_proj"),
    ],
)
def test_the_simulated_server_cannot_reload_where_vllm_cannot(
    panel: Make, version: str, args: dict[str, Any], said: str
) -> None:
    awake = panel(version=version, args=args)
    awake("start", "m")
    config = load(awake.config)
    record = RecordStore(awake.state_home / "vllm-sleep-tui", config.path).read("m")
    with httpx.Client(transport=httpx.HTTPTransport(uds=record.socket), timeout=30) as client:
        answer = client.post("http://127.0.0.1/collective_rpc", json={"method": "reload_weights"})
    assert answer.status_code == 500
    assert said in answer.json()["error"]["message"]
