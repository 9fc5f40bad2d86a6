"""Does sleeping pay? What it costs once, what each switch saves, and what that makes in a day."""

from __future__ import annotations

from math import ceil
from statistics import mean, median

import msgspec

from vllm_sleep_tui.bench import figures
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run
from vllm_sleep_tui.units import precise, time_left

ONCE = ("warming", "priming", figures.FIRST_ANSWER)
"""Phases of an initial load that only sleeping asks for."""


class Pays(msgspec.Struct, frozen=True, kw_only=True):
    """One sleep level against stop and start; seconds, the mean of both directions."""

    mode: Mode
    cold: float
    is_estimate: bool
    """Whether `cold` is taken from the initial loads, as no cold pass was made."""
    sleeping: float
    once: float
    """Warm-up and priming of both models."""

    @property
    def saved(self) -> float:
        """By one switch."""
        return self.cold - self.sleeping

    @property
    def pays_after(self) -> int | None:
        """The switch by which `once` is earned back; None if it never is."""
        return max(1, ceil(self.once / self.saved)) if self.saved > 0 else None

    def sentence(self, switches_per_day: float) -> str:
        """All of it for a person."""
        about = "about " if self.is_estimate else ""
        way = (
            f"{self.mode.words.capitalize()}: a switch takes {precise(self.sleeping)}, stop and start {about}"
        )
        if self.pays_after is None:
            return f"{way}{precise(self.cold)}: sleeping does not pay here."
        return (
            f"{way}{precise(self.cold)}: each switch saves {precise(self.saved)}. Warm-up and priming "
            f"cost {precise(self.once)} once, earned back by switch {self.pays_after}. "
            f"At {switches_per_day:g} switches a day that is "
            f"{time_left(self.saved * switches_per_day)} a day."
        )


def pays(run: Run) -> tuple[Pays, ...]:
    """Each sleep level that was measured, against cold; nothing where either is unknown."""
    measured = switch_time(run, Mode.COLD)
    cold = measured if measured is not None else cold_from_loads(run)
    if cold is None:
        return ()
    once = sum(phases_of_loads(run, name, only=ONCE) or 0.0 for name in run.plan.pair)
    return tuple(
        Pays(mode=mode, cold=cold, is_estimate=measured is None, sleeping=sleeping, once=once)
        for mode in (Mode.LEVEL1, Mode.LEVEL2)
        if (sleeping := switch_time(run, mode)) is not None
    )


def switch_time(run: Run, mode: Mode) -> float | None:
    """The median switch to each model, averaged; None unless both directions were measured."""
    spreads = [figures.spread(figures.switches(run, mode, name)) for name in run.plan.pair]
    medians = [each.median for each in spreads if each is not None]
    return mean(medians) if len(medians) == len(spreads) else None


def cold_from_loads(run: Run) -> float | None:
    """A cold start as the initial loads had it, without what only sleeping asks for."""
    sums = [phases_of_loads(run, name, without=ONCE) for name in run.plan.pair]
    complete = [each for each in sums if each is not None]
    return mean(complete) if len(complete) == len(sums) else None


def phases_of_loads(
    run: Run, name: str, *, only: tuple[str, ...] | None = None, without: tuple[str, ...] = ()
) -> float | None:
    """The median over a model's initial loads of some of their phases together; None without a load."""
    sums = [
        sum(
            spent
            for phase, spent in load.phases.items()
            if phase not in without and (only is None or phase in only)
        )
        for load in run.loads
        if load.model == name
    ]
    return median(sums) if sums else None
