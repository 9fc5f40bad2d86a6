"""The models as they were before a run, and how they get there again."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_sleep_tui.bench.results import Found
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Report
from vllm_sleep_tui.fleet.states import SETTLED, State


def neighbours(fleet: Fleet, pair: Sequence[str]) -> list[str]:
    """The pair and every other model that shares a GPU with it and is started here."""
    models = fleet.loaded.config.models
    gpus = {gpu for name in pair for gpu in models[name].gpus}
    sharing = [name for name, model in models.items() if gpus & set(model.gpus) and not model.is_attached]
    return [*pair, *(name for name in sharing if name not in pair)]


def look(fleet: Fleet, names: Sequence[str]) -> tuple[Found, ...]:
    """How these models are now; raises RefusedError if one is in the middle of something."""
    snapshot = fleet.snapshot()
    states = []
    for name in names:
        model = snapshot.model(name)
        if model.state not in SETTLED:
            raise RefusedError(f"{name} is {model.state}.", "Wait for its end, then begin again.")
        states.append(Found(name=name, state=model.state, level=model.level))
    return tuple(states)


async def put_aside(fleet: Fleet, names: Sequence[str], report: Report | None) -> None:
    """Put awake bystanders to sleep, each the way its level says."""
    for name in names:
        if fleet.snapshot().model(name).state is State.AWAKE:
            await fleet.sleep(name, report=report)


async def put_back(fleet: Fleet, states: Sequence[Found], report: Report | None) -> None:
    """Bring each model to its state of before: stopped ones first, awake ones last.

    One that had failed ends stopped if the run has started it, else as it is.
    Goes on after a failure and raises OperationError that names all of them.
    """
    failures: list[str] = []
    rank = {State.STOPPED: 0, State.FAILED: 0, State.ASLEEP: 1, State.AWAKE: 2}
    for before in sorted(states, key=lambda each: rank[each.state]):
        try:
            await _put_back_one(fleet, before, report)
        except CancelledByUser:
            raise
        except PanelError as error:
            failures.append(f"{before.name}, which was {before.state}: {error.what}")
    if failures:
        raise OperationError(
            f"Not all models could be put back: {' '.join(failures)}", "Look at `status`, then start them."
        )


async def _put_back_one(fleet: Fleet, before: Found, report: Report | None) -> None:
    now = fleet.snapshot().model(before.name)
    if before.state in (State.STOPPED, State.FAILED):
        if now.state not in (State.STOPPED, before.state):
            await fleet.stop([before.name], report=report)
    elif before.state is State.ASLEEP:
        await put_asleep(fleet, before.name, 1 if before.level is None else before.level, report)
    elif now.state is not State.AWAKE:
        await fleet.switch(before.name, report=report)


async def put_asleep(fleet: Fleet, name: str, level: int, report: Report | None) -> None:
    """Make a model sleep at `level`, from wherever it is; another level needs a wake between."""
    now = fleet.snapshot().model(name)
    if now.state is State.ASLEEP and now.level == level:
        return
    if now.state is not State.AWAKE:
        await fleet.switch(name, report=report)
    await fleet.sleep(name, level=level, report=report)
