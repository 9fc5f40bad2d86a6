"""The verbs that change what runs; each waits for its end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from vllm_sleep_tui.cli.common import (
    WholeNumber,
    complete_model,
    config_option,
    json_option,
    load_config,
    put_done,
    put_json,
)
from vllm_sleep_tui.cli.running import Reporter, with_fleet
from vllm_sleep_tui.cli.status import model_json
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.units import gib

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet
    from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, ModelSnapshot

names_argument = click.argument("names", metavar="NAME…", nargs=-1, shell_complete=complete_model)
all_option = click.option("--all", "everything", is_flag=True, help="Every model of the config.")
force_option = click.option("--force", is_flag=True, help="Do not wait for answers under way.")


@click.command()
@names_argument
@all_option
@json_option
@config_option
@click.pass_context
def start(ctx: click.Context, names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """Start models; with --all the file's first one is left awake."""
    loaded = load_config(ctx)
    chosen = _choose(loaded, names, everything=everything)
    _put_several(_operate(loaded, chosen, lambda fleet: fleet.start(chosen, report=Reporter())), as_json)


@click.command()
@names_argument
@all_option
@force_option
@json_option
@config_option
@click.pass_context
def stop(ctx: click.Context, names: tuple[str, ...], everything: bool, force: bool, as_json: bool) -> None:
    """Stop models and free all they hold."""
    loaded = load_config(ctx)
    chosen = _choose(loaded, names, everything=everything, also=_with_servers(loaded) if everything else ())
    _put_several(
        _operate(loaded, chosen, lambda fleet: fleet.stop(chosen, force=force, report=Reporter())), as_json
    )


@click.command()
@names_argument
@force_option
@json_option
@config_option
@click.pass_context
def restart(ctx: click.Context, names: tuple[str, ...], force: bool, as_json: bool) -> None:
    """Stop models and start them again."""
    loaded = load_config(ctx)
    if not names:
        raise UsageError("No model is named.", f"Name one or more of: {', '.join(loaded.config.models)}.")
    chosen = _choose(loaded, names, everything=False)
    _put_several(
        _operate(loaded, chosen, lambda fleet: fleet.restart(chosen, force=force, report=Reporter())), as_json
    )


@click.command()
@click.argument("name", shell_complete=complete_model)
@click.option("--level", type=WholeNumber(0, 2), help="Weights in VRAM (0), in RAM (1), on disk (2).")
@force_option
@json_option
@config_option
@click.pass_context
def sleep(ctx: click.Context, name: str, level: int | None, force: bool, as_json: bool) -> None:
    """Put a model to sleep: its VRAM is freed, its server stays."""
    loaded = load_config(ctx)
    loaded.model(name)
    _put_one(
        _operate(
            loaded, [name], lambda fleet: fleet.sleep(name, level=level, force=force, report=Reporter())
        ),
        as_json,
    )


@click.command()
@click.argument("name", shell_complete=complete_model)
@json_option
@config_option
@click.pass_context
def wake(ctx: click.Context, name: str, as_json: bool) -> None:
    """Wake a sleeping model; others sleep first where it needs their room."""
    loaded = load_config(ctx)
    loaded.model(name)
    _put_one(_operate(loaded, [name], lambda fleet: fleet.wake(name, report=Reporter())), as_json)


@click.command()
@click.argument("name", shell_complete=complete_model)
@force_option
@json_option
@config_option
@click.pass_context
def switch(ctx: click.Context, name: str, force: bool, as_json: bool) -> None:
    """Make a model answer; others sleep as far as needed."""
    loaded = load_config(ctx)
    loaded.model(name)
    _put_one(
        _operate(loaded, [name], lambda fleet: fleet.switch(name, force=force, report=Reporter())), as_json
    )


def _choose(
    loaded: LoadedConfig, names: Sequence[str], *, everything: bool, also: Sequence[str] = ()
) -> list[str]:
    """The models meant, each once; --all leaves out attached ones but `also`: they are not ours to start or
    stop.

    Raises UsageError for an unknown name, or names together with --all.
    """
    if everything and names:
        raise UsageError("Models are named and --all is given too.", "Leave one of the two out.")
    if not everything and not names:
        raise UsageError(
            "No model is named.", f"Say --all, or name some of: {', '.join(loaded.config.models)}."
        )
    for name in names:
        loaded.model(name)
    ours = [name for name, model in loaded.config.models.items() if not model.is_attached or name in also]
    return list(dict.fromkeys(names or ours or loaded.config.models))


def _with_servers(loaded: LoadedConfig) -> list[str]:
    """The models of which a server of ours runs; such a one may have got a `url:` meanwhile."""
    from vllm_sleep_tui.fleet.survey import read_once  # only `--all` asks

    return read_once(loaded, state_dir()).with_servers()


def _operate(
    loaded: LoadedConfig, names: Sequence[str], act: Callable[[Fleet], Awaitable[Any]]
) -> list[ModelSnapshot]:
    """Carry the operation out; how the models are afterwards."""

    async def act_and_look(fleet: Fleet) -> FleetSnapshot:
        await act(fleet)
        return await fleet.measured()

    snapshot = with_fleet(loaded, act_and_look, looks=False)
    return [snapshot.model(name) for name in names]


def _put_one(models: list[ModelSnapshot], as_json: bool) -> None:
    if as_json:
        put_json({"version": 1, **_result(models[0])}, done=True)
    else:
        _put_lines(models)


def _put_several(models: list[ModelSnapshot], as_json: bool) -> None:
    if as_json:
        put_json({"version": 1, "models": [_result(model) for model in models]}, done=True)
    else:
        _put_lines(models)


def _put_lines(models: list[ModelSnapshot]) -> None:
    for model in models:
        level = "" if model.level is None else f" L{model.level}"
        put_done(f"{model.name}  {model.state}{level}  VRAM {gib(model.vram_bytes)}")


def _result(model: ModelSnapshot) -> dict[str, Any]:
    shown = model_json(model)
    return {"model": shown.pop("name"), **shown}
