"""What is read from a model's files, and what is said of files that do not tell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.made_checkpoints import PHI, QWEN, shapes_of, write_model, write_safetensors
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.checkpoint import Task, find_checkpoint, read_checkpoint
from vllm_sleep_tui.sizing.pinned_memory import segments

MIB = 2**20


def test_shapes_and_sizes_come_from_config_and_headers(tmp_path: Path) -> None:
    found = read_checkpoint(write_model(tmp_path / "m", QWEN))
    assert found.architecture == "Qwen3ForCausalLM"
    assert found.task is Task.GENERATE
    assert found.parameters == 596_049_920
    assert {tensor.dtype for tensor in found.tensors} == {"BF16"}
    assert sum(tensor.bytes for tensor in found.tensors) == 2 * 596_049_920
    assert found.kv_bytes(1) == 28 * 2 * 8 * 128 * 2
    assert found.kv_bytes(1, ranks=16) == 28 * 2 * 1 * 128 * 2, "a head is never cut"


def test_shards_are_read_by_the_index_and_a_missing_one_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PHI))
    shapes = shapes_of(PHI)
    names = list(shapes)
    parts = {"a.safetensors": names[:100], "b.safetensors": names[100:]}
    for file, members in parts.items():
        write_safetensors(tmp_path / file, {name: shapes[name] for name in members})
    write_safetensors(tmp_path / "stray.safetensors", {"stray": (1000, 1000)})
    weight_map = {name: file for file, members in parts.items() for name in members}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = read_checkpoint(tmp_path)
    assert {tensor.name for tensor in whole.tensors} == set(shapes)
    (tmp_path / "b.safetensors").unlink()
    part = read_checkpoint(tmp_path)
    assert part.weights_bytes is None
    assert "b.safetensors is missing" in part.unknown["weights"]


def test_mistrals_second_copy_of_the_weights_is_not_counted(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", PHI)
    once = read_checkpoint(folder).weights_bytes
    write_safetensors(folder / "consolidated.safetensors", shapes_of(PHI))
    assert read_checkpoint(folder).weights_bytes == once


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0[1, 2]  ", b"\xff" * 16, b"\x02\0\0\0\0\0\0\0{]"]
)
def test_a_file_that_is_no_safetensors_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(content)
    found = read_checkpoint(tmp_path)
    assert found.weights_bytes is None
    assert "weights" in found.unknown
    assert "kv_bytes_per_token" in found.unknown


@pytest.mark.parametrize("content", ["[]", "no json", ""])
def test_a_config_that_is_none_is_an_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        read_checkpoint(tmp_path)


def test_a_sliding_layer_keeps_a_window_and_a_linear_one_nothing_per_token(tmp_path: Path) -> None:
    kinds = ["sliding_attention"] * 20 + ["full_attention"] * 8 + ["linear_attention"] * 4
    config = PHI | {"sliding_window": 512, "layer_types": kinds}
    found = read_checkpoint(write_model(tmp_path / "m", config, {"w": (1,)}))
    assert found.kv_bytes(4096) == (8 * 4096 + 20 * 512) * 2 * 32 * 96 * 2


def test_a_compressed_cache_is_whole_on_every_rank(tmp_path: Path) -> None:
    config = PHI | {"kv_lora_rank": 512, "qk_rope_head_dim": 64}
    found = read_checkpoint(write_model(tmp_path / "m", config, {"w": (1,)}))
    assert found.kv_bytes(1, ranks=2) == 32 * 576 * 2


def test_a_model_for_images_is_read_by_its_text_part(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": PHI,
        "vision_config": {"num_hidden_layers": 3},
    }
    found = read_checkpoint(write_model(tmp_path / "m", config, {"w": (1,)}))
    assert (found.layers, found.task) == (32, Task.GENERATE)


def test_packed_weights_hide_the_number_of_parameters(tmp_path: Path) -> None:
    config = PHI | {"quantization_config": {"quant_method": "awq"}}
    found = read_checkpoint(write_model(tmp_path / "m", config, {"q.qweight": (64, 64)}, "I32"))
    assert (found.parameters, found.quantization) == (None, "awq")
    assert found.weights_bytes == 64 * 64 * 4


def test_a_folder_beside_the_config_comes_before_the_cache(tmp_path: Path) -> None:
    write_model(tmp_path / "org/name", PHI)
    assert find_checkpoint("org/name", tmp_path, {"HF_HUB_CACHE": str(tmp_path)}) == tmp_path / "org/name"
    assert find_checkpoint("org/other", tmp_path, {"HF_HUB_CACHE": str(tmp_path)}) is None


def test_a_large_tensor_has_a_segment_of_its_own_and_smaller_ones_share() -> None:
    assert segments([297 * MIB - 1, 54 * MIB]) == [298 * MIB, 54 * MIB]
    assert segments([100_000] * 10) == [2 * MIB]
    assert segments([8 * MIB, 8 * MIB, 4 * MIB, 2 * MIB]) == [20 * MIB, 20 * MIB]
