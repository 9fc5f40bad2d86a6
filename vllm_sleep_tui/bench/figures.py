"""From a run's raw samples to the figures people compare: medians with lowest and highest, never alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

import msgspec

from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run, Step

IN_ORDER = (
    *("stop", "drain", "sleep", "settle", "wake", "weights", "reload", "kv_cache", "reset", "prove"),
    *("fetching", "loading", "compiling", "capturing", "opening", "warming"),
)
"""The phases of a switch as they follow each other."""

FIRST_ANSWER = "first answer"
"""The phase of an initial load that is the warm-up's whole inference."""


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """Some measurements of one thing."""

    count: int
    median: float
    low: float
    high: float


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured in one mode of the switches to one model; seconds."""

    mode: Mode
    target: str
    switch: Spread | None
    ttft: Spread | None
    inference: Spread | None
    tokens: Spread | None


class Total(msgspec.Struct, frozen=True, kw_only=True):
    """The passes of one mode as a whole; seconds."""

    mode: Mode
    protocol: Spread | None
    """Six times awake, six inferences."""
    initial_load: float | None
    """Of both models, once; a cold pass has none, as its first step is a start."""
    refused: str | None = None

    @property
    def whole(self) -> float | None:
        """The initial load and one pass, as the post adds them up."""
        return None if self.protocol is None else self.protocol.median + (self.initial_load or 0.0)


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """All figures of a run."""

    rows: tuple[Row, ...]
    totals: tuple[Total, ...]
    loads: dict[str, Spread]
    """By model: initial loads for the passes that sleep."""


def spread(values: Iterable[float | None]) -> Spread | None:
    """Median, lowest and highest of the known ones; None without any."""
    ranked = sorted(value for value in values if value is not None)
    if not ranked:
        return None
    return Spread(count=len(ranked), median=median(ranked), low=ranked[0], high=ranked[-1])


def steps(run: Run, mode: Mode, target: str) -> list[Step]:
    """Every step of a mode that ended with this model awake."""
    return [step for each in run.of_mode(mode) for step in each.steps if step.target == target]


def switches(run: Run, mode: Mode, target: str) -> list[float]:
    """Seconds of the switches to a model: steps that had another to put to sleep or to stop."""
    return [step.switch for step in steps(run, mode, target) if step.leaving is not None]


def modes(run: Run) -> list[Mode]:
    """The modes that the run has anything of, in their usual order."""
    return [mode for mode in Mode if any(each.steps or each.refused for each in run.of_mode(mode))]


def summary(run: Run) -> Summary:
    """Everything that reports and comparisons show."""
    return Summary(
        rows=tuple(row(run, mode, name) for mode in modes(run) for name in run.plan.pair),
        totals=tuple(total(run, mode) for mode in modes(run)),
        loads={name: of_model for name in run.plan.pair if (of_model := spread(loads(run, name)))},
    )


def row(run: Run, mode: Mode, target: str) -> Row:
    """The figures of the switches to one model."""
    made = steps(run, mode, target)

    def of(value: Callable[[Step], float | None]) -> Spread | None:
        return spread(value(step) for step in made)

    return Row(
        mode=mode,
        target=target,
        switch=spread(switches(run, mode, target)),
        ttft=of(lambda step: step.ttft),
        inference=of(lambda step: step.inference),
        tokens=of(lambda step: step.tokens),
    )


def total(run: Run, mode: Mode) -> Total:
    """The passes of one mode as a whole."""
    passes = run.of_mode(mode)
    load = None
    if mode.level is not None and all(loads(run, name) for name in run.plan.pair):
        load = sum(median(loads(run, name)) for name in run.plan.pair)
    return Total(
        mode=mode,
        protocol=spread(each.total for each in passes),
        initial_load=load,
        refused=next((each.refused for each in passes if each.refused), None),
    )


def loads(run: Run, name: str) -> list[float]:
    """Seconds of a model's initial loads."""
    return [load.seconds for load in run.loads if load.model == name]


def first_answers(run: Run) -> dict[str, float]:
    """Seconds of each model's first answer: its warm-up, or without one the first of all passes."""
    answers: dict[str, float] = {}
    for load in reversed(run.loads):
        made = [step for mode in modes(run) if mode.level for step in steps(run, mode, load.model)]
        later = sorted((step for step in made if step.began > load.began), key=lambda step: step.began)
        if FIRST_ANSWER in load.phases:
            answers[load.model] = load.phases[FIRST_ANSWER]
        elif later:
            answers[load.model] = later[0].inference
    return {name: answers[name] for name in run.plan.pair if name in answers}


def phases(run: Run, mode: Mode, target: str) -> dict[str, float]:
    """The median of each phase of the switches to a model, in the order in which they come."""
    made = [step.phases for step in steps(run, mode, target) if step.leaving is not None]
    names = {name for each in made for name in each}
    if {"weights", "reload", "kv_cache"} & names:
        names.discard("wake")  # the whole of which these are the parts
    return {name: median(each[name] for each in made if name in each) for name in IN_ORDER if name in names}
