"""Reads the config file: every complaint names file, line, key and the cure."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.config.checks import check, check_names, own_key
from vllm_sleep_tui.config.parameters import EXPECTED as OF_A_PRESET
from vllm_sleep_tui.config.parameters import ParameterError, Parameters, parameters
from vllm_sleep_tui.config.types import (
    Config,
    GatewayConfig,
    GatewayKeyConfig,
    IdleConfig,
    ModelConfig,
    SimulatedGpuConfig,
    parse_bytes,
    parse_duration,
)
from vllm_sleep_tui.config.values import fill_in, read_args, read_env
from vllm_sleep_tui.config.yaml import Document, Key, is_null, parse, spell, typed
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import Mark, digest_with, mark

__all__ = ["LoadedConfig", "load", "parse_bytes", "parse_duration"]

_EXPECTED = {
    "vllm_command": "a list of words, such as [vllm]",
    "models": "a mapping of names to models",
    "model": "text: a hub name or a folder",
    "url": "text, such as http://127.0.0.1:8000",
    "api_key": "the name of a variable, such as ${BIG_KEY}",
    "api_key_file": "text, such as ~/.config/big.key",
    "url_user": "the name of a user of this machine, or * for anybody",
    "gpus": "a list of GPU numbers from 0, such as [0]",
    "level": "auto, 0, 1, 2 or none",
    "sleep_backend": "auto or stock",
    "kv_cache": "an amount of memory, such as 20GiB",
    "args": "a mapping of flags to values, such as {max-model-len: 8192}, or a list of words",
    "env": "a mapping of names to text, or a list such as [NAME=value]",
    "env_file": "the name of a file, or a list of them",
    "aliases": "a list of names, such as [gpt-4o]",
    "port": "a whole number from 1 to 65535",
    "autostart": "true or false",
    "idle": "a mapping, such as {sleep_after: 10m, stop_after: 2h}",
    "sleep_after": "a time such as 30s, 10m or 2h",
    "stop_after": "a time such as 30s, 10m or 2h",
    "restart": "on-failure or never",
    "gateway": "a mapping, such as {port: 8800}",
    "keep_conversations": "true or false",
    "host": "127.0.0.1, localhost or ::1",
    "keys": 'a list of mappings, such as [{name: editor, api_key: "${EDITOR_KEY}"}]',
    "requests": "a whole number from 1",
    "queue": "a whole number from 1",
    "min_awake": "a time such as 1s",
    "max_wait": "a time such as 30s",
    "give_up": "a time such as 10m",
    "starts": "true or false",
    "return_to": "the name of a model",
    "return_after": "a time such as 10m",
    "max_body": "an amount of memory, such as 64MiB",
    "presets": "a mapping of names to ways to ask, such as {exact: {temperature: 0}}",
    "simulated_gpus": "a list of mappings, such as [{name: Demo, memory: 24GiB}]",
    "name": "text",
    "memory": "an amount of memory, such as 24GiB",
    **OF_A_PRESET,
}
"""What each key of the file takes, in words; `test_a_value_of_the_wrong_kind_…` asks for every one."""
_CLIENTS_MODELS = "a list of names of models, such as [qwen]"
"""What `models` of a client's key takes, which is another thing than the `models` of the file."""
_NO_INDEX = (
    (
        "MIG-",
        "a slice of a GPU, whose memory cannot be planned and watched here",
        "Start that server yourself with CUDA_VISIBLE_DEVICES, and use `url:`.",
    ),
    ("GPU-", "a GPU's UUID", "Write its index, which `nvidia-smi -L` shows beside it, as in gpus: [0]."),
)
"""How people name GPUs elsewhere, what that is, and what to do instead."""
_KEYS = ("api_key", "api_key_file")
_KINDS: dict[type, str] = {
    str: "text",
    bool: "true or false",
    int: "a number",
    float: "a number",
    dict: "a mapping",
    list: "a list",
}


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A config that holds together, and the file it came from."""

    config: Config
    path: Path
    """Absolute, links followed: the file itself, by which its records are known."""
    found: Path
    """Absolute, as it was found, links not followed: the name that the person saw and agreed to."""
    digest: str
    """SHA-256 of the content of the file and of those that it includes, to know it again."""
    lines: Mapping[str, int] = field(repr=False)
    """The line of each key, such as models.qwen.gpus."""
    marks: Mapping[Path, Mark] = field(default_factory=dict, repr=False)
    """The file as it was found and all that were read for it: those that it includes, those of keys, schemas
    and tools; each as it was just before it was read."""

    def agreement(self) -> str:
        """What a person agrees to who agrees to this file: a digest of it and of the files it names."""
        return digest_with(self.digest, self._named())

    def version(self) -> str:
        """Another one each time that one of these files was written, the same for all who read them then."""
        marks = sorted(map(repr, self.marks.values()))
        return hashlib.sha256(" ".join([self.digest, *marks]).encode()).hexdigest()

    def _named(self) -> Iterator[Path]:
        """The paths among its words, keys left out: they may change. Most words are of no file."""
        keyless = {"api_key": None, "api_key_file": None}
        models = [msgspec.structs.asdict(model) | keyless for model in self.config.models.values()]
        for word in dict.fromkeys(_words([self.config.vllm_command, *models])):
            yield self.path.parent / os.path.expanduser(word)

    def model(self, name: str) -> ModelConfig:
        """The model called `name`; raises UsageError with a name that is like it."""
        if name in self.config.models:
            return self.config.models[name]
        near = _nearest(name, self.config.models, likeness=0.6)
        there = f"There are: {', '.join(self.config.models)}."
        cure = f"Did you mean {near}? {there}" if near else there
        raise UsageError(f"No model is called {name!r} in {self.path}.", cure)


def load(path: Path, marks: dict[Path, Mark] | None = None) -> LoadedConfig:
    """Read and check a config file; raises UsageError on the first thing that is wrong in it.

    `marks` is where it notes what it reads, for who wants to know that of a file that is wrong too.
    """
    found = Path(os.path.abspath(path))
    marks = {} if marks is None else marks
    marks[found] = mark(found)
    document = parse(path, marks)
    config = _convert(document)
    check(document, config)
    return LoadedConfig(
        config=_located(config, path.resolve().parent),
        path=path.resolve(),
        found=found,
        digest=document.whole_digest,
        lines={spell(key): line for key, line in document.lines.items()},
        marks=marks,
    )


def _words(value: Any) -> Iterator[str]:
    """The parts of all texts in it that may be paths: `bash -c "exec ./run.sh"`, `--plugin=./x.py`."""
    if isinstance(value, str):
        yield from (word for word in re.split(r"[\s=:;,&|()<>'\"]+", value) if word)
        yield value
    elif isinstance(value, Mapping):
        yield from _words(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)


def _convert(document: Document) -> Config:
    written = document.values
    if is_null(written):
        raise document.error((), "the file is empty", "Write one with: vllm-sleep-tui init")
    written = _mapping(document, (), written)
    _check_keys(document, (), written, Config)
    models = _mapping(document, ("models",), {} if is_null(written.get("models")) else written["models"])
    if not models:
        cure = "Add one, as in models: {qwen: {model: Qwen/Qwen3-0.6B}}"
        raise document.error(("models",), "no model is named", cure)
    check_names(document, models)
    apart = ("models", "gateway", "presets")
    rest = {key: value for key, value in written.items() if key not in apart and not is_null(value)}
    values = typed(fill_in(document, (), rest))
    for index, gpu in enumerate(_items(document, ("simulated_gpus",), values.get("simulated_gpus"))):
        _struct(document, ("simulated_gpus", index), gpu, SimulatedGpuConfig)
    if not is_null(written.get("gateway")):
        values["gateway"] = _gateway(document, written["gateway"])
    presets = {} if is_null(written.get("presets")) else _mapping(document, ("presets",), written["presets"])
    values["presets"] = {name: _preset(document, name, preset) for name, preset in presets.items()}
    complete = {name: _model(document, name, model) for name, model in models.items()}
    config: Config = _built(document, (), {**values, "models": {}}, Config)
    return msgspec.structs.replace(config, models=complete)


def _model(document: Document, name: str, value: Any) -> ModelConfig:
    key: Key = ("models", name)
    written = dict(_mapping(document, key, value))
    _check_keys(document, key, written, ModelConfig)
    keys = own_key(document, key, written)
    filled = {
        part: fill_in(document, (*key, part), item) for part, item in written.items() if part not in _KEYS
    }
    for part in ("args", "env"):
        if part in filled and not isinstance(filled[part], list):
            _mapping(document, (*key, part), filled[part])
    args = read_args(document, (*key, "args"), filled.get("args", {}))
    env = read_env(document, key, filled, spans_machines=ServeArgs(args).spans_machines)
    values = {part: typed(item) for part, item in filled.items() if part not in ("args", "env", "env_file")}
    values |= {"args": args, "env": env, **keys}
    if not is_null(files := filled.get("env_file")):
        values["env_file"] = [str(file) for file in (files if isinstance(files, list) else [files])]
    if "idle" in values:
        _struct(document, (*key, "idle"), values["idle"], IdleConfig)
    for index, gpu in enumerate(values["gpus"] if isinstance(values.get("gpus"), list) else ()):
        for prefix, wrong, cure in _NO_INDEX:
            if isinstance(gpu, str) and gpu.startswith(prefix):
                raise document.error((*key, "gpus", index), wrong, cure)
    model: ModelConfig = _built(document, key, values, ModelConfig)
    return model


def _preset(document: Document, name: str, value: Any) -> Parameters:
    key: Key = ("presets", name)
    written = _mapping(document, key, value)
    _check_keys(document, key, written, Parameters)
    given = {part: item for part, item in written.items() if not is_null(item)}
    try:
        folder = document.path.resolve().parent
        return parameters(typed(fill_in(document, key, given)), folder, document.reads)
    except ParameterError as error:
        raise document.error((*key, error.name), error.wrong, error.cure) from None


def _gateway(document: Document, value: Any) -> GatewayConfig:
    key: Key = ("gateway",)
    written = dict(_mapping(document, key, value))
    _check_keys(document, key, written, GatewayConfig)
    keys = None if is_null(written.get("keys")) else written.pop("keys")
    read = []
    for index, item in enumerate(_items(document, (*key, "keys"), keys)):
        where: Key = (*key, "keys", index)
        own = dict(_mapping(document, where, item))
        _check_keys(document, where, own, GatewayKeyConfig)
        secret = own_key(document, where, own)
        rest = {name: part for name, part in own.items() if name not in _KEYS}
        read.append({**typed(fill_in(document, where, rest)), **secret})
        _built(document, where, read[-1], GatewayKeyConfig)
    values = {part: item for part, item in written.items() if not is_null(item)}
    gateway: GatewayConfig = _built(
        document, key, {**typed(fill_in(document, key, values)), "keys": read}, GatewayConfig
    )
    return gateway


def _struct(document: Document, key: Key, value: Any, kind: type[msgspec.Struct]) -> None:
    values = _mapping(document, key, value)
    _check_keys(document, key, values, kind)
    _built(document, key, values, kind)


def _built(document: Document, key: Key, values: Mapping[str, Any], kind: type[msgspec.Struct]) -> Any:
    """Convert, wording msgspec's complaint anew from the path it gives."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        if "missing required field" in message:
            missing = message.split("`")[1]
            cure = f"Add {missing}: {_EXPECTED[missing]}."
            raise document.error(key, f"{missing} is missing", cure) from None
        name = where.strip("`").lstrip(".").split(".")[0].split("[")[0]
        of_a_client = (kind, name) == (GatewayKeyConfig, "models")
        expected = _CLIENTS_MODELS if of_a_client else _EXPECTED.get(name, "something else")
        wrong = f"must be {expected}, not {_shown(values.get(name))}"
        raise document.error((*key, name), wrong, "Correct the value.") from None


def _mapping(document: Document, key: Key, value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    of_a_model = len(key) == 2 and key[0] == "models"
    name = str(key[-1]) if key and not of_a_model else ""
    expected = _EXPECTED.get(name, "a mapping, lines of `key: value`")
    raise document.error(key, f"must be {expected}, not {_kind(value)}", "Correct the value.")


def _items(document: Document, key: Key, value: Any) -> list[Any]:
    if value is None:
        return []
    if isinstance(value, list):
        return value
    raise document.error(key, f"must be {_EXPECTED[str(key[-1])]}, not {_kind(value)}", "Correct the value.")


def _check_keys(document: Document, key: Key, values: Mapping[str, Any], kind: type[msgspec.Struct]) -> None:
    fields = kind.__struct_fields__
    for name in values:
        if name not in fields:
            near = _nearest(name, fields)
            wrong = f"unknown key; the nearest known one is {near}" if near else "unknown key"
            raise document.error((*key, name), wrong, f"Known here: {', '.join(fields)}.")


def _nearest(name: str, words: Iterable[str], likeness: float = 0.0) -> str | None:
    """The known word that looks most like `name`; None if none is as like it as that, from 0 to 1."""
    spelled = {word.lower(): word for word in words}
    alike = difflib.get_close_matches(name.lower().replace("-", "_"), spelled, n=1, cutoff=likeness)
    return spelled[alike[0]] if alike else None


def _kind(value: Any) -> str:
    """Of what a YAML file holds, whose reader marks some words and numbers by classes of its own."""
    kinds = (_KINDS[kind] for kind in type(value).__mro__ if kind in _KINDS)
    return next(kinds, "nothing" if value is None else "something else")


def _shown(value: Any) -> str:
    return repr(value)[:60] if isinstance(value, str | int | float | list) else _kind(value)


def _located(config: Config, folder: Path) -> Config:
    """Make relative paths absolute for whoever looks from elsewhere.

    They count from the config's folder, where servers run too.
    """
    command = _located_command(config.vllm_command, folder)
    models = {
        name: msgspec.structs.replace(
            model,
            vllm_command=model.vllm_command and _located_command(model.vllm_command, folder),
            model=model.model and _absolute(model.model, folder, anywhere=None),
            # An attached server's GPUs are none of this machine's.
            gpus=() if model.is_attached else model.gpus,
        )
        for name, model in config.models.items()
    }
    return msgspec.structs.replace(config, vllm_command=command, models=models)


def _located_command(command: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    return (_absolute(command[0], folder, anywhere="/"), *command[1:])


def _absolute(text: str, folder: Path, *, anywhere: str | None) -> str:
    """A path that starts with a dot, or holds `anywhere`, made absolute; a hub name stays what it is."""
    if text.startswith(("./", "../")) or (anywhere and anywhere in text and not text.startswith("/")):
        return str((folder / text).absolute())
    return text
