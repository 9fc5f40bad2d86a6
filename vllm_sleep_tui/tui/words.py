"""States, commands and what is measured, as short text; how numbers are written is in `units`."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vllm_sleep_tui.fleet.snapshot import Prediction, SwitchTimes
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.units import NONE, gib_cell, start_time, took


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


DOING = {
    "switch": "switching to {}",
    "sleep": "putting {} to sleep",
    "wake": "waking {}",
    "start": "starting {}",
    "stop": "stopping {}",
    "restart": "restarting {}",
}
"""An operation under way, for a person, `{}` for the model; whoever began it."""


GLOSSARY: tuple[tuple[str, str], ...] = (
    (
        "L0",
        "Asleep, its weights in VRAM: only the KV cache is given up. The fastest wake",
    ),
    ("L1", "Asleep, its weights in RAM (pinned, so that the GPU copies them at full speed)"),
    ("L2", "Asleep, its weights on disk: no RAM held, and the slowest wake"),
    ("pinned", "RAM that cannot be swapped; vLLM keeps the copies of level 1 there"),
    ("drain", "New questions wait, and answers under way are finished"),
    ("settle", "The memory of the sleeper is seen gone before the other one wakes"),
    ("prove", "The first token after a wake, compared with what it was when the model started"),
    ("KV", "The memory of what was read and written so far; a sleep empties it"),
    ("TTFT", "Time to the first token of an answer"),
)
"""The words of the screen that not everybody knows, for the help."""


def state_words(state: State, level: int | None) -> str:
    """The state with its level: `asleep L1`."""
    word = LOOKS[state].word
    if level is not None and state in {State.ASLEEP, State.FALLING_ASLEEP}:
        return f"{word} L{level}"
    return word


def expected_time(prediction: Prediction) -> str | None:
    """How long what is predicted takes; None if a part of it was never timed here."""
    if prediction.seconds is None:
        return None
    return (start_time if prediction.action == "start" else took)(prediction.seconds)


def memory_words(size: int | None) -> str:
    """Bytes for a table cell, in GiB; what is not there is NONE."""
    return NONE if size == 0 else gib_cell(size)


def short_command(command: str) -> str:
    """A command without the folders of its program and its scripts, which say little and take much room."""
    program, *rest = command.split(" ")
    names = [Path(word).name if word.startswith("/") and word.endswith(".py") else word for word in rest]
    return " ".join([Path(program).name, *names]) if program else command


PARTS_OF_WAKE = ("weights", "reload", "kv cache", "reset")
"""The steps of a wake from level 2; its phase `wake` is their sum."""


def phases_of(times: SwitchTimes) -> list[tuple[str, float]]:
    """The phases that happened, in order, with their seconds."""
    return [
        (name.replace("_", " "), seconds) for name, seconds in times.phases.items() if seconds is not None
    ]
