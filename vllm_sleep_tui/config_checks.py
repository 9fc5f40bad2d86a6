"""What the types of the config cannot say: reserved arguments, clashing ports and GPUs, hidden servers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import urlsplit

from vllm_sleep_tui.config import MODEL_NAME, Config, ModelConfig, parse_bytes, parse_duration
from vllm_sleep_tui.config_yaml import Document, Key

RESERVED_ARGS: dict[str, str] = {
    "model": "Write it as the model's own `model:`.",
    "host": "Servers listen on 127.0.0.1 alone: remove it.",
    "port": "Write it as the model's own `port:`.",
    "uds": "Servers are reached through a port: remove it.",
    "served-model-name": "The model's key in this file is its served name: remove it.",
    "api-key": "Servers listen on 127.0.0.1 alone, behind a guard: remove it.",
    "middleware": "The guard is the server's middleware: remove it.",
    "api-server-count": "The guard counts requests in one API server: remove it.",
    "enable-sleep-mode": "Write `level: auto`, 1 or 2 to have it, `level: none` to go without.",
    "headless": "A headless server answers no requests: remove it.",
    "ssl-keyfile": "Servers are reached over plain HTTP on 127.0.0.1: remove it.",
    "ssl-certfile": "Servers are reached over plain HTTP on 127.0.0.1: remove it.",
    "hf-token": 'It would show in the process list; write `env: {HF_TOKEN: "${HF_TOKEN}"}`.',
}
"""Arguments of `vllm serve` that are this program's own, and what to do instead."""
RESERVED_ENV: dict[str, str] = {
    "VLLM_API_KEY": "Servers listen on 127.0.0.1 alone, behind a guard: remove it.",
    "CUDA_VISIBLE_DEVICES": "Write the model's GPUs as `gpus: [0]`.",
    "VLLM_PORT": "It is a port inside vLLM and collides between servers; the one that answers is `port:`.",
    "VLLM_USE_RUST_FRONTEND": "That front end would not load the guard: remove it.",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "A server whose engine died must end to be restarted: remove it.",
    "PYTHONHOME": "It would mix two Pythons; name the right one in `vllm_command`.",
}

MAX_PARALLEL = 1024
_RESERVED = "reserved, vllm-sleep-tui sets it"
_SHORT_ARGS = {"tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "asc": "api-server-count"}
_WRAPPERS = {"docker", "podman", "nerdctl", "uvx", "ssh", "sudo", "sh", "bash", "srun"}
_RUNNERS = {"conda", "mamba", "micromamba", "uv", "poetry", "pipx", "hatch", "pixi", "pdm"}
_VARIABLE = re.compile(r"\$\{([^}]*)\}")
_SENDABLE = re.compile(r"[!-~]+")
"""What a header can carry and a space cannot cut in two."""


def normal_arg(name: str) -> str:
    """One spelling for an argument: `--Served_Model_Name` is served-model-name; short ones become long."""
    plain = name.strip().lstrip("-").replace("_", "-").lower().split("=")[0]
    return _SHORT_ARGS.get(plain, plain)


def spans_machines(args: Mapping[str, Any]) -> bool:
    """Whether the model may run on more machines than this one: through Ray, or as one of several nodes."""
    given = {normal_arg(name): value for name, value in args.items()}
    return given.get("distributed-executor-backend") == "ray" or given.get("nnodes", 1) != 1


def check_names(document: Document, models: Mapping[str, Any]) -> None:
    """Complain about a model's name that could not be a file's name."""
    for name in models:
        if not re.fullmatch(MODEL_NAME, name):
            raise document.error(
                ("models", name),
                "not a name for a model",
                "Use letters, digits, dot, dash and underscore, at most 64, a letter or digit first.",
            )


def check(document: Document, config: Config) -> None:
    """Complain about the first value that cannot work; raises UsageError."""
    check_names(document, config.models)
    _check_command(document, config.vllm_command)
    for name, model in config.models.items():
        key: Key = ("models", name)
        _check_source(document, key, model)
        _check_args(document, key, model)
        _check_gpus(document, key, model, simulated=len(config.simulated_gpus))
        for field in ("sleep_after", "stop_after"):
            _check_unit(document, (*key, "idle", field), getattr(model.idle, field), parse_duration)
    for index, gpu in enumerate(config.simulated_gpus):
        _check_unit(document, ("simulated_gpus", index, "memory"), gpu.memory, parse_bytes)
    _check_ports(document, config)


def _check_command(document: Document, command: tuple[str, ...]) -> None:
    key: Key = ("vllm_command",)
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
        if model.api_key is not None:
            name = "api_key_file" if model.api_key_file else "api_key"
            wrong = "only a server given by `url:` may want a key"
            raise document.error(
                (*key, name), wrong, "Remove it: the guard protects the servers of `model:`."
            )
        if model.url_user is not None:
            wrong = "only a server given by `url:` may be another user's"
            raise document.error((*key, "url_user"), wrong, "Remove it.")
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
    for field in ("args", "env", "port", "autostart"):
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
    seen: dict[str, str] = {}
    for spelled in model.args:
        name = normal_arg(spelled)
        own = next((r for r in RESERVED_ARGS if name in (r, f"no-{r}") or name.startswith(f"{r}.")), None)
        if own:
            raise document.error((*key, "args", spelled), _RESERVED, RESERVED_ARGS[own])
        if not re.match(r"^[a-z][a-z0-9.-]*$", name) or "=" in spelled:
            raise document.error(
                (*key, "args", spelled), "not a flag's name", "Write flags as max-model-len: 8192"
            )
        if name in seen:
            raise document.error((*key, "args", spelled), f"the same as {seen[name]}", "Keep one of the two.")
        seen[name] = spelled
        if name == "gpu-memory-utilization" and not _is_share(model.args[spelled]):
            raise document.error(
                (*key, "args", spelled), "must be a number above 0 and up to 1", "Write it like 0.85."
            )
    for variable in model.env:
        if variable in RESERVED_ENV:
            raise document.error((*key, "env", variable), _RESERVED, RESERVED_ENV[variable])
        if not re.match(r"^[A-Za-z_][A-Za-z0-9_]*$", variable):
            raise document.error(
                (*key, "env", variable), "not a variable's name", "Use letters, digits and underscores."
            )


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _check_gpus(document: Document, key: Key, model: ModelConfig, *, simulated: int) -> None:
    for position, index in enumerate(model.gpus):
        if index in model.gpus[:position]:
            raise document.error((*key, "gpus"), f"GPU {index} is there twice", "Name each GPU once.")
        if simulated and index >= simulated:
            cure = f"Use 0 to {simulated - 1}, or add one to `simulated_gpus`."
            raise document.error((*key, "gpus"), f"there is no simulated GPU {index}", cure)
    sizes = {normal_arg(name): value for name, value in model.args.items()}
    needed = 1
    for name in ("tensor-parallel-size", "pipeline-parallel-size"):
        size = sizes.get(name, 1)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_PARALLEL:
            wrong = f"must be a whole number from 1 to {MAX_PARALLEL}"
            raise document.error((*key, "args", name), wrong, "Write it like 2.")
        needed *= size
    if model.gpus and len(model.gpus) < needed and not spans_machines(model.args):
        raise document.error(
            (*key, "gpus"),
            f"{len(model.gpus)} GPU named, but tensor times pipeline parallel size is {needed}",
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
        elif (address := _address(model.url)) and address[0] in ("127.0.0.1", "localhost", "::1"):
            yield ("models", name, "url"), address[1]
    if config.gateway:
        yield ("gateway", "port"), config.gateway.port


def fill_in(document: Document, key: Key, value: Any) -> Any:
    """Put environment variables in place of ``${VAR}``; raises UsageError if unset; shows no value."""
    if isinstance(value, dict):
        return {name: fill_in(document, (*key, name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [fill_in(document, (*key, index), item) for index, item in enumerate(value)]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if found is None:
            wrong = f"the environment variable {match[1]} is not set"
            raise document.error(key, wrong, f"Set it first: export {match[1]}=…")
        if not found.isascii() and any("\ud800" <= char <= "\udfff" for char in found):
            raise document.error(key, f"the environment variable {match[1]} is not UTF-8 text", "Correct it.")
        return found

    return _VARIABLE.sub(look_up, value)


def own_key(document: Document, key: Key, values: Mapping[str, Any]) -> dict[str, str]:
    """The fields of an attached server's key, read from its variable or file; UsageError shows no value."""
    text, file = values.get("api_key"), values.get("api_key_file")
    if text is not None and file is not None:
        raise document.error((*key, "api_key_file"), "the key is given twice", "Keep one of the two.")
    fields = {}
    if file is not None:
        where: Key = (*key, "api_key_file")
        name = fill_in(document, where, file)
        if not isinstance(name, str):
            raise document.error(where, "must be the name of a file", "Correct the value.")
        home = Path.home() if name.startswith("~/") else document.path.absolute().parent
        path = home / name.removeprefix("~/")
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
        content = path.read_bytes() if path.is_file() else None  # a pipe would be waited for
    except OSError as error:
        wrong = f"{path} cannot be read: {error.strerror}"
        raise document.error(where, wrong, "Correct the path or its permissions.") from None
    if content is None:
        raise document.error(where, f"there is no file {path}", "Write the key there, in one line.")
    return content.decode(errors="replace").strip()
