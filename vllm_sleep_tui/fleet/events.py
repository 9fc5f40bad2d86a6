"""What happened to the fleet, as it is kept in the history and told to whoever subscribes.

Every process over a config writes its events to the same history, so that a panel also hears what a verb or
another panel did. See `Fleet.events`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.units import took


class Kind(StrEnum):
    """What an event is about."""

    STATE = "state"
    """A model entered a state."""
    FAULT = "fault"
    """A model failed, or its server died; `detail` is the reason."""
    OPERATION = "operation"
    """An operation ended; `outcome` says how."""
    CONFIG = "config"
    """The config is another than before and is heeded from now on; `detail` is what changed."""


class Outcome(StrEnum):
    """How an operation ended."""

    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


class FleetEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened."""

    id: int = 0
    """Grows with each event of a state folder; 0 before it is kept."""
    time: float
    """UTC seconds."""
    kind: Kind
    model: str
    """The operation's target, where it is about an operation on several: their names with commas.

    Empty where it is about none: what the config says of no model alone.
    """
    operation: str | None = None
    """The operation that did it, or that ended; None if it came by itself."""
    state: State | None = None
    level: int | None = None
    """Of the sleep, where the model sleeps or falls asleep."""
    outcome: Outcome | None = None
    seconds: float | None = None
    """How long the operation took."""
    detail: str | None = None
    """One sentence: why it failed, for whom a model made room, or what of the config changed."""
    config: str | None = None
    """Of a changed config: the version of its files. Who else heeds that one tells it no second time."""
    pid: int | None = None
    """The process that did it; of a changed config, the first that heeded it."""

    @property
    def models(self) -> list[str]:
        """The names in `model`."""
        return self.model.split(", ") if self.model else []

    @property
    def is_failure(self) -> bool:
        """Whether somebody should hear of it: a fault, or an operation that did not work."""
        return self.kind is Kind.FAULT or self.outcome is Outcome.FAILED

    def sentence(self) -> str:
        """What happened, for a person, without its time and model."""
        if self.kind is Kind.OPERATION:
            after = f" after {took(self.seconds)}" if self.seconds is not None else ""
            return f"{self.operation} {self.outcome}{after}{f': {self.detail}' if self.detail else ''}"
        if self.kind is Kind.FAULT:
            return f"failed: {self.detail or 'no reason is known'}"
        if self.kind is Kind.CONFIG:
            by = f", by {self.operation}" if self.operation else ""
            return f"config: {self.detail}{by}"
        words = str(self.state).replace("-", " ")
        if self.level is not None:
            words += f" at level {self.level}"
        if self.operation is not None:
            words += f" by {self.operation}"
        return f"{words}, {self.detail}" if self.detail else words
