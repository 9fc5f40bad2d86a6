"""What the dashboard shows at one moment: the fleet's snapshot, and what only the panel knows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

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
    colors: dict[str, str] = field(init=False)
    """The paint of each model."""
    shapes: dict[str, int] = field(init=False)
    """How many models before it in the file have its paint: they need another shape beside it."""

    @property
    def model(self) -> ModelSnapshot | None:
        """The selected model."""
        return None if self.selected is None else self.snapshot.model(self.selected)

    def __post_init__(self) -> None:
        models = self.snapshot.models
        looks = list(zip(models, _looks(tuple(model.gpus for model in models)), strict=True))
        object.__setattr__(self, "colors", {model.name: f"m{color}" for model, (color, _) in looks})
        object.__setattr__(self, "shapes", {model.name: shape for model, (_, shape) in looks})

    @property
    def awake(self) -> tuple[ModelSnapshot, ...]:
        """The models that answer now."""
        return tuple(model for model in self.snapshot.models if model.state is State.AWAKE)

    @property
    def is_simulated(self) -> bool:
        """True if any GPU is not real."""
        return any(gpu.simulated for gpu in self.snapshot.gpus)


@lru_cache(maxsize=4)
def _looks(gpus: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, int], ...]:
    """Colour and shape of each model, in the order of the file, by its GPUs; no two have both in common.

    A model gets the colour that the fewest on its GPUs have, of those the one that the fewest have at all: so
    neighbours on a bar differ as long as there are colours, and COLORS models differ wherever they are.
    """
    near: Counter[tuple[int, int]] = Counter()
    all_of: Counter[int] = Counter()
    looks = []
    for mine in gpus:
        taken = [(sum(near[gpu, color] for gpu in mine), all_of[color]) for color in range(COLORS)]
        color = taken.index(min(taken))
        looks.append((color, all_of[color]))
        near.update((gpu, color) for gpu in mine)
        all_of[color] += 1
    return tuple(looks)
