"""What must sleep so that a model fits: arithmetic over measured numbers, no I/O.

Several models stay awake together where they fit. Who is asked to sleep first: the longest idle, among those
that hold memory on a GPU that is short of it; nobody more than is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec

from vllm_sleep_tui.sizing.budget import MARGIN


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """An awake model that could make room."""

    name: str
    awake: Mapping[int, int]
    """VRAM it holds now, bytes by GPU index."""
    asleep: Mapping[int, int]
    """VRAM it would keep, bytes by GPU index."""
    idle_since: float
    """UTC seconds of its last request, or of its wake."""
    answering: bool = False
    stops: bool = False
    """It cannot sleep (`level: none`): it is stopped and gives back everything."""
    resident: Mapping[int, int] | None = None
    """VRAM it would keep with its weights left there, bytes by GPU index; None if they are not to stay."""
    sleeps_already: bool = False
    """It sleeps at level 0 and would give up its weights as well; whoever is awake goes first."""

    def weights(self, gpu: int) -> int:
        """Bytes that stay on a GPU with its weights, beside what it keeps in any case."""
        return max(0, (self.resident or {}).get(gpu, 0) - self.asleep.get(gpu, 0))

    def gives(self, gpu: int) -> int:
        """Bytes that its sleep frees on a GPU."""
        kept = 0 if self.stops else self.asleep.get(gpu, 0)
        return max(0, self.awake.get(gpu, 0) - kept)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The plan: who makes room, and what is free then."""

    sleeps: tuple[str, ...]
    stops: tuple[str, ...]
    keeps: frozenset[str] = frozenset()
    """Of those who sleep, whose weights have room beside the target: they stay in VRAM."""
    gives_way: frozenset[str] = frozenset()
    """Of those who sleep, whose weights leave VRAM for those that stay; the target would fit without."""
    free: Mapping[int, int]
    """Bytes free by GPU index once they sleep."""
    missing: Mapping[int, int]
    """Bytes still missing by GPU index; empty if the target fits."""

    @property
    def fits(self) -> bool:
        """Whether the target fits after the plan."""
        return not self.missing

    @property
    def leaving(self) -> tuple[str, ...]:
        """Everybody who makes room, in order."""
        return (*self.sleeps, *self.stops)


def make_room(
    need: Mapping[int, int], free: Mapping[int, int | None], neighbours: Sequence[Neighbour]
) -> Room:
    """Choose who sleeps so that `need` bytes by GPU index are free, with a margin.

    A GPU whose free memory is not known (None) counts as full of its neighbours: all of them make room.
    """
    shortage = {gpu: bytes_ + MARGIN - (free.get(gpu) or 0) for gpu, bytes_ in need.items()}
    blind = {gpu for gpu in need if free.get(gpu) is None}
    chosen: list[Neighbour] = []
    for neighbour in sorted(neighbours, key=lambda n: (n.sleeps_already, n.answering, n.idle_since, n.name)):
        holds = {gpu for gpu in need if neighbour.gives(gpu) > 0}
        if any(shortage[gpu] > 0 or gpu in blind for gpu in holds) or (
            blind & set(neighbour.awake) & set(need)
        ):
            chosen.append(neighbour)
            for gpu in holds:
                shortage[gpu] -= neighbour.gives(gpu)
    chosen = spare(chosen, shortage, blind)
    return conclude(need, free, chosen, blind, neighbours)


def spare(chosen: list[Neighbour], shortage: dict[int, int], blind: Iterable[int]) -> list[Neighbour]:
    """Leave awake whoever turned out not to be needed, the most recently used first."""
    kept = list(chosen)
    for neighbour in reversed(chosen):
        gives = {gpu: neighbour.gives(gpu) for gpu in shortage}
        if set(blind) & set(neighbour.awake):
            continue
        if all(shortage[gpu] + gives[gpu] <= 0 or gives[gpu] == 0 for gpu in shortage):
            kept.remove(neighbour)
            for gpu in shortage:
                shortage[gpu] += gives[gpu]
    return kept


def keep_weights(
    need: Mapping[int, int],
    free: Mapping[int, int | None],
    chosen: Sequence[Neighbour],
    others: Sequence[Neighbour],
) -> tuple[list[Neighbour], list[Neighbour]]:
    """Of those who sleep, whose weights have room beside the target; and whose give way for that.

    The most recently used keep theirs, also before the `others` that sleep with theirs already.
    """
    resting = [other for other in others if other.sleeps_already and other.resident is not None]
    spare = {
        gpu: (free[gpu] or 0) + sum(n.gives(gpu) for n in (*chosen, *resting)) - size - MARGIN
        for gpu, size in need.items()
    }
    falling = [n for n in chosen if n.resident is not None and not n.stops and not n.sleeps_already]
    kept = []
    for neighbour in sorted((*falling, *resting), key=lambda n: -n.idle_since):
        if all(neighbour.weights(gpu) <= spare[gpu] for gpu in need):
            kept.append(neighbour)
            spare = {gpu: size - neighbour.weights(gpu) for gpu, size in spare.items()}
    kept_falling = [n for n in falling if n in kept]
    return kept_falling, [n for n in resting if n not in kept] if kept_falling else []


def conclude(
    need: Mapping[int, int],
    free: Mapping[int, int | None],
    chosen: Sequence[Neighbour],
    blind: Iterable[int],
    neighbours: Sequence[Neighbour],
) -> Room:
    """What is free, and what is still missing, once everybody chosen has made room."""
    after = {gpu: (free.get(gpu) or 0) + sum(n.gives(gpu) for n in chosen) for gpu in need}
    keeps: list[Neighbour] = []
    gives_way: list[Neighbour] = []
    if not set(blind):
        keeps, gives_way = keep_weights(need, free, chosen, [n for n in neighbours if n not in chosen])
    for gpu in after:
        after[gpu] += sum(n.gives(gpu) for n in gives_way) - sum(n.weights(gpu) for n in keeps)
    missing = {
        gpu: need[gpu] + MARGIN - after[gpu]
        for gpu in need
        if gpu not in set(blind) and need[gpu] + MARGIN > after[gpu]
    }
    return Room(
        sleeps=tuple(n.name for n in (*gives_way, *chosen) if not n.stops),
        stops=tuple(n.name for n in chosen if n.stops),
        keeps=frozenset(n.name for n in keeps),
        gives_way=frozenset(n.name for n in gives_way),
        free=after,
        missing=missing,
    )
