"""How much memory and time a simulated model takes; measured on an H100 with vLLM 0.24 (h100/*.jsonl)."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class KnownModel:
    """Sizes of a model that the demo and the blog post use."""

    weights_gib: float
    kv_kib_per_token: int


KNOWN_MODELS = {
    "Qwen/Qwen3-0.6B": KnownModel(1.12, 112),
    "HuggingFaceTB/SmolLM2-135M-Instruct": KnownModel(0.25, 23),
    "microsoft/Phi-3-mini-4k-instruct": KnownModel(7.31, 384),
    "microsoft/Phi-3-vision-128k-instruct": KnownModel(7.7, 384),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct-AWQ": KnownModel(15.6, 96),
    "Qwen/Qwen3-32B-AWQ": KnownModel(18.0, 256),
}
ARCHITECTURES = {"qwen": "Qwen3ForCausalLM", "phi": "Phi3ForCausalLM", "smollm": "LlamaForCausalLM"}


def weights_bytes(model: str) -> int:
    """Size of the weights: of the table, a name such as ``sim/3GiB``, or a folder's files; else a guess."""
    if model in KNOWN_MODELS:
        return int(KNOWN_MODELS[model].weights_gib * GIB)
    if named := re.search(r"(\d+(?:\.\d+)?)\s*(MiB|GiB)$", model):
        return int(float(named[1]) * (GIB if named[2] == "GiB" else GIB >> 10))
    if Path(model).is_dir():
        return sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
    if billions := re.search(r"(\d+(?:\.\d+)?)B\b", model, re.IGNORECASE):
        bytes_each = 0.55 if re.search("awq|gptq|int4|4bit", model, re.IGNORECASE) else 2.0
        return int(float(billions[1]) * 1e9 * bytes_each)
    return GIB + zlib.crc32(model.encode()) % (7 * GIB)


def architecture(model: str) -> str:
    """The class that the log names."""
    name = model.lower()
    return next((found for part, found in ARCHITECTURES.items() if part in name), "LlamaForCausalLM")


def sees(model: str) -> bool:
    """Whether the model takes pictures: by a folder's config.json, else by its name."""
    config = Path(model) / "config.json"
    if config.is_file():
        return b'"vision_config"' in config.read_bytes()
    return re.search(r"vision|-vl\b|pixtral|llava|gemma-3", model, re.IGNORECASE) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What one rank holds on its GPU, in bytes; a sleeper keeps only `residual`."""

    weights: int
    kv_cache: int
    residual: int

    @property
    def awake(self) -> int:
        """Everything."""
        return self.weights + self.kv_cache + self.residual


def plan_memory(
    *, weights: int, total: int, utilization: float, kv_cache: int | None, ranks: int, eager: bool
) -> MemoryPlan:
    """The shares of one rank on a GPU of `total` bytes; `kv_cache` is negative if it has no room."""
    share = weights // ranks
    residual = residual_bytes(total, ranks=ranks, eager=eager)
    overhead = max(int(0.4 * GIB), int(1.5 * GIB * total / (80 * GIB)))
    rest = int(utilization * total) + overhead - residual - share
    return MemoryPlan(weights=share, kv_cache=rest if kv_cache is None else kv_cache, residual=residual)


def residual_bytes(total: int, *, ranks: int, eager: bool) -> int:
    """What a sleeper leaves: 0.9 GiB of 24, 1.4 of 80; more with NCCL, less without graphs."""
    fraction = (total / GIB - 24) / 56
    residual = 1.6 + 1.1 * fraction if ranks > 1 else 0.9 + 0.5 * fraction
    return int(max(0.3, residual * (0.65 if eager else 1.0)) * GIB)


def context_bytes(total: int) -> int:
    """What the CUDA context alone takes, before anything is loaded."""
    return residual_bytes(total, ranks=1, eager=True) // 2


def pinned_bytes(weights: int) -> int:
    """Host memory of a level 1 backup: allocations are rounded up to powers of two and never given back."""
    return int(weights * (2.6 if weights < 2 * GIB else 1.4))


def kv_bytes_per_token(model: str, *, ranks: int) -> int:
    """What one rank's cache takes for a token; of an unknown model, a guess that grows with its weights."""
    if model in KNOWN_MODELS:
        return KNOWN_MODELS[model].kv_kib_per_token * 1024 // ranks
    return int(112 * 1024 * max(0.2, (weights_bytes(model) / GIB / 1.12) ** 0.4)) // ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """Seconds that operations take, from the sizes of one rank."""

    weights_gib: float
    kv_gib: float

    def sleep(self, *, level: int, has_pinned: bool) -> float:
        """Falling asleep; the first level 1 sleep allocates the pinned memory, which dominates."""
        if level != 1:
            return 0.05
        return 0.015 * self.weights_gib + 0.055 if has_pinned else 0.65 * self.weights_gib + 0.7

    def own_sleep(self, *, level: int, has_pinned: bool) -> float:
        """Falling asleep by the panel's sleep mode: digests only, unless the RAM is new (H200, vLLM 0.26)."""
        if level == 0:
            return 0.04
        return 0.004 * self.weights_gib + 0.045 if level == 2 or has_pinned else 0.38 * self.weights_gib + 0.1

    def own_weights(self) -> float:
        """Waking the weights by the panel's sleep mode: the copy at 55 GB/s beside the mapping (H100)."""
        return 0.0195 * self.weights_gib + 0.01

    def own_kv_cache(self, *, made_gib: float) -> float:
        """Waking the cache by it: what was handed over costs nothing beside the rest, what the driver clears
        before anybody gets it does."""
        return 0.005 + 0.0022 * made_gib

    def wake(self, tag: str, *, level: int) -> float:
        """Waking one tag; after level 2 the weights come back empty."""
        if tag == "kv_cache":
            return 0.003 * self.kv_gib
        return 0.02 * self.weights_gib + 0.08 if level == 1 else 0.1

    def reload(self) -> float:
        """`reload_weights`, with the files in the page cache."""
        return 0.3 + 0.13 * self.weights_gib


START_SECONDS: Mapping[str, float] = {
    "import": 15.0,
    "configure": 4.0,
    "spawn": 12.0,
    "load": 1.5,
    "compile": 7.5,
    "profile": 2.0,
    "capture": 3.0,
    "warm": 4.0,
    "serve": 1.0,
}
"""Phases of a start with warm compile caches, 50 s in all for a small model."""
LOAD_SECONDS_PER_GIB = 0.6
PRIVATE_BYTES = int(2.1 * GIB)
"""Anonymous memory of an engine and its API server."""
