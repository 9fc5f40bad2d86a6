"""What a checkpoint on disk tells before anything is launched: sizes, shapes, what a token's cache takes.

Only ``config.json`` and the headers of the safetensors files are read; nothing is downloaded. All of it is a
stranger's: a file that is no checkpoint's is named, and a number that no model has is not reckoned with.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec

from vllm_sleep_tui.engine.failures import NOT_JSON
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.hub import GENERATES, hub_cache
from vllm_sleep_tui.sizing.model_files import (
    AGAIN,
    is_weights_name,
    main_snapshot,
    open_file,
    read_config,
    read_whole,
    shown,
    with_home,
)

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes of a header; the format allows no more, and all headers of a model together have far less."""
INDEX_LIMIT = 64 * 2**20
"""Bytes of an index, which has a line for each tensor."""
TENSOR_LIMIT = 250_000
"""Tensors of a model; one with 384 experts in each of 60 layers has 70,000, and packed 210,000."""
NAME_LIMIT = 500
"""Characters of a tensor's name; the longest of published models have 100."""
FILE_LIMIT = 5000
"""Files of weights; the largest models have some hundred."""
LARGEST = 2**40
"""A dimension, a length or a count beyond it is no model's."""
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


_Name = Annotated[str, msgspec.Meta(max_length=NAME_LIMIT)]


class _Index(msgspec.Struct):
    """Which file holds each tensor."""

    weight_map: dict[_Name, str]


class _Entry(msgspec.Struct):
    """A tensor as a header describes it."""

    dtype: Annotated[str, msgspec.Meta(pattern=r"^[A-Z][A-Z0-9_]{0,31}$")]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=LARGEST)], ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[
        Annotated[int, msgspec.Meta(ge=0, le=2**60)], Annotated[int, msgspec.Meta(ge=0, le=2**60)]
    ]


_index_decoder = msgspec.json.Decoder(_Index)
_header_decoder = msgspec.json.Decoder(dict[_Name, msgspec.Raw])
_entries_decoder = msgspec.json.Decoder(list[_Entry])
_WORD = re.compile(r"[A-Za-z][\w.+-]{0,99}", re.ASCII)


class Tensor(msgspec.Struct, frozen=True):
    """One tensor of a safetensors header."""

    name: str
    dtype: str
    """As the format writes it: BF16, F8_E4M3, I32."""
    shape: tuple[int, ...]
    bytes: int


class Attention(msgspec.Struct, frozen=True, kw_only=True):
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


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files; what they do not tell is None, and `unknown` says why."""

    folder: Path
    tensors: tuple[Tensor, ...]
    """Empty if the weights are not safetensors."""
    weights_bytes: int | None
    parameters: int | None
    """None if they are packed or there are no headers."""
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
    unknown: Mapping[str, str] = msgspec.field(default_factory=dict)

    def kv_bytes(self, tokens: int, *, width: int = 2, ranks: int = 1) -> int | None:
        """Bytes of KV cache that a context of `tokens` takes on each of `ranks` GPUs; None if not known."""
        if self.attention is None or (numbers := self.attention.numbers(ranks)) is None:
            return None
        kept = min(tokens, self.attention.window or tokens)
        layers = self.attention.full_layers * tokens + self.attention.sliding_layers * kept
        return layers * numbers * width


def find_checkpoint(model: str, base: Path, environ: Mapping[str, str]) -> Path | None:
    """The folder of a model: a local one, seen from `base`, or `main` of the Hugging Face cache."""
    local = base / with_home(model)
    if _is_there(local / "config.json"):  # whatever it is: who reads it says so
        return local
    snapshot = main_snapshot(hub_cache(environ) / f"models--{model.replace('/', '--')}")
    return snapshot if snapshot is not None and os.path.isfile(snapshot / "config.json") else None


def _is_there(path: Path) -> bool:
    """False as well in a folder that may not be entered, and for a name that no file can have."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a model's config and headers; raises UsageError if its config.json is none."""
    config = _Settings(read_config(folder / "config.json"), folder / "config.json")
    unknown: dict[str, str] = {}
    tensors, size = _read_weights(folder, unknown)
    attention = _attention(config)
    if attention is None:
        unknown["kv_bytes_per_token"] = "config.json names no layers and heads that are known here"
    architectures = config.whole.get("architectures")
    architecture = _word(architectures[0]) if isinstance(architectures, list) and architectures else None
    quantization = config.whole.get("quantization_config") or config.text.get("quantization_config")
    return Checkpoint(
        folder=folder,
        tensors=tensors,
        weights_bytes=size,
        parameters=_parameters(tensors),
        architecture=architecture,
        task=_task(architecture, folder),
        layers=config.integer("num_hidden_layers", "n_layer", "num_layers"),
        hidden=config.integer("hidden_size", "n_embd", "d_model"),
        vocabulary=config.integer("vocab_size"),
        max_length=config.integer("max_position_embeddings", "n_positions", "max_seq_len"),
        rotary_dim=_rotary_dim(config),
        tied=bool(config.text.get("tie_word_embeddings", config.whole.get("tie_word_embeddings", False))),
        quantization=_quantization(quantization),
        attention=attention,
        unknown=unknown,
    )


class _Settings:
    """A config.json; of a model for several media, the part about text."""

    def __init__(self, whole: dict[str, Any], path: Path) -> None:
        self.whole = whole
        self._path = path
        parts = (whole.get(name) for name in ("text_config", "llm_config", "language_config"))
        self.text: dict[str, Any] = next((part for part in parts if isinstance(part, dict)), whole)

    def integer(self, *names: str) -> int | None:
        """The first of these that is a positive number; raises UsageError if no model has so many."""
        values = ((name, self.text.get(name)) for name in names)
        name, value = next(((n, v) for n, v in values if type(v) is int and v > 0), ("", None))
        if value is not None and value > LARGEST:
            raise UsageError(f"{shown(self._path)}: {name}: no model has so many.", AGAIN)
        return value

    def share(self, name: str) -> float:
        """A number above 0 and up to 1; 1 if it is not given. Raises UsageError if it is another."""
        value = self.text.get(name)
        if not isinstance(value, int | float):
            return 1.0
        if not 0 < value <= 1:  # NaN neither
            raise UsageError(f"{shown(self._path)}: {name}: not a share.", AGAIN)
        return float(value)


def _word(value: object) -> str | None:
    """A name that the checkpoint gives; None if it is not one."""
    return value if isinstance(value, str) and _WORD.fullmatch(value) else None


def _quantization(settings: object) -> str | None:
    """The method of a `quantization_config`."""
    if not isinstance(settings, dict):
        return None
    return _word(settings.get("quant_method")) or "unnamed"


def _task(architecture: str | None, folder: Path) -> Task | None:
    if os.path.isfile(folder / "modules.json"):  # as sentence-transformers writes it; vLLM looks there too
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
            tensors = _read_headers(files)
            return tensors, sum(tensor.bytes for tensor in tensors)
        loose = [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".gguf")]
        sizes = [os.path.getsize(path) for path in loose if os.path.isfile(path)]
    except UsageError as error:
        unknown["weights"] = error.what
        return (), None
    except OSError as error:
        unknown["weights"] = f"{shown(folder)}: cannot be read: {error.strerror}."
        return (), None
    unknown["tensors"] = "there are no safetensors headers"
    if not sizes:
        unknown["weights"] = "there are no weights in the folder"
    return (), sum(sizes) or None


def _parameters(tensors: Sequence[Tensor]) -> int | None:
    if not tensors or any(tensor.dtype in PACKED and len(tensor.shape) > 1 for tensor in tensors):
        return None
    return sum(math.prod(tensor.shape) for tensor in tensors)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model; raises UsageError if one is missing."""
    if not _is_there(folder / INDEX):
        files = sorted(folder.glob("*.safetensors"))
        # Mistral's folders hold the same weights twice.
        files = [path for path in files if not path.name.startswith("consolidated")] or files
        _check_few(len(files))
        return files
    try:
        index = _index_decoder.decode(read_whole(folder / INDEX, INDEX_LIMIT))
    except NOT_JSON as error:
        raise UsageError(f"{INDEX} is no index of weights: {_malformed(error)}.", AGAIN) from None
    names = sorted(set(index.weight_map.values()))
    _check_few(len(names))
    if not names:
        raise UsageError(f"{INDEX} names no weights.", AGAIN)
    for name in names:
        if not is_weights_name(name):
            raise UsageError(f"{INDEX} names {shown(name)!r}, which is no file of weights beside it.", AGAIN)
        if not _is_there(folder / name):
            raise UsageError(f"{shown(name)} is missing: the model is not fetched completely.", AGAIN)
    return [folder / name for name in names]


def _check_few(files: int) -> None:
    """Raises UsageError if there are more files of weights than a model has."""
    if files > FILE_LIMIT:
        raise UsageError(f"{files} files of weights are more than a model has.", AGAIN)


def _read_headers(files: list[Path]) -> tuple[Tensor, ...]:
    """The tensors of all files; raises UsageError if one is no safetensors file, or all are too large."""
    tensors: list[Tensor] = []
    left = HEADER_LIMIT
    for path in files:
        in_file, length = read_header(path)
        tensors += in_file
        left -= length
        if left < 0 or len(tensors) > TENSOR_LIMIT:
            raise UsageError(f"{shown(path.name)}: with it there are more tensors than a model has.", AGAIN)
    return tuple(tensors)


def read_header(path: Path) -> tuple[list[Tensor], int]:
    """The tensors of a safetensors file, and the bytes of its header; raises UsageError if it is none.

    What the format demands is checked as far as figures hang on it: no tensor lies beyond the end of the file
    or has more numbers than it has room for, and together they are not larger than the file.
    """
    with open_file(path) as file:
        try:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if 0 < length <= HEADER_LIMIT else b""
            room = os.fstat(file.fileno()).st_size - 8 - length
        except OSError as error:
            raise UsageError(f"{shown(path.name)}: cannot be read: {error.strerror}.", AGAIN) from None
    if not header:
        raise UsageError(f"{shown(path.name)} has no safetensors header.", AGAIN)
    try:
        raw = _header_decoder.decode(header)
        raw.pop("__metadata__", None)
        if len(raw) > TENSOR_LIMIT:
            raise ValueError("it names more tensors than a model has")
        # All in one call: a call for each takes seconds.
        entries = _entries_decoder.decode(b"[" + b",".join(raw.values()) + b"]")
        tensors = [_tensor(name, entry, room) for name, entry in zip(raw, entries, strict=True)]
        if sum(tensor.bytes for tensor in tensors) > room:
            raise ValueError("its tensors overlap")
    except (*NOT_JSON, ValueError) as error:
        what = f"{shown(path.name)} has no safetensors header: {_malformed(error)}."
        raise UsageError(what, AGAIN) from None
    return tensors, length


def _tensor(name: str, entry: _Entry, room: int) -> Tensor:
    """Raises ValueError if the header contradicts itself, or the file, which has `room` for tensors."""
    begin, end = entry.data_offsets
    if end > room:
        raise ValueError("a tensor ends beyond the file, which may be cut short")
    if begin > end or math.prod(entry.shape) > 2 * (end - begin):  # the smallest numbers have 4 bits
        raise ValueError("a tensor's shape and its place do not agree")
    return Tensor(name, entry.dtype, entry.shape, end - begin)


def _malformed(error: Exception) -> str:
    """What is wrong with JSON, without anything of its content."""
    if isinstance(error, RecursionError):
        return "it is nested too deep"
    if isinstance(error, UnicodeDecodeError):
        return "it is not text"
    return str(error)


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
        stateful = sum(any(word in kind for word in STATEFUL) for kind in kinds if isinstance(kind, str))
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
    part = config.share("partial_rotary_factor")
    return None if size is None else int(size * part)
