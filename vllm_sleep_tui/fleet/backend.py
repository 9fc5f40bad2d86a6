"""What a model's server must be able to do for the fleet, whatever kind it is.

A kind of server is one class that does this, with a line in `backend_of`, and how it is observed without
importing what operates it, with a line in `observe` (`observe/snapshotter.py`).
`operations/supervised.py` starts vLLM itself and keeps it; `attached/backend.py` talks to a vLLM that
somebody else started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from vllm_sleep_tui.fleet.attached.backend import Attached
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.operations.room import GpuMemory
from vllm_sleep_tui.fleet.operations.supervised import Supervised
from vllm_sleep_tui.fleet.snapshot import Prediction, Serving, SwitchTimes, Way
from vllm_sleep_tui.fleet.states import State

if TYPE_CHECKING:  # verbs that ask no server do without it
    from vllm_sleep_tui.engine.client import VllmClient


class Backend(Protocol):
    """The server of one model; operations raise PanelError with what is wrong and what to do."""

    def predict(self, memory: Mapping[int, GpuMemory], serving: Mapping[str, Serving]) -> Prediction:
        """What `switch` would do with the GPUs' memory as it is and what is being served."""

    # ── asked ────────────────────────────────────────────────────────────────────────────────────────────

    async def state(self) -> State:
        """The state as it is, whoever has written down what; raises RefusedError if it does not answer."""

    async def endpoint(self) -> tuple[VllmClient, str]:
        """Whom to ask, and by which name; raises OperationError if it does not tell."""

    async def way(self) -> Way:
        """How clients' requests get there; raises PanelError while it does not run."""

    # ── operated ─────────────────────────────────────────────────────────────────────────────────────────

    async def switch(self, operation: Operation, *, force: bool = False) -> SwitchTimes:
        """Make the model awake, from wherever it is."""

    async def wake(self, operation: Operation) -> None:
        """Wake a sleeper; refused if it does not run."""

    async def sleep(self, level: int | None, operation: Operation, *, force: bool = False) -> None:
        """Put it to sleep at `level`, or its own; done if it sleeps so."""

    def check_startable(self) -> None:
        """Raises UsageError or RefusedError if it cannot be started from here as the config has it."""

    async def start(self, operation: Operation) -> None:
        """Start it; done if it runs, awake or asleep."""

    def check_stoppable(self) -> None:
        """Raises RefusedError if it is not ours to stop."""

    async def stop(self, operation: Operation, *, force: bool) -> None:
        """Stop it; done if it is stopped."""


def backend_of(model: Model) -> Backend:
    """The server of a model, by its config."""
    return Attached(model) if model.config.is_attached else Supervised(model)
