"""Several models started or stopped by one operation: side by side where they share no GPU."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError
from vllm_sleep_tui.fleet.backend import Backend, backend_of
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.states import State


async def start_all(models: Sequence[Model], operation: Operation) -> None:
    """Start models, those that share a GPU one after another, others side by side; the first ends awake.

    Whoever cannot be started is left out, and named in what is raised once the others have.
    """
    chosen, errors = startable(models)
    if len(models) == 1:
        await backend_of(models[0]).start(operation)
        return
    for model in models:
        if model not in chosen:
            operation.tell(model.name, "left out", "it cannot be started as the config has it")
    results = await asyncio.gather(
        *(start_group(group, operation) for group in groups(chosen)), return_exceptions=True
    )
    for result in results:
        if isinstance(result, BaseException):
            raise result
        errors |= result
    raise_several(errors)


async def stop_all(models: Sequence[Model], operation: Operation, force: bool) -> None:
    """Stop models; a start under way, anybody's of this user, is broken off.

    One that is not ours to stop is left out, and named in what is raised once the others have stopped.
    """
    chosen, errors = sifted(models, lambda backend: backend.check_stoppable())
    results = await asyncio.gather(
        *(backend_of(model).stop(operation, force=force) for model in chosen), return_exceptions=True
    )
    for model, result in zip(chosen, results, strict=True):
        if isinstance(result, PanelError) and not isinstance(result, CancelledByUser):
            errors[model.name] = result
        elif result is not None:
            raise result
    raise_several(errors)


def startable(models: Sequence[Model]) -> tuple[list[Model], dict[str, PanelError]]:
    """The models that the config lets start, and why the others cannot; raises that if none can."""
    return sifted(models, lambda backend: backend.check_startable())


def sifted(
    models: Sequence[Model], check: Callable[[Backend], None]
) -> tuple[list[Model], dict[str, PanelError]]:
    """The models that pass `check`, and what it raised for the others; raises that if none passes."""
    chosen: list[Model] = []
    errors: dict[str, PanelError] = {}
    for model in models:
        try:
            check(backend_of(model))
        except PanelError as error:
            errors[model.name] = error
        else:
            chosen.append(model)
    if errors and not chosen:
        raise_several(errors, type(next(iter(errors.values()))))
    return chosen, errors


def groups(models: Sequence[Model]) -> list[list[Model]]:
    """The models, divided so that no two groups have a GPU in common; order kept. The CPU counts as one."""
    divided: list[tuple[set[int], list[Model]]] = []
    for model in models:
        gpus = set(model.config.gpus) or {-1}
        touching = [group for group in divided if group[0] & gpus]
        merged = (
            gpus.union(*(group_gpus for group_gpus, _ in touching)),
            [member for _, members in touching for member in members] + [model],
        )
        divided = [group for group in divided if group not in touching] + [merged]
    return [sorted(members, key=list(models).index) for _, members in divided]


async def start_group(models: Sequence[Model], operation: Operation) -> dict[str, PanelError]:
    """Start the last first, so that the first is the one that stays awake; go on after a failure, and say
    what each was."""
    errors: dict[str, PanelError] = {}
    first = models[0]
    for model in reversed(models):
        if model is not first and model.config.level == "none":
            operation.tell(model.name, "left stopped", "level: none; the next one would stop it again")
            continue
        try:
            await backend_of(model).start(operation.part(model.name))
        except CancelledByUser:
            raise
        except PanelError as error:
            errors[model.name] = error
    if first.read().state is State.ASLEEP:
        try:
            await backend_of(first).switch(operation.part(first.name))
        except CancelledByUser:
            raise
        except PanelError as error:
            errors[first.name] = error
    return errors


def raise_several(errors: Mapping[str, PanelError], kind: type[PanelError] = OperationError) -> None:
    """Raise what went wrong, if anything did: the first of it, with what is wrong with the others."""
    if errors:
        first, *rest = dict.fromkeys(error.what for error in errors.values())
        cure = next(iter(errors.values())).cure
        raise kind(f"{first}{''.join(f' Also: {what}' for what in rest)}", cure, by_model=errors)
