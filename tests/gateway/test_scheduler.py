"""Whose turn it is, in made-up time: rules one by one, then whatever can happen, over and over."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_sleep_tui.gateway.scheduler import Decision, Rules, Scheduler

MODELS = ("a", "b", "c")


def one_gpu(cost: float = 0.5, **rules: float) -> Scheduler:
    """Three models of which one fits; a is awake since long ago."""
    scheduler = Scheduler(Rules(**rules))
    for name in MODELS:
        lane = scheduler.lane(name)
        lane.gpus, lane.cost, lane.leaves = frozenset({0}), cost, frozenset(MODELS) - {name}
    scheduler.woke("a", -1000.0)
    return scheduler


def moved(scheduler: Scheduler, name: str, now: float) -> Decision:
    for other in MODELS:
        scheduler.fell(other)
    scheduler.moved(name, now, is_awake=True)
    return scheduler.decide(now)


def switched(decision: Decision) -> list[str]:
    return [switch.name for switch in decision.switch]


def test_requests_for_the_awake_model_run_at_once() -> None:
    scheduler = one_gpu()
    for number in range(3):
        scheduler.arrive(number, "a", 0.0)
        assert scheduler.decide(0.0).run == [number]


def test_an_idle_model_is_left_at_once_and_all_that_wait_run_together() -> None:
    scheduler = one_gpu()
    scheduler.arrive(1, "b", 0.0)
    assert switched(scheduler.decide(0.0)) == ["b"]
    scheduler.arrive(2, "b", 0.2)
    assert scheduler.decide(0.2) == Decision()
    assert moved(scheduler, "b", 0.5).run == [1, 2]


def test_a_busy_model_has_a_turn_that_the_cost_measures_and_then_gets_no_more() -> None:
    scheduler = one_gpu(cost=0.5)
    scheduler.arrive(1, "a", 0.0)
    scheduler.decide(0.0)
    scheduler.arrive(2, "b", 1.0)
    assert scheduler.decide(1.0).look_at == 6.0  # ten times the cost
    scheduler.arrive(3, "a", 5.9)
    assert scheduler.decide(5.9).run == [3]
    assert scheduler.lets_in("a")
    assert scheduler.decide(6.0) == Decision()
    assert not scheduler.lets_in("a")
    scheduler.arrive(4, "a", 6.1)
    assert scheduler.decide(6.1) == Decision()
    scheduler.done(1, 7.0)
    assert switched(scheduler.decide(7.0)) == []
    scheduler.done(3, 8.0)
    assert switched(scheduler.decide(8.0)) == ["b"]


def test_who_was_switched_to_is_answered_before_the_next_one_comes() -> None:
    scheduler = one_gpu(cost=0.05)
    for number, name in enumerate(("b", "c", "b", "c")):
        scheduler.arrive(number, name, 0.0)
    first = switched(scheduler.decide(60.0))
    assert len(first) == 1
    now = moved(scheduler, first[0], 60.05)
    assert len(now.run) == 2
    assert now.switch == []


def test_a_client_that_comes_back_sooner_than_a_switch_takes_is_waited_for() -> None:
    scheduler = one_gpu(cost=10.0)
    for number in range(4):
        scheduler.arrive(number, "a", number * 3.0)
        scheduler.decide(number * 3.0)
        scheduler.done(number, number * 3.0 + 1.0)  # two seconds to think
    scheduler.arrive("b", "b", 10.1)
    waits = scheduler.decide(10.1)
    assert waits.switch == []
    assert waits.look_at == 13.0
    assert switched(scheduler.decide(13.0)) == ["b"]


def test_nobody_waits_longer_than_the_bound_while_new_ones_run() -> None:
    scheduler = one_gpu(cost=50.0, max_wait=20.0)
    scheduler.arrive(0, "a", 0.0)
    scheduler.decide(0.0)
    scheduler.arrive("b", "b", 1.0)
    scheduler.decide(1.0)
    scheduler.arrive(1, "a", 20.9)
    assert scheduler.decide(20.9).run == [1]
    scheduler.decide(21.0)
    scheduler.arrive(2, "a", 21.1)
    assert scheduler.decide(21.1).run == []


def test_models_that_fit_together_are_served_together() -> None:
    scheduler = one_gpu()
    scheduler.lane("b").leaves = frozenset()
    scheduler.arrive(1, "a", 0.0)
    scheduler.arrive(2, "b", 0.0)
    decision = scheduler.decide(0.0)
    assert decision.run == [1]
    assert switched(decision) == ["b"]
    scheduler.moved("b", 0.5, is_awake=True)
    scheduler.arrive(3, "a", 0.6)
    assert set(scheduler.decide(0.6).run) == {2, 3}


def test_a_request_that_was_turned_away_keeps_its_place() -> None:
    scheduler = one_gpu()
    scheduler.arrive(1, "a", 0.0)
    scheduler.arrive(2, "a", 1.0)
    scheduler.decide(1.0)
    scheduler.bounced(2)
    scheduler.bounced(1)
    assert list(scheduler.lane("a").waiting) == [1, 2]
    assert switched(scheduler.decide(1.0)) == ["a"]


def test_who_leaves_is_forgotten() -> None:
    scheduler = one_gpu()
    scheduler.arrive(1, "a", 0.0)
    scheduler.decide(0.0)
    scheduler.arrive(2, "b", 0.0)
    scheduler.decide(100.0)  # a gets no more
    scheduler.done(2, 100.0)
    scheduler.arrive(3, "a", 100.0)
    assert scheduler.decide(100.0).run == [3]
    scheduler.done("nobody", 100.0)


steps = st.lists(
    st.tuples(st.sampled_from(MODELS), st.floats(0, 5), st.floats(0.01, 4)), min_size=1, max_size=60
)


@given(steps, st.sampled_from([0.05, 0.5, 5.0]), st.booleans())
@settings(max_examples=150)
def test_everybody_is_answered_once_by_their_own_model_within_a_bound(
    arrivals: list[tuple[str, float, float]], cost: float, together: bool
) -> None:
    """Drives it as the desk does: one model awake at a time, or b beside the others."""
    scheduler = one_gpu(cost=cost, max_wait=10.0)
    if together:
        for name in MODELS:
            scheduler.lane(name).leaves -= {"b"}
        scheduler.lane("b").leaves = frozenset()
    awake, now = {"a"}, 0.0
    events: list[tuple[float, int, str, object]] = []
    for number, (name, pause, length) in enumerate(arrivals):
        now += pause
        events.append((now, number, "arrive", (number, name, length)))
    order = len(events)
    came: dict[int, tuple[float, str, float]] = {}
    ran: dict[int, float] = {}
    longest = max(length for _, _, length in arrivals)
    while events:
        events.sort()
        now, _, kind, what = events.pop(0)
        if kind == "arrive":
            assert isinstance(what, tuple)
            number, name, length = what
            came[number] = now, name, length
            scheduler.arrive(number, name, now)
        elif kind == "done":
            scheduler.done(what, now)  # type: ignore[arg-type]
        elif kind == "moved":
            awake.add(str(what))
            scheduler.moved(str(what), now, is_awake=True)
        decision = scheduler.decide(now)
        for request in decision.run:
            assert isinstance(request, int)
            assert request not in ran, "answered twice"
            assert came[request][1] in awake, "answered by a model that is not awake"
            ran[request] = now
            order += 1
            events.append((now + came[request][2], order, "done", request))
        for switch in decision.switch:
            busy = {came[number][1] for number, at in ran.items() if at + came[number][2] > now}
            assert not switch.leaves & busy, "a model that answers was left"
            for name in switch.leaves:
                awake.discard(name)
                scheduler.fell(name)
            order += 1
            events.append((now + cost, order, "moved", switch.name))
        if decision.look_at is not None:
            order += 1
            events.append((max(decision.look_at, now), order, "look", None))
            looks = [event for event in events if event[2] == "look"]
            events = [event for event in events if event[2] != "look"] + [min(looks)]
    assert ran.keys() == came.keys(), "somebody was never answered"
    worst = max(ran[number] - came[number][0] for number in came)
    assert worst <= 10.0 + len(MODELS) * (longest + 2 * cost + 5.0)
