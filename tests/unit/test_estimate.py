"""Estimates from headers, against what was measured on an H100 with vLLM 0.24 (h100/*.jsonl)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.unit.made_checkpoints import MOE, PHI, QWEN, SMOLLM, cache_model, write_model
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.serve_args import whole_number
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.estimate import Estimate, estimate, estimated_weights

GIB = 2**30
H100 = 81559 * 2**20
FP8 = {"quantization": "fp8"}


def estimated(folder: Path, config: Mapping[str, Any], **args: object) -> Estimate:
    """The estimate on H100s of a made model with these arguments."""
    write_model(folder / "model", config)
    named = {name.replace("_", "-"): value for name, value in args.items()}
    model = ModelConfig(model=str(folder / "model"), args=named)
    return estimate(model, folder, total=H100, gpu_name="NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("config", "args", "measured"),
    [
        pytest.param(QWEN, {}, 2.961, id="Qwen3-0.6B"),
        pytest.param(QWEN, {"tensor_parallel_size": 2}, 2 * 2.065, id="Qwen3-0.6B, TP 2"),
        pytest.param(QWEN, {"pipeline_parallel_size": 2}, 1.203 + 2.33, id="Qwen3-0.6B, PP 2"),
        pytest.param(PHI, {}, 10.084, id="Phi-3-mini"),
        pytest.param(PHI, FP8, 5.615, id="Phi-3-mini FP8"),
        pytest.param(SMOLLM, {}, 0.748, id="SmolLM2-135M"),
        pytest.param(SMOLLM, FP8, 0.6, id="SmolLM2-135M FP8"),
        pytest.param(MOE, {"tensor_parallel_size": 2}, 2 * 0.619, id="MoE, TP 2"),
    ],
)
def test_the_pinned_ram_is_within_a_tenth_of_what_was_measured(
    tmp_path: Path, config: Mapping[str, Any], args: dict[str, object], measured: float
) -> None:
    pinned = estimated(tmp_path, config, **args).pinned_bytes
    assert pinned is not None
    assert pinned / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("config", "args", "logged"),
    [
        pytest.param(QWEN, {}, 1.12, id="Qwen3-0.6B"),
        pytest.param(QWEN, {"tensor_parallel_size": 2}, 2 * 0.57, id="Qwen3-0.6B, TP 2"),
        pytest.param(PHI, {}, 7.31, id="Phi-3-mini"),
        pytest.param(SMOLLM, {}, 0.26, id="SmolLM2-135M"),
    ],
)
def test_the_weights_are_what_vllm_logged(
    tmp_path: Path, config: Mapping[str, Any], args: dict[str, object], logged: float
) -> None:
    found = estimated(tmp_path, config, **args)
    assert found.weights_bytes is not None
    assert found.weights_bytes / GIB == pytest.approx(logged, rel=0.05)


@pytest.mark.parametrize(
    ("config", "args", "awake"),
    [
        pytest.param(QWEN, {"gpu_memory_utilization": 0.85}, 69.236, id="Qwen3-0.6B"),
        pytest.param(PHI, {"gpu_memory_utilization": 0.85}, 68.148, id="Phi-3-mini"),
        pytest.param(SMOLLM, {"gpu_memory_utilization": 0.3}, 25.07, id="SmolLM2-135M"),
        pytest.param(PHI, {"gpu_memory_utilization": 0.4} | FP8, 32.434, id="Phi-3-mini FP8"),
        pytest.param(
            QWEN, {"gpu_memory_utilization": 0.4, "tensor_parallel_size": 2}, 35.402, id="Qwen3-0.6B, TP 2"
        ),
    ],
)
def test_the_vram_awake_is_within_a_tenth_of_what_was_measured(
    tmp_path: Path, config: Mapping[str, Any], args: dict[str, object], awake: float
) -> None:
    found = estimated(tmp_path, config, **args).awake_per_gpu
    assert found is not None
    assert found / GIB == pytest.approx(awake, rel=0.1)


EAGER = {"enforce_eager": True}


@pytest.mark.parametrize(
    ("config", "args", "asleep"),
    [
        pytest.param(QWEN, {}, 1.385, id="Qwen3-0.6B"),
        pytest.param(PHI, {}, 1.551, id="Phi-3-mini"),
        pytest.param(SMOLLM, {}, 1.23, id="SmolLM2-135M"),
        pytest.param(QWEN, FP8, 1.291, id="Qwen3-0.6B FP8"),
        pytest.param(PHI, FP8, 1.484, id="Phi-3-mini FP8"),
        pytest.param(SMOLLM, EAGER, 0.820, id="SmolLM2-135M, eager"),
        pytest.param(MOE, EAGER, 0.920, id="MoE, eager"),
        pytest.param(PHI, EAGER, 0.889, id="Phi-3-mini, eager"),
        pytest.param(PHI, EAGER | FP8, 0.967, id="Phi-3-mini FP8, eager"),
        pytest.param(SMOLLM, EAGER | FP8, 0.805, id="SmolLM2-135M FP8, eager"),
        pytest.param(QWEN, {"tensor_parallel_size": 2}, 2.734, id="Qwen3-0.6B, TP 2"),
        pytest.param(MOE, EAGER | {"tensor_parallel_size": 2}, 2.744, id="MoE, TP 2, eager"),
    ],
)
def test_the_vram_asleep_is_within_a_tenth_of_what_was_measured(
    tmp_path: Path, config: Mapping[str, Any], args: dict[str, object], asleep: float
) -> None:
    found = estimated(tmp_path, config, **args).asleep_per_gpu
    assert found is not None
    assert found / GIB == pytest.approx(asleep, rel=0.1)


@pytest.mark.parametrize(
    ("config", "tokens", "bytes_for_all"),
    [pytest.param(PHI, 159_936, 58.57, id="Phi-3-mini"), pytest.param(SMOLLM, 1_072_048, 23.0, id="SmolLM2")],
)
def test_the_kv_cache_of_a_token_is_what_vllms_log_gives(
    tmp_path: Path, config: Mapping[str, Any], tokens: int, bytes_for_all: float
) -> None:
    per_token = estimated(tmp_path, config).kv_bytes_per_token
    assert per_token is not None
    assert per_token * tokens / GIB == pytest.approx(bytes_for_all, rel=0.01)


@pytest.mark.parametrize(
    ("config", "measured"),
    [
        pytest.param(
            QWEN, {"start": 49, "sleep1_first": 1.4, "sleep1": 0.08, "wake1": 0.355, "wake2": 0.6}, id="qwen"
        ),
        pytest.param(
            PHI, {"start": 52, "sleep1_first": 5.2, "sleep1": 0.185, "wake1": 0.455, "wake2": 1.38}, id="phi"
        ),
    ],
)
def test_the_times_are_near_the_measured_ones(
    tmp_path: Path, config: Mapping[str, Any], measured: dict[str, float]
) -> None:
    times = estimated(tmp_path, config, gpu_memory_utilization=0.85).times
    for name, seconds in measured.items():
        assert getattr(times, name) == pytest.approx(seconds, rel=0.25), name


def test_a_context_is_counted_with_the_length_that_is_served(tmp_path: Path) -> None:
    found = estimated(tmp_path, PHI, max_model_len="2K", kv_cache_dtype="fp8")
    assert found.max_length == 2048
    assert found.context_bytes == 2048 * 32 * 2 * 32 * 96


def test_a_kv_cache_that_is_given_decides_over_the_share(tmp_path: Path) -> None:
    found = estimated(tmp_path, PHI, kv_cache_memory_bytes="4G", gpu_memory_utilization=0.1)
    assert found.awake_per_gpu is not None
    assert 13 < found.awake_per_gpu / GIB < 15.5


def test_without_a_gpu_the_share_is_not_known_but_the_weights_are(tmp_path: Path) -> None:
    write_model(tmp_path / "m", PHI)
    found = estimate(ModelConfig(model="m"), tmp_path)
    assert found.awake_per_gpu is None
    assert found.weights_bytes is not None


def test_a_model_of_the_cache_is_found_where_its_server_will_look(tmp_path: Path) -> None:
    cache_model(tmp_path / "hf", "Qwen/Qwen3-0.6B", QWEN)
    model = ModelConfig(model="Qwen/Qwen3-0.6B", env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_CACHE": ""})
    weights = estimated_weights(model, tmp_path)
    assert weights is not None
    assert weights / GIB == pytest.approx(1.12, rel=0.02)


def test_a_model_that_is_not_here_is_an_error_that_says_how_to_fetch_it(tmp_path: Path) -> None:
    model = ModelConfig(model="no/such-model", env={"HF_HUB_CACHE": str(tmp_path)})
    assert estimated_weights(model, tmp_path) is None
    with pytest.raises(UsageError, match="not on this machine") as caught:
        estimate(model, tmp_path)
    assert "hf download no/such-model" in caught.value.cure


def test_weights_without_headers_count_with_the_size_of_their_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI))
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        file.truncate(3 * GIB)
    found = estimate(ModelConfig(model=str(tmp_path)), tmp_path, total=H100)
    assert found.weights_bytes == 3 * GIB
    assert found.pinned_bytes is None
    assert "tensors" in found.unknown


def test_a_checkpoint_that_changed_is_read_again(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", SMOLLM)
    model = ModelConfig(model=str(folder))
    before = estimated_weights(model, tmp_path)
    (folder / "model.safetensors").unlink()
    assert before is not None
    assert estimated_weights(model, tmp_path) is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [(8192, 8192), ("8k", 8000), ("8K", 8192), ("1.5G", 3 * 2**29), ("auto", None), (-1, None), (True, None)],
)
def test_numbers_are_read_as_vllm_reads_them(written: object, meant: int | None) -> None:
    assert whole_number(written) == meant
