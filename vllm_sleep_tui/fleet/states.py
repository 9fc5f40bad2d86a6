"""The states of a model, and the one table of what may follow what."""

from __future__ import annotations

from enum import StrEnum

from vllm_sleep_tui.errors import RefusedError


class State(StrEnum):
    """Where a model is; its sleep level and start phase are fields beside it."""

    STOPPED = "stopped"
    STARTING = "starting"
    AWAKE = "awake"
    FALLING_ASLEEP = "falling-asleep"
    ASLEEP = "asleep"
    WAKING = "waking"
    STOPPING = "stopping"
    FAILED = "failed"


class StartPhase(StrEnum):
    """What a starting model is doing."""

    FETCHING = "fetching"
    LOADING = "loading"
    COMPILING = "compiling"
    CAPTURING = "capturing"
    WARMING = "warming"
    PRIMING = "priming"


class Event(StrEnum):
    """What happened to a model."""

    START = "start"
    READY = "ready"
    SLEEP = "sleep"
    SLEPT = "slept"
    SLEEP_UNDONE = "sleep undone"
    WAKE = "wake"
    WOKE = "woke"
    WAKE_UNDONE = "wake undone"
    STOP = "stop"
    EXITED = "exited"
    FAIL = "fail"


RUNNING = frozenset({State.STARTING, State.AWAKE, State.FALLING_ASLEEP, State.ASLEEP, State.WAKING})
"""The states with a server that has not been asked to end."""
SETTLED = frozenset({State.STOPPED, State.AWAKE, State.ASLEEP, State.FAILED})
"""The states in which nothing is under way."""

TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.STOPPED, Event.START): State.STARTING,
    (State.FAILED, Event.START): State.STARTING,
    (State.STARTING, Event.READY): State.AWAKE,
    (State.AWAKE, Event.SLEEP): State.FALLING_ASLEEP,
    (State.FALLING_ASLEEP, Event.SLEPT): State.ASLEEP,
    (State.FALLING_ASLEEP, Event.SLEEP_UNDONE): State.AWAKE,
    (State.ASLEEP, Event.WAKE): State.WAKING,
    (State.WAKING, Event.WOKE): State.AWAKE,
    (State.WAKING, Event.WAKE_UNDONE): State.ASLEEP,
    (State.FAILED, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.STOP): State.STOPPING,
    (State.STOPPING, Event.EXITED): State.STOPPED,
    **{(state, Event.STOP): State.STOPPING for state in RUNNING},
    **{(state, Event.EXITED): State.FAILED for state in RUNNING},
    **{(state, Event.FAIL): State.FAILED for state in (*RUNNING, State.STOPPING)},
}


def next_state(state: State, event: Event) -> State:
    """The state after `event`; raises RefusedError with a sentence for what is not in the table."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise RefusedError(f"Cannot {event} a model that is {state}.") from None
