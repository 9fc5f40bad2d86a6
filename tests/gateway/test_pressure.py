"""Memory that runs short while requests wait: another process takes VRAM, RAM, or the room of a KV pool."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from tests.gateway.conftest import Gated, MakeGated

GIB = 2**30
HOLD = """
import sys
from pathlib import Path
from vllm_sleep_tui.simulator import devices
folder, vram, ram = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
devices.claim(folder, vram={0: vram}, pinned_bytes=0, private_bytes=ram, title="x")
print("claimed", flush=True)
sys.stdin.read()
"""
WHOLE = {"args": {"max-model-len": 2048, "gpu-memory-utilization": 0.85}}


def status(here: Gated) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(here.verb("status", "--json"))
    return found


@contextmanager
def another_process(here: Gated, *, vram: int = 0, ram: int = 0) -> Iterator[None]:
    """Somebody else's process, which holds so many bytes."""
    (folder,) = {file.parent for file in (here.folder / "state").rglob("gpus.json")}
    command = [sys.executable, "-c", HOLD, str(folder), str(vram), str(ram)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        yield
        process.communicate()


def free_vram(here: Gated) -> int:
    gpu = status(here)["gpus"][0]
    return int(gpu["total_bytes"] - gpu["used_bytes"])


def test_vram_that_another_process_takes_is_told_and_nobody_sleeps_for_nothing(gated: MakeGated) -> None:
    here = gated({"a": {"model": "sim/1GiB", **WHOLE}, "b": {"model": "sim/4GiB", **WHOLE}})
    here.verb("start", "--all")
    assert here.chat("a").status_code == 200
    with another_process(here, vram=free_vram(here) - GIB // 16):
        refused = here.chat("b")
        assert refused.status_code == 503, refused.text
        message = refused.json()["error"]["message"]
        assert "b needs" in message, message
        assert "are free" in message, message
        assert 1 <= int(refused.headers["retry-after"]) <= 10
        assert here.states() == {"a": "awake", "b": "asleep"}
        assert here.chat("a").status_code == 200
    here.until(lambda: here.chat("b").status_code == 200)
    assert here.states() == {"a": "asleep", "b": "awake"}


def test_ram_that_runs_short_is_told_to_who_waits(gated: MakeGated) -> None:
    here = gated({"a": {"model": "sim/4GiB", "level": 1}, "b": {"model": "sim/4GiB", "level": 1}})
    ram = status(here)["host"]["ram_available_bytes"]
    with another_process(here, ram=ram - 2 * GIB):
        refused = here.chat("a")
        assert refused.status_code == 503, refused.text
        assert "RAM" in refused.json()["error"]["message"], refused.text
    here.until(lambda: here.chat("a").status_code == 200)


def test_a_kv_pool_without_room_takes_the_sleepers_weights_out_of_vram(
    gated: MakeGated, tmp_path: Path
) -> None:
    fast = {"env": {"VLLM_SIM_VERSION": "0.26.0"}}
    share = {"args": {"max-model-len": 2048, "gpu-memory-utilization": 0.6}}
    here = gated(
        {"a": {"model": "sim/4GiB", **fast, **share}, "b": {"model": "sim/4GiB", **fast, **share}},
        begins=False,
    )
    here.env |= {"VLLM_SLEEP_TUI_POOL": str(tmp_path / "pool")}
    here.serve()
    here.until(here.answers)
    here.verb("start", "--all")
    for name in "baba":
        assert here.chat(name).status_code == 200
    assert levels(here) == {"a": None, "b": 0}
    with another_process(here, vram=free_vram(here) - GIB // 16):
        assert here.chat("b").status_code == 200
        assert levels(here) == {"a": 1, "b": None}
        assert here.chat("a").status_code == 200
        assert levels(here) == {"a": None, "b": 1}
    for name in "ba":
        assert here.chat(name).status_code == 200
    assert levels(here) == {"a": None, "b": 0}


def levels(here: Gated) -> dict[str, int | None]:
    return {
        model["id"]: model["level"] for model in httpx.get(f"{here.url}/models", timeout=60).json()["data"]
    }
