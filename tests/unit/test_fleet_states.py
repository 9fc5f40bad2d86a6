"""The table of states."""

import pytest

from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.states import RUNNING, SETTLED, TRANSITIONS, Event, State, next_state


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", Event)
def test_what_is_not_in_the_table_is_refused_with_a_sentence(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(RefusedError, match=f"Cannot .* {state}"):
            next_state(state, event)


def test_every_running_state_can_be_stopped_and_can_die() -> None:
    for state in RUNNING:
        assert next_state(state, Event.STOP) is State.STOPPING
        assert next_state(state, Event.EXITED) is State.FAILED


def test_every_state_is_reached_and_none_is_a_trap() -> None:
    assert {State.STOPPED, *TRANSITIONS.values()} == set(State)
    reached, frontier = set(), {State.STARTING}
    while frontier:
        reached |= frontier
        frontier = {after for (before, _), after in TRANSITIONS.items() if before in reached} - reached
    assert reached == set(State)


def test_a_transitional_state_always_has_a_way_to_a_settled_one() -> None:
    for state in set(State) - SETTLED:
        assert any(after in SETTLED for (before, _), after in TRANSITIONS.items() if before is state)
