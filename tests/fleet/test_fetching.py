"""Fetching a model before its start, with a download tool that stands in for the hub's."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from tests.fleet.conftest import seen, until
from vllm_sleep_tui.config_file import LoadedConfig, load
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


async def test_a_download_that_fails_names_the_cause_and_starts_nothing(
    loaded: LoadedConfig, tmp_path: Path
) -> None:
    (tmp_path / "rest").write_text(f"echo '{GATED}' >&2; exit 1")
    async with Fleet(loaded, tmp_path / "state") as fleet:
        with pytest.raises(OperationError, match="gated") as caught:
            await fleet.start(["m"])
        assert caught.value.cure
        assert seen(fleet, "m").state is State.STOPPED
    assert (tmp_path / "calls").read_text().split()[1:] == ["download", "org/model"]


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
    assert not os.path.exists(f"/proc/{pid}")


async def test_offline_nothing_is_fetched(
    loaded: LoadedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "rest").write_text("exit 1")
    async with Fleet(loaded, tmp_path / "state") as fleet:
        await fleet.start(["m"])  # vLLM's own business
        await fleet.stop(["m"], force=True)
    assert not (tmp_path / "calls").exists()
