"""What the dashboard shows at one moment: the fleet's snapshot, and what only the panel knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot, Prediction
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.state.operations import Running, Trouble

COLORS = 8
"""Models that a theme tells apart by colour alone."""


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
    places: dict[str, int] = field(init=False)
    """The place of each model in the file, from 0."""
    colors: dict[str, str] = field(init=False)
    """The paint of each model."""

    @property
    def model(self) -> ModelSnapshot | None:
        """The selected model."""
        return None if self.selected is None else self.snapshot.model(self.selected)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", {model.name: at for at, model in enumerate(self.snapshot.models)})
        object.__setattr__(self, "colors", _colors(self.snapshot.models))

    @property
    def awake(self) -> tuple[ModelSnapshot, ...]:
        """The models that answer now."""
        return tuple(model for model in self.snapshot.models if model.state is State.AWAKE)

    @property
    def is_simulated(self) -> bool:
        """True if any GPU is not real."""
        return any(gpu.simulated for gpu in self.snapshot.gpus)


def _colors(models: Sequence[ModelSnapshot]) -> dict[str, str]:
    """By the place in the file; of more than COLORS, by that among those on the same GPUs.

    So neighbours on the bar of a GPU differ, as long as there are colours.
    """
    if len(models) <= COLORS:
        return {model.name: f"m{index}" for index, model in enumerate(models)}
    before: Counter[tuple[int, ...]] = Counter()
    colors = {}
    for model in models:
        colors[model.name] = f"m{(before[model.gpus] + sum(model.gpus)) % COLORS}"
        before[model.gpus] += 1
    return colors
