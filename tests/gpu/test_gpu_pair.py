"""Two models that do not fit on one GPU together: what falls, what rises, who answers."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from command_line import CommandLine

pytestmark = pytest.mark.gpu
GIB = 2**30
LEFT_ASLEEP = 2 * GIB
"""A sleeper keeps 0.8 to 1.6 GiB on one GPU (H100, vLLM 0.24)."""


def test_after_the_start_one_is_awake_and_the_other_sleeps_at_the_configured_level(
    pair: CommandLine, level: int
) -> None:
    models = pair.status()
    assert (models["a"]["state"], models["b"]["state"]) == ("awake", "asleep")
    assert models["b"]["level"] == level
    assert models["b"]["vram_bytes"] < LEFT_ASLEEP < models["a"]["vram_bytes"]


def test_a_switch_moves_the_memory_from_one_model_to_the_other(
    pair: CommandLine, gpu_zero_used: Callable[[], int]
) -> None:
    pair("switch", "a")
    for target, other in (("b", "a"), ("a", "b")):
        before = pair.status()
        pair("switch", target)
        after = pair.status()
        assert after[other]["vram_bytes"] < LEFT_ASLEEP < before[other]["vram_bytes"]
        assert before[target]["vram_bytes"] < LEFT_ASLEEP < after[target]["vram_bytes"]
        held = sum(model["vram_bytes"] for model in after.values())
        assert abs(gpu_zero_used() - held) < 2 * GIB  # what NVML shows is what the models account for


def test_sleep_and_wake_are_proven_by_the_memory_and_by_the_first_token(
    pair: CommandLine, level: int
) -> None:
    pair("switch", "a")
    full = pair.look("a").vram_bytes
    pair("sleep", "a")
    asleep = pair.look("a")
    assert (asleep.state, asleep.level, asleep.proof) == ("asleep", level, "proven")
    assert asleep.frees_memory
    pair("wake", "a")
    awake = pair.look("a")
    assert (awake.state, awake.proof) == ("awake", "proven")
    assert full is not None
    assert awake.vram_bytes is not None
    assert abs(awake.vram_bytes - full) < GIB


def test_the_ledger_has_the_steps_of_the_level(pair: CommandLine, level: int) -> None:
    pair("switch", "a")
    ledger = json.loads(pair("switch", "b", "--json"))["last_switch"]
    phases = {phase for phase, seconds in ledger["phases"].items() if seconds is not None}
    assert {"drain", "sleep", "settle", "wake", "prove"} <= phases
    assert ({"weights", "reload", "kv_cache", "reset"} <= phases) == (level == 2)
    assert ledger["total"] < 30  # 0.5 s to 2 s on an H100; a cold start is 47 s and more


def test_level_one_pins_ram_and_level_two_does_not(pair: CommandLine, level: int) -> None:
    pair("switch", "b")
    pinned = pair.status()["b"]["pinned_bytes"]
    assert (pinned > GIB // 4) == (level == 1)


def test_a_chat_with_the_sleeping_model_switches_to_it(pair: CommandLine) -> None:
    pair("switch", "b")
    answer = json.loads(pair("chat", "a", "What is the capital of France?", "--json"))
    assert answer["text"]
    assert answer["switch_seconds"] > 0
    models = pair.status()
    assert (models["a"]["state"], models["b"]["state"]) == ("awake", "asleep")


def test_a_wake_makes_room_first_because_one_without_room_wedges_the_engine(pair: CommandLine) -> None:
    pair("switch", "b")
    pair("wake", "a")
    models = pair.status()
    assert (models["a"]["state"], models["b"]["state"]) == ("awake", "asleep")


def test_after_stop_the_gpu_shows_the_memory_gone(
    pair: CommandLine, gpu_zero_used: Callable[[], int]
) -> None:
    held = sum(model["vram_bytes"] for model in pair.status().values())
    before = gpu_zero_used()
    pair("stop", "--all")
    assert before - gpu_zero_used() > held - 2 * GIB
    assert not pair.processes()
