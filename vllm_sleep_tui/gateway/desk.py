"""Carries out what the scheduler decides: lets requests through, switches models through the fleet.

What it believes of a model may be old: somebody else puts it to sleep, its server dies. The guard in front of
each server is asked last, and who is turned away there waits again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Protocol

from vllm_sleep_tui.config.types import GatewayConfig, parse_duration
from vllm_sleep_tui.errors import CancelledByUser, PanelError
from vllm_sleep_tui.fleet.snapshot import (
    FleetSnapshot,
    ModelSnapshot,
    Prediction,
    Progress,
    Report,
    SwitchTimes,
    Way,
)
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.gateway.asks import Ask, Asks
from vllm_sleep_tui.gateway.replies import Refusal
from vllm_sleep_tui.gateway.scheduler import UNKNOWN_COST, Lane, Rules, Scheduler, Switch

LOOK_SECONDS = 0.5
"""Between two looks at the models."""
SURE_SECONDS = 2.0
"""After a switch the memory that is known may be older than it: whoever shares a GPU counts as in the way."""
WAKE_GUESSES = {0: 0.2, 1: 1.0}
"""Seconds of a wake that was never measured, by level: who is awake is to be left for it soon."""
PAUSES = (2.0, 10.0, 60.0)
"""After switches to a model that failed in a row, in seconds."""
MOVING = frozenset({State.STARTING, State.FALLING_ASLEEP, State.WAKING, State.STOPPING})
AT_REST = frozenset({State.STOPPED, State.FAILED})
log = logging.getLogger(__name__)


class Operator(Protocol):
    """What of the fleet is used here."""

    def snapshot(self) -> FleetSnapshot:
        """Everything as of now."""

    def predict(self, name: str) -> Prediction:
        """What a switch would do."""

    async def switch(self, name: str, *, force: bool = False, report: Report | None = None) -> SwitchTimes:
        """Make a model awake."""

    async def way(self, name: str) -> Way:
        """How requests get to its server."""


class Desk:
    """Whoever asks for a model waits here for its turn."""

    def __init__(
        self,
        fleet: Operator,
        config: GatewayConfig,
        asks: Asks,
        want: Callable[[list[str]], None],
    ) -> None:
        stay, longest = config.min_awake, config.max_wait
        rules = Rules(
            max_wait=None if longest is None else parse_duration(longest),
            min_awake=None if stay is None else parse_duration(stay),
        )
        self._fleet = fleet
        self._config = config
        self._asks = asks
        self._want = want
        self._scheduler = Scheduler(rules)
        self._turns: dict[Ask, asyncio.Future[None]] = {}
        self._ways: dict[str, Way] = {}
        self._states: dict[str, State] = {}
        self._levels: dict[str, int | None] = {}
        """Of those that sleep."""
        self._took: dict[tuple[str, int | None], float] = {}
        """What a switch to a model took here, by the level that it slept at; None: it was started."""
        self._hopeless: dict[str, float] = {}
        """Since when a model that is waited for is predicted not to fit."""
        self._failures: dict[str, int] = {}
        self._reasons: dict[str, Refusal] = {}
        self._switching: dict[str, asyncio.Task[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._looking: asyncio.Task[None] | None = None
        self._moved_at = float("-inf")
        self._used_at = time.monotonic()
        self._is_open = True

    def start(self) -> None:
        """Begin to look at the models."""
        self._look()
        self._looking = asyncio.create_task(self._keep_looking())

    @property
    def is_switching(self) -> bool:
        """Whether a switch is under way."""
        return bool(self._switching)

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return self._scheduler.waiting

    async def close(self) -> None:
        """Refuse who waits; a switch under way ends at its next safe point."""
        self._is_open = False
        if self._looking is not None:
            self._looking.cancel()
        if self._timer is not None:
            self._timer.cancel()
        for lane in self._scheduler.lanes.values():
            self._refuse(lane, self._ending())
        for task in self._switching.values():
            task.cancel()
        await asyncio.gather(*self._switching.values(), return_exceptions=True)

    # ── for one request ──────────────────────────────────────────────────────────────────────────────────

    def enter(self, ask: Ask) -> asyncio.Future[None]:
        """Wait for the model's turn: done when it has come, or with a Refusal. Raises Refusal at once if the
        queue is full."""
        lane = self._scheduler.lane(ask.target.model)
        if not self._is_open:
            raise self._ending()
        now = asyncio.get_running_loop().time()
        if not self._scheduler.lets_in(lane.name) and self._scheduler.waiting >= self._config.queue:
            message = f"{self._scheduler.waiting} requests wait, as many as may (`gateway: {{queue: …}}`)."
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after=max(1.0, lane.cost))
        if not lane.is_awake and lane.not_before > now and lane.name in self._reasons:
            why = self._reasons[lane.name]
            raise Refusal(why.status, why.message, retry_after=lane.not_before - now)
        self._scheduler.arrive(ask, lane.name, now)
        return self._wait(ask, lane)

    def bounce(self, ask: Ask) -> asyncio.Future[None]:
        """Its model was not awake after all: it waits again. Raises Refusal when the gateway ends."""
        if not self._is_open:
            raise self._ending()
        ask.began = None
        self._ways.pop(ask.target.model, None)
        self._scheduler.bounced(ask)
        return self._wait(ask, self._scheduler.lane(ask.target.model))

    def done(self, ask: Ask) -> None:
        """It is answered, or its client has gone."""
        self._turns.pop(ask, None)
        self._used_at = time.monotonic()
        self._scheduler.done(ask, asyncio.get_running_loop().time())
        if self._scheduler.waiting:
            self._act()

    async def way(self, model: str) -> Way:
        """How to get to its server; raises PanelError while it does not run."""
        way = self._ways.get(model)
        if way is None:
            way = self._ways[model] = await self._fleet.way(model)
        return way

    def _ending(self) -> Refusal:
        return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The gateway is ending.", retry_after=5)

    def _wait(self, ask: Ask, lane: Lane) -> asyncio.Future[None]:
        future = self._turns[ask] = asyncio.get_running_loop().create_future()
        future.add_done_callback(_looked_at)
        is_first = len(lane.waiting) == 1  # the others find what was predicted for it, or the next look's
        if is_first and not lane.is_awake and not lane.is_moving:
            self._want([lane.name])
            self._predict(lane)
        self._act()
        return future

    # ── what the scheduler decides ───────────────────────────────────────────────────────────────────────

    def _act(self) -> None:
        if not self._is_open:
            return
        loop = asyncio.get_running_loop()
        decision = self._scheduler.decide(loop.time())
        for ask in decision.run:
            assert isinstance(ask, Ask)
            ask.began = time.time()
            future = self._turns[ask]
            if not future.done():
                future.set_result(None)
        for switch in decision.switch:
            task = asyncio.create_task(self._switch(switch), name=f"switch to {switch.name}")
            self._switching[switch.name] = task
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if decision.look_at is not None:
            self._timer = loop.call_at(decision.look_at, self._act)

    async def _switch(self, switch: Switch) -> None:
        name, loop = switch.name, asyncio.get_running_loop()
        level = self._levels.get(name)
        lane = self._scheduler.lane(name)
        log.info("gateway: switches to %s, %d waiting", name, len(lane.waiting))
        began, refusal = loop.time(), None
        try:
            await self._fleet.switch(name, report=lambda step: self._tell(name, step))
            self._ways[name] = await self._fleet.way(name)
        except PanelError as error:
            refusal = Refusal(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"{name} cannot be made awake: {error.what} {error.cure}".rstrip(),
                retry_after=PAUSES[0],
            )
            if not isinstance(error, CancelledByUser):
                log.warning("gateway: %s", refusal.message)
        except Exception:  # who waits is answered, whatever it was
            log.exception("gateway: something unforeseen went wrong with the switch to %s", name)
            refusal = Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"The switch to {name} failed.")
        now = loop.time()
        self._moved_at = now
        self._asks.switches[name, "failed" if refusal else "done"] += 1
        del self._switching[name]
        self._scheduler.moved(name, now, is_awake=refusal is None)
        if refusal is None:
            self._failures.pop(name, None)
            self._reasons.pop(name, None)
            self._took[name, level] = now - began
        else:
            failures = self._failures[name] = self._failures.get(name, 0) + 1
            refusal.retry_after = PAUSES[min(failures, len(PAUSES)) - 1]
            lane.not_before = now + refusal.retry_after
            self._reasons[name] = refusal
            self._refuse(lane, refusal)
        self._look()

    def _tell(self, name: str, step: Progress) -> None:
        words = f"{step.model}: {step.phase} {step.detail}".rstrip()
        for ask in self._scheduler.lane(name).waiting:
            assert isinstance(ask, Ask)
            ask.waits_for = words

    def _refuse(self, lane: Lane, refusal: Refusal) -> None:
        """Answer all that wait for a model so."""
        for ask in list(lane.waiting):
            assert isinstance(ask, Ask)
            self._scheduler.done(ask, asyncio.get_running_loop().time())
            future = self._turns.pop(ask, None)
            if future is not None and not future.done():
                future.set_exception(refusal)

    # ── what is known of the models ──────────────────────────────────────────────────────────────────────

    async def _keep_looking(self) -> None:
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                self._look()
                self._return()
            except Exception:  # the next look may be better, and requests go on
                log.exception("gateway: something unforeseen went wrong with the look at the models")

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        models = self._fleet.snapshot().models
        self._states = {model.name: model.state for model in models}
        self._levels = {model.name: model.level for model in models}
        if any(_answers(model) for model in models):
            self._used_at = time.monotonic()  # by whoever goes past this to a model's own port, too
        for model in models:
            lane = self._scheduler.lane(model.name)
            lane.gpus = frozenset(model.gpus)
            if lane.is_moving:
                continue
            if model.state is State.AWAKE:
                self._scheduler.woke(model.name, now)
            else:
                self._scheduler.fell(model.name)
                self._ways.pop(model.name, None)
        gone = self._scheduler.lanes.keys() - self._states.keys()
        wanted = [lane for lane in self._scheduler.lanes.values() if lane.waiting]
        for name in self._hopeless.keys() - {lane.name for lane in wanted}:
            del self._hopeless[name]
        for lane in wanted:
            if lane.name in gone:
                message = f"{lane.name} is no longer in the config."
                self._refuse(lane, Refusal(HTTPStatus.NOT_FOUND, message, code="model_not_found"))
            elif not lane.is_awake and not lane.is_moving:
                self._predict(lane)
        if wanted:
            self._want([lane.name for lane in wanted if lane.name not in gone])
        self._act()

    def _predict(self, lane: Lane) -> None:
        """What a switch to it would take and who would leave; refuses who waits if it cannot be."""
        state = self._states.get(lane.name)
        if state in AT_REST and not self._config.starts:
            message = (
                f"{lane.name} is {state}, and requests start no model here (`gateway: {{starts: false}}`)."
            )
            self._refuse(lane, Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message))
            return
        now = asyncio.get_running_loop().time()
        prediction = self._fleet.predict(lane.name)
        near = [
            other
            for other in self._scheduler.lanes.values()
            if other is not lane and other.is_awake and other.gpus & lane.gpus
        ]
        known = {*prediction.sleeps, *prediction.stops}
        is_sure = prediction.action != "nothing" and now - self._moved_at > SURE_SECONDS
        lane.leaves = frozenset(known if is_sure else known | {other.name for other in near})
        if prediction.seconds is not None:
            lane.cost = prediction.seconds
        else:
            level = self._levels.get(lane.name)
            guess = UNKNOWN_COST if level is None else WAKE_GUESSES.get(level, UNKNOWN_COST)
            lane.cost = self._took.get((lane.name, level), guess)
        settled = is_sure and not self._switching and not MOVING & set(self._states.values())
        if prediction.action != "refused" or not settled:
            self._hopeless.pop(lane.name, None)
        elif now - self._hopeless.setdefault(lane.name, now) >= SURE_SECONDS:
            # Not before: who was killed holds memory until it is seen gone, and a switch looks anew.
            del self._hopeless[lane.name]
            self._refuse(lane, Refusal(HTTPStatus.SERVICE_UNAVAILABLE, prediction.sentence, retry_after=10))
            return
        held = [name for name in lane.leaves if self._scheduler.lane(name).running]
        words = f"{', '.join(held)} to end its answers" if held else "its turn"
        for ask in lane.waiting:
            assert isinstance(ask, Ask)
            ask.waits_for = words

    def _return(self) -> None:
        """Back to the model that is to be awake when nothing is asked."""
        name, after = self._config.return_to, parse_duration(self._config.return_after)
        idle = time.monotonic() - self._used_at
        if name is None or idle < after or self._asks.under_way or self._switching:
            return
        self._used_at = time.monotonic()  # once, not again and again
        lane = self._scheduler.lane(name)
        if self._states.get(name) is State.ASLEEP and not lane.is_moving:
            lane.is_moving = True
            self._switching[name] = asyncio.create_task(self._switch(Switch(name, frozenset())))


def _answers(model: ModelSnapshot) -> bool:
    """Whether the model answers somebody, or did so a moment ago."""
    serving = model.serving
    return serving is not None and bool(serving.running or serving.generation_tokens_per_s)


def _looked_at(turn: asyncio.Future[None]) -> None:
    """A refusal that comes when its client has gone is nobody's."""
    if not turn.cancelled():
        turn.exception()
