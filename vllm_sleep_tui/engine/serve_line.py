"""Reads a `vllm serve` command line that somebody else wrote: its model, its flags, what is ours to set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from vllm_sleep_tui.config.flags import SAID, SWITCH, AmbiguousError, spelled
from vllm_sleep_tui.engine.serve_args import ServeArgs, why_reserved

OLD_ENTRY = "vllm.entrypoints.openai.api_server"
_SILENT = frozenset({"model", "host", "port", "served-model-name", "api-key", "enable-sleep-mode"})
"""Reserved ones that are carried over in another way, or are set for every server."""


@dataclass(slots=True)
class ServeLine:
    """One server as its command line has it."""

    model: str
    binary: str | None
    """The vllm that was called by a path; None: by its name, or through Python."""
    names: list[str] = field(default_factory=list)
    """The names that it is served under."""
    args: dict[str, str | bool | list[str]] = field(default_factory=dict)
    """Flags that `args:` takes, by their long names."""
    port: int | None = None
    has_key: bool = False
    notes: list[str] = field(default_factory=list)
    """What could not be carried over, and why."""

    @property
    def gpus(self) -> int:
        """How many it asks for."""
        return ServeArgs(self.args).gpus or 1


def arguments_in(words: Sequence[str]) -> tuple[str | None, list[str]] | None:
    """The binary and the arguments of `vllm serve` in a command; None if it is another program."""
    for index, word in enumerate(words):
        if PurePath(word).name == "vllm" and words[index + 1 : index + 2] == ["serve"]:
            return (word if "/" in word else None), list(words[index + 2 :])
        if word == OLD_ENTRY or word.endswith(OLD_ENTRY.rpartition("vllm.")[2] + ".py"):
            return None, list(words[index + 1 :])
    return None


def read_arguments(words: Sequence[str], binary: str | None = None) -> ServeLine:
    """What the words behind `vllm serve` say; raises ValueError if they name no model."""
    line = ServeLine(model="", binary=binary)
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        if not word.startswith("-"):
            line.model = line.model or word
            continue
        dashed, has_value, value = word.partition("=")
        try:
            meaning = spelled(dashed)
        except AmbiguousError as error:
            line.notes.append(f"{dashed}: could be {error}")
            continue
        values = [value] if has_value else []
        is_switch = meaning.flag is not None and meaning.flag.type == SWITCH
        is_list = meaning.flag is not None and meaning.flag.takes_list
        while not has_value and position < len(words) and not _is_flag(words[position]):
            if is_switch and words[position].lower() not in SAID:
                break
            values.append(words[position])
            position += 1
            if not is_list:
                break
        _take(line, meaning.name, meaning.is_off, values)
    if not line.model:
        raise ValueError("it names no model")
    return line


def _is_flag(word: str) -> bool:
    """Whether a word is a flag and not a number below zero."""
    return word.startswith("-") and not word[1:2].isdigit() and word != "-"


def _take(line: ServeLine, name: str, is_off: bool, values: list[str]) -> None:
    first = values[0] if values else ""
    if name == "model":
        line.model = first
    elif name == "served-model-name":
        line.names += values
    elif name == "port":
        line.port = int(first) if first.isdigit() else None
    elif name == "api-key":
        line.has_key = True
    elif name in _SILENT:
        pass
    elif (why := why_reserved(name)) is not None:
        line.notes.append(f"--{name}: {why}")
    elif is_off or not values:
        line.args[name] = not is_off
    elif name in line.args and not isinstance(line.args[name], bool):
        before = line.args[name]
        line.args[name] = [*([before] if isinstance(before, str) else before), *values]  # type: ignore[misc]
    else:
        line.args[name] = first if len(values) == 1 else values
