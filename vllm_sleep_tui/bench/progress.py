"""How far a run is and how long the rest will take, from what it measured so far."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

from vllm_sleep_tui.bench.plan import STEPS, Mode, PassKey
from vllm_sleep_tui.bench.results import Run, Step
from vllm_sleep_tui.units import precise, time_left


@dataclass(frozen=True, slots=True)
class Left:
    """What is still to do."""

    done: int
    """Steps done, those of refused passes included."""
    steps: int
    seconds: float
    """Expected for the steps of modes that were measured already."""
    is_all: bool
    """Whether that is every step; without it `seconds` is a lower limit."""


def left(run: Run) -> Left:
    """Steps and seconds that are left."""
    done, seconds, is_all = 0, 0.0, True
    by_key = {each.key: each for each in run.passes}
    for key in run.plan.passes:
        each = by_key.get(key)
        finished = 0 if each is None else (STEPS if each.is_done else len(each.steps))
        done += finished
        if finished < STEPS:
            typical = seconds_of_step(run, key.mode)
            is_all = is_all and typical is not None
            seconds += (STEPS - finished) * (typical or 0.0)
    return Left(done, STEPS * len(run.plan.passes), seconds, is_all)


def seconds_of_step(run: Run, mode: Mode) -> float | None:
    """The mean of a mode's steps so far; of a cold one never made, that of the initial loads."""
    measured = [step.switch + step.inference for each in run.of_mode(mode) for step in each.steps]
    if not measured and mode is Mode.COLD:
        measured = [load.seconds for load in run.loads]
    return mean(measured) if measured else None


def line(run: Run, key: PassKey, step: Step) -> str:
    """One step for a person, with the time left."""
    rest = left(run)
    first = "no text" if step.ttft is None else f"first token {precise(step.ttft)}"
    tokens = "" if step.tokens is None else f"{step.tokens} tokens in "
    at_least = "about" if rest.is_all else "at least"
    ahead = f", {at_least} {time_left(rest.seconds)} left" if rest.done < rest.steps else ""
    return (
        f"{key.mode} {key.repeat}  {step.leaving or '–'} → {step.target}  {precise(step.switch)}  {first}  "
        f"{tokens}{precise(step.inference)}  ({rest.done} of {rest.steps}{ahead})"
    )
