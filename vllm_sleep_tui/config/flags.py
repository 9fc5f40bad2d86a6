"""The flags of `vllm serve`: what a parser knows, and the one spelling of each.

A table is what one vLLM's parser says of itself. Four are shipped (vLLM 0.24 to 0.33), for reading a
config and for a vLLM that cannot be asked; `vllm_sleep_tui.engine.installed_flags` asks the installed one.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.engine.serve_args import OPTIMIZATION_LEVEL

SHIPPED = Path(__file__).parents[1] / "vllm_flags"
MAX_TABLE_BYTES = 4 * 2**20
"""A shipped one has 30 kB; one that was asked for has the help of each flag besides."""
SWITCH = "switch"
WORDS = {"true": True, "false": False}
"""What a switch is, once the file is read."""
SAID = {"true": "true", "yes": "true", "on": "true", "false": "false", "no": "false", "off": "false"}
"""What people write for it, in small letters."""

_ONE = re.compile(r"-{0,2}[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_.-]+\+?)?")
_LEVEL = re.compile(r"-{0,2}O=?([0-9]?)")


class Flag(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One flag as a parser knows it."""

    names: tuple[str, ...]
    """Every spelling, with its dashes; first the long one that turns on."""
    type: str = "text"
    """switch (takes no value), text, int, float, size (32k), json or object (vLLM's own kinds)."""
    off: tuple[str, ...] = ()
    """Of a switch: the spellings that turn it off."""
    nargs: str | int | None = None
    """As argparse has it: + and * take a list, ? may stand alone."""
    choices: tuple[str, ...] = ()
    default: Any = None
    const: Any = None
    repeats: bool = False
    """Given again, it adds up."""
    help: str = ""
    """What it is for, in a line; shipped tables leave it out."""

    @property
    def name(self) -> str:
        """Its long name without dashes."""
        return next((name for name in self.names if name.startswith("--")), self.names[0]).lstrip("-")

    @property
    def takes_list(self) -> bool:
        """Whether several values may follow."""
        return self.nargs in ("+", "*") or isinstance(self.nargs, int)


class Spelling(msgspec.Struct, frozen=True):
    """What a spelling means."""

    name: str
    """The flag's long name without dashes, and behind a dot what it sets of it."""
    flag: Flag | None
    """None if no table has it."""
    is_off: bool = False
    """It is the flag's `--no-…`."""

    @property
    def head(self) -> str:
        """The flag's name without what follows a dot."""
        return self.name.partition(".")[0]


class AmbiguousError(Exception):
    """An abbreviation of several flags, which are the text."""


class FlagTable:
    """The flags of one vLLM."""

    def __init__(self, version: str, flags: Iterable[Flag], *, is_asked: bool = False) -> None:
        self.version = version
        self.is_asked = is_asked
        """It is the installed vLLM's own word, not a shipped table that is thought to be near."""
        self.flags = tuple(flags)
        self._by_name = {name: flag for flag in self.flags for name in flag.names}

    def find(self, name: str) -> Flag | None:
        """The flag of a name without dashes, which may go on behind a dot."""
        return self._by_name.get(f"--{name.partition('.')[0]}")

    def find_dashed(self, dashed: str) -> Flag | None:
        """The flag of a name with its dashes."""
        return self._by_name.get(dashed)

    def nearest(self, name: str) -> str | None:
        """The flag that looks most like `name`, without dashes; None if none does."""
        spellings = [spelling.lstrip("-") for spelling in self._by_name if spelling.startswith("--")]
        alike = difflib.get_close_matches(name.partition(".")[0], spellings, n=1, cutoff=0.6)
        return alike[0] if alike else None

    def starting(self, dashed: str) -> dict[str, Flag]:
        """The spellings that begin like this one."""
        return {name: flag for name, flag in self._by_name.items() if name.startswith(dashed)}


class _Dumped(msgspec.Struct):
    version: str
    flags: list[Flag]


def encode_table(version: str, flags: Iterable[Flag]) -> bytes:
    """The JSON of a table."""
    return msgspec.json.encode(_Dumped(version, list(flags)))


def decode_table(content: bytes, *, is_asked: bool) -> FlagTable:
    """A table from its JSON; raises msgspec.DecodeError."""
    dumped = msgspec.json.decode(content, type=_Dumped)
    return FlagTable(dumped.version, dumped.flags, is_asked=is_asked)


@functools.cache
def shipped_tables() -> tuple[FlagTable, ...]:
    """The tables that come with this program, the oldest first."""
    files = sorted(SHIPPED.glob("*.json"), key=lambda file: _numbers(file.stem))
    return tuple(decode_table(file.read_bytes(), is_asked=False) for file in files)


def shipped_table(version: str | None = None) -> FlagTable:
    """The shipped table nearest below this version, else the oldest; the newest for a version not known."""
    tables = shipped_tables()
    if version is None:
        return tables[-1]
    wanted = _numbers(version)[:2]
    return next((table for table in reversed(tables) if _numbers(table.version)[:2] <= wanted), tables[0])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def spelled(text: str) -> Spelling:
    """What `text` means in any of the shipped tables, the newest first; raises AmbiguousError.

    A flag that none of them has keeps its name: the installed vLLM may be newer.
    """
    tables = list(reversed(shipped_tables()))
    body = text.lstrip("-")
    head, dot, tail = body.partition(".")
    if _LEVEL.fullmatch(text):
        head = OPTIMIZATION_LEVEL
    long, short = f"--{head.replace('_', '-')}", f"-{head}"
    is_short = text.startswith("-") and not text.startswith("--")
    for table in tables:
        for dashed in (short, long) if is_short else (long, short):
            if exact := table.find_dashed(dashed):
                return Spelling(exact.name + dot + tail, exact, dashed in exact.off)
    # argparse takes a beginning for the whole, if only one flag begins so.
    begun: dict[tuple[str, bool], Flag] = {}
    for table in reversed(tables):
        begun |= {(flag.name, name in flag.off): flag for name, flag in table.starting(long).items()}
    if len(begun) > 1:
        raise AmbiguousError(", ".join(sorted({f"no-{name}" if off else name for name, off in begun})))
    for (name, off), flag in begun.items():
        return Spelling(name + dot + tail, flag, off)
    return Spelling(long.lstrip("-") + dot + tail, None)


def is_name(text: str) -> bool:
    """Whether it can be the name of a flag: `max-model-len`, `-tp`, `compilation-config.mode`."""
    return _ONE.fullmatch(text) is not None


def wrong_value(flag: Flag, value: str | tuple[str, ...]) -> str | None:
    """Why vLLM's parser would refuse this value, in words; None if it would not."""
    if flag.type == SWITCH:
        return None if value in WORDS else "takes no value: write true or false"
    if isinstance(value, tuple) and not (flag.takes_list or flag.repeats):
        return "takes one value, not a list"
    for item in value if isinstance(value, tuple) else (value,):
        if item in ("None", ""):
            continue
        if flag.choices and item not in flag.choices and flag.type == "text":
            return f"{item!r} is none of: {', '.join(flag.choices)}"
        if (reads := _READS.get(flag.type)) and not reads(item):
            return f"{item!r} is not {_KINDS[flag.type]}"
    return None


def _is_json(text: str) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


_READS: Mapping[str, Any] = {
    "int": re.compile(r"\s*[+-]?\d[\d_]*\s*").fullmatch,
    "float": re.compile(
        r"\s*[+-]?(\d[\d_]*\.?[\d_]*|\.\d+)([eE][+-]?\d+)?\s*|[+-]?(inf|nan)", re.I
    ).fullmatch,
    "size": re.compile(r"\s*([+-]?\d[\d_]*|\d+(\.\d+)?[kKmMgGtT]|auto)\s*", re.I).fullmatch,
    "json": _is_json,
}
_KINDS = {"int": "a whole number", "float": "a number", "size": "a size such as 8192 or 32k", "json": "JSON"}
