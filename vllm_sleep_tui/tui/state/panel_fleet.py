"""What the panel asks of the fleet: as little as it needs, so that its tests can script one."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.pictures import Picture
from vllm_sleep_tui.fleet.server_log import ServerLog
from vllm_sleep_tui.fleet.snapshot import (
    ChatEvent,
    FleetSnapshot,
    HeldProcess,
    Prediction,
    Report,
    SwitchTimes,
)

if TYPE_CHECKING:  # reading checkpoints is slow to import, and seldom looked at
    from vllm_sleep_tui.config.changes import Change
    from vllm_sleep_tui.config.load import LoadedConfig
    from vllm_sleep_tui.fleet.advice import Advice


class PanelFleet(Protocol):
    """What the panel asks of the fleet; `fleet.Fleet` is one."""

    loaded: LoadedConfig
    state_dir: Path

    def reload(self, loaded: LoadedConfig) -> list[Change]:
        """Go on with a changed config file; what differs."""
        ...

    async def apply(self, text: str) -> None:
        """Write this text to the config file and go on with it."""
        ...

    async def advice(self) -> Advice:
        """What to do with each model and GPU."""
        ...

    def snapshot(self) -> FleetSnapshot:
        """What is known now; cheap."""
        ...

    def look_less(self, less: bool) -> None:
        """Whether figures may be taken half as often: nobody is at the keys."""
        ...

    def predict(self, name: str) -> Prediction:
        """What switching to a model would do; cheap."""
        ...

    def waits(self, name: str) -> str | None:
        """What an operation on a model would wait for now, in words; cheap."""
        ...

    async def processes(self) -> tuple[HeldProcess, ...]:
        """The processes of our servers, and all others that hold VRAM."""
        ...

    def events(self, after: int | None = None) -> AsyncGenerator[FleetEvent, None]:
        """What happens from this call on, here and in other processes; without an end."""
        ...

    async def past(self, window: float) -> Past:
        """What the history says about the last `window` seconds, and about today."""
        ...

    async def recent_events(self, count: int, *, only_failures: bool = False) -> Sequence[FleetEvent]:
        """The last events, the oldest first."""
        ...

    def log(self, name: str) -> ServerLog:
        """What the model's servers said."""
        ...

    async def log_at(self, name: str, event: FleetEvent) -> ServerLog:
        """As `log`, below what the server of an event said, if another was started since."""
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

    async def check_sees(self, name: str, pictures: Sequence[Picture]) -> None:
        """Raise RefusedError if the model is known to take no pictures."""
        ...
