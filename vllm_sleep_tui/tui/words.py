"""Numbers and states as short text; what is unknown is `?`, what is not there is `–`."""

from __future__ import annotations

from typing import NamedTuple

from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, SwitchTimes
from vllm_sleep_tui.fleet.states import State

GIB = 1024**3
NONE = "–"
UNKNOWN = "?"


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


def gib(count: int | None) -> str:
    """Bytes as GiB with one decimal, without the unit."""
    return UNKNOWN if count is None else f"{count / GIB:.1f}"


def gib_short(count: int | None) -> str:
    """Bytes as GiB in at most four characters, without the unit."""
    if count is None:
        return UNKNOWN
    return f"{count / GIB:.0f}" if count >= 100 * GIB else f"{count / GIB:.1f}"


def clock(seconds: float) -> str:
    """How long, as 0:07, 12:31, 3:05 h or 2 d."""
    whole = max(0, int(seconds))
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    if whole < 86400:
        return f"{whole // 3600}:{whole % 3600 // 60:02d} h"
    return f"{whole // 86400} d"


def took(seconds: float) -> str:
    """A measured time: 26 ms, 0.48 s, 12.3 s, 88 s."""
    if seconds < 0.0995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 59.95 else f"{seconds:.0f} s"


def long_time(seconds: float) -> str:
    """A sum of time: 47 s, 11 min, 2.3 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
    return gib_short(model.vram_bytes)


def ram_words(count: int | None) -> str:
    """RAM for a table cell, in GiB."""
    return NONE if count == 0 else gib_short(count)


PARTS_OF_WAKE = ("weights", "reload", "kv cache", "reset")
"""The steps of a wake from level 2; its phase `wake` is their sum."""


def phases_of(times: SwitchTimes) -> list[tuple[str, float]]:
    """The phases that happened, in order, with their seconds."""
    return [
        (name.replace("_", " "), seconds) for name, seconds in times.phases.items() if seconds is not None
    ]
