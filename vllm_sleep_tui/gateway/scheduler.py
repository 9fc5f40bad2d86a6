"""Whose turn it is: which requests run now, and which model is to be switched to. Without a clock or I/O.

Requests for an awake model run at once. Those for others wait together, by model, and a switch serves all of
them. Who is awake is left for them when it is idle and nobody is likely to come back to it sooner than the
switches would take; when it is busy, after a turn that is measured by the cost of the switch. Nobody waits
longer than `max_wait` while new requests of others run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

TURN_COSTS = 10.0
"""A busy model's turn, in costs of the switch that ends it: so at most a tenth of the time is switching."""
LONGEST_TURN = 30.0
PATIENCE = 2.0
LONGEST_STAY = 1.0
"""Seconds of `min_awake` where the config leaves it to the cost."""
GAP_MARGIN = 1.5
"""How much later than usual a client may come back and still be waited for."""
GAP_WEIGHT = 0.3
"""Of the latest pause in the running mean of pauses."""
UNKNOWN_COST = 5.0
"""Seconds of a switch that was never measured."""
GRAIN = 1e-6
"""Seconds; a limit that is looked at so shortly before has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the person has set, in seconds."""

    max_wait: float | None = None
    """None: LONGEST_TURN, or PATIENCE times what the switch costs if that is longer."""
    min_awake: float | None = None


@dataclass(slots=True)
class Lane:
    """One model: who waits for it, who is answered by it, and what it takes to have it awake."""

    name: str
    gpus: frozenset[int] = frozenset()
    is_awake: bool = False
    cost: float = UNKNOWN_COST
    """Seconds to make it awake."""
    leaves: frozenset[str] = frozenset()
    """The models that have to leave for it."""
    not_before: float = 0.0
    """After a failure: no switch to it until then."""
    waiting: dict[Hashable, float] = field(default_factory=dict)
    """When each arrived, the first one first."""
    running: dict[Hashable, float] = field(default_factory=dict)
    since: float = float("-inf")
    ended: float = float("-inf")
    """When its last answer ended."""
    gap: float | None = None
    """The usual pause until its next request."""
    is_moving: bool = False
    """A switch to it is under way."""

    @property
    def is_busy(self) -> bool:
        """Whether anybody is answered, or is about to be."""
        return bool(self.running or self.waiting)

    def waits(self, now: float) -> float:
        """How long the first one has waited."""
        return now - next(iter(self.waiting.values()), now)


@dataclass(frozen=True, slots=True)
class Switch:
    """Make `name` awake; `leaves` answer nobody now and are held back meanwhile."""

    name: str
    leaves: frozenset[str]


@dataclass(slots=True)
class Decision:
    """What to do now, and when to ask again if nothing happens."""

    run: list[Hashable] = field(default_factory=list)
    switch: list[Switch] = field(default_factory=list)
    look_at: float | None = None

    def look(self, at: float) -> None:
        """Ask again at `at`, if not before."""
        self.look_at = at if self.look_at is None else min(at, self.look_at)


class Scheduler:
    """The lanes of all models. Who calls it tells what happened, then asks what to do."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.lanes: dict[str, Lane] = {}
        self._of: dict[Hashable, Lane] = {}
        self._held: dict[str, frozenset[str]] = {}
        """Who answers nobody new, by the model that it is for."""

    def lane(self, name: str) -> Lane:
        """The lane of a model."""
        if name not in self.lanes:
            self.lanes[name] = Lane(name)
        return self.lanes[name]

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(len(lane.waiting) for lane in self.lanes.values())

    def lets_in(self, name: str) -> bool:
        """Whether a request for this model would run at once."""
        return self.lane(name).is_awake and not any(name in held for held in self._held.values())

    # ── what happened ────────────────────────────────────────────────────────────────────────────────────

    def arrive(self, request: Hashable, name: str, now: float) -> None:
        """A request for a model."""
        lane = self.lane(name)
        if not lane.is_busy and lane.ended > float("-inf"):
            pause = now - lane.ended
            lane.gap = pause if lane.gap is None else lane.gap + GAP_WEIGHT * (pause - lane.gap)
        lane.waiting[request] = now
        self._of[request] = lane

    def done(self, request: Hashable, now: float) -> None:
        """It was answered, or has gone, waiting or not."""
        lane = self._of.pop(request, None)
        if lane is None:
            return
        lane.waiting.pop(request, None)
        if lane.running.pop(request, None) is not None:
            lane.ended = now

    def bounced(self, request: Hashable) -> None:
        """Its model turned out not to be awake: it waits again, as long as it has waited."""
        lane = self._of[request]
        lane.waiting = {request: lane.running.pop(request), **lane.waiting}
        lane.waiting = dict(sorted(lane.waiting.items(), key=lambda item: item[1]))
        self.fell(lane.name)

    def fell(self, name: str) -> None:
        """A model is no longer awake, whoever did that."""
        self.lane(name).is_awake = False

    def woke(self, name: str, now: float) -> None:
        """A model is awake, whoever did that."""
        lane = self.lane(name)
        if not lane.is_awake:
            lane.is_awake, lane.since = True, now

    def moved(self, name: str, now: float, *, is_awake: bool) -> None:
        """The switch to a model has ended."""
        lane = self.lane(name)
        lane.is_moving, lane.is_awake = False, is_awake
        if is_awake:
            lane.since = now
        self._held.pop(name, None)

    # ── what to do ───────────────────────────────────────────────────────────────────────────────────────

    def decide(self, now: float) -> Decision:
        """What to do now. A switch that it names has begun, until `moved` is told."""
        decision = Decision()
        # Who was switched to is answered first, before the next one may take its place.
        self._let_in(decision)
        wanted = [lane for lane in self.lanes.values() if lane.waiting and not lane.is_awake]
        if wanted or self._held:
            self._choose([lane for lane in wanted if not lane.is_moving], now, decision)
            self._let_in(decision)
        return decision

    def _let_in(self, decision: Decision) -> None:
        for lane in self.lanes.values():
            if lane.waiting and self.lets_in(lane.name):
                decision.run += lane.waiting
                lane.running |= lane.waiting
                lane.waiting = {}

    def _choose(self, candidates: Iterable[Lane], now: float, decision: Decision) -> None:
        moving = [lane for lane in self.lanes.values() if lane.is_moving]
        self._held = {lane.name: self._held[lane.name] for lane in moving}
        claimed = {name for held in self._held.values() for name in held} | {lane.name for lane in moving}
        gpus = frozenset[int]().union(*(lane.gpus for lane in moving))
        for lane in sorted(candidates, key=lambda lane: self._rank(lane, now)):
            if lane.not_before > now + GRAIN:
                decision.look(lane.not_before)
                continue
            leaves = frozenset(name for name in lane.leaves if self.lane(name).is_awake)
            if leaves & claimed or lane.gpus & gpus or lane.name in claimed:
                continue
            may_at = max((self._may_leave(self.lane(name), lane, now) for name in leaves), default=now)
            overdue = lane.waits(now) + GRAIN >= self._turn(lane)
            if may_at <= now + GRAIN or (overdue and not self._are_running(leaves)):
                lane.is_moving = True
                decision.switch.append(Switch(lane.name, leaves))
                gpus |= lane.gpus
            elif not overdue:
                decision.look(min(may_at, now - lane.waits(now) + self._turn(lane)))
                continue
            claimed |= leaves | {lane.name}
            self._held[lane.name] = leaves

    def _are_running(self, names: Iterable[str]) -> bool:
        return any(self.lane(name).running for name in names)

    def _rank(self, lane: Lane, now: float) -> tuple[bool, float]:
        """First who has waited too long, by how long; then by what a second of switching spares."""
        waits = lane.waits(now)
        if waits + GRAIN >= self._bound(lane):
            return False, -waits
        spared = sum(now - arrived + 1.0 for arrived in lane.waiting.values())
        return True, -spared / (lane.cost + 0.01)

    def _turn(self, lane: Lane) -> float:
        """How long somebody waits for this lane before those who are in its way get no more requests."""
        return min(self._bound(lane), TURN_COSTS * lane.cost)

    def _bound(self, lane: Lane) -> float:
        """How long anybody waits for this lane while new requests of others run."""
        given = self.rules.max_wait
        return max(LONGEST_TURN, PATIENCE * lane.cost) if given is None else given

    def _may_leave(self, lane: Lane, coming: Lane, now: float) -> float:
        """When an awake model may leave, unless a turn is over before; infinity while it is busy."""
        if lane.is_busy:
            return float("inf")
        stay = min(coming.cost, LONGEST_STAY) if self.rules.min_awake is None else self.rules.min_awake
        may_at = lane.since + stay
        if lane.gap is not None:
            lingers = GAP_MARGIN * lane.gap
            # What those who wait lose, against the switch that who comes back waits for.
            if lingers * len(coming.waiting) < coming.cost:
                may_at = max(may_at, lane.ended + lingers)
        return may_at
