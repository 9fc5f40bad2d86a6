"""In which order requests for several models are answered: three rules on one trace, in simulated time.

    python benchmarks/gateway_order.py [--clients 6] [--models 3] [--minutes 30] [--seed 1]

Clients with think times ask models of which one at a time fits on the GPU: agents that alternate two models,
people who talk to one, and batches that send many requests at once. The rules:

first-come  strictly in the order of arrival; those in a row for one model run together.
llama-swap  the first request for another model takes the lock: nobody new is let in, the answers under
            way end, the model is changed; all that wait for it go on together, then the next lock's.
ours        `vllm_sleep_tui/gateway/scheduler.py`.

For each cost of a switch: minutes until the whole trace is answered, and seconds until the turn of a request
comes, the median and the worst. Every client waits for its answer before it thinks of the next question.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import json
import random
import statistics
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

from vllm_sleep_tui.gateway.scheduler import Decision, Rules, Scheduler, Switch

COSTS = (0.05, 0.5, 50.0)


class Order(Protocol):
    """What a rule must do; see Scheduler."""

    def arrive(self, request: Hashable, name: str, now: float) -> None: ...  # noqa: D102
    def done(self, request: Hashable, now: float) -> None: ...  # noqa: D102
    def moved(self, name: str, now: float, *, is_awake: bool) -> None: ...  # noqa: D102
    def decide(self, now: float) -> Decision: ...  # noqa: D102


class InOrder:
    """First-come: a queue; its head runs once its model is awake and nobody of another is answered."""

    overtakes = False

    def __init__(self) -> None:
        self._queue: deque[tuple[Hashable, str]] = deque()
        self._running: dict[Hashable, str] = {}
        self._awake: str | None = None
        self._moving: str | None = None

    def arrive(self, request: Hashable, name: str, now: float) -> None:
        """At the end of the queue; of llama-swap's, past it while nobody holds the lock."""
        self._queue.append((request, name))

    def done(self, request: Hashable, now: float) -> None:
        """Answered."""
        self._running.pop(request, None)

    def moved(self, name: str, now: float, *, is_awake: bool) -> None:
        """The switch has ended."""
        self._awake, self._moving = name, None

    def decide(self, now: float) -> Decision:
        """Let in what may come in."""
        decision = Decision()
        while self._queue and self._moving is None:
            request, name = self._queue[0]
            if name != self._awake:
                if self._running:
                    break
                leaves = frozenset({self._awake}) if self._awake else frozenset[str]()
                self._moving = name
                decision.switch.append(Switch(name, leaves))
                break
            self._queue.popleft()
            self._running[request] = name
            decision.run.append(request)
        return decision


class LlamaSwap(InOrder):
    """The same, but who waits for the model that is being loaded is let in together once it is."""

    def moved(self, name: str, now: float, *, is_awake: bool) -> None:
        """Those who wait for this model have taken their place behind its lock, not behind the queue."""
        super().moved(name, now, is_awake=is_awake)
        mine = [item for item in self._queue if item[1] == name]
        self._queue = deque([*mine, *(item for item in self._queue if item[1] != name)])


class Ours:
    """The gateway's own, told what the desk would tell it."""

    def __init__(self, models: list[str], cost: float, rules: Rules) -> None:
        self._scheduler = Scheduler(rules)
        self._models = models
        for name in models:
            lane = self._scheduler.lane(name)
            lane.gpus, lane.cost = frozenset({0}), cost
            lane.leaves = frozenset(models) - {name}
        self.arrive = self._scheduler.arrive
        self.done = self._scheduler.done
        self.decide = self._scheduler.decide

    def moved(self, name: str, now: float, *, is_awake: bool) -> None:
        """One awake at a time."""
        for other in self._models:
            self._scheduler.fell(other)
        self._scheduler.moved(name, now, is_awake=is_awake)


@dataclass(frozen=True)
class Step:
    """One question of a client."""

    think: float
    model: str
    answer: float
    at_once: int = 1


Trace = list[list[Step]]


def trace(clients: int, models: list[str], minutes: float, seed: int) -> Trace:
    """Each client's questions, for about that long if nobody ever waited."""
    chance = random.Random(seed)

    def agent() -> Iterator[Step]:
        pair = itertools.cycle(chance.sample(models, 2))
        while True:
            yield Step(chance.expovariate(1 / 0.3), next(pair), chance.uniform(0.5, 4))

    def person() -> Iterator[Step]:
        model = chance.choice(models)
        while True:
            yield Step(chance.lognormvariate(2.3, 0.8), model, chance.uniform(2, 15))

    def batch() -> Iterator[Step]:
        while True:
            yield Step(chance.expovariate(1 / 60), chance.choice(models), chance.uniform(1, 6), at_once=20)

    kinds: list[Callable[[], Iterator[Step]]] = [agent, person, batch]
    steps: Trace = []
    for number in range(clients):
        mine: list[Step] = []
        begin = chance.uniform(0, 30)
        spent = 0.0
        for step in kinds[number % 3]():
            mine.append(step if mine else Step(begin, step.model, step.answer, step.at_once))
            spent += step.think + step.answer
            if spent > minutes * 60:
                break
        steps.append(mine)
    return steps


@dataclass(frozen=True)
class Result:
    """What came of a trace."""

    minutes: float
    p50: float
    worst: float
    switches: int


def simulate(order: Order, steps: Trace, cost: float) -> Result:
    """Play the trace."""
    events: list[tuple[float, int, str, tuple[int, int, int] | str | None]] = []
    count = itertools.count()
    waits: list[float] = []
    arrived: dict[Hashable, float] = {}
    left: dict[tuple[int, int], int] = {}
    switches, end, look = 0, 0.0, float("inf")

    def put(at: float, kind: str, what: tuple[int, int, int] | str | None) -> None:
        heapq.heappush(events, (at, next(count), kind, what))

    def ask(client: int, number: int, now: float) -> None:
        step = steps[client][number]
        left[client, number] = step.at_once
        for part in range(step.at_once):
            put(now + step.think, "arrive", (client, number, part))

    for client in range(len(steps)):
        ask(client, 0, 0.0)
    while events:
        now, _, kind, what = heapq.heappop(events)
        if kind == "arrive" and isinstance(what, tuple):
            arrived[what] = now
            order.arrive(what, steps[what[0]][what[1]].model, now)
        elif kind == "done" and isinstance(what, tuple):
            order.done(what, now)
            end = now
            client, number, _ = what
            left[client, number] -= 1
            if not left[client, number] and number + 1 < len(steps[client]):
                ask(client, number + 1, now)
        elif kind == "look" and now < look:
            continue  # put off since
        elif kind == "moved" and isinstance(what, str):
            order.moved(what, now, is_awake=True)
        decision = order.decide(now)
        for request in decision.run:
            assert isinstance(request, tuple)
            waits.append(now - arrived[request])
            put(now + steps[request[0]][request[1]].answer, "done", request)
        for switch in decision.switch:
            switches += 1
            put(now + cost, "moved", switch.name)
        before, look = look, float("inf") if decision.look_at is None else max(decision.look_at, now)
        if look not in (before, float("inf")) or (kind == "look" and look == before):
            put(look, "look", None)
    assert len(waits) == sum(step.at_once for mine in steps for step in mine), "somebody was never answered"
    return Result(end / 60, statistics.median(waits), max(waits), switches)


def main() -> None:
    """All rules, all costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--models", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-wait", type=float)
    parser.add_argument("--min-awake", type=float)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    models = [f"m{number}" for number in range(arguments.models)]
    steps = trace(arguments.clients, models, arguments.minutes, arguments.seed)
    rules = Rules(max_wait=arguments.max_wait, min_awake=arguments.min_awake)
    rows = []
    for cost in COSTS:
        orders: dict[str, Order] = {
            "first-come": InOrder(),
            "llama-swap": LlamaSwap(),
            "ours": Ours(models, cost, rules),
        }
        rows += [(cost, name, simulate(order, steps, cost)) for name, order in orders.items()]
    if arguments.json:
        print(json.dumps([{"cost": cost, "rule": name, **vars(result)} for cost, name, result in rows]))
        return
    print(f"{'switch':>7} {'rule':11} {'total':>9} {'p50 wait':>9} {'worst':>8} {'switches':>9}")
    for cost, name, result in rows:
        print(
            f"{cost:6.2f}s {name:11} {result.minutes:7.1f}min {result.p50:8.2f}s {result.worst:7.1f}s "
            f"{result.switches:9}"
        )


if __name__ == "__main__":
    main()
