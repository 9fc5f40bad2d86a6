"""The JSON schema of the config file, by which an editor completes, explains and checks what is written.

It holds the flags of `vllm serve` under `args:` too. It may be kinder than the reader of the file, never
stricter, but for one thing: an abbreviated flag is marked, since an editor can only compare whole names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.config.flags import SAID, SWITCH, Flag, FlagTable
from vllm_sleep_tui.config.types import Config
from vllm_sleep_tui.engine.serve_args import RESERVED, why_reserved
from vllm_sleep_tui.files import write_private

Schema = dict[str, Any]

_FILLED_IN = r"\$|^~"
"""A variable or the home folder: what it will be is not known to an editor."""
_LEFT_OUT = "^(None)?$"
_SAID = "|".join(form for word in SAID for form in (word, word.title(), word.upper()))
_NUMBERS = {
    "int": ("integer", r"^\s*[+-]?\d[\d_]*\s*$"),
    "float": ("number", r"^\s*[+-]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][+-]?\d+)?\s*$|^[+-]?([iI]nf|[nN]a[nN])"),
    "size": ("integer", r"^\s*([+-]?\d[\d_]*|\d+(\.\d+)?[kKmMgGtT]|[aA][uU][tT][oO])\s*$"),
}
"""The kind of a flag's value as YAML has it, and as text."""
_SCALAR = ["string", "number", "boolean", "null"]


def schema(tables: Sequence[FlagTable] = ()) -> Schema:
    """The schema; `tables` are the flags of the vLLMs that the file names.

    A flag that none of them has is marked if every one of them was asked.
    """
    described = msgspec.json.schema(Config)
    model = described["$defs"]["ModelConfig"]
    model["oneOf"] = [{"required": ["model"]}, {"required": ["url"]}]
    words = {"type": "array", "items": {"type": ["string", "number", "boolean"]}}
    asked = described["$defs"]["Parameters"]["properties"]
    for name in ("stop", "schema", "tools"):
        asked[name] = {"anyOf": [asked[name], {"type": "string"}]}
    described["$defs"]["Args"] = _args(tables)
    args = {"$ref": "#/$defs/Args"}
    for name, mapping in (("args", args), ("env", {"type": "object"}), ("env_file", {"type": "string"})):
        described_as = model["properties"][name]["description"]
        model["properties"][name] = {"description": described_as, "anyOf": [mapping, words]}
    model["properties"]["api_key"]["anyOf"][0]["pattern"] = r"^\$(\{[A-Za-z_]\w*\}|[A-Za-z_]\w*)$"
    described["$defs"]["Config"]["properties"]["models"]["minProperties"] = 1
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **described}


def write_schema(path: Path, tables: Sequence[FlagTable] = ()) -> None:
    """Write the JSON schema to `path`; raises OperationError."""
    write_private(path, (json.dumps(schema(tables), indent=1, ensure_ascii=False) + "\n").encode())


def _args(tables: Sequence[FlagTable]) -> Schema:
    """What a mapping of flags may hold."""
    reserved = "|".join(map(_either_dash, RESERVED))
    args: Schema = {"type": "object", "propertyNames": {"not": {"pattern": f"^-*(no[-_])?({reserved})$"}}}
    if not tables:
        return args
    flags: dict[str, Flag] = {}
    for table in tables:
        flags = {flag.name: flag for flag in table.flags if why_reserved(flag.name) is None} | flags
    args["properties"] = {name: _described(flag) for name, flag in sorted(flags.items())}
    args["patternProperties"] = {
        _any_of(flag.names): {"$ref": f"#/$defs/Args/properties/{name}"} for name, flag in flags.items()
    }
    deep = [name for flag in flags.values() if flag.type in ("json", "object") for name in flag.names]
    if deep:
        args["patternProperties"][rf"{_any_of(deep)[:-1]}\..+$"] = {}
    args["patternProperties"]["^-{0,2}O=?[0-9]?$"] = {}
    if all(table.is_asked for table in tables):
        args["additionalProperties"] = False
    return args


def _any_of(names: Iterable[str]) -> str:
    """A pattern of these spellings, with and without dashes before and between."""
    return f"^-{{0,2}}({'|'.join(_either_dash(name.lstrip('-')) for name in names)})$"


def _either_dash(name: str) -> str:
    return re.escape(name).replace(r"\-", "[-_]")


def _described(flag: Flag) -> Schema:
    entry: Schema = {"description": flag.help} if flag.help else {}
    if flag.default is not None:
        entry["default"] = flag.default
    one = list(_one(flag))
    if not (flag.takes_list or flag.repeats):
        return entry | {"anyOf": one}
    return entry | {"anyOf": [*one, {"type": "array", "items": {"anyOf": one}}]}


def _one(flag: Flag) -> Iterator[Schema]:
    """What one value of a flag may be."""
    if flag.type == SWITCH:
        yield {"type": ["boolean", "null"]}
        yield {"type": "string", "pattern": f"^({_SAID})$|{_FILLED_IN}"}
    elif flag.type in _NUMBERS:
        kind, pattern = _NUMBERS[flag.type]
        yield {"type": [kind, "null"] if flag.nargs != "?" else [kind, "null", "boolean"]}
        yield {"type": "string", "pattern": f"{pattern}|{_FILLED_IN}|{_LEFT_OUT}"}
    elif flag.type == "text" and flag.choices:
        yield {"enum": [*flag.choices, *(plain for text in flag.choices for plain in _as_yaml(text)), None]}
        yield {"type": "string", "pattern": f"{_FILLED_IN}|{_LEFT_OUT}"}
        if flag.nargs == "?":
            yield {"type": "boolean"}
    elif flag.type in ("json", "object"):
        yield {}
    else:
        yield {"type": [*_SCALAR, "object"]}


def _as_yaml(text: str) -> Iterator[Any]:
    """What YAML reads in a text that is written without quotes, if it is no text then."""
    try:
        plain = msgspec.json.decode(text)
    except msgspec.DecodeError:
        return
    if isinstance(plain, bool | int | float):
        yield plain
