"""What `args:` and `env:` become: one rule for variables, one spelling of a flag, text as written."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_sleep_tui.config.flags import (
    SAID,
    SWITCH,
    WORDS,
    AmbiguousError,
    Spelling,
    is_name,
    spelled,
)
from vllm_sleep_tui.config.yaml import MAX_BYTES, Document, Key, Written, is_null, parse, typed
from vllm_sleep_tui.engine.serve_args import why_reserved
from vllm_sleep_tui.files import read_regular

RESERVED_ENV: dict[str, str] = {
    "VLLM_API_KEY": "Write it as the model's own `api_key:` or `api_key_file:`.",
    "CUDA_VISIBLE_DEVICES": "Write the model's GPUs as `gpus: [0]`.",
    "CUDA_DEVICE_ORDER": "GPUs are counted as NVML counts them, by PCI bus: remove it.",
    "VLLM_PORT": "It is a port inside vLLM and collides between servers; the one that answers is `port:`.",
    "VLLM_HOST_IP": "Servers talk on 127.0.0.1; only a model over several machines may set it.",
    "VLLM_SERVER_DEV_MODE": "The sleep endpoints need it, so it is always 1: remove it.",
    "VLLM_USE_RUST_FRONTEND": "That front end would not load the guard: remove it.",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "A server whose engine died must end to be restarted: remove it.",
    "PYTHONHOME": "It would mix two Pythons; name the right one in `vllm_command`.",
    "TMPDIR": "Each server has a short private one, which goes with it: remove it.",
    "SPT_NOENV": "It keeps the launch's mark in the environment of vLLM's processes: remove it.",
}
"""Variables that `env` may not set, and what to do instead."""
OUR_ENV = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "VLLM_SERVER_DEV_MODE": "1", "SPT_NOENV": "1"}
"""Of those, the ones with a value of ours: to write that very value is no contradiction."""
OUR_ENV_PREFIXES = ("SLEEP_TUI_", "VLLM_SLEEP_TUI_")
IS_OURS = "reserved, vllm-sleep-tui sets it"

_VARIABLE = re.compile(r"\$(?:(\$)|\{([A-Za-z_]\w*)(?::-([^}]*))?\}|([A-Za-z_]\w*)|(\{))", re.ASCII)
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")


def fill_in(document: Document, key: Key, value: Any) -> Any:
    """The value with its variables and home folder put in; raises UsageError if one is unset; shows no value.

    `$VAR`, `${VAR}` and `${VAR:-otherwise}` are variables of this program's environment, `$$` is a dollar
    sign, `~` or `~/…` at the beginning is the home folder; the same for every value of the file.
    """
    if isinstance(value, dict):
        return {name: fill_in(document, (*key, name), item) for name, item in value.items()}
    if isinstance(value, list):
        return [fill_in(document, (*key, index), item) for index, item in enumerate(value)]
    if not isinstance(value, Written) or is_null(value):
        return value
    text = str(Path.home()) + value[1:] if value == "~" or value.startswith("~/") else value
    filled = _VARIABLE.sub(lambda match: _look_up(document, key, match), text)
    return value if filled == value else Written(filled)


def _look_up(document: Document, key: Key, match: re.Match[str]) -> str:
    dollar, braced, otherwise, plain, open_brace = match.groups()
    if dollar:
        return "$"
    if open_brace:
        wrong = "a ${ that is neither ${VAR} nor ${VAR:-otherwise}"
        raise document.error(key, wrong, "Correct it; for a dollar sign as such write $$.")
    name = braced or plain
    value = os.environ.get(name)
    if otherwise is not None and not value:
        return str(otherwise)
    if value is None:
        wrong = f"the environment variable {name} is not set"
        cure = f"Set it first: export {name}=…; for a dollar sign as such write $$."
        raise document.error(key, wrong, cure)
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise document.error(key, f"the environment variable {name} is not UTF-8 text", "Correct it.")
    return value


# ── args ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_args(document: Document, key: Key, value: Any) -> dict[str, Any]:
    """`args:` as flags by their long names, each with the text (or texts) that vLLM is to get.

    `value` is a mapping of flags to values or a list of words of the command line, variables put in. A switch
    is "true" or "false"; what has no value is left out. Raises UsageError, also for a flag that is our own.
    """
    flags: dict[str, Any] = {}
    said: dict[str, str] = {}
    for where, name, given in _pairs(document, key, value):
        if not is_name(name):
            raise document.error(where, "not a flag's name", "Write flags as max-model-len: 8192")
        spelling = resolve(document, where, name)
        if spelling.name == "config":
            inside = _read_config(document, where, given)
            flags = inside | flags
            continue
        if is_null(given):
            continue
        if spelling.name in said:
            raise document.error(where, f"the same as {said[spelling.name]}", "Keep one of the two.")
        said[spelling.name] = name
        flags[spelling.name] = _text(document, where, spelling, given)
    return flags


def resolve(document: Document, where: Key, name: str) -> Spelling:
    """What a spelling means; raises UsageError if it is ambiguous or the program's own."""
    try:
        spelling = spelled(name)
    except AmbiguousError as error:
        wrong = f"the beginning of several flags: {error}"
        raise document.error(where, wrong, "Write the one that is meant in full.") from None
    if cure := why_reserved(spelling.name):
        means = "" if spelling.head in name.replace("_", "-") else f"means {spelling.head}, "
        raise document.error(where, f"{means}{IS_OURS}", cure)
    return spelling


def _pairs(document: Document, key: Key, value: Any) -> Iterator[tuple[Key, str, Any]]:
    """Each flag with the place it stands at and what it is given."""
    if isinstance(value, Mapping):
        for name, given in value.items():
            if "=" in name:
                raise document.error((*key, name), "not a flag's name", "Write flags as max-model-len: 8192")
            yield (*key, name), name, given
        return
    words = [_word(document, (*key, index), item) for index, item in enumerate(value)]
    index = 0
    while index < len(words):
        where: Key = (*key, index)
        name, has_value, first = words[index].partition("=")
        if not _is_flag(name):
            raise document.error(
                where,
                f"{name!r} belongs to no flag",
                "Write flags with their dashes, as in [--max-model-len, 8192].",
            )
        index += 1
        given = [first] if has_value else []
        if level := re.fullmatch(r"-O=?(\d)", words[index - 1]):
            name, given = "-O", [level[1]]
        while not has_value and index < len(words) and not _is_flag(words[index]):
            given.append(words[index])
            index += 1
        yield (
            where,
            name,
            given if len(given) > 1 else Written(given[0]) if given else Written("true", "bool"),
        )


def _word(document: Document, where: Key, item: Any) -> str:
    if isinstance(item, str):
        return str(item)
    raise document.error(
        where, "must be a word of the command line", "Write it as on the command line, in quotes."
    )


def _is_flag(word: str) -> bool:
    return re.match(r"--?[A-Za-z]", word) is not None


def _text(document: Document, where: Key, spelling: Spelling, given: Any) -> Any:
    """The value as vLLM is to get it: a text, or several."""
    flag = spelling.flag
    if isinstance(given, dict):
        return as_json(given)
    if isinstance(given, list):
        is_json = flag is not None and flag.type == "json" and not flag.takes_list
        if is_json or ("." in spelling.name and not spelling.name.endswith("+")):
            return as_json([Written(item) if isinstance(item, str) else item for item in given])
        return tuple(as_json(item) if isinstance(item, dict | list) else str(item) for item in given)
    text = str(given)
    is_bool = isinstance(given, Written) and given.kind == "bool"
    if flag is None or flag.type != SWITCH or "." in spelling.name:
        # Behind a dot vLLM reads JSON, which knows no `True`.
        return text.lower() if is_bool and (flag is None or "." in spelling.name) else text
    if (said := SAID.get(text.lower())) is None:
        raise document.error(where, "takes no value", "Write true or false.")
    return said if not spelling.is_off else "false" if WORDS[said] else "true"


def as_json(value: Any) -> str:
    """A tree as JSON, its numbers spelled as they are written."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {as_json(item)}' for name, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_json, value))}]"
    if isinstance(value, Written) and value.kind in ("int", "float") and _JSON_NUMBER.fullmatch(value):
        return str(value)
    if isinstance(value, Written) and value.kind in ("int", "float") and value.lstrip("+-").startswith("0"):
        return json.dumps(str(value))  # 0012 is no number of JSON, and 12 is another text
    return json.dumps(typed(value), ensure_ascii=False)


def _read_config(document: Document, where: Key, given: Any) -> dict[str, Any]:
    """The flags of a YAML file as `vllm serve --config` takes it, checked as if they stood in `args:`."""
    if not isinstance(given, Written) or is_null(given) or not given:
        raise document.error(where, "must be the name of a file", "Write it like config: serve.yaml")
    path = document.path.resolve().parent / given
    inside = document.include(parse(document.reads(path), document.marks))
    values = inside.values
    if is_null(values):
        return {}
    if not isinstance(values, dict):
        raise inside.error(
            (), "must be a mapping of flags to values", "Write lines such as max-model-len: 8192"
        )
    if "config" in values:
        raise inside.error(("config",), "a file of flags names no other", "Write its flags here.")
    return read_args(inside, (), values)


# ── env ─────────────────────────────────────────────────────────────────────────────────────────────────────


def read_env(
    document: Document, key: Key, values: Mapping[str, Any], *, spans_machines: bool
) -> dict[str, str]:
    """The model's `env_file:` and over it `env:`; raises UsageError, also for a variable that is our own."""
    variables: dict[str, str] = {}
    files = values.get("env_file")
    for index, name in enumerate(files if isinstance(files, list) else [] if is_null(files) else [files]):
        where: Key = (*key, "env_file", index) if isinstance(files, list) else (*key, "env_file")
        if not isinstance(name, Written) or is_null(name):
            raise document.error(where, "must be the name of a file", "Write it like env_file: serve.env")
        variables |= _env_file(document, where, document.path.resolve().parent / name, spans_machines)
    given = values.get("env")
    for where, variable, text in _variables(document, (*key, "env"), {} if is_null(given) else given):
        _check_variable(document, where, variable, text, spans_machines)
        variables[variable] = text
    return variables


def _variables(document: Document, key: Key, value: Any) -> Iterator[tuple[Key, str, str]]:
    pairs = value.items() if isinstance(value, Mapping) else ((None, item) for item in value)
    for index, (name, item) in enumerate(pairs):
        where: Key = (*key, index if name is None else name)
        if not isinstance(item, Written) or (name is not None and item.kind == "null"):
            cure = f'Write it in quotes: {name}: "…"' if name else "Write it like NAME=value."
            raise document.error(where, "must be text", cure)
        if name is None:
            name, has_value, text = item.partition("=")
            # A name alone takes the value of this program's environment, as in compose files.
            item = text if has_value else fill_in(document, where, Written(f"${{{name}}}"))
        yield where, name, str(item)


def _env_file(document: Document, where: Key, path: Path, spans_machines: bool) -> dict[str, str]:
    """Lines `NAME=value`, with or without `export` and quotes; single quotes keep every sign."""
    document.reads(path)
    try:
        content = read_regular(path, MAX_BYTES, follow=True) if path.is_file() else None
    except OSError as error:
        raise document.error(where, f"{path} cannot be read: {error.strerror}", "Correct the path.") from None
    if content is None:
        raise document.error(where, f"there is no file {path}", "Write lines there such as NAME=value.")
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise document.error(where, f"{path} is not UTF-8 text", "Save the file as UTF-8.") from None
    places: dict[Key, int] = {}
    inside = document.include(Document(path, hashlib.sha256(content).hexdigest(), None, places))
    variables = {}
    for number, line in enumerate(lines, 1):
        text = line.strip().removeprefix("export ").strip()
        if not text or text.startswith("#"):
            continue
        name, has_value, value = (part.strip() for part in text.partition("="))
        places[name,] = number
        if not has_value:
            raise inside.error((name,), "not NAME=value", "Correct the line.")
        if len(value) > 1 and value[0] == value[-1] == "'":
            value = value[1:-1]
        else:
            quoted = len(value) > 1 and value[0] == value[-1] == '"'
            value = str(fill_in(inside, (name,), Written(value[1:-1] if quoted else value)))
        _check_variable(inside, (name,), name, value, spans_machines)
        variables[name] = value
    return variables


def _check_variable(document: Document, where: Key, name: str, text: str, spans_machines: bool) -> None:
    if name in RESERVED_ENV and OUR_ENV.get(name) != text and not (name == "VLLM_HOST_IP" and spans_machines):
        raise document.error(where, IS_OURS, RESERVED_ENV[name])
    if name.startswith(OUR_ENV_PREFIXES):
        raise document.error(where, IS_OURS, "Remove it.")
    if not _ENV_NAME.fullmatch(name):
        raise document.error(where, "not a variable's name", "Use letters, digits and underscores.")
    if "\0" in text:
        raise document.error(where, "holds a zero byte, which no variable can", "Remove it.")
