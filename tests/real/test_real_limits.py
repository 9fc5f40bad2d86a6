"""Where real vLLM cannot reload, keeps LoRA, or misses a port of its own: as the product's tables say it."""

from __future__ import annotations

import json
import random
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from command_line import CommandLine

from tests.real.conftest import CHEAP, SAME_ANSWER, command_line, model_config
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.loaders import CANNOT_RELOAD
from vllm_sleep_tui.fleet.store.records import Record, RecordStore

pytestmark = pytest.mark.real
START_SECONDS = 900.0
HIDDEN, QUERY, VALUE, RANK = 64, 64, 32, 8
"""Of the model `tiny`, see models.py."""


@pytest.fixture
def stopped_after(tmp_path: Path) -> Iterator[list[CommandLine]]:
    """What is put in is stopped at the end."""
    made: list[CommandLine] = []
    yield made
    for each in made:
        each.close()


def tiny(tmp_path: Path, made: list[CommandLine], **args: Any) -> CommandLine:
    """The command line over the model `tiny` with further arguments."""
    panel = command_line(tmp_path, {"tiny": model_config("tiny", args=CHEAP | SAME_ANSWER | args)})
    made.append(panel)
    return panel


def begin(panel: CommandLine) -> None:
    """Start the model; two cores that others use as well may need minutes."""
    started = panel.run("start", "tiny", seconds=START_SECONDS)
    assert started.returncode == 0, started.stderr


def record_of(panel: CommandLine) -> Record:
    """The model's record: its port, and the socket for vLLM's own endpoints."""
    config = load(panel.config)
    return RecordStore(panel.state_home / "vllm-sleep-tui", config.path).read("tiny")


def ask(record: Record, method: str, path: str, /, **body: Any) -> httpx.Response:
    """A call to vLLM past the guard."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=record.socket), timeout=300) as client:
        return client.request(method, f"http://127.0.0.1{path}", json=body or None)


def test_dummy_weights_are_refused_level_2_which_vllm_could_not_bring_back(
    tmp_path: Path, stopped_after: list[CommandLine]
) -> None:
    panel = tiny(tmp_path, stopped_after, **{"load-format": "dummy"})
    begin(panel)
    refused = panel.run("sleep", "tiny", "--level", "2")
    assert refused.returncode == 1
    assert "dummy weights cannot be loaded again" in refused.stderr
    assert panel.look("tiny").state == "awake"
    told = ask(record_of(panel), "GET", "/server_info?config_format=json").json()["vllm_config"]
    assert told["load_config"]["load_format"] == "dummy"  # where it is asked of a server that is attached
    answer = ask(record_of(panel), "POST", "/collective_rpc", method="reload_weights")
    assert answer.status_code == 500
    assert f"{CANNOT_RELOAD} `dummy` format" in answer.json()["error"]["message"]


def make_adapter(folder: Path) -> None:
    """A LoRA adapter of random numbers for `tiny`, as PEFT writes one."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 64, "bias": "none"}
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {}
    for layer in (0, 1):
        for name, rows in (("q_proj", QUERY), ("v_proj", VALUE)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            shapes |= {f"{stem}.lora_A.weight": (RANK, HIDDEN), f"{stem}.lora_B.weight": (rows, RANK)}
    header: dict[str, Any] = {}
    data, chance = b"", random.Random(7)
    for name, (rows, columns) in shapes.items():
        numbers = struct.pack(f"<{rows * columns}f", *(chance.gauss(0, 0.5) for _ in range(rows * columns)))
        span = [len(data), len(data) + len(numbers)]
        header[name] = {"dtype": "F32", "shape": [rows, columns], "data_offsets": span}
        data += numbers
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded + data
    (folder / "adapter_model.safetensors").write_bytes(content)


def test_a_lora_adapter_outlives_level_2(tmp_path: Path, stopped_after: list[CommandLine]) -> None:
    make_adapter(tmp_path / "adapter")
    modules = [f"mine={tmp_path / 'adapter'}"]
    panel = tiny(
        tmp_path, stopped_after, **{"enable-lora": True, "max-lora-rank": 8, "lora-modules": modules}
    )
    begin(panel)

    def answers() -> dict[str, str]:
        record = record_of(panel)
        asked = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0}
        replies = {
            name: ask(record, "POST", "/v1/completions", model=name, **asked) for name in ("tiny", "mine")
        }
        assert [reply.status_code for reply in replies.values()] == [200, 200]
        return {name: reply.json()["choices"][0]["text"] for name, reply in replies.items()}

    before = answers()
    assert before["tiny"] != before["mine"]
    panel("sleep", "tiny", "--level", "2")
    panel("wake", "tiny")
    assert panel.look("tiny").proof == "proven"
    assert answers() == before


def test_a_port_inside_vllm_that_is_taken_is_not_told_as_the_servers_own(
    tmp_path: Path, stopped_after: list[CommandLine]
) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        endpoint = f"tcp://*:{taken.getsockname()[1]}"
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": endpoint}
        panel = tiny(tmp_path, stopped_after, **{"kv-events-config": events})
        failed = panel.run("start", "tiny", seconds=START_SECONDS)
    assert failed.returncode == 1
    assert f"A port that vLLM uses inside is taken: {endpoint}." in failed.stderr
    assert "kv-events-config" in failed.stderr
    assert "once more" not in failed.stderr  # the config names it: another start would not help


def test_each_of_two_replicas_is_proven(tmp_path: Path, stopped_after: list[CommandLine]) -> None:
    panel = tiny(tmp_path, stopped_after, **{"data-parallel-size": 2})
    begin(panel)

    def answered() -> list[float]:
        """Requests that each replica has answered."""
        page = ask(record_of(panel), "GET", "/metrics").text
        counts = [0.0, 0.0]
        for line in page.splitlines():
            if line.startswith("vllm:request_success_total{"):
                counts['engine="1"' in line] += float(line.rpartition(" ")[2])
        return counts

    for level in (1, 2):
        panel("sleep", "tiny", "--level", str(level))
        asleep = panel.look("tiny")
        assert (asleep.state, asleep.level) == ("asleep", level)
        before = answered()
        panel("wake", "tiny")
        awake = panel.look("tiny")
        assert (awake.state, awake.proof) == ("awake", "proven")
        assert answered() == [count + 1 for count in before]
    asked = {"model": "tiny", "prompt": "Once upon a time", "max_tokens": 5}
    port = record_of(panel).port
    assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked, timeout=60).status_code == 200
