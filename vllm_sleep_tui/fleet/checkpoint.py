"""What a checkpoint on disk tells before anything is launched: sizes, shapes, what a token's cache takes.

Only ``config.json`` and the headers of the safetensors files are read; nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.discovery import GENERATES, hub_cache

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes of a header; the format allows no more."""
EMBEDS = ("Model", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification", "EmbeddingModel")
"""Endings of architectures that vLLM runs as pooling models."""
PACKED = frozenset({"I32", "I64", "U8", "I8"})
"""Types of tensors that hold several quantised weights in one number, or indices."""


STATEFUL = ("linear", "mamba", "conv", "recurrent")
"""In the kinds of layers that keep one state for a whole context instead of something per token."""


class Task(StrEnum):
    """What a model answers."""

    GENERATE = "generate"
    EMBED = "embed"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors header."""

    name: str
    dtype: str
    """As the format writes it: BF16, F8_E4M3, I32."""
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The layers that keep something per token, and what each keeps, in numbers per token."""

    full_layers: int
    sliding_layers: int = 0
    window: int | None = None
    """Tokens that a sliding layer keeps at most."""
    kv_heads: int | None = None
    head_dim: int | None = None
    latent: int | None = None
    """Numbers per token and layer of a compressed cache (MLA); every rank of a TP group keeps all."""

    def numbers(self, ranks: int) -> int | None:
        """Numbers that one layer keeps for a token on one of `ranks` GPUs; None if not known."""
        if self.latent is not None:
            return self.latent
        if self.kv_heads is None or self.head_dim is None:
            return None
        return 2 * max(1, self.kv_heads // ranks) * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's files; what they do not tell is None, and `unknown` says why."""

    folder: Path
    tensors: tuple[Tensor, ...]
    """Empty if the weights are not safetensors."""
    weights_bytes: int | None
    architecture: str | None
    task: Task | None
    layers: int | None
    hidden: int | None
    """Numbers that a layer hands to the next for each token."""
    vocabulary: int | None
    max_length: int | None
    """Tokens of a context, `max_position_embeddings`."""
    rotary_dim: int | None
    """Numbers per position of the table of rotations."""
    tied: bool
    """The output layer is the embedding."""
    quantization: str | None
    """The checkpoint's own, such as awq, gptq or fp8."""
    attention: Attention | None
    unknown: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of weights by the type they are stored in, the largest first."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors:
            sizes[tensor.dtype] += tensor.bytes
        return dict(sizes.most_common())

    @property
    def parameters(self) -> int | None:
        """How many parameters there are; None if they are packed or the headers are not there."""
        if not self.tensors or any(t.dtype in PACKED and len(t.shape) > 1 for t in self.tensors):
            return None
        return sum(math.prod(tensor.shape) for tensor in self.tensors)

    def kv_bytes(self, tokens: int, *, width: int = 2, ranks: int = 1) -> int | None:
        """Bytes of KV cache that a context of `tokens` takes on each of `ranks` GPUs; None if not known."""
        if self.attention is None or (numbers := self.attention.numbers(ranks)) is None:
            return None
        kept = min(tokens, self.attention.window or tokens)
        layers = self.attention.full_layers * tokens + self.attention.sliding_layers * kept
        return layers * numbers * width


def find_checkpoint(model: str, base: Path, environ: Mapping[str, str]) -> Path | None:
    """The folder of a model: a local one, seen from `base`, or `main` of the Hugging Face cache."""
    local = base / Path(model).expanduser()
    if os.path.isfile(local / "config.json"):  # False as well in a folder that may not be entered
        return local
    cached = hub_cache(environ) / f"models--{model.replace('/', '--')}"
    try:
        snapshot = cached / "snapshots" / (cached / "refs/main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return snapshot if os.path.isfile(snapshot / "config.json") else None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a model's config and headers; raises UsageError if there is no config.json to be read."""
    config = _Settings(_read_config(folder / "config.json"))
    unknown: dict[str, str] = {}
    tensors, size = _read_weights(folder, unknown)
    attention = _attention(config)
    if attention is None:
        unknown["kv_bytes_per_token"] = "config.json names no layers and heads that are known here"
    architectures = config.whole.get("architectures")
    architecture = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    quantization = config.whole.get("quantization_config") or config.text.get("quantization_config")
    return Checkpoint(
        folder=folder,
        tensors=tensors,
        weights_bytes=size,
        architecture=architecture,
        task=_task(architecture, folder),
        layers=config.integer("num_hidden_layers", "n_layer", "num_layers"),
        hidden=config.integer("hidden_size", "n_embd", "d_model"),
        vocabulary=config.integer("vocab_size"),
        max_length=config.integer("max_position_embeddings", "n_positions", "max_seq_len"),
        rotary_dim=_rotary_dim(config),
        tied=bool(config.text.get("tie_word_embeddings", config.whole.get("tie_word_embeddings", False))),
        quantization=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
        attention=attention,
        unknown=unknown,
    )


class _Settings:
    """A config.json; of a model for several media, the part about text."""

    def __init__(self, whole: dict[str, Any]) -> None:
        self.whole = whole
        parts = (whole.get(name) for name in ("text_config", "llm_config", "language_config"))
        self.text: dict[str, Any] = next((part for part in parts if isinstance(part, dict)), whole)

    def integer(self, *names: str) -> int | None:
        """The first of these that is a positive number."""
        found = (self.text.get(name) for name in names)
        return next((value for value in found if type(value) is int and value > 0), None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}.", "Name another folder.") from None
    except ValueError:
        raise UsageError(f"{path}: not JSON.", "Fetch the model again.") from None
    if not isinstance(config, dict):
        raise UsageError(f"{path}: not a model's config.", "Fetch the model again.")
    return config


def _task(architecture: str | None, folder: Path) -> Task | None:
    if (folder / "modules.json").is_file():  # as sentence-transformers writes it; vLLM looks there too
        return Task.EMBED
    if architecture is None:
        return None
    if architecture.endswith(GENERATES):
        return Task.GENERATE
    return Task.EMBED if architecture.endswith(EMBEDS) else None


# ── weights ──────────────────────────────────────────────────────────────────────────────────────────────


def _read_weights(folder: Path, unknown: dict[str, str]) -> tuple[tuple[Tensor, ...], int | None]:
    """The tensors and their bytes; files without headers count with their size."""
    try:
        files = _weight_files(folder)
        if files:
            tensors = tuple(tensor for path in files for tensor in read_header(path))
            return tensors, sum(tensor.bytes for tensor in tensors)
        sizes = [p.stat().st_size for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".gguf")]
    except (OSError, ValueError) as error:
        unknown["weights"] = str(error)
        return (), None
    unknown["tensors"] = "there are no safetensors headers"
    if not sizes:
        unknown["weights"] = "there are no weights in the folder"
    return (), sum(sizes) or None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model; raises ValueError if one of the index is missing."""
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_bytes())
        names = sorted(set(index["weight_map"].values())) if isinstance(index, dict) else []
        for name in names:
            if not (folder / name).is_file():
                raise ValueError(f"{name} is missing: the model is not fetched completely")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    # Mistral's folders hold the same weights twice.
    return [path for path in files if not path.name.startswith("consolidated")] or files


def read_header(path: Path) -> list[Tensor]:
    """The tensors of a safetensors file; raises ValueError if it is none."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= HEADER_LIMIT:
            raise ValueError(f"{path.name} has no safetensors header")
        header = json.loads(file.read(length))
    try:
        return [
            Tensor(name, entry["dtype"], tuple(entry["shape"]), _span(entry["data_offsets"]))
            for name, entry in header.items()
            if name != "__metadata__"
        ]
    except (AttributeError, KeyError, TypeError):
        raise ValueError(f"{path.name} has no safetensors header") from None


def _span(offsets: list[int]) -> int:
    return offsets[1] - offsets[0]


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────


def _attention(config: _Settings) -> Attention | None:
    layers = config.integer("num_hidden_layers", "n_layer", "num_layers")
    if layers is None:
        return None
    full, sliding = _layer_kinds(config, layers)
    rank = config.integer("kv_lora_rank")
    heads = config.integer("num_attention_heads", "n_head", "num_heads")
    return Attention(
        full_layers=full,
        sliding_layers=sliding,
        window=config.integer("sliding_window") if sliding else None,
        kv_heads=config.integer("num_key_value_heads", "num_kv_heads") or heads,
        head_dim=_head_dim(config),
        latent=None if rank is None else rank + (config.integer("qk_rope_head_dim") or 0),
    )


def _layer_kinds(config: _Settings, layers: int) -> tuple[int, int]:
    """How many layers keep every token, and how many only a window of them."""
    kinds = config.text.get("layer_types")
    if isinstance(kinds, list):
        sliding = kinds.count("sliding_attention")
        stateful = sum(any(word in str(kind) for word in STATEFUL) for kind in kinds)
        return len(kinds) - sliding - stateful, sliding
    if config.integer("sliding_window") is None or config.text.get("use_sliding_window") is False:
        return layers, 0
    pattern = config.integer("sliding_window_pattern")
    full = 0 if pattern is None else layers // pattern
    return full, layers - full


def _head_dim(config: _Settings) -> int | None:
    given = config.integer("head_dim")
    hidden = config.integer("hidden_size", "n_embd", "d_model")
    heads = config.integer("num_attention_heads", "n_head", "num_heads")
    return given or (None if hidden is None or heads is None else hidden // heads)


def _rotary_dim(config: _Settings) -> int | None:
    """Numbers per position of the table of rotations; None if the model has none."""
    if not any(name in config.text for name in ("rope_theta", "rope_parameters", "rope_scaling")):
        return None
    size = config.integer("qk_rope_head_dim") or _head_dim(config)
    part = config.text.get("partial_rotary_factor", 1.0)
    return None if size is None else int(size * (part if isinstance(part, int | float) else 1.0))
