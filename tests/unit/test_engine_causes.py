"""The reason of a failure, from excerpts of recorded logs and from messages in vLLM's sources."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sleep_tui.engine.causes import diagnose, diagnose_download, diagnose_engine

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
        ("inner-port", 1, "inside is taken: tcp://*:15557", "`kv-events-config`"),
        ("shared-memory-small", 1, "/dev/shm, has 1 MiB free, and 160 MiB are needed", "--shm-size"),
        ("open-files", 1, "may not open as many files", "ulimit -n"),
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
            "TimeoutError: Timed out waiting for engine core processes to start. This is often caused by "
            "slow weight loading for large models. Waited 600s (configured by VLLM_ENGINE_READY_TIMEOUT_S).",
            "not ready within the 600 s that vLLM gives it",
        ),
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


def test_an_exception_whose_words_begin_on_a_later_line_is_told_with_them() -> None:
    log = (
        "Traceback (most recent call last):\n"
        "RuntimeError: \n"
        "\n"
        "        An attempt has been made to dance before the music began.\n"
    )
    said = "RuntimeError: An attempt has been made to dance before the music began."
    assert diagnose(log, exit_code=1).reason == said
    assert (
        diagnose("RuntimeError:\nTraceback (most recent call last):\n", exit_code=1).reason == "RuntimeError:"
    )


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


HUB_LOG = (
    "(APIServer pid=5) ERROR 11-26 12:13:00 [repo_utils.py:66] {words}\n"
    "(APIServer pid=5) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
    "(APIServer pid=5)   Value error, Invalid repository ID or local directory specified: 'org/model'.\n"
)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            "Error retrieving file list: 403 Client Error.\n\nCannot access gated repo for url http://hub/x.\n"
            "Access to model org/model is restricted and you are not in the authorized list.",
            "gated",
        ),
        (
            "Error retrieving file list: 401 Client Error.\n\nRepository Not Found for url: http://hub/x.\n"
            "Invalid username or password.",
            "does not know the model",
        ),
        (
            "Error retrieving file list: Client error '401 Unauthorized' for url 'http://hub/x'\n"
            "For more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/401\n\n"
            "Invalid credentials in Authorization header",
            "does not accept the token",
        ),
        (
            "Error retrieving file list: 403 Forbidden: None.\nCannot access content at: http://hub/x.",
            "token may not read",
        ),
        (
            "Error retrieving file list: 404 Client Error.\n\nRepository Not Found for url: http://hub/x.",
            "does not know the model",
        ),
        ("Error retrieving file list: [Errno 111] Connection refused, retrying 1 of 2", "cannot be reached"),
        ("Error retrieving file list: Server error '503 Service Unavailable' for url 'x'", "out of order"),
    ],
)
def test_what_the_hub_answered_is_told_and_not_vllms_invalid_repository(words: str, reason: str) -> None:
    log = HUB_LOG.format(
        words=words.replace("\n", "\n(APIServer pid=5) ERROR 11-26 12:13:00 [repo_utils.py:66] ")
    )

    assert reason in diagnose(log, exit_code=1).reason


def test_a_hub_that_refused_at_first_is_no_cause_of_what_failed_later() -> None:
    log = (
        "Error retrieving file list: [Errno 111] Connection refused, retrying 1 of 2\n"
        f"{ENGINE}EngineCore failed to start.\n{ENGINE}torch.OutOfMemoryError: CUDA out of memory.\n"
    )

    assert diagnose(log, exit_code=1).reason == "The GPU ran out of memory."


@pytest.mark.parametrize(
    ("line", "reason", "cure"),
    [
        ("httpx.ConnectTimeout: timed out", "did not answer in time", "network"),
        ("httpx.ReadTimeout: The read operation timed out", "did not answer in time", "network"),
        ("requests.exceptions.ReadTimeout: HTTPSConnectionPool: Read timed out.", "in time", "network"),
        ("httpx.ConnectError: [Errno 111] Connection refused", "cannot be reached", "proxy"),
        (
            "huggingface_hub.errors.OfflineModeIsEnabled: Cannot reach https://hub: offline mode is enabled. "
            "To disable it, please unset the `HF_HUB_OFFLINE` environment variable.",
            "may not be asked",
            "unset HF_HUB_OFFLINE",
        ),
        (
            "huggingface_hub.errors.RevisionNotFoundError: 404 Client Error. Revision Not Found for url: x",
            "no such revision",
            "`revision`",
        ),
        (
            "huggingface_hub.errors.HfHubHTTPError: 429 Client Error: Too Many Requests for url: x",
            "too many requests",
            "minutes",
        ),
        ("OSError: [Errno 24] Too many open files", "as many files", "ulimit -n"),
        ("zmq.error.ZMQError: Too many open files", "as many files", "ulimit -n"),
        ("RuntimeError: can't start new thread", "threads", "ulimit -u"),
        (
            "OSError: [Errno 28] No space left on device: '/dev/shm/psm_1f2e'",
            "/dev/shm, is full",
            "--shm-size",
        ),
        (
            "RuntimeError: unable to write to file </torch_123_456>: No space left on device (28)",
            "/dev/shm, is full",
            "--ipc=host",
        ),
        (
            "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:77, unhandled system error "
            "(run with NCCL_DEBUG=INFO for details), NCCL version 2.27.3",
            "call to the system",
            "/dev/shm|--ipc=host",
        ),
        ("RuntimeError: NCCL error: unhandled cuda error", "(NCCL) failed", "NCCL_DEBUG"),
        (
            "torch.distributed.DistBackendError: NCCL error in: x, invalid usage. Last error: "
            "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
            "the same GPU",
            "once",
        ),
        (
            "zmq.error.ZMQError: Address already in use (addr='tcp://*:5557')",
            "inside is taken: tcp://*:5557",
            "kv-events-config",
        ),
        (
            "torch.distributed.DistNetworkError: The server socket has failed to listen on any local network "
            "address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE, message: address in use",
            "inside is taken: 29500",
            "master-port",
        ),
    ],
)
def test_a_message_of_todays_libraries_gets_its_own_sentence(line: str, reason: str, cure: str) -> None:
    diagnosis = diagnose(f"Traceback (most recent call last):\n{line}\n", exit_code=1)

    assert reason in diagnosis.reason
    assert any(word in diagnosis.cure for word in cure.split("|"))


def test_a_refused_connection_inside_vllm_is_not_told_as_the_hub() -> None:
    log = "torch.distributed.DistNetworkError: The client socket has failed to connect: Connection refused\n"

    assert "hub" not in diagnose(log, exit_code=1).reason


def test_a_bus_error_points_at_shared_memory() -> None:
    assert "/dev/shm" in diagnose("", exit_code=-7).reason


def test_an_inspection_that_failed_tells_the_exception_that_stands_above() -> None:
    recorded = (DATA / "cause-inspection.txt").read_text()

    diagnosis = diagnose(recorded, exit_code=1)

    assert "libraries do not fit together" in diagnosis.reason
    unknown = recorded.replace(
        "ImportError: libcudart.so.12: cannot open shared object file", "KeyError: 'moon'"
    )
    assert diagnose(unknown, exit_code=1).reason.startswith("KeyError: 'moon'")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Error: Access denied. Model 'org/gated' requires approval.\nHint: set HF_DEBUG=1 …", "gated"),
        ("Error: Model 'org/n' not found.\nIf the repo is private, make sure …", "does not know the model"),
        ("Error: Local entry not found. [Errno 111] Connection refused", "cannot be reached"),
        ("Error: Local entry not found. timed out", "did not answer in time"),
        ("Error: 403 Forbidden: None.\nMake sure your token has the correct permissions.", "may not read"),
        ("Error: the moon\nHint: set HF_DEBUG=1 as environment variable for full traceback.", "the moon"),
    ],
)
def test_the_words_of_the_download_tool_are_understood(said: str, reason: str) -> None:
    assert reason in diagnose_download(said)
