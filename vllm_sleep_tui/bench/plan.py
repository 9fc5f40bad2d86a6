"""What a run does: the pair, its passes in order, its questions, and what it changes of the pair's config."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import msgspec
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from vllm_sleep_tui.errors import UsageError

STEPS = 6
"""A→B→A→B→A→B: the post's protocol, the first A from where both models wait."""
MAX_TOKENS = 100
DEFAULT_MODES = "level1,level2,cold"
_OVERRIDE = re.compile(r"^(?P<name>.+?)\.(?:args\.(?P<argument>[^=]+)|level)=(?P<value>.*)$", re.DOTALL)
_MODE = re.compile(r"^(level1|level2|cold)(?::([1-9][0-9]?))?$")

QUESTIONS = (
    "Why is the sky blue?",
    "How does a refrigerator keep food cold?",
    "What makes bread rise?",
    "Why do leaves change colour in autumn?",
    "How does a bicycle stay upright?",
    "What causes the tides?",
    "How do vaccines work?",
    "Why does ice float on water?",
    "How is glass made?",
    "What is a prime number?",
    "How do birds find their way south?",
    "Why is the sea salty?",
)


class Mode(StrEnum):
    """How the leaving model makes room for the other."""

    LEVEL1 = "level1"
    LEVEL2 = "level2"
    COLD = "cold"

    @property
    def level(self) -> int | None:
        """The sleep level; None for stop and start."""
        return {Mode.LEVEL1: 1, Mode.LEVEL2: 2, Mode.COLD: None}[self]

    @property
    def words(self) -> str:
        """As people call it."""
        return {Mode.LEVEL1: "sleep level 1", Mode.LEVEL2: "sleep level 2", Mode.COLD: "stop and start"}[self]


class PassKey(msgspec.Struct, frozen=True):
    """One pass of the protocol: its mode, and which repeat of it, from 1."""

    mode: Mode
    repeat: int


class Override(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the pair's config for this run alone."""

    model: str
    """A name of the pair, or * for both."""
    argument: str | None
    """A flag of `vllm serve`; None: the model's `level`."""
    value: Any
    """None removes the flag."""

    def __str__(self) -> str:
        """As it is written on the command line."""
        where = "level" if self.argument is None else f"args.{self.argument}"
        return f"{self.model}.{where}={'null' if self.value is None else self.value}"


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that decides what a run does."""

    a: str
    b: str
    passes: tuple[PassKey, ...]
    seed: int = 0
    warm_up: bool = True
    overrides: tuple[Override, ...] = ()

    @property
    def pair(self) -> tuple[str, str]:
        """Both models, A first."""
        return self.a, self.b

    def targets(self) -> tuple[str, ...]:
        """The model that each step of a pass makes awake."""
        return self.pair * (STEPS // 2)

    def question(self, key: PassKey, step: int) -> str:
        """What is asked after a step; no question comes twice in a pass."""
        return QUESTIONS[(self.passes.index(key) * STEPS + step) % len(QUESTIONS)]


def parse_modes(text: str, repeats: int) -> dict[Mode, int]:
    """Repeats by mode of `level1,level2,cold:1`; raises UsageError."""
    counts: dict[Mode, int] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        match = _MODE.match(word)
        if match is None or Mode(match[1]) in counts:
            wrong = "is not a mode" if match is None else "is there twice"
            raise UsageError(
                f"--modes: {word!r} {wrong}.",
                "Name some of level1, level2, cold; cold:1 is cold with one repeat.",
            )
        counts[Mode(match[1])] = int(match[2] or repeats)
    if not counts:
        raise UsageError("--modes names no mode.", f"Leave it out for {DEFAULT_MODES}.")
    return counts


def order(counts: Mapping[Mode, int], seed: int) -> tuple[PassKey, ...]:
    """The passes: modes shuffled by `seed`, the repeats of one together, as a change of mode costs starts."""
    modes = sorted(counts)
    random.Random(seed).shuffle(modes)
    return tuple(PassKey(mode, repeat) for mode in modes for repeat in range(1, counts[mode] + 1))


def parse_overrides(texts: Sequence[str], pair: tuple[str, str]) -> tuple[Override, ...]:
    """The changes of `NAME.args.FLAG=VALUE` and `NAME.level=VALUE`; raises UsageError."""
    return tuple(_override(text, pair) for text in texts)


def _override(text: str, pair: tuple[str, str]) -> Override:
    match = _OVERRIDE.match(text)
    if match is None:
        raise UsageError(
            f"--set {text!r} is no change of a model.",
            f"Write it like {pair[0]}.args.enforce-eager=true or '*.args.quantization=fp8'.",
        )
    if match["name"] not in (*pair, "*"):
        raise UsageError(
            f"--set {text!r}: the pair is {' and '.join(pair)}.", "Name one of them, or * for both."
        )
    try:
        value = YAML(typ="safe", pure=True).load(match["value"])
    except YAMLError:
        raise UsageError(f"--set {text!r}: the value cannot be read.", "Write it as in the config.") from None
    return Override(model=match["name"], argument=match["argument"], value=value)
