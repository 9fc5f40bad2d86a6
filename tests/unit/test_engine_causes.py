"""The reason of a failure, from excerpts of recorded logs and from messages in vLLM's sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sleep_tui.engine.causes import diagnose, diagnose_engine

DATA = Path(__file__).parent / "data"
ENGINE = "(EngineCore pid=7) ERROR 11-23 07:37:38 [core.py:1510] "


@pytest.mark.parametrize(
    ("recording", "exit_code", "reason", "cure"),
    [
        ("bad-flag", 2, "does not know the flag --no-such-flag.", "`args:`"),
        ("bad-model-path", 1, "no model folder ./no-such-dir", "path in `model:`"),
        ("empty-model-dir", 1, "./empty-dir holds no model", "config.json"),
        ("sleep-mode-refused", 1, "no sleep mode on this platform", "level: none"),
        ("port-in-use", 1, "port is taken", "`port:`"),
        ("kv-cache-too-big", 1, "have 400.0 GiB of RAM and 11.16 GiB are free", "kv-cache-memory-bytes"),
        ("kv-cache-too-small", 1, "`max-model-len` 4096 needs 0.01 GiB", "at most 384"),
        ("worker-killed", 0, "worker process of the engine (VllmWorker-0) was killed", "dmesg"),
        ("engine-killed", 0, "engine process was killed", "dmesg"),
        ("interrupted", 1, "interrupted by a signal", "again"),
        ("signalled", 0, "asked the server to end", "again"),
    ],
)
def test_every_recorded_failure_gets_its_reason(
    recording: str, exit_code: int, reason: str, cure: str
) -> None:
    diagnosis = diagnose((DATA / f"cause-{recording}.txt").read_text(), exit_code=exit_code)

    assert reason in diagnosis.reason
    assert cure in diagnosis.cure


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "ValueError: Free memory on device cuda:0 (18.4/23.6 GiB) on startup is less than desired GPU "
            "memory utilization (0.92, 21.71 GiB). Decrease GPU memory utilization.",
            "18.4 of 23.6 GiB are free, 21.71 GiB are asked for",
        ),
        ("ValueError: No available memory for the cache blocks. Try increasing it.", "KV cache"),
        (
            "ValueError: User-specified max_model_len (131072) is greater than the derived max_model_len "
            "(max_position_embeddings=4096 or model_max_length=None in model's config.json).",
            "131072 is more than the model was made for (4096)",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.", "GPU ran out of memory"),
        ("AssertionError: Error in memory profiling. Initial free memory 1, current 2.", "changed hands"),
        ("RuntimeError: CUDA Error: out of memory at /src/csrc/cumem_allocator.cpp:163", "no room"),
        ("RuntimeError: Memory usage increased after sleeping.", "took GPU memory while"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'ninja'", "`ninja`"),
        (
            "ValueError: Model architectures ['FooForCausalLM'] are not supported for now.",
            "does not support the model's architecture",
        ),
        (
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).",
            "driver is too old",
        ),
        (
            "AssertionError: Expandable segments are not compatible with memory pool. Please track it.",
            "expandable_segments",
        ),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        (
            "ValueError: The repository x contains custom code which must be executed to load it.",
            "code of its own",
        ),
        ("huggingface_hub.errors.LocalEntryNotFoundError: Cannot find it in the local cache", "local cache"),
        (
            "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='huggingface.co', port=443): "
            "Max retries exceeded with url: /api/models/x",
            "hub cannot be reached",
        ),
        (
            "importlib.metadata.PackageNotFoundError: No package metadata was found for vllm",
            "not properly installed",
        ),
        (
            "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried 1 bytes.",
            "ran out of memory (RAM)",
        ),
        ("ModuleNotFoundError: No module named 'panel_guard'", "guard"),
        (
            "ValueError: World size (2) is larger than the number of available GPUs (1) here.",
            "2 GPUs and is given 1",
        ),
    ],
)
def test_every_known_message_gets_a_sentence_and_a_cure(line: str, reason: str) -> None:
    log = f"{ENGINE}EngineCore failed to start.\n{ENGINE}Traceback (most recent call last):\n{ENGINE}{line}\n"

    diagnosis = diagnose(log, exit_code=1)

    assert reason in diagnosis.reason
    assert diagnosis.cure.endswith(".")
    assert "{" not in diagnosis.reason + diagnosis.cure


def test_a_gated_model_is_not_taken_for_a_missing_token_although_a_401_comes_first() -> None:
    log = (
        "Traceback (most recent call last):\n"
        "requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/x\n"
        "The above exception was the direct cause of the following exception:\n"
        "huggingface_hub.errors.GatedRepoError: 401 Client Error. (Request ID: Root=1)\n"
    )

    assert "gated" in diagnose(log, exit_code=1).reason


def test_a_token_that_is_wrong_is_told_from_a_gated_model() -> None:
    log = "Traceback:\nhuggingface_hub.errors.RepositoryNotFoundError: 401 Client Error. (Request ID: 1)\n"

    assert "valid token" in diagnose(log, exit_code=1).reason


def test_the_engines_own_exception_wins_over_those_of_other_processes() -> None:
    log = (
        "OSError: [Errno 98] Address already in use\n"
        f"{ENGINE}EngineCore failed to start.\n"
        f"(APIServer pid=1) INFO 11-23 07:37:38 [x.py:1] a line of another process between\n"
        f"{ENGINE}torch.OutOfMemoryError: CUDA out of memory.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )

    assert diagnose(log, exit_code=1).reason == "The GPU ran out of memory."


def test_an_unknown_exception_is_shown_as_it_is_and_not_taken_for_a_killed_worker() -> None:
    log = (
        f"{ENGINE}EngineCore failed to start.\n"
        f"{ENGINE}ValueError: the moon is in the wrong place\n"
        f"{ENGINE}Worker proc VllmWorker-0 died unexpectedly, shutting down.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )

    assert diagnose(log, exit_code=1).reason == "ValueError: the moon is in the wrong place"


def test_a_setting_in_a_dumped_config_is_no_cause() -> None:
    log = "(APIServer pid=1) INFO 11-23 07:37:38 [x.py:1] config: trust_remote_code=True, HF_HUB_OFFLINE\n"

    assert "without giving a reason" in diagnose(log, exit_code=1).reason


def test_a_silent_sigkill_points_at_the_machines_memory() -> None:
    assert "SIGKILL" in diagnose("", exit_code=-9).reason
    assert "signal 11" in diagnose("", exit_code=-11).reason
    assert "could not be run" in diagnose("", exit_code=127).reason


def test_escapes_of_a_log_never_reach_the_reason() -> None:
    diagnosis = diagnose("\x1b[31mValueError: \x1b]0;title\x07red\x1b[0m\n", exit_code=1)

    assert diagnosis.reason == "ValueError: red"


def test_the_engine_itself_tells_why_it_ends_and_nothing_else_is_taken_for_it() -> None:
    request = "(APIServer pid=3) ERROR 11-23 07:37:38 [serving.py:9] ValueError: a bad request, hours ago\n"
    lines = "EngineCore encountered a fatal error.", "RuntimeError: CUDA error: an illegal memory access"
    block = "\n".join(f"{ENGINE}{line}" for line in lines)

    assert diagnose_engine(request) is None
    found = diagnose_engine(request + block)
    assert found is not None
    assert "illegal memory access" in found.reason
    killed = diagnose_engine((DATA / "cause-worker-killed.txt").read_text())
    assert killed is not None
    assert "worker process of the engine (VllmWorker-0) was killed" in killed.reason
