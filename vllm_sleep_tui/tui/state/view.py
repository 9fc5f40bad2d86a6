"""What the dashboard shows at one moment: the fleet's snapshot, and what only the panel knows."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_sleep_tui.fleet.observe.processes import HeldProcess
from vllm_sleep_tui.fleet.snapshot import (
    ChatEvent,
    FleetSnapshot,
    ModelSnapshot,
    Prediction,
    Progress,
    SwitchTimes,
)
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.history import History
from vllm_sleep_tui.fleet.store.locks import Holder
from vllm_sleep_tui.tui.state.past import Past

if TYPE_CHECKING:
    from vllm_sleep_tui.config.load import LoadedConfig
    from vllm_sleep_tui.sizing.advice import Advice

Report = Callable[[Progress], None]
TROUBLE_SECONDS = 30.0
"""So long a refusal stands on the screen; after it, it tells of a past that may be another one by now."""


class PanelFleet(Protocol):
    """What the panel asks of the fleet; `fleet.Fleet` is one."""

    loaded: LoadedConfig
    state_dir: Path

    def reload(self, loaded: LoadedConfig) -> None:
        """Go on with a changed config file."""
        ...

    async def advice(self) -> Advice:
        """What to do with each model and GPU."""
        ...

    def snapshot(self) -> FleetSnapshot:
        """What is known now; cheap."""
        ...

    def predict(self, name: str) -> Prediction:
        """What switching to a model would do; cheap."""
        ...

    def waits(self, name: str) -> Holder | None:
        """Whom an operation on a model would have to wait for now; cheap."""
        ...

    async def processes(self) -> tuple[HeldProcess, ...]:
        """The processes of our servers, and all others that hold VRAM."""
        ...

    @property
    def history(self) -> History:
        """The past; its questions are asked in a thread."""
        ...

    def log_path(self, name: str) -> Path:
        """The model's log file, which need not exist yet."""
        ...

    async def seen(self, name: str) -> None:
        """The person has looked at why the model's last server died."""
        ...

    async def start(self, names: Sequence[str], *, report: Report | None = None) -> object:
        """Start models."""
        ...

    async def stop(
        self, names: Sequence[str], *, force: bool = False, report: Report | None = None
    ) -> object:
        """Stop models."""
        ...

    async def restart(
        self, names: Sequence[str], *, force: bool = False, report: Report | None = None
    ) -> object:
        """Stop and start models."""
        ...

    async def sleep(
        self, name: str, *, level: int | None = None, force: bool = False, report: Report | None = None
    ) -> object:
        """Put a model to sleep."""
        ...

    async def wake(self, name: str, *, report: Report | None = None) -> object:
        """Wake a model."""
        ...

    async def switch(self, name: str, *, force: bool = False, report: Report | None = None) -> SwitchTimes:
        """Make a model the one that is awake."""
        ...

    def chat(
        self,
        name: str,
        messages: list[dict[str, Any]],
        *,
        params: dict[str, Any] | None = None,
        report: Report | None = None,
    ) -> AsyncIterator[ChatEvent]:
        """Stream an answer, after a switch if the model is asleep."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An operation that this panel started and that is under way."""

    model: str
    verb: str
    """What is being done, for a person: switching to, putting to sleep …"""
    since: float
    """UTC seconds."""
    progress: Progress | None = None
    cancelled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A refusal or a failure of an operation of this panel; it stays until the next one on that model.

    It is over before that once the model has moved on, whoever moved it, or after TROUBLE_SECONDS: a failure
    of the model itself is in its record.
    """

    verb: str
    what: str
    cure: str
    at: float
    """UTC seconds of its end."""

    def stands(self, model: ModelSnapshot, now: float) -> bool:
        """Whether it still tells how things are; `now` in UTC seconds."""
        return now < self.at + TROUBLE_SECONDS and (model.since is None or model.since <= self.at)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One moment of the dashboard."""

    snapshot: FleetSnapshot
    selected: str | None = None
    prediction: Prediction | None = None
    waits: Holder | None = None
    """Whom `enter` would wait for."""
    past: Past = field(default_factory=Past)
    bench: str = ""
    """How far the panel's benchmark is; empty while none runs."""
    running: Mapping[str, Running] = field(default_factory=dict)
    troubles: Mapping[str, Trouble] = field(default_factory=dict)

    @property
    def model(self) -> ModelSnapshot | None:
        """The selected model."""
        return None if self.selected is None else self.snapshot.model(self.selected)

    @property
    def colors(self) -> dict[str, str]:
        """The paint of each model, by its place in the file."""
        return {model.name: f"m{index}" for index, model in enumerate(self.snapshot.models)}

    @property
    def awake(self) -> tuple[ModelSnapshot, ...]:
        """The models that answer now."""
        return tuple(model for model in self.snapshot.models if model.state is State.AWAKE)

    @property
    def is_simulated(self) -> bool:
        """True if any GPU is not real."""
        return any(gpu.simulated for gpu in self.snapshot.gpus)
