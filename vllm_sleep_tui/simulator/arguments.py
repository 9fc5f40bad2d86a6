"""The command line of `vllm serve`: which flags there are, and what the simulator does with them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


SWITCHES = _names(
    """aggregate-engine-logging allow-credentials allow-deprecated-quantization async-scheduling
    calculate-kv-scales disable-cascade-attn disable-custom-all-reduce disable-fastapi-docs
    disable-frontend-multiprocessing disable-hybrid-kv-cache-manager disable-log-requests
    disable-log-stats disable-sliding-window disable-uvicorn-access-log enable-auto-tool-choice
    enable-chunked-prefill enable-dbo enable-eplb enable-expert-parallel enable-force-include-usage
    enable-log-outputs enable-log-requests enable-lora enable-nccl-comm-suspend
    enable-per-request-metrics enable-prefix-caching enable-prompt-embeds enable-prompt-tokens-details
    enable-request-id-headers enable-scale-out enable-server-load-tracking enable-sleep-mode
    enable-ssl-refresh enable-tokenizer-info-endpoint enforce-eager exclude-tools-when-tool-choice-none
    fully-sharded-loras generate-loras headless interleave-mm-strings kv-sharing-fast-prefill
    log-error-stack multi-modal-encoder-only return-tokens-as-token-ids skip-mm-profiling
    skip-tokenizer-init sleep-mode-offload-cudagraph trust-remote-code trust-request-chat-template
    use-tqdm-on-load"""
)
"""Flags without a value; each also exists as ``--no-…``."""
VALUES = _names(
    """allowed-local-media-path allowed-media-domains attention-backend block-size chat-template
    chat-template-content-format code-revision compilation-config config config-format convert
    cpu-offload-gb cuda-graph-sizes cudagraph-capture-sizes data-parallel-address data-parallel-backend
    data-parallel-rank data-parallel-rpc-port data-parallel-size data-parallel-size-local
    default-mm-loras device-ids disable-access-log-for-endpoints distributed-executor-backend
    download-dir dtype ec-transfer-config generation-config gpu-memory-utilization h11-max-header-count
    h11-max-incomplete-event-size hf-config-path hf-overrides hf-token host ignore-patterns
    io-processor-plugin kv-cache-dtype kv-cache-memory kv-cache-memory-bytes kv-events-config
    kv-offloading-backend kv-offloading-size kv-transfer-config limit-mm-per-prompt load-format
    log-config-file logging-config logits-processor-pattern logits-processors logprobs-mode lora-dtype
    lora-modules long-prefill-token-threshold mamba-cache-dtype master-addr master-port max-cpu-loras
    max-log-len max-logprobs max-lora-rank max-loras max-model-len max-num-batched-tokens
    max-num-partial-prefills max-num-seqs max-parallel-loading-workers media-io-kwargs middleware
    mm-encoder-tp-mode mm-processor-cache-gb mm-processor-cache-type mm-processor-kwargs model
    model-impl model-loader-extra-config nnodes node-rank num-gpu-blocks-override num-lookahead-slots
    optimization-level otlp-traces-endpoint override-generation-config pipeline-parallel-size
    pooler-config port pt-load-map-location quantization quantization-config reasoning-parser
    response-role revision root-path runner safetensors-load-strategy scheduler-cls scheduling-policy
    seed shutdown-timeout sleep-mode-backend speculative-config sse-keep-alive-interval ssl-ca-certs
    ssl-cert-reqs ssl-certfile ssl-keyfile stream-interval structured-outputs-config swap-space task
    tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision tool-call-parser tool-parser-plugin
    tool-server uds uvicorn-log-level worker-cls worker-extension-cls api-server-count"""
)
"""Flags with one value; of a repeated one the last counts, but ``--middleware`` adds up."""
LISTS = _names(
    """allowed-headers allowed-methods allowed-origins api-key served-model-name
    sleep-preserve-parameter-names"""
)
"""Flags with one or more values."""
SHORT = {
    "-tp": "tensor-parallel-size",
    "-pp": "pipeline-parallel-size",
    "-dp": "data-parallel-size",
    "-q": "quantization",
    "-cc": "compilation-config",
    "-O": "optimization-level",
}
NUMBERS: Mapping[str, type[int] | type[float]] = {
    "port": int,
    "tensor-parallel-size": int,
    "pipeline-parallel-size": int,
    "data-parallel-size": int,
    "api-server-count": int,
    "max-num-seqs": int,
    "shutdown-timeout": int,
    "gpu-memory-utilization": float,
}
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
"""What vLLM makes of 32k (decimal) and 32K (binary)."""
DEFAULT_MAX_MODEL_LEN = 40960
"""Of Qwen3, whose config the models of the simulator are taken to have."""


class ArgumentError(Exception):
    """The command line is wrong; the text is what follows ``vllm: error:`` before the exit with 2."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the simulator uses of the command line."""

    model: str
    served_names: tuple[str, ...]
    host: str
    port: int
    uds: str | None
    api_keys: tuple[str, ...]
    middlewares: tuple[str, ...]
    utilization: float
    tensor_parallel: int
    pipeline_parallel: int
    max_model_len: int
    kv_cache_bytes: int | None
    enforce_eager: bool
    sleep_mode: bool
    load_tracking: bool
    log_stats: bool
    pooling: bool
    load_format: str
    quantization: str | None
    unlogged_paths: frozenset[str]
    given: Mapping[str, object]
    """Every flag as given, by vLLM's Python name, with keys hidden: the ``non-default args`` of the log."""


def parse(arguments: Sequence[str], default_utilization: float) -> Options:
    """Read what follows `serve`; raises ArgumentError with vLLM's own words."""
    model, flags = _collect(list(arguments))
    values = {name: _number(name, found[-1]) for name, found in flags.items() if name in NUMBERS}
    model = model or _last(flags, "model") or "Qwen/Qwen3-0.6B"
    return Options(
        model=model,
        served_names=tuple(flags.get("served-model-name", ())) or (model,),
        host=_last(flags, "host") or "127.0.0.1",
        port=int(values.get("port", 8000)),
        uds=_last(flags, "uds") or None,
        api_keys=tuple(flags.get("api-key", ())),
        middlewares=tuple(flags.get("middleware", ())),
        utilization=float(values.get("gpu-memory-utilization", default_utilization)),
        tensor_parallel=int(values.get("tensor-parallel-size", 1)),
        pipeline_parallel=int(values.get("pipeline-parallel-size", 1)),
        max_model_len=_size(flags, "max-model-len") or DEFAULT_MAX_MODEL_LEN,
        kv_cache_bytes=_size(flags, "kv-cache-memory-bytes") or _size(flags, "kv-cache-memory"),
        enforce_eager="enforce-eager" in flags,
        sleep_mode="enable-sleep-mode" in flags,
        load_tracking="enable-server-load-tracking" in flags,
        log_stats="disable-log-stats" not in flags,
        pooling=_last(flags, "runner") == "pooling" or _last(flags, "task") in ("embed", "embedding"),
        load_format=_last(flags, "load-format") or "auto",
        quantization=_last(flags, "quantization") or None,
        unlogged_paths=frozenset(_last(flags, "disable-access-log-for-endpoints").split(",")),
        given=_given(model, flags),
    )


def _collect(arguments: list[str]) -> tuple[str, dict[str, list[str]]]:
    model, flags, unknown = "", dict[str, list[str]](), list[str]()
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("-"):
            if model:
                unknown.append(argument)
            model = model or argument
            continue
        name, has_value, value = argument.partition("=")
        name = SHORT.get(name) or re.sub(r"^--", "", name).replace("_", "-")
        if name in VALUES or name in LISTS:
            taken = [value] if has_value else _take(name, arguments)
            flags[name] = [*flags.get(name, ()), *taken] if name == "middleware" else taken
        elif name in SWITCHES:
            flags[name] = []
        elif name.startswith("no-") and name[3:] in SWITCHES:
            flags.pop(name[3:], None)
        else:
            unknown.append(argument)
    if unknown:
        raise ArgumentError(f"unrecognized arguments: {' '.join(unknown)}")
    return model, flags


def _take(name: str, arguments: list[str]) -> list[str]:
    taken = list[str]()
    while arguments and not arguments[0].startswith("--") and (name in LISTS or not taken):
        taken.append(arguments.pop(0))
    if not taken:
        raise ArgumentError(
            f"argument --{name}: expected {'at least one' if name in LISTS else 'one'} argument"
        )
    return taken


def _last(flags: Mapping[str, list[str]], name: str) -> str:
    found = flags.get(name)
    return found[-1] if found else ""


def _number(name: str, text: str) -> int | float:
    kind = NUMBERS[name]
    try:
        return kind(text)
    except ValueError:
        raise ArgumentError(f"argument --{name}: invalid {kind.__name__} value: {text!r}") from None


def _size(flags: Mapping[str, list[str]], name: str) -> int | None:
    text = _last(flags, name)
    if text in ("", "auto", "-1"):
        return None
    match = re.fullmatch(r"([0-9.]+)([kmgKMG]?)", text)
    if match is None:
        raise ArgumentError(f"argument --{name}: invalid human_readable_int value: {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _given(model: str, flags: Mapping[str, list[str]]) -> dict[str, object]:
    given: dict[str, object] = {"model_tag": model, "model": model}
    for name, found in flags.items():
        key = name.replace("-", "_")
        if name == "api-key":
            given[key] = ["***"] * len(found)
        elif name in SWITCHES:
            given[key] = True
        elif name in LISTS or name == "middleware":
            given[key] = found
        else:
            given[key] = _literal(found[-1])
    return given


def _literal(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
