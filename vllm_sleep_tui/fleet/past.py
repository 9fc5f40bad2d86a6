"""What was: switches, states, what was served; frozen values that the fleet hands out."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vllm_sleep_tui.fleet.snapshot import SwitchTimes
from vllm_sleep_tui.fleet.states import State


class PastSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """One switch that went well."""

    time: float
    """UTC seconds of its end."""
    model: str
    level: int | None
    """The level it slept at; None if it was started instead."""
    from_state: State
    times: SwitchTimes
    left: tuple[str, ...]
    """Who made room."""


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """How long a model's switches took, in seconds."""

    count: int
    p50: float
    p95: float


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """What sleeping saved against stopping and starting the same models."""

    switches: int
    """Of sleepers; a start saves nothing."""
    seconds: float
    unknown: int = 0
    """Switches that are not counted in `seconds`: their model's cold start is not known."""


class StateSpan(msgspec.Struct, frozen=True, kw_only=True):
    """A model was in a state from one moment to another, UTC seconds."""

    model: str
    state: State
    level: int | None
    start: float
    end: float


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """What a model was asked and answered in a stretch of time; one without anything is left out."""

    model: str
    time: float
    """UTC seconds of its beginning."""
    seconds: float
    requests: int
    """That ended, however they ended."""
    prompt_tokens: int
    generated_tokens: int


class Past(msgspec.Struct, frozen=True, kw_only=True):
    """What the history says about a window of time up to now, and about today."""

    percentiles: Mapping[str, Mapping[int, Percentiles]] = {}
    """Of switches, by model and level."""
    cold_starts: Mapping[str, float] = {}
    """The usual one of each model, in seconds; a model whose is not known is left out."""
    takes: Mapping[str, Mapping[str, float]] = {}
    """What each model's operations take as a rule, in seconds, by their names in `Footprint.times`: what a
    Prediction adds up."""
    switches_today: int = 0
    """To models that slept; a start is none."""
    saved_today: Saved = Saved(switches=0, seconds=0.0)
    spans: tuple[StateSpan, ...] = ()
    switches: tuple[PastSwitch, ...] = ()
    """In the window, like the spans and what was served."""
    served: tuple[Served, ...] = ()
    """In stretches of time that make up the window, none shorter than the history keeps them."""
