"""Checkpoints with the shapes of real models: headers over files without content."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WIDTHS = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "I32": 4}
Shapes = Mapping[str, Sequence[int]]

QWEN = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "sliding_window": None,
}
PHI = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "sliding_window": None,
}
SMOLLM = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 49152,
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 16,
    "moe_intermediate_size": 768,
    "max_position_embeddings": 8192,
    "rope_theta": 10000.0,
}


def write_safetensors(path: Path, shapes: Shapes, dtype: str = "BF16") -> None:
    """Write a header; the content is a hole in the file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * WIDTHS[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)


def write_model(
    folder: Path, config: Mapping[str, Any], shapes: Shapes | None = None, dtype: str = "BF16"
) -> Path:
    """Write a whole model; its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", shapes or shapes_of(config), dtype)
    return folder


def cache_model(home: Path, name: str, config: Mapping[str, Any]) -> None:
    """Write a whole model into a Hugging Face cache under `home`."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    write_model(folder / "snapshots/abc123", config)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("abc123")


def shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model, named as transformers writes them."""
    words, hidden = config["vocab_size"], config["hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in layer_shapes(config).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (words, hidden)
    return shapes


def layer_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    size = config.get("head_dim", hidden // heads)
    q, kv = heads * size, config["num_key_value_heads"] * size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.o_proj.weight": (hidden, q),
    }
    if config["architectures"] == ["Phi3ForCausalLM"]:
        inner = config["intermediate_size"]
        return shapes | {
            "self_attn.qkv_proj.weight": (q + 2 * kv, hidden),
            "mlp.gate_up_proj.weight": (2 * inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
    shapes["self_attn.q_proj.weight"] = (q, hidden)
    shapes["self_attn.k_proj.weight"] = shapes["self_attn.v_proj.weight"] = (kv, hidden)
    if "head_dim" in config:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (size,)
    if "num_experts" not in config:
        return shapes | mlp_shapes("mlp", hidden, config["intermediate_size"])
    shapes["mlp.gate.weight"] = (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        shapes |= mlp_shapes(f"mlp.experts.{expert}", hidden, config["moe_intermediate_size"])
    return shapes


def mlp_shapes(prefix: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one gated block."""
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }
