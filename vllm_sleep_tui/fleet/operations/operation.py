"""One operation under way: its phases timed and told, its safe points, its end on request."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterator

from vllm_sleep_tui.errors import CancelledByUser, PanelError
from vllm_sleep_tui.fleet.events import FleetEvent, Kind, Outcome
from vllm_sleep_tui.fleet.snapshot import Progress, Report, SwitchTimes
from vllm_sleep_tui.fleet.states import StartPhase
from vllm_sleep_tui.telemetry.processes import ProcessId, start_ticks

PHASES = ("drain", "sleep", "settle", "wake", "weights", "reload", "kv_cache", "reset", "prove")


def actor() -> ProcessId:
    """This process, as the one who acts."""
    return ProcessId(pid=os.getpid(), start=start_ticks(os.getpid()) or 0)


class Operation:
    """What is being done, for whom to tell, and whether to stop at the next safe point."""

    def __init__(
        self,
        name: str,
        target: str,
        report: Report | None = None,
        *,
        skip: frozenset[StartPhase] = frozenset(),
    ) -> None:
        self.name = name
        self.target = target
        self.since = time.time()
        self.skip = skip
        """Phases that its starts leave out: WARMING (with the reference of the proof), PRIMING."""
        self.times: dict[str, float] = {}
        self.emptied: set[int] = set()
        """GPUs whose KV pools have given up all since the last memory came into them."""
        self._began = time.monotonic()
        self._waited = 0.0
        self._report = report
        self._cancelled = asyncio.Event()

    def part(self, target: str) -> Operation:
        """The same operation on one of its models: a ledger of its own, cancelled together."""
        part = Operation(self.name, target, self._report, skip=self.skip)
        part._cancelled = self._cancelled
        return part

    def cancel(self) -> None:
        """Ask it to stop at its next safe point."""
        self._cancelled.set()

    @property
    def is_cancelled(self) -> bool:
        """Whether the person asked for the end."""
        return self._cancelled.is_set()

    def checkpoint(self) -> None:
        """A safe point: raises CancelledByUser if the person asked for the end."""
        if self.is_cancelled:
            raise CancelledByUser(
                f"The {self.name} of {self.target} was cancelled.", "Nothing was left half done."
            )

    async def pause(self, seconds: float) -> None:
        """Wait at a safe point; raises CancelledByUser as soon as the end is asked for."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._cancelled.wait(), seconds)
        self.checkpoint()

    def tell(self, model: str, phase: str, detail: str = "", fraction: float | None = None) -> None:
        """Say what is happening now."""
        if self._report:
            self._report(
                Progress(model=model, operation=self.name, phase=phase, detail=detail, fraction=fraction)
            )

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to the ledger."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - began

    def waited(self, seconds: float) -> None:
        """Leave out of the ledger what was spent waiting for somebody else's operation."""
        self._waited += seconds

    def ledger(self) -> SwitchTimes:
        """The phases so far, and the time since the operation began without what it waited for others."""
        return SwitchTimes(
            phases={phase: self.times.get(phase) for phase in PHASES},
            total=time.monotonic() - self._began - self._waited,
        )


def ended(operation: Operation, error: BaseException | None) -> FleetEvent:
    """That the operation has ended, well or with this error."""
    outcome, detail = Outcome.DONE, None
    if isinstance(error, CancelledByUser | asyncio.CancelledError):
        outcome = Outcome.CANCELLED
    elif error is not None:
        outcome, detail = Outcome.FAILED, error.what if isinstance(error, PanelError) else repr(error)
    return FleetEvent(
        time=time.time(),
        kind=Kind.OPERATION,
        model=operation.target,
        operation=operation.name,
        outcome=outcome,
        seconds=operation.ledger().total,
        detail=detail,
        pid=os.getpid(),
    )
