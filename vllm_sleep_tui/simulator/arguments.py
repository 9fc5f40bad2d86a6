"""The command line of `vllm serve`: which flags there are, and what the simulator does with them."""

from __future__ import annotations

import argparse
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

TABLES = Path(__file__).parents[1] / "vllm_flags"
"""What the parsers of vLLM 0.24 to 0.33 said of themselves, a file each."""
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
    worker_extension: str
    log_stats: bool
    pooling: bool
    load_format: str
    quantization: str | None
    unlogged_paths: frozenset[str]
    given: Mapping[str, object]
    """Every flag as given, by vLLM's Python name, with keys hidden: the ``non-default args`` of the log."""


def parse(arguments: Sequence[str], default_utilization: float, version: str = "0.32.0") -> Options:
    """Read what follows `serve` as that vLLM does; raises ArgumentError with vLLM's own words."""
    parser = _parser(version)
    known, unknown = parser.parse_known_args(_prepared(arguments))
    if unknown:
        raise ArgumentError(f"unrecognized arguments: {' '.join(unknown)}")
    found: dict[str, Any] = {name: value for name, value in vars(known).items() if value is not None}
    model = found.pop("model_tag", None) or found.get("model") or "Qwen/Qwen3-0.6B"
    return Options(
        model=model,
        served_names=tuple(found.get("served_model_name", ())) or (model,),
        host=found.get("host", "127.0.0.1"),
        port=found.get("port", 8000),
        uds=found.get("uds"),
        api_keys=tuple(found.get("api_key", ())),
        middlewares=tuple(found.get("middleware", ())),
        utilization=found.get("gpu_memory_utilization", default_utilization),
        tensor_parallel=found.get("tensor_parallel_size", 1),
        pipeline_parallel=found.get("pipeline_parallel_size", 1),
        max_model_len=found.get("max_model_len") or DEFAULT_MAX_MODEL_LEN,
        kv_cache_bytes=found.get("kv_cache_memory_bytes"),
        enforce_eager=found.get("enforce_eager", False),
        sleep_mode=found.get("enable_sleep_mode", False),
        worker_extension=found.get("worker_extension_cls", ""),
        load_tracking=found.get("enable_server_load_tracking", False),
        log_stats=not found.get("disable_log_stats", False),
        pooling=found.get("runner") == "pooling" or found.get("task") in ("embed", "embedding"),
        load_format=found.get("load_format", "auto"),
        quantization=found.get("quantization"),
        unlogged_paths=frozenset(found.get("disable_access_log_for_endpoints", "").split(",")),
        given={"model_tag": model, "model": model, **found}
        | ({"api_key": ["***"] * len(found["api_key"])} if "api_key" in found else {}),
    )


def _prepared(arguments: Sequence[str]) -> list[str]:
    """The words as vLLM changes them first: underscores, `-O3`, and dotted flags put together as JSON."""
    words, nested = list[str](), dict[str, dict[str, Any]]()
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        name, has_value, value = word.partition("=")
        if level := re.fullmatch(r"-O=?(.+)", word):
            words += ["--optimization-level", level[1]]
        elif word == "-O":
            words.append("--optimization-level")
        elif word.startswith("-") and "." in name:
            if not has_value:
                if not waiting:
                    raise ArgumentError(f"argument {name}: expected one argument")
                value = waiting.pop(0)
            head, *keys = name.split(".")
            if keys[-1].endswith("+"):
                keys[-1], value = keys[-1][:-1], json.dumps(value.split(","))
            inside = nested.setdefault(head.replace("_", "-"), {})
            for key in keys[:-1]:
                inside = inside.setdefault(key, {})
            inside[keys[-1]] = _literal(value)
        elif word.startswith("--"):
            words.append(name.replace("_", "-") + has_value + value)
        else:
            words.append(word)
    for head, inside in nested.items():
        words += [head, json.dumps(inside)]
    return words


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


class _Switch(argparse.Action):
    """A flag without a value, with the spellings that turn it off."""

    def __init__(self, *, off: Sequence[str], **settings: Any) -> None:
        super().__init__(nargs=0, **settings)
        self.off = off

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: Any = None
    ) -> None:
        setattr(namespace, self.dest, option not in self.off)


def _parser(version: str) -> _Parser:
    parser = _Parser(prog="vllm serve", add_help=False)
    parser.add_argument("model_tag", nargs="?")
    for flag in _flags(version):
        if flag["type"] == "switch":
            parser.add_argument(*flag["names"], action=_Switch, off=flag.get("off", ()), default=None)
            continue
        settings: dict[str, Any] = {"type": _TYPES.get(flag["type"], str)}
        if flag.get("repeats"):
            settings["action"] = "append"
        if "nargs" in flag:
            settings["nargs"] = flag["nargs"]
        if "const" in flag:
            settings["const"] = flag["const"]
        if flag.get("choices") and flag["type"] == "text":
            settings["choices"] = flag["choices"]
        parser.add_argument(*flag["names"], **settings)
    return parser


@functools.cache
def _flags(version: str) -> list[dict[str, Any]]:
    """The flags of the vLLM nearest below this version, else of the oldest."""
    files = {tuple(map(int, file.stem.split("."))): file for file in TABLES.glob("*.json")}
    wanted = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    chosen = max((numbers for numbers in files if numbers <= wanted), default=min(files))
    flags: list[dict[str, Any]] = json.loads(files[chosen].read_bytes())["flags"]
    return flags


def human_readable_int(text: str) -> int | None:
    """A size as vLLM reads it; None for what it finds out itself."""
    if text in ("auto", "-1"):
        return None
    match = re.fullmatch(r"([0-9.]+)([kmgKMG]?)", text)
    if match is None:
        raise ValueError(text)
    return int(float(match[1]) * UNITS[match[2]])


_TYPES: Mapping[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "size": human_readable_int,
    "json": json.loads,
}


def _literal(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return text
