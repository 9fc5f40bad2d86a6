"""YAML with line numbers: scalars as they are written, and the line of each of them for complaints."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.reader import ReaderError

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import Mark, mark, open_regular

Key = tuple[str | int, ...]
"""Where a value stands: ("models", "qwen", "gpus", 0)."""

MAX_BYTES = 1_000_000
"""Of a config: reading more would take seconds."""
_MAX_DEPTH = 32
"""A config has far fewer levels; an alias inside its own anchor has no end."""
_ANOTHER = "Give another file with --config"
_UNUSABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
_PROBLEMS = {
    "found character '\\t' that cannot start any token": (
        "a tab is used for indentation",
        "YAML knows only spaces there: replace the tab.",
    ),
}


Kind = Literal["text", "int", "float", "bool", "null", "date"]


class Written(str):
    """A scalar as the file spells it: `1.10`, `0012345` and `12e4567` stay what they are."""

    __slots__ = ("kind",)
    kind: Kind
    """What YAML takes it for; in quotes always text."""

    def __new__(cls, text: str, kind: Kind = "text") -> Self:
        """The text with its kind."""
        self = super().__new__(cls, text)
        self.kind = kind
        return self


class _Scalars(RoundTripConstructor):
    """Keeps the text of every scalar, where ruamel would make numbers of them."""


def _keeping(kind: Kind) -> Any:
    def construct(_: _Scalars, node: ScalarNode) -> Written:
        return Written(node.value, kind)

    return construct


for _tag, _kind in (
    ("int", "int"),
    ("float", "float"),
    ("bool", "bool"),
    ("null", "null"),
    ("timestamp", "date"),
):
    _Scalars.add_constructor(f"tag:yaml.org,2002:{_tag}", _keeping(_kind))  # type: ignore[arg-type]


def is_null(value: Any) -> bool:
    """Whether nothing stands there: no key, no value, `~` or `null`."""
    return value is None or (isinstance(value, Written) and value.kind == "null")


def typed(value: Any) -> Any:
    """A tree of scalars as YAML takes them: numbers, true, null; dates stay text."""
    if isinstance(value, dict):
        return {str(name): typed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [typed(item) for item in value]
    if not isinstance(value, Written):
        return value
    match value.kind:
        case "null":
            return None
        case "bool":
            return value.lower() == "true"
        case "int":
            return _whole(value)
        case "float":
            return float(value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
        case _:
            return str(value)


def _whole(text: str) -> int | str:
    plain = text.replace("_", "")
    try:
        return int(plain, 10) if plain.lstrip("+-").isdigit() else int(plain, 0)
    except ValueError:  # more digits than Python reads
        return text


def as_yaml(value: Any) -> str:
    """A tree as one line of YAML, with each scalar as it was written."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(name)}: {as_yaml(item)}' for name, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    if isinstance(value, Written) and value.kind != "text":
        return str(value) or "null"
    return json.dumps(value, ensure_ascii=False)


class Document(msgspec.Struct, frozen=True):
    """A file's values with the lines they stand on; it words the complaints about them."""

    path: Path
    digest: str
    """SHA-256 of the file's content."""
    values: Any
    """Mappings, lists and `Written` scalars."""
    lines: Mapping[Key, int]
    included: list[str] = msgspec.field(default_factory=list)
    """The digests of the files whose content counts as this one's."""
    marks: dict[Path, Mark] = msgspec.field(default_factory=dict)
    """The other files that it names and that were read or looked for, each as it was just before."""

    def reads(self, path: Path) -> Path:
        """Note that a file is read for this one, before it is; returns its path."""
        self.marks[path] = mark(path)
        return path

    def include(self, other: Document) -> Document:
        """Count another file's content as part of this one; returns that file."""
        self.included.extend([other.digest, *other.included])
        return other

    @property
    def whole_digest(self) -> str:
        """SHA-256 that changes with the file or any that it includes."""
        if not self.included:
            return self.digest
        return hashlib.sha256(" ".join([self.digest, *self.included]).encode()).hexdigest()

    def line(self, key: Key) -> int:
        """The line of a key, or of the nearest thing around it (a key merged with ``<<`` has none)."""
        while key and key not in self.lines:
            key = key[:-1]
        return self.lines.get(key, 1)

    def error(self, key: Key, wrong: str, cure: str) -> UsageError:
        """What is wrong with the value at `key`: file, line, key and the cure."""
        name = f" {spell(key)}:" if key else ""
        return UsageError(f"{self.path}:{self.line(key)}:{name} {wrong}", cure)


def spell(key: Key) -> str:
    """A key as people write it: models.qwen.gpus[0]."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def parse(path: Path, marks: dict[Path, Mark] | None = None) -> Document:
    """Read a YAML file as it is written; raises UsageError with file and line for what is not YAML.

    `marks` is where it notes the other files that are read for it.
    """
    content = _read(path)
    text = _decoded(path, content)
    reader = YAML(typ="rt", pure=True)
    reader.Constructor = _Scalars
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an anchor used twice is no mistake
            tree = reader.load(text)
    except MarkedYAMLError as error:
        raise _syntax_error(path, error) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UsageError(f"{path}:{line}: a control character is not allowed", "Remove it.") from None
    except Exception as error:  # ruamel itself trips over some files: a list as a key is a TypeError
        raise UsageError(f"{path}:1: not YAML: {_one_line(str(error))}", "Correct the file.") from None
    lines: dict[Key, int] = {(): 1}
    noted = {} if marks is None else marks
    document = Document(path, hashlib.sha256(content).hexdigest(), None, lines, marks=noted)
    return msgspec.structs.replace(document, values=_plain(tree, (), lines, document))


def _read(path: Path) -> bytes:
    try:
        with os.fdopen(open_regular(path, follow=True), "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file", f"{_ANOTHER}, or write one: vllm-sleep-tui init") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}", f"{_ANOTHER}.") from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"{path}: larger than 1 MB, so it is no config", f"{_ANOTHER}.")
    return content


def _decoded(path: Path, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text", "Save the file as UTF-8.") from None


def _syntax_error(path: Path, error: MarkedYAMLError) -> UsageError:
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    problem = _one_line(error.problem or error.context or "not YAML")
    if problem.startswith("found duplicate key"):
        name = problem.split('"')[1] if '"' in problem else "?"
        return UsageError(f"{path}:{line}: {name}: this key is there twice", "Keep one of the two.")
    wrong, cure = _PROBLEMS.get(problem, (f"not YAML: {problem}", "Look at this line and the one above it."))
    return UsageError(f"{path}:{line}: {wrong}", cure)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _plain(node: Any, key: Key, lines: dict[Key, int], document: Document) -> Any:
    """Copy ruamel's tree into mappings, lists and scalars as written, and note the line of each."""
    if len(key) > _MAX_DEPTH:
        raise document.error(key[:2], "nested too deeply", "Remove the alias that contains itself.")
    if isinstance(node, CommentedMap):
        return _plain_mapping(node, key, lines, document)
    if isinstance(node, CommentedSeq):
        positions = node.lc.data or {}
        for index in range(len(node)):
            if index in positions:
                lines[*key, index] = positions[index][0] + 1
        return [_plain(item, (*key, index), lines, document) for index, item in enumerate(node)]
    if node is None:
        return Written("", "null")
    if isinstance(node, str):
        if _UNUSABLE.search(node):
            wrong = "a control character or half of one, which no program takes as an argument"
            raise document.error(key, wrong, "Remove it.")
        return node if isinstance(node, Written) else Written(node)
    raise document.error(key, "a tag or another special value", "Write plain text, in quotes.")


def _plain_mapping(node: CommentedMap, key: Key, lines: dict[Key, int], document: Document) -> dict[str, Any]:
    positions = node.lc.data or {}
    for name in node:
        if name in positions:
            lines[*key, str(name)] = positions[name][0] + 1
    for name in node:
        if not isinstance(name, str) or (isinstance(name, Written) and name.kind != "text"):
            raise document.error((*key, str(name)), "a key must be text", f'Write it in quotes: "{name}":')
    return {str(name): _plain(value, (*key, str(name)), lines, document) for name, value in node.items()}
