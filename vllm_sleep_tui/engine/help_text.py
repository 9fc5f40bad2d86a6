"""The flags of `vllm serve` as its `--help=all` shows them: all that a wrapper around vLLM can be asked.

A help shows the spellings, choices and defaults of each flag, and not what its value is read as: that is
taken from a table that knows the flag. What a help hides it knows too, if it is of the same release.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from vllm_sleep_tui.config.flags import SWITCH, Flag, FlagTable
from vllm_sleep_tui.text import one_line

WIDTH = 20_000
"""Columns to have it printed in, so that no flag is broken over two lines."""
MAX_HELP = 200
"""Characters of what a flag is for."""

_FLAG = re.compile(r" {2}(?P<spellings>-\S.*?)(?: {2,}(?P<text>\S.*))?")
_DEEPER = re.compile(r" {3,}(?P<text>\S.*)")
_SPELLING = re.compile(r"(?P<name>--?[A-Za-z][\w.-]*)(?P<value>[ =].*)?")
_SERVE = re.compile(r"usage: .*\bserve\b")
_DEFAULT = re.compile(r"\(default: (?P<default>.*)\)$")


def flags_in(shown: str, near: FlagTable, *, same_release: bool) -> tuple[Flag, ...]:
    """The flags in a help of `vllm serve`; none if it is no such help.

    `near` is the table of a near version. With `same_release` the flags that it has and the help hides are
    there too.
    """
    lines = shown.splitlines()
    if not any(_SERVE.match(line) for line in lines):
        return ()
    shows = [_flag(spellings, text, near) for spellings, text in _told(lines)]
    flags = [flag for flag in shows if flag is not None]
    if not (same_release and flags):
        return tuple(flags)
    by_name = {flag.name: flag for flag in near.flags}
    flags = [_with_hidden(flag, by_name.get(flag.name)) for flag in flags]
    names = {name for flag in flags for name in flag.names}
    return (*flags, *(flag for flag in near.flags if names.isdisjoint(flag.names)))


def _with_hidden(flag: Flag, complete: Flag | None) -> Flag:
    """The flag with the spellings that its help hides, as `complete` of the same release has them."""
    if complete is None or complete.type != flag.type:
        return flag
    names = tuple(dict.fromkeys((*flag.names, *complete.names)))
    return msgspec.structs.replace(flag, names=names, off=complete.off)


def _told(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Each flag's spellings, with what stands beside and below them."""
    spellings, text = "", [""]
    for line in lines:
        if begun := _FLAG.fullmatch(line):
            if spellings:
                yield spellings, "\n".join(text)
            spellings, text = begun["spellings"], [begun["text"] or ""]
        elif spellings and (deeper := _DEEPER.fullmatch(line)):
            text.append(deeper["text"])
    if spellings:
        yield spellings, "\n".join(text)


def _flag(spellings: str, text: str, near: FlagTable) -> Flag | None:
    """One flag of a help; None for the help itself, and for what is not understood."""
    parts = [_SPELLING.fullmatch(part) for part in re.split(r", (?=-)", spellings)]
    if not all(parts):
        return None
    names = tuple(part["name"] for part in parts if part)
    if "--help" in names:
        return None
    value = next((part["value"].strip(" =") for part in parts if part and part["value"]), "")
    like = next((flag for name in names if (flag := near.find_dashed(name))), None)
    if like is None or (like.type == SWITCH) != (value == ""):
        like = _unknown(names, value)
    off = tuple(name for name in names if name in like.off)
    # Where no table names choices the braces may be mere examples, as of `tool-call-parser`.
    choices = _choices(value) if like.choices else ()
    return msgspec.structs.replace(like, names=names, off=off, choices=choices, help=_for_what(text))


def _unknown(names: tuple[str, ...], value: str) -> Flag:
    """A flag that no table has, as far as its help tells."""
    if not value:
        off = tuple(name for name in names if name.startswith("--no-") and f"--{name[5:]}" in names)
        return Flag(names=names, type=SWITCH, off=off)
    nargs = "+" if value.endswith(" ...]") else None
    if value.startswith("[") and value.endswith("]"):
        nargs = "*" if "..." in value else "?"
    return Flag(names=names, nargs=nargs, choices=_choices(value) if value.endswith("}") else ())


def _choices(value: str) -> tuple[str, ...]:
    found = re.match(r"\{([^{}]*)\}", value)
    return tuple(choice for choice in found[1].split(",") if choice != "None") if found else ()


def _for_what(text: str) -> str:
    """The first sentence of a help text on one line."""
    whole = one_line(_DEFAULT.sub("", text.strip()))
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z`'\"])", whole, maxsplit=1)[0]
    return sentence if len(sentence) <= MAX_HELP else f"{sentence[: MAX_HELP - 1].rstrip()}…"
