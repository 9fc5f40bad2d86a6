"""What the types of the config cannot say: clashing ports, names and GPUs, sizes, hidden servers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from vllm_sleep_tui.config.types import (
    MODEL_NAME,
    Config,
    GatewayConfig,
    ModelConfig,
    parse_bytes,
    parse_duration,
)
from vllm_sleep_tui.config.values import fill_in
from vllm_sleep_tui.config.yaml import Document, Key, Written, is_null
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.files import read_regular

MAX_KEY_FILE = 2**16
"""Bytes; a key has a hundred, and what is larger is another file."""
_WRAPPERS = {"docker", "podman", "nerdctl", "uvx", "ssh", "sudo", "sh", "bash", "srun"}
_RUNNERS = {"conda", "mamba", "micromamba", "uv", "poetry", "pipx", "hatch", "pixi", "pdm"}
_VARIABLE = re.compile(r"\$(\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)", re.ASCII)
_NAMES = "Use at most 255 printable characters, no dash first and no space first or last."
_SENDABLE = re.compile(r"[!-~]+")
"""What a header can carry and a space cannot cut in two."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_names(document: Document, models: Mapping[str, Any]) -> None:
    """Complain about a model's name that no command line could say."""
    for name in models:
        if not is_model_name(name):
            raise document.error(("models", name), "not a name for a model", _NAMES)


def is_model_name(name: str) -> bool:
    """Whether a model may be called so."""
    return re.fullmatch(MODEL_NAME, name) is not None and name.isprintable()


def check(document: Document, config: Config) -> None:
    """Complain about the first value that cannot work; raises UsageError."""
    check_names(document, config.models)
    _check_command(document, ("vllm_command",), config.vllm_command)
    _check_aliases(document, config)
    for name, model in config.models.items():
        key: Key = ("models", name)
        _check_source(document, key, model)
        _check_args(document, key, model)
        _check_gpus(document, key, model, simulated=len(config.simulated_gpus))
        for field in ("sleep_after", "stop_after"):
            _check_unit(document, (*key, "idle", field), getattr(model.idle, field), parse_duration)
        _check_unit(document, (*key, "kv_cache"), model.kv_cache, parse_bytes)
    for index, gpu in enumerate(config.simulated_gpus):
        _check_unit(document, ("simulated_gpus", index, "memory"), gpu.memory, parse_bytes)
    _check_ports(document, config)
    if config.gateway is not None:
        _check_gateway(document, config, config.gateway)


def _check_gateway(document: Document, config: Config, gateway: GatewayConfig) -> None:
    if gateway.host not in LOOPBACK:
        wrong = "not an address of this machine alone"
        cure = f"Write {' or '.join(LOOPBACK)}; for other machines see docs/remote.md."
        raise document.error(("gateway", "host"), wrong, cure)
    for field in ("min_awake", "max_wait", "give_up", "return_after"):
        _check_unit(document, ("gateway", field), getattr(gateway, field), parse_duration)
    _check_unit(document, ("gateway", "max_body"), gateway.max_body, parse_bytes)
    known = f"There are: {', '.join(config.models)}."
    if gateway.return_to is not None and gateway.return_to not in config.models:
        raise document.error(("gateway", "return_to"), f"no model is called {gateway.return_to!r}", known)
    taken: dict[str | None, str] = {}
    for index, key in enumerate(gateway.keys):
        where: Key = ("gateway", "keys", index)
        if key.api_key is None:
            cure = 'Add api_key: "${VAR}", or api_key_file: FILE.'
            raise document.error(where, f"the key of {key.name} is missing", cure)
        if key.api_key in taken or key.name in taken.values():
            wrong = "two have the same name or key"
            raise document.error(where, wrong, "Give each client its own: it is known by it.")
        taken[key.api_key] = key.name
        for name in key.models:
            if name not in config.models:
                raise document.error((*where, "models"), f"no model is called {name!r}", known)


def _check_aliases(document: Document, config: Config) -> None:
    """Every name means one model, for whoever looks for a model by the name that requests use."""
    owners = {name: name for name in config.models}
    for name, model in config.models.items():
        for index, alias in enumerate(model.aliases):
            key: Key = ("models", name, "aliases", index)
            if not is_model_name(alias):
                raise document.error(key, "not a name for a model", _NAMES)
            if alias in owners:
                wrong = f"{alias!r} is already a name of {owners[alias]}"
                raise document.error(key, wrong, "Give each model names of its own.")
            owners[alias] = name


def _check_command(document: Document, key: Key, command: tuple[str, ...]) -> None:
    if not all(command):
        raise document.error(
            key, "an empty word", "Write the vllm binary, as in [vllm] or [/opt/venv/bin/vllm]."
        )
    first = PurePath(command[0]).name
    if first in _WRAPPERS or (first in _RUNNERS and "run" in command[1:]):
        raise document.error(
            key,
            f"`{' '.join([first, *command[1:2]])}` hides the server's process, so it cannot be watched",
            "Write the vllm binary inside that environment, or start the server yourself and use `url:`.",
        )
    if command[-1] == "serve" or (" " in command[0] and "/" not in command[0]):
        raise document.error(key, "one word too many", "Write a list of words without `serve`, as in [vllm].")


def _check_source(document: Document, key: Key, model: ModelConfig) -> None:
    if (model.model is None) == (model.url is None):
        wrong = "has both `model` and `url`" if model.url else "has neither `model` nor `url`"
        cure = "Write `model:` for a server that is started here, `url:` for one that somebody else started."
        raise document.error(key, wrong, cure)
    if model.model is not None:
        if model.url_user is not None:
            wrong = "only a server given by `url:` may be another user's"
            raise document.error((*key, "url_user"), wrong, "Remove it.")
        if model.vllm_command is not None:
            _check_command(document, (*key, "vllm_command"), model.vllm_command)
        if not model.model.strip() or model.model.startswith("-"):
            raise document.error(
                (*key, "model"), "not a model", "Write a hub name such as Qwen/Qwen3-0.6B or a folder."
            )
        return
    if _address(model.url) is None:
        raise document.error((*key, "url"), "not a server's address", "Write it like http://127.0.0.1:8000")
    if model.idle.stop_after is not None:
        wrong = "a server given by `url:` is not stopped from here"
        cure = "Remove it; `sleep_after` works where its server can sleep."
        raise document.error((*key, "idle", "stop_after"), wrong, cure)
    if model.idle.sleep_after is not None and model.level == "none":
        wrong = "a server given by `url:` with `level: none` does not sleep"
        raise document.error((*key, "idle", "sleep_after"), wrong, "Remove it, or write another `level:`.")
    if model.level == 0:
        wrong = "the weights of a server that is not started here cannot stay in VRAM"
        raise document.error((*key, "level"), wrong, "Write 1 or 2.")
    for field in ("args", "env_file", "env", "port", "autostart", "vllm_command", "aliases", "kv_cache"):
        if getattr(model, field):
            wrong = "has no effect on a server that is not started here"
            raise document.error((*key, field), wrong, "Remove it.")


def _address(url: str | None) -> tuple[str, int] | None:
    """Host and port of a server's address; None if it is none, or holds a password."""
    try:
        parts = urlsplit(url or "")
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except (ValueError, KeyError):
        return None
    if not parts.hostname or parts.username or parts.query or re.search(r"\s", url or ""):
        return None
    return parts.hostname, port


def _check_args(document: Document, key: Key, model: ModelConfig) -> None:
    for flag, wrong, cure in ServeArgs(model.args).faults():
        raise document.error((*key, "args", flag), wrong, cure)


def _check_gpus(document: Document, key: Key, model: ModelConfig, *, simulated: int) -> None:
    for position, index in enumerate(model.gpus):
        if index in model.gpus[:position]:
            raise document.error((*key, "gpus"), f"GPU {index} is there twice", "Name each GPU once.")
        if simulated and index >= simulated:
            there = "0" if simulated == 1 else f"0 to {simulated - 1}"
            cure = f"Use {there}, or add one to `simulated_gpus`."
            raise document.error((*key, "gpus"), f"there is no simulated GPU {index}", cure)
    needed = ServeArgs(model.args).gpus
    if model.gpus and needed is not None and len(model.gpus) < needed:
        raise document.error(
            (*key, "gpus"),
            f"{len(model.gpus)} GPU named, but tensor times pipeline times data parallel size is {needed}",
            f"Name {needed} GPUs, as in gpus: {list(range(needed))}, or lower the sizes.",
        )


def _check_unit(document: Document, key: Key, text: str | None, parser: Any) -> None:
    try:
        if text is not None:
            parser(text)
    except ValueError as error:
        raise document.error(key, str(error), "Correct the value.") from None


def _check_ports(document: Document, config: Config) -> None:
    taken: dict[int, str] = {}
    for key, port in _ports(config):
        owner = ".".join(str(part) for part in key[:-1])
        if port in taken:
            cure = "Give each its own port, or leave `port` out and a free one is chosen."
            raise document.error(key, f"port {port} is already that of {taken[port]}", cure)
        taken[port] = owner


def _ports(config: Config) -> Iterator[tuple[Key, int]]:
    for name, model in config.models.items():
        if model.port:
            yield ("models", name, "port"), model.port
        elif (address := _address(model.url)) and address[0] in LOOPBACK:
            yield ("models", name, "url"), address[1]
    if config.gateway:
        yield ("gateway", "port"), config.gateway.port


def own_key(document: Document, key: Key, values: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a server's key, read from its variable or file; UsageError shows no value."""
    text, file = (None if is_null(values.get(name)) else values[name] for name in ("api_key", "api_key_file"))
    if text is not None and file is not None:
        raise document.error((*key, "api_key_file"), "the key is given twice", "Keep one of the two.")
    fields = {}
    if file is not None:
        where: Key = (*key, "api_key_file")
        name = fill_in(document, where, file)
        if not isinstance(name, Written) or name.kind != "text":
            raise document.error(where, "must be the name of a file", "Correct the value.")
        path = document.path.resolve().parent / name
        document.reads(path)
        fields = {"api_key_file": str(path), "api_key": _key_in(document, where, path)}
    elif text is not None:
        where = (*key, "api_key")
        if not isinstance(text, str) or not _VARIABLE.fullmatch(text):
            cure = 'Write api_key: "${VAR}", or name a file that holds the key: api_key_file: FILE'
            raise document.error(where, "a key is not written here, for all who read this file", cure)
        fields = {"api_key": fill_in(document, where, text)}
    if fields and not _SENDABLE.fullmatch(fields["api_key"]):
        wrong = "the key that it names is empty or holds spaces or signs that no header can carry"
        raise document.error(where, wrong, "Correct it there: the key alone, in one line.")
    return fields


def _key_in(document: Document, where: Key, path: Path) -> str:
    """The content of a key's file without the end of its line."""
    try:
        content = read_regular(path, MAX_KEY_FILE, follow=True) if path.is_file() else None
    except OSError as error:
        wrong = f"{path} cannot be read: {error.strerror}"
        raise document.error(where, wrong, "Correct the path or its permissions.") from None
    if content is None:
        raise document.error(where, f"there is no file {path}", "Write the key there, in one line.")
    return content.decode(errors="replace").strip()
