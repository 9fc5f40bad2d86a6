"""States, and what is measured of a model, as short text; how numbers are written is in `units`."""

from __future__ import annotations

from typing import NamedTuple

from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.units import NONE, gib_cell


class Look(NamedTuple):
    """How a state is shown."""

    glyph: str
    paint: str
    word: str


LOOKS: dict[State, Look] = {
    State.STOPPED: Look("○", "muted", "stopped"),
    State.STARTING: Look("◔", "warning", "starting"),
    State.AWAKE: Look("●", "good", "awake"),
    State.FALLING_ASLEEP: Look("◒", "warning", "falling asleep"),
    State.ASLEEP: Look("◐", "accent", "asleep"),
    State.WAKING: Look("◓", "warning", "waking"),
    State.STOPPING: Look("◌", "warning", "stopping"),
    State.FAILED: Look("✗", "bad", "failed"),
}


def state_words(state: State, level: int | None) -> str:
    """The state with its level: `asleep L1`."""
    word = LOOKS[state].word
    if level is not None and state in {State.ASLEEP, State.FALLING_ASLEEP}:
        return f"{word} L{level}"
    return word


def vram_words(model: ModelSnapshot) -> str:
    """The model's VRAM for a table cell, in GiB."""
    if model.vram_bytes == 0:
        return NONE
    return gib_cell(model.vram_bytes)


def ram_words(count: int | None) -> str:
    """RAM for a table cell, in GiB."""
    return NONE if count == 0 else gib_cell(count)


PARTS_OF_WAKE = ("weights", "reload", "kv cache", "reset")
"""The steps of a wake from level 2; its phase `wake` is their sum."""


def phases_of(times: SwitchTimes) -> list[tuple[str, float]]:
    """The phases that happened, in order, with their seconds."""
    return [
        (name.replace("_", " "), seconds) for name, seconds in times.phases.items() if seconds is not None
    ]
