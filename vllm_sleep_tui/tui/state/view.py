"""What the dashboard shows at one moment: the fleet's snapshot, and what only the panel knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot, Prediction
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.state.operations import Running, Trouble


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One moment of the dashboard."""

    snapshot: FleetSnapshot
    selected: str | None = None
    prediction: Prediction | None = None
    waits: str | None = None
    """What `enter` would wait for, in words."""
    past: Past = field(default_factory=Past)
    tokens: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Generated tokens per second of each model that served lately, the last few seconds, the latest last."""
    waiting: int = 0
    """Requests that wait in this panel's gateway."""
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
