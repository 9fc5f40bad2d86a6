"""Fetching a model before its start, with a download tool that stands in for the hub's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command_line import CommandLine
from tests.fleet.conftest import seen, until
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.errors import CancelledByUser, OperationError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.fleet.states import State

GATED = "huggingface_hub.errors.GatedRepoError: 403 Client Error. Cannot access gated repo for url."


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedConfig:
    """A config whose `vllm` has an `hf` beside it, which notes its calls."""
    binaries = tmp_path / "bin"
    binaries.mkdir()
    cache = tmp_path / "cache"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    vllm = binaries / "vllm"
    vllm.write_text(f'#!/bin/sh\nexec {sys.executable} -m vllm_sleep_tui.simulator "$@"\n')
    hf = binaries / "hf"
    blobs = cache / "models--org--model" / "blobs"
    hf.write_text(
        f'#!/bin/sh\necho $$ "$@" >> {tmp_path}/calls\n'
        f"mkdir -p {blobs}\necho weights > {blobs}/a.incomplete\n"
        f"exec sh {tmp_path}/rest\n"
    )
    for path in (vllm, hf):
        path.chmod(0o755)
    config = tmp_path / "vllm-sleep-tui.yaml"
    model = {
        "model": "org/model",
        "gpus": [],
        "args": {"max-model-len": 2048},
        "env": {"VLLM_SIM_TIMES": "instant"},
    }
    config.write_text(json.dumps({"vllm_command": [str(vllm)], "models": {"m": model}}))
    return load(config)


async def test_a_download_that_fails_is_told_and_vllm_tries_it_itself(
    loaded: LoadedConfig, tmp_path: Path
) -> None:
    (tmp_path / "rest").write_text(f"echo '{GATED}' >&2; exit 1")
    told: list[Progress] = []
    async with Fleet(loaded, tmp_path / "state") as fleet:
        await fleet.start(["m"], report=told.append)
        assert seen(fleet, "m").state is State.AWAKE
        await fleet.stop(["m"], force=True)
    (failed,) = [step for step in told if step.phase == "not fetched"]
    assert "gated" in failed.detail
    assert "vLLM tries it itself" in failed.detail


async def test_what_vllm_says_of_a_model_it_cannot_get_is_not_hidden(
    loaded: LoadedConfig, tmp_path: Path
) -> None:
    (tmp_path / "rest").write_text("echo nonsense >&2; exit 1")
    rewrite(loaded, env={"VLLM_SIM_TIMES": "instant", "VLLM_SIM_FAULTS": "gated"})
    async with Fleet(load(loaded.path), tmp_path / "state") as fleet:
        with pytest.raises(OperationError, match="gated") as caught:
            await fleet.start(["m"])
        assert "HF_TOKEN" in caught.value.cure
        assert seen(fleet, "m").state is State.FAILED


def rewrite(loaded: LoadedConfig, **changes: Any) -> None:
    """Change the model in the config file."""
    content = json.loads(loaded.path.read_text())
    content["models"]["m"] |= changes
    loaded.path.write_text(json.dumps(content))


HUB = """#!/usr/bin/env python3
# Stands in for `hf`: puts those files of a made repository into the cache that its words ask for.
import fnmatch, json, os, pathlib, sys
words = sys.argv[2:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + chr(10))
name, names, flags = words.pop(0), [], {{"--exclude": [], "--include": []}}
while words:
    word = words.pop(0)
    if word.startswith("--"):
        flags.setdefault(word, []).append(words.pop(0))
    else:
        names.append(word)
cache = pathlib.Path((flags.get("--cache-dir") or [{cache!r}])[0]) / f"models--{{name.replace('/', '--')}}"
snapshot = cache / "snapshots" / ("c" * 40)
(cache / "refs").mkdir(parents=True, exist_ok=True)
(cache / "refs" / (flags.get("--revision") or ["main"])[0]).write_text("c" * 40)
for path, content in json.loads(pathlib.Path({files!r}).read_text()).items():
    wanted = any(fnmatch.fnmatchcase(path, one) for one in [*names, *flags["--include"]])
    if wanted and not any(fnmatch.fnmatchcase(path, one) for one in flags["--exclude"]):
        (snapshot / path).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / path).write_text(content)
"""
INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
SHARDS = {"model-1-of-2.safetensors": "1", "model-2-of-2.safetensors": "2"}
BULK = {"original/x/model.bin": "o", "pytorch_model.bin": "b", "README.md": "r", "tf_model.h5": "h"}


@pytest.fixture
def hub(loaded: LoadedConfig, tmp_path: Path) -> Callable[[dict[str, str]], None]:
    """Fills the hub's one repository with files."""
    files = tmp_path / "files.json"
    script = HUB.format(calls=str(tmp_path / "calls"), cache=os.environ["HF_HUB_CACHE"], files=str(files))
    hf = tmp_path / "bin" / "hf"
    hf.write_text(script.replace("/usr/bin/env python3", sys.executable))
    hf.chmod(0o755)
    return lambda content: files.write_text(json.dumps(content)) and None


def fetched(folder: Path) -> set[str]:
    """The files that have come into a cache."""
    return {
        path.relative_to(snapshot).as_posix()
        for snapshot in folder.glob("models--*/snapshots/*")
        for path in snapshot.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("there", "args", "taken"),
    [
        (
            {"model.safetensors.index.json": INDEX, **SHARDS, "extra.safetensors": "x", **BULK},
            {},
            {"model.safetensors.index.json", *SHARDS},
        ),
        (
            {"model.safetensors": "w", "consolidated.safetensors": "c", **BULK},
            {},
            {"consolidated.safetensors"},
        ),
        (
            {"model.safetensors": "w", "consolidated.safetensors": "c", **BULK},
            {"load-format": "hf"},
            {"model.safetensors", "consolidated.safetensors"},
        ),
        ({"model.safetensors": "w", **BULK}, {}, {"model.safetensors"}),
        (BULK, {}, {"pytorch_model.bin"}),
        (
            BULK,
            {"load_format": "npcache", "ignore-patterns": "none"},
            {"pytorch_model.bin", "original/x/model.bin"},
        ),
        ({"weights.pt": "p", **BULK}, {"load-format": "pt"}, {"weights.pt"}),
    ],
    ids=["indexed", "mistral", "hf", "one file", "bin", "npcache", "pt"],
)
async def test_the_files_that_vllm_takes_are_fetched_and_no_others(
    loaded: LoadedConfig,
    hub: Callable[[dict[str, str]], None],
    tmp_path: Path,
    there: dict[str, str],
    args: dict[str, Any],
    taken: set[str],
) -> None:
    hub(there)
    rewrite(loaded, args={"max-model-len": 2048, **args})
    async with Fleet(load(loaded.path), tmp_path / "state") as fleet:
        await fleet.start(["m"])
        await fleet.stop(["m"], force=True)
        assert fetched(tmp_path / "cache") == taken
        calls = (tmp_path / "calls").read_text()
        await fleet.start(["m"])  # all is here now: nobody is asked again
        await fleet.stop(["m"], force=True)
        assert (tmp_path / "calls").read_text() == calls


async def test_revision_and_download_dir_are_passed_on(
    loaded: LoadedConfig, hub: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    hub({"model.safetensors": "w"})
    rewrite(loaded, args={"max-model-len": 2048, "revision": "v2", "download_dir": "weights"})
    async with Fleet(load(loaded.path), tmp_path / "state") as fleet:
        await fleet.start(["m"])
        await fleet.stop(["m"], force=True)
    assert fetched(tmp_path / "weights") == {"model.safetensors"}
    assert fetched(tmp_path / "cache") == set()
    words = json.loads((tmp_path / "calls").read_text().splitlines()[0])
    assert words[words.index("--revision") + 1] == "v2"
    assert words[words.index("--cache-dir") + 1] == str(tmp_path / "weights")


@pytest.mark.parametrize(
    "changes",
    [
        {"env": {"VLLM_USE_MODELSCOPE": "True"}},
        {"model": "org/model:Q4_K_M"},
        {"model": "org/model.gguf"},
        {"model": "s3://bucket/model", "args": {"load-format": "runai_streamer"}},
        {"args": {"load-format": "dummy"}},
        {"args": {"load-format": "runai_streamer"}},
        {"args": {"load-format": "sharded_state"}},
        {"env": {"TRANSFORMERS_OFFLINE": "1"}},
    ],
    ids=["ModelScope", "quant", "gguf", "s3", "dummy", "streamer", "sharded", "offline"],
)
def test_what_is_not_a_plain_hub_model_is_left_to_vllm(
    loaded: LoadedConfig, tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "rest").write_text("exit 0")
    changes["env"] = {"VLLM_SIM_TIMES": "instant", "VLLM_SIM_FAULTS": "gated", **changes.get("env", {})}
    rewrite(loaded, **changes)
    panel = CommandLine(loaded.path, tmp_path / "state")
    assert panel.run("start", "m").returncode == 1  # the simulated vLLM fails at once, whatever it was given
    assert not (tmp_path / "calls").exists()


async def test_a_cancelled_download_is_ended_with_its_group(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "rest").write_text("sleep 120")
    told: list[Progress] = []
    async with Fleet(loaded, tmp_path / "state") as fleet:
        task = asyncio.create_task(fleet.start(["m"], report=told.append))
        await until(lambda: any(step.phase == "fetching" and "GiB" in step.detail for step in told))
        task.cancel()
        with pytest.raises(CancelledByUser):
            await task
    pid = int((tmp_path / "calls").read_text().split()[0])
    await until(lambda: not os.path.exists(f"/proc/{pid}"))


async def test_offline_nothing_is_fetched(
    loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rest").write_text("exit 1")
    async with Fleet(loaded, tmp_path / "state") as fleet:
        await fleet.start(["m"])  # vLLM's own business
        await fleet.stop(["m"], force=True)
    assert not (tmp_path / "calls").exists()


async def test_names_in_an_index_are_files_and_never_options_or_places_elsewhere(
    loaded: LoadedConfig, hub: Callable[[dict[str, str]], None], tmp_path: Path
) -> None:
    names = [
        "--local-dir=x.safetensors",
        "../../x.safetensors",
        "/tmp/x.safetensors",
        "model-1-of-2.safetensors",
    ]
    weight_map = {str(number): name for number, name in enumerate(names)}
    hub({"model.safetensors.index.json": json.dumps({"weight_map": weight_map}), **SHARDS})
    async with Fleet(loaded, tmp_path / "state") as fleet:
        await fleet.start(["m"])
        await fleet.stop(["m"], force=True)
    calls = (tmp_path / "calls").read_text()
    assert "model-1-of-2.safetensors" in calls
    assert "x.safetensors" not in calls


async def test_a_helper_that_left_the_group_holds_up_no_start(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "rest").write_text(f"setsid sh -c 'echo $$ >> {tmp_path}/helpers; exec sleep 600' &\nexit 0")
    async with Fleet(loaded, tmp_path / "state") as fleet:
        await asyncio.wait_for(fleet.start(["m"]), 120)
        await fleet.stop(["m"], force=True)
    helpers = tmp_path / "helpers"
    await until(lambda: helpers.exists() and len(helpers.read_text().split()) == tries(tmp_path))
    for pid in helpers.read_text().split():
        os.kill(int(pid), signal.SIGKILL)


def tries(tmp_path: Path) -> int:
    """How often the tool was called."""
    return len((tmp_path / "calls").read_text().splitlines())


async def test_a_cancelled_download_takes_its_helpers_along_wherever_they_went(
    loaded: LoadedConfig, tmp_path: Path
) -> None:
    (tmp_path / "rest").write_text(
        f"setsid sh -c 'trap \"\" TERM; echo $$ > {tmp_path}/helper; sleep 600' &\nsleep 600"
    )
    told: list[Progress] = []
    async with Fleet(loaded, tmp_path / "state") as fleet:
        task = asyncio.create_task(fleet.start(["m"], report=told.append))
        await until(lambda: (tmp_path / "helper").exists() and (tmp_path / "helper").read_text().strip())
        await until(lambda: any(step.phase == "fetching" for step in told))
        task.cancel()
        with pytest.raises(CancelledByUser):
            await task
    with contextlib.suppress(psutil.NoSuchProcess):
        helper = psutil.Process(int((tmp_path / "helper").read_text()))
        # Whoever inherited it may not have looked yet.
        await until(lambda: helper.status() == psutil.STATUS_ZOMBIE)
