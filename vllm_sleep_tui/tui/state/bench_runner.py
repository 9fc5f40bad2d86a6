"""The benchmark of this panel: it runs on while other screens are in front."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import cast

from vllm_sleep_tui.bench import run as experiment
from vllm_sleep_tui.bench.plan import PassKey, Plan
from vllm_sleep_tui.bench.progress import left
from vllm_sleep_tui.bench.results import Run, Step, folder, new_file, read
from vllm_sleep_tui.errors import PanelError, UsageError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Progress
from vllm_sleep_tui.tui.state.operations import Operations, expected
from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet
from vllm_sleep_tui.units import time_left

Ended = Callable[[PanelError | None], None]


class BenchRunner:
    """At most one run at a time, its measurements so far, and how it ended."""

    def __init__(self, fleet: PanelFleet, operations: Operations) -> None:
        self._fleet = fleet
        self._operations = operations
        self._task: asyncio.Task[None] | None = None
        self.run: Run | None = None
        """All that the last run measured so far."""
        self.progress: Progress | None = None
        self.is_cancelled = False

    @property
    def is_running(self) -> bool:
        """Whether a run is under way."""
        return self._task is not None

    @property
    def folder(self) -> Path:
        """Where results are kept."""
        return folder(self._fleet.state_dir)

    def start(self, plan: Plan, ended: Ended, resume: Path | None = None) -> None:
        """Run the plan, or go on with a result; `ended` is told why it did not come to its end."""
        self.progress, self.is_cancelled = None, False
        self._task = self._operations.spawn(self._measure(plan, ended, resume))
        # Not in the task itself: one that is cancelled before its first step never runs a line.
        self._task.add_done_callback(self._forget)

    def cancel(self) -> bool:
        """Ask the run to stop at its next safe point; False if there is none or it was asked already."""
        if self._task is None or self.is_cancelled:
            return False
        self.is_cancelled = True
        self._task.cancel()
        return True

    def words(self) -> str:
        """How far it is: `bench 12 of 36, about 3 min left`; empty while nothing runs."""
        if not self.is_running:
            return ""
        if self.is_cancelled:
            return "bench stops"
        if self.run is None:
            return "bench begins"
        rest = left(self.run)
        more = f", {'about' if rest.is_all else 'at least'} {time_left(rest.seconds)} left"
        return f"bench {rest.done} of {rest.steps}{more if rest.seconds else ''}"

    def _forget(self, _: asyncio.Task[None]) -> None:
        self._task = None

    async def _measure(self, plan: Plan, ended: Ended, resume: Path | None) -> None:
        error: PanelError | None = None
        try:
            before = None if resume is None else read(resume)
            self.run = before
            out = resume or new_file(self._fleet.state_dir, plan)
            # A benchmark stops and starts servers of its own, for which it needs the fleet itself.
            fleet = cast("Fleet", self._fleet)
            self.run = await experiment.run(
                fleet, plan, self._sample, out=out, resume=before, report=self._report
            )
        except (Exception, asyncio.CancelledError) as raised:
            error = expected(raised)
        self._task = None
        ended(error)

    def _sample(self, run: Run, _key: PassKey, _step: Step) -> None:
        self.run = run

    def _report(self, progress: Progress) -> None:
        self.progress = progress


def past_runs(place: Path) -> list[tuple[Path, Run]]:
    """The results in a folder, the newest first; what cannot be read is left out (blocks for ms)."""
    runs = []
    for path in sorted(place.glob("*.json"), reverse=True):
        try:
            runs.append((path, read(path)))
        except UsageError:
            continue
    return runs
