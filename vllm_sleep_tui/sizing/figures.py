"""The figures that advice is reckoned from: what models take and what a machine has to share."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from vllm_sleep_tui.sizing import budget
from vllm_sleep_tui.sizing.estimate import ACTIVATIONS
from vllm_sleep_tui.sizing.footprints import AWAKE_OVERHEAD
from vllm_sleep_tui.units import GIB

PRIVATE_BYTES = int(3.1 * GIB)
"""RAM of a server beside its pinned pool: 2.0 GiB its engine, 1.1 its API server (H100, vLLM 0.24)."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """What one model takes, in bytes and seconds; None is not known."""

    name: str
    gpus: tuple[int, ...]
    configured: str
    """The config's `level`."""
    is_attached: bool = False
    """Somebody else's server (`url:`)."""
    awake: Mapping[int, int]
    """VRAM by GPU index; empty if not known."""
    asleep: Mapping[int, int]
    weights: int | None = None
    """On the fullest GPU."""
    context: int | None = None
    """KV cache of one context of full length, on each GPU."""
    pinned: int | None = None
    start: float | None = None
    wake1: float | None = None
    wake2: float | None = None
    estimated: frozenset[str] = frozenset()
    """Which of `memory`, `pinned`, `start`, `wake1` and `wake2` are estimates."""
    no_level2: str | None = None
    """Why level 2 would lose something, in words."""
    per_day: float | None = None
    """Switches to it a day, once a week of them is known."""
    resident: int | None = None
    """VRAM on each GPU that its weights take if they stay there while it sleeps; None: they may not."""
    stay: tuple[str, ...] = ()
    """Whose weights have room in VRAM while it is awake."""
    kv_cache: int | None = None
    """What its next start leaves for its KV cache on each GPU."""
    kv_per_token: int | None = None
    """Bytes of it on each GPU."""
    kv_note: str | None = None
    """Why the config's `kv_cache` is not what it gets, in words."""
    wake0: float | None = None
    """Measured, from level 0."""
    unreadable: str | None = None
    """Why its files are no checkpoint, in a sentence, of a model that has not run here."""

    @property
    def fixed(self) -> int | None:
        """VRAM that it takes awake on a GPU without any KV cache; None if the weights are not known."""
        return None if self.weights is None else self.weights + ACTIVATIONS + AWAKE_OVERHEAD


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What there is to share, in bytes."""

    totals: Mapping[int, int]
    """VRAM by GPU index."""
    others: Mapping[int, int]
    """VRAM by GPU index that processes hold which are none of ours."""
    ram: int | None
    """RAM that level 1 may pin for all models together, with every server running; None if not known."""

    def room(self, gpu: int) -> int:
        """VRAM of a GPU that our models may take, with a margin left over."""
        return self.totals[gpu] - self.others.get(gpu, 0) - budget.MARGIN
