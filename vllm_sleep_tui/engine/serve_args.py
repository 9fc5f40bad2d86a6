"""What the flags of a model's `vllm serve` mean to us, typed: the one place that knows their names.

It imports nothing of ours, so that the config can be checked with it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

UTILIZATION = "gpu-memory-utilization"
OPTIMIZATION_LEVEL = "optimization-level"
"""Of which -O3 is short."""
PORT = "--port"
MAX_PARALLEL = 1024
"""Of tensor and of pipeline parallelism, and of replicas; what asks for more will not start."""
LARGEST_NUMBER = 2**50
"""Of a flag; no length and no size is larger."""

RESERVED: dict[str, str] = {
    "model": "Write it as the model's own `model:`.",
    "host": "Servers listen on 127.0.0.1 alone: remove it.",
    "port": "Write it as the model's own `port:`.",
    "uds": "Clients reach a server by its port, the panel by a socket of the guard: remove it.",
    "served-model-name": "The model's key in this file is its served name; others are its `aliases:`.",
    "api-key": "It would show in the process list; write the model's own `api_key:` or `api_key_file:`.",
    "middleware": "The guard is the server's middleware: remove it.",
    "root-path": "The panel and its guard know vLLM's paths as they are; put a proxy in front.",
    "api-server-count": "The guard counts requests in one API server: remove it.",
    "headless": "A headless server answers no requests: remove it.",
    "grpc": "A gRPC server has no HTTP to sleep, wake or chat through: remove it.",
    "grpc-port": "It needs a front end that would not load the guard: remove it.",
    "enable-sleep-mode": "Write `level: auto`, 1 or 2 to have it, `level: none` to go without.",
    "ssl-keyfile": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "ssl-certfile": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "ssl-ca-certs": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "ssl-cert-reqs": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "ssl-ciphers": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "enable-ssl-refresh": "Servers are reached over plain HTTP on 127.0.0.1; put a proxy in front for TLS.",
    "hf-token": 'It would show in the process list; write `env: {HF_TOKEN: "${HF_TOKEN}"}`.',
    "device-ids": "Write the model's GPUs as `gpus: [0]`.",
    "disable-access-log-for-endpoints": "It is set for what is polled: remove it.",
    "data-parallel-external-lb": "It makes one server of each replica; write a model of its own for each.",
    "data-parallel-hybrid-lb": "Its replicas answer on ports of their own: remove it.",
    "data-parallel-multi-port-external-lb": "Its replicas answer on ports of their own: remove it.",
    "data-parallel-rank": "It makes one server of each replica; write a model of its own for each.",
    "data-parallel-start-rank": "Its replicas answer on ports of their own: remove it.",
    "omni": "Another program than `vllm serve` would start: start it yourself and use `url:`.",
}
"""Flags that `args:` may not set, and what to do instead."""


def why_reserved(name: str) -> str | None:
    """What to do instead of setting this flag; None if it may be set."""
    head = name.partition(".")[0].lower()
    return RESERVED.get(head) or RESERVED.get(head.removeprefix("no-"))


@dataclass(frozen=True, slots=True)
class ServeArgs:
    """The `args:` of a model, by long names, each a text or several; what cannot be read counts as unset."""

    args: Mapping[str, Any]

    # ── memory and size ──────────────────────────────────────────────────────────────────────────────────

    @property
    def utilization(self) -> float | None:
        """Share of each GPU's memory, above 0 and up to 1; None if it is left to us."""
        text = self._text(UTILIZATION)
        return None if text is None else float(text)

    @property
    def max_model_len(self) -> int | None:
        """Tokens of a context; None: the checkpoint's own."""
        return self._number("max-model-len")

    @property
    def max_num_seqs(self) -> int | None:
        """Requests that are computed at a time."""
        return self._number("max-num-seqs")

    @property
    def kv_cache_memory_bytes(self) -> int | None:
        """The KV cache of each GPU in bytes, if it is fixed."""
        return self._number("kv-cache-memory-bytes")

    @property
    def sizes_its_cache(self) -> str | None:
        """The flag by which a person has said how large the KV cache is; None if it is left to us."""
        return next((name for name in ("kv-cache-memory-bytes", UTILIZATION) if self._text(name)), None)

    @property
    def kv_width(self) -> int:
        """Bytes of one number in the KV cache."""
        return 1 if (self._text("kv-cache-dtype") or "").startswith("fp8") else 2

    @property
    def quantization(self) -> str | None:
        """The method that is asked for; None: the checkpoint's own."""
        return self._text("quantization") or None

    @property
    def is_full_width(self) -> bool:
        """Whether it computes with four bytes a number."""
        return self._text("dtype") in ("float32", "float")

    @property
    def is_eager(self) -> bool:
        """Whether it captures no CUDA graphs."""
        return self._is_on("enforce-eager")

    # ── how it is spread ─────────────────────────────────────────────────────────────────────────────────

    @property
    def tensor_ranks(self) -> int:
        """GPUs that share each layer."""
        return min(self._number("tensor-parallel-size") or 1, MAX_PARALLEL)

    @property
    def pipeline_ranks(self) -> int:
        """Groups of GPUs that each hold some of the layers."""
        return min(self._number("pipeline-parallel-size") or 1, MAX_PARALLEL)

    @property
    def spans_machines(self) -> bool:
        """Whether it may run on more machines than this one: through Ray, or as one of several nodes."""
        is_ray = self.args.get("distributed-executor-backend") == "ray"
        return is_ray or str(self.args.get("nnodes", 1)) != "1"

    @property
    def replicas(self) -> int:
        """How many data parallel replicas of the model the server holds on this machine."""
        size = _whole(self.args.get(self._replicas_flag) or "1")
        return 1 if self.spans_machines else max(1, size or 1)

    @property
    def gpus(self) -> int | None:
        """How many GPUs it wants on this machine; None if they may be elsewhere."""
        sizes = [_whole(self.args.get(name, "1")) or 1 for name in self._sizes]
        return None if self.spans_machines else sizes[0] * sizes[1] * sizes[2]

    @property
    def _replicas_flag(self) -> str:
        local = "data-parallel-size-local"
        return local if local in self.args else "data-parallel-size"

    @property
    def _sizes(self) -> tuple[str, str, str]:
        return "tensor-parallel-size", "pipeline-parallel-size", self._replicas_flag

    # ── what it loads ────────────────────────────────────────────────────────────────────────────────────

    @property
    def load_format(self) -> str:
        """The loader that is asked for, in small letters; "auto" leaves it to vLLM."""
        return str(self.args.get("load-format") or "auto").lower()

    @property
    def has_lora(self) -> bool:
        """Whether it serves adapters."""
        return self._is_on("enable-lora")

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the LoRA adapters that it serves from its start on: NAME=PATH, or JSON with a name."""
        given = self.args.get("lora-modules") or ()
        names = []
        for text in map(str, (given,) if isinstance(given, str) else given):
            try:
                names.append(str(json.loads(text)["name"]) if text.startswith("{") else text.split("=", 1)[0])
            except (ValueError, KeyError, TypeError):
                continue  # vLLM says what is wrong with it
        return tuple(names)

    @property
    def revision(self) -> str | None:
        """Of the model on the hub."""
        revision = self.args.get("revision")
        return None if revision is None else str(revision)

    @property
    def download_dir(self) -> str | None:
        """Where the hub's files are kept; None: the hub's own cache."""
        return str(self.args.get("download-dir") or "") or None

    @property
    def ignore_patterns(self) -> tuple[str, ...]:
        """Files of the hub that it leaves out; empty: vLLM's own choice."""
        patterns = self.args.get("ignore-patterns") or ()
        return (patterns,) if isinstance(patterns, str) else tuple(map(str, patterns))

    @property
    def drafts(self) -> bool:
        """Whether a draft model guesses ahead of it (speculative decoding)."""
        return bool(self._text("speculative-config"))

    # ── what it answers ──────────────────────────────────────────────────────────────────────────────────

    @property
    def is_pooling(self) -> bool:
        """Whether it is asked to embed and not to write."""
        return self.args.get("runner") == "pooling"

    @property
    def lays_out_chats(self) -> bool:
        """Whether it says itself how a chat is laid out, whatever the model's files say."""
        return bool(self.args.get("chat-template") or self.args.get("tokenizer-mode"))

    @property
    def tokenizer(self) -> str | None:
        """Name or folder; None: the model's own."""
        return str(self.args.get("tokenizer") or "") or None

    def faults(self) -> Iterator[tuple[str, str, str]]:
        """What cannot be as it is written: the flag, what is wrong with it, what to do."""
        share = self.args.get(UTILIZATION)
        if share is not None and not _is_share(share):
            yield UTILIZATION, "must be a number above 0 and up to 1", "Write it like 0.85."
        for name in self._sizes:
            size = _whole(self.args.get(name, "1"))
            if size is None or not 1 <= size <= MAX_PARALLEL:
                yield name, f"must be a whole number from 1 to {MAX_PARALLEL}", "Write it like 2."

    def _text(self, name: str) -> str | None:
        """A flag's text, of several the first; None if it is not there."""
        value = self.args.get(name)
        if isinstance(value, tuple | list):
            return str(value[0]) if value else None
        return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)

    def _number(self, name: str) -> int | None:
        return whole_number(self._text(name))

    def _is_on(self, name: str) -> bool:
        return self._text(name) == "true"


def whole_number(value: object) -> int | None:
    """A number of a flag as vLLM reads it: 8192, 8k (thousands) or 8K (1,024s); None if it is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if 0 < value <= LARGEST_NUMBER else None
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([kKmMgGtT]?)", str(value), re.ASCII)
    if match is None:
        return None
    unit = 1024 if match[2].isupper() else 1000
    number = int(float(match[1]) * unit ** (" kmgt".index(match[2].lower()) if match[2] else 0))
    return number if 0 < number <= LARGEST_NUMBER else None


def _whole(value: Any) -> int | None:
    return int(value) if re.fullmatch(r"\+?[0-9]{1,9}", str(value)) else None


def _is_share(value: Any) -> bool:
    try:
        return not isinstance(value, tuple) and 0 < float(value) <= 1
    except ValueError:
        return False


def port_in(words: list[str]) -> int:
    """The port on a command line of `vllm serve`; raises ValueError if it names none."""
    if PORT not in words[:-1]:
        raise ValueError("its command line names no port")
    return int(words[words.index(PORT) + 1])
