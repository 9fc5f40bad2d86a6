"""Two models on real vLLM on the CPU: start, chat, sleep, wake, switch, through the command line."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import httpx
import pytest
from command_line import CommandLine, wait_until

pytestmark = pytest.mark.real
QUESTION = "What is the capital of France?"


def test_both_models_start_in_phases_and_the_first_is_awake(two_models: CommandLine, tmp_path: Path) -> None:
    said = tmp_path / "said"
    starting = two_models.begin("start", "--all", to=said)
    seen: list[tuple[str, str | None]] = []

    def look() -> bool:
        for name in ("smollm2", "tiny"):
            model = two_models.look(name)
            seen.append((model.state, model.phase))
        return starting.poll() is not None

    wait_until(look, seconds=300, what="start --all ends", every=0.2)
    assert starting.returncode == 0, said.read_text()
    assert {("starting", "loading"), ("starting", "warming")} <= set(seen)
    assert two_models.status()["smollm2"]["state"] == "awake"


def test_status_of_an_awake_model_names_its_server_and_claims_no_vram(two_models: CommandLine) -> None:
    two_models("switch", "smollm2")
    model = two_models.status()["smollm2"]
    assert model["gpus"] == []
    assert not model["vram_bytes"]
    assert model["ram_bytes"] > 200 * 2**20  # 270 MB of weights and three Pythons
    answer = httpx.get(f"http://127.0.0.1:{model['port']}/v1/models").json()
    assert [entry["id"] for entry in answer["data"]] == ["smollm2"]


def test_a_real_model_answers_sensibly(two_models: CommandLine) -> None:
    assert "Paris" in two_models("chat", "smollm2", QUESTION)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeper_keeps_its_level_frees_nothing_and_wakes_proven(
    two_models: CommandLine, level: int
) -> None:
    two_models("switch", "smollm2")
    two_models("sleep", "smollm2", "--level", str(level))
    asleep = two_models.look("smollm2")
    assert (asleep.state, asleep.level, asleep.frees_memory) == ("asleep", level, False)
    two_models("wake", "smollm2")
    awake = two_models.look("smollm2")
    assert (awake.state, awake.level, awake.proof) == ("awake", None, "proven")


def test_sleeping_twice_is_done_and_another_level_is_refused(two_models: CommandLine) -> None:
    two_models("switch", "tiny")
    two_models("sleep", "tiny", "--level", "1")
    assert two_models.run("sleep", "tiny", "--level", "1").returncode == 0
    refused = two_models.run("sleep", "tiny", "--level", "2")
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) >= 2
    assert two_models.status()["tiny"]["level"] == 1


def test_a_sleeper_refuses_strangers_at_once_where_plain_vllm_would_hang(two_models: CommandLine) -> None:
    two_models("switch", "tiny")
    two_models("sleep", "tiny")
    port = two_models.status()["tiny"]["port"]
    body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 1}
    answer = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=10)
    assert answer.status_code == 503
    assert "Retry-After" in answer.headers
    assert httpx.post(f"http://127.0.0.1:{port}/wake_up", timeout=10).status_code == 403


def test_a_switch_wakes_the_sleeper_and_keeps_a_ledger(two_models: CommandLine) -> None:
    for name in ("smollm2", "tiny"):
        two_models("switch", name)
        two_models("sleep", name)
        result = json.loads(two_models("switch", name, "--json"))
        assert result["state"] == "awake"
        ledger = result["last_switch"]
        assert ledger["phases"]["wake"] > 0
        assert ledger["phases"]["prove"] > 0
        assert (
            sum(filter(None, (ledger["phases"]["wake"], ledger["phases"]["prove"]))) <= ledger["total"] < 30
        )


def test_a_chat_with_a_sleeping_model_wakes_it_first(two_models: CommandLine) -> None:
    two_models("switch", "smollm2")
    two_models("sleep", "smollm2")
    answer = json.loads(two_models("chat", "smollm2", QUESTION, "--json"))
    assert "Paris" in answer["text"]
    assert answer["switch_seconds"] > 0
    assert two_models.status()["smollm2"]["state"] == "awake"


def read_first(process: subprocess.Popen[str]) -> str:
    """The first piece of what a process says on stdout, as soon as it says it."""
    assert process.stdout is not None
    return process.stdout.read(1)


def test_a_forced_stop_ends_although_a_chat_streams(two_models: CommandLine) -> None:
    two_models("switch", "tiny")
    streaming = two_models.begin("chat", "tiny", "Tell a long story.")
    assert read_first(streaming)
    stopped = two_models.run("stop", "tiny", "--force", seconds=60)
    assert stopped.returncode == 0, stopped.stderr
    streaming.communicate(timeout=30)  # ends, one way or the other: vLLM closes the stream or drops it (0.32)
    assert two_models.status()["tiny"]["state"] == "stopped"
