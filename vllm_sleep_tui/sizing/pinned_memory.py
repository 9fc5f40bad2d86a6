"""What level 1 will pin: how vLLM lays a checkpoint out in VRAM, and what a copy of that takes in RAM.

Two roundings make a small model's copy much larger than its weights. vLLM keeps its weights in a pool of
PyTorch's caching allocator, which asks the driver for segments: 2 MiB for tensors of up to 1 MiB, 20 MiB for
those below 10 MiB, else the tensor rounded up to 2 MiB. A sleep copies segments, each into a pinned block
of its own, and PyTorch rounds those up to powers of two: 20 MiB become 32, an embedding of 297 MiB 512.
And the pool holds more than the checkpoint: with vLLM's second model runner also the sampler's tables,
594 MiB (1 GiB pinned) for Qwen3-0.6B with 1,024 sequences.

Of eight launches measured on an H100 (vLLM 0.24) this gives seven within 3 %: Qwen3-0.6B alone and on two
GPUs by tensor and by pipeline, Phi-3-mini and SmolLM2-135M in BF16 and FP8; a small MoE on two within 9 %.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from functools import lru_cache

import msgspec

from vllm_sleep_tui.sizing.checkpoint import Checkpoint, Tensor
from vllm_sleep_tui.units import MIB

SMALL = MIB
"""The largest tensor that shares a small segment."""
SMALL_SEGMENT = 2 * MIB
"""This and what follows are the sizes of PyTorch's CUDA allocator (CUDACachingAllocator)."""
LARGE = 10 * MIB
"""From here on a tensor has a segment of its own, unless there is a gap for it."""
LARGE_SEGMENT = 20 * MIB
GRAIN = 2 * MIB
ALIGNMENT = 512
PINNED_BASE = 64 * MIB
"""Pinned by an engine that never slept: 0.04 to 0.08 GiB measured on an H100."""

WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
FUSED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
"""Tensors that vLLM keeps as one."""
WHOLE = frozenset({"gate", "router", "kv_a_proj_with_mqa", "q_a_proj"})
"""Matrices that every rank of a tensor-parallel group keeps whole."""
ENDS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "lm_head.weight")
"""The matrices with a row for each word; vLLM quantises none of them and pads them to 64 rows."""
_EXPERT = re.compile(r"(.*\bexperts)\.\d+\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.(.*)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d{1,6})\.")
_OTHER_MEDIA = ("vision", "visual", "audio")
_NAMES = 16_384
"""Names of tensors that are taken apart once: most models call them the same."""


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How a model is spread and stored."""

    tensor_ranks: int = 1
    pipeline_ranks: int = 1
    quantised: bool = False
    """To 8 bits while it is loaded (`--quantization fp8` on a checkpoint that is not)."""
    full_width: bool = False
    """32-bit weights stay 32 bits (`--dtype float32`); vLLM makes them 16 otherwise."""
    sequences: int | None = None
    """`max-num-seqs` if the second model runner is used, whose sampler has a table for each; else None."""

    @property
    def gpus(self) -> int:
        """How many GPUs it takes."""
        return self.tensor_ranks * self.pipeline_ranks


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """What a model takes as it is spread, in bytes."""

    weights: int
    """Over all GPUs, as vLLM logs them ("Model loading took")."""
    fullest: int
    """Of what sleeps on the fullest GPU, the sampler's tables included."""
    pinned: int
    """RAM that level 1 pins, over all ranks."""


def spread(checkpoint: Checkpoint, layout: Layout) -> Spread:
    """Lay a checkpoint out (60,000 tensors take half a second)."""
    stages = ranks(checkpoint, layout)
    return Spread(
        weights=layout.tensor_ranks * (sum(map(sum, stages)) - sum(_tables(checkpoint, layout))),
        fullest=max(map(sum, stages)),
        pinned=layout.tensor_ranks * sum(pinned_of(segments(stage)) for stage in stages),
    )


def ranks(checkpoint: Checkpoint, layout: Layout) -> list[list[int]]:
    """Bytes of each allocation on a rank, in order, for one rank of each pipeline stage."""
    count = layout.pipeline_ranks
    stages: list[dict[str, int]] = [{} for _ in range(count)]
    for tensor in sorted(checkpoint.tensors, key=_order):
        if checkpoint.tied and tensor.name.endswith("lm_head.weight"):
            continue
        name = _name_in_vllm(tensor.name)
        for stage in _stages(tensor.name, checkpoint, count):
            stages[stage][name] = stages[stage].get(name, 0) + _size(tensor, checkpoint, layout)
    tensors = [list(_with_table(stage, checkpoint)) for stage in stages]
    tensors[-1] += _tables(checkpoint, layout)
    return tensors


def pinned_of(sizes: Iterable[int]) -> int:
    """RAM for a rank's segments, and what its engine pins anyway."""
    return sum(1 << (size - 1).bit_length() for size in sizes) + PINNED_BASE


def segments(allocations: Iterable[int]) -> list[int]:
    """The segments that PyTorch's caching allocator asks the driver for, in bytes."""
    blocks: list[int] = []
    gaps: dict[bool, list[int]] = {True: [], False: []}
    for wanted in allocations:
        size = max(ALIGNMENT, math.ceil(wanted / ALIGNMENT) * ALIGNMENT)
        is_small = size <= SMALL
        free = gaps[is_small]
        at = bisect_left(free, size)
        if at < len(free):
            block = free.pop(at)
        else:
            block = _segment(size)
            blocks.append(block)
        left = block - size
        if left >= ALIGNMENT if is_small else left > SMALL:
            insort(free, left)
    return blocks


def _tables(checkpoint: Checkpoint, layout: Layout) -> list[int]:
    """The sampler's tables, which the second model runner keeps beside the weights of the last stage."""
    if layout.sequences is None or checkpoint.vocabulary is None:
        return []
    return sampler_tables(layout.sequences, checkpoint.vocabulary)


def sampler_tables(sequences: int, vocabulary: int) -> list[int]:
    """What vLLM's second model runner allocates for sampling beside the weights, in bytes (source, 0.32)."""
    biases = [sequences * 1024 * 4] * 3 + [sequences * 128 * 4]
    bad_words = [sequences * 1024 * 4, sequences * 129 * 4]
    word_masks = [sequences * math.ceil(vocabulary / 32) * 4] * 2  # of the prompt, and of a grammar
    return [*biases, *bad_words, *word_masks, sequences * vocabulary * 4]


def _segment(size: int) -> int:
    if size <= SMALL:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if size < LARGE else math.ceil(size / GRAIN) * GRAIN


def _order(tensor: Tensor) -> tuple[int, int, str]:
    """As vLLM builds a model: the embedding, the layers, the rest."""
    layer = _layer(tensor.name)
    if layer is not None:
        return 1, layer, tensor.name
    return (0 if tensor.name.endswith(ENDS[:-1]) else 2), 0, tensor.name


@lru_cache(maxsize=_NAMES)
def _layer(name: str) -> int | None:
    if any(part in name for part in _OTHER_MEDIA):
        return None
    match = _LAYER.search(name)
    return int(match[1]) if match else None


def _stages(name: str, checkpoint: Checkpoint, count: int) -> Iterator[int]:
    """The pipeline stages that hold a tensor."""
    layer = _layer(name)
    if layer is not None:
        yield min(count - 1, layer * count // (checkpoint.layers or layer + 1))
        return
    first = name.endswith(ENDS[:-1]) or any(part in name for part in _OTHER_MEDIA)
    if first:
        yield 0
    if count > 1 and first and checkpoint.tied and name.endswith(ENDS):
        yield count - 1
    if not first:
        yield count - 1


@lru_cache(maxsize=_NAMES)
def _name_in_vllm(name: str) -> str:
    """The tensor that this one becomes a part of."""
    if expert := _EXPERT.fullmatch(name):
        part = "w2" if expert[2] in ("down_proj", "w2") else "w13"
        return f"{expert[1]}.{part}.{expert[3]}"
    parts = name.split(".")
    return ".".join(FUSED.get(part, part) for part in parts)


def _size(tensor: Tensor, checkpoint: Checkpoint, layout: Layout) -> int:
    """The tensor's bytes on one rank."""
    parts = tensor.name.split(".")
    shape = tensor.shape
    if len(shape) < 2 or WHOLE & set(parts):
        return _stored(tensor, layout)
    if tensor.name.endswith(ENDS):
        rows = math.ceil(shape[0] / 64) * 64
        return _stored(tensor, layout) * rows // max(1, shape[0]) // layout.tensor_ranks
    size = _quantised(tensor, checkpoint) if layout.quantised else _stored(tensor, layout)
    return size // _shares(parts, checkpoint, layout.tensor_ranks)


def _shares(parts: list[str], checkpoint: Checkpoint, tensor_ranks: int) -> int:
    """Into how many parts a matrix is cut: key and value heads are copied when there are too few of them."""
    heads = checkpoint.attention.kv_heads if checkpoint.attention else None
    if heads is not None and ("k_proj" in parts or "v_proj" in parts):
        return min(heads, tensor_ranks)
    return tensor_ranks


def _stored(tensor: Tensor, layout: Layout) -> int:
    width = WIDTHS.get(tensor.dtype)
    if width is None or width <= 2 or (layout.full_width and width == 4):
        return tensor.bytes
    return tensor.bytes * 2 // width


def _quantised(tensor: Tensor, checkpoint: Checkpoint) -> int:
    """Bytes after online quantisation to 8 bits, which takes the layers' matrices and nothing else."""
    is_linear = _layer(tensor.name) is not None and tensor.dtype in WIDTHS and checkpoint.quantization is None
    return math.prod(tensor.shape) if is_linear else tensor.bytes


def _with_table(stage: dict[str, int], checkpoint: Checkpoint) -> Iterator[int]:
    """The stage's tensors, and the table of rotations that its first layer makes."""
    made = checkpoint.rotary_dim is None or checkpoint.max_length is None
    for name, size in stage.items():
        yield size
        if not made and _layer(name) is not None:
            made = True
            yield (checkpoint.rotary_dim or 0) * (checkpoint.max_length or 0) * 2
