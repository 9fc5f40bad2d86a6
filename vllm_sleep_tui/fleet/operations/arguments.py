"""The arguments of a model against the vLLM that will read them, before anything is started for them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from vllm_sleep_tui.config.flags import FlagTable, shipped_table
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.argv import check_args
from vllm_sleep_tui.engine.installed_flags import Installed, ask_flags, installed, kept_flags
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.discovery import find_command
from vllm_sleep_tui.fleet.operations.operation import Operation
from vllm_sleep_tui.fleet.states import StartPhase

SIMULATED_VERSION = "0.32.0"
ASKING = "asking vLLM for its flags, once"


def vllm_of(command: Sequence[str], folder: Path) -> Installed | None:
    """The vLLM of a `vllm_command` of a config in `folder`; None if it is not there."""
    found = find_command(command, os.environ)
    return installed(command, found.version if found else None, os.environ, folder)


def known_flags(model: Model) -> FlagTable:
    """What the model's vLLM knows, as far as that is known without running it."""
    if model.core.simulated is not None:
        return simulated_flags({**os.environ, **model.config.env})
    return kept_flags(vllm_of(model.vllm_command, model.base), model.core.state_dir)


def flags_of(command: Sequence[str], folder: Path, state_dir: Path, *, may_ask: bool) -> FlagTable:
    """What the vLLM of a `vllm_command` knows, asked if it may be; outside of any event loop."""
    vllm = vllm_of(command, folder)
    return asyncio.run(ask_flags(vllm, state_dir, os.environ)) if may_ask else kept_flags(vllm, state_dir)


def complaints(model: ModelConfig, flags: FlagTable) -> Iterator[tuple[str, str, str]]:
    """What this vLLM would refuse of the model's arguments: the flag, what is wrong, what to do."""
    return check_args(model.args, flags)


def simulated_flags(environ: Mapping[str, str]) -> FlagTable:
    """What the demo's stand-in knows in this environment."""
    version = environ.get("VLLM_SIM_VERSION", SIMULATED_VERSION)
    return FlagTable(version, shipped_table(version).flags, is_asked=True)


async def learn_flags(model: Model, operation: Operation) -> FlagTable:
    """The same, after asking a vLLM that was never asked before."""
    flags = known_flags(model)
    if flags.is_asked:
        return flags
    operation.tell(model.name, StartPhase.LOADING, ASKING)
    return await ask_flags(vllm_of(model.vllm_command, model.base), model.core.state_dir, os.environ)


def check_arguments(model: Model, flags: FlagTable) -> None:
    """Raises UsageError for the first argument that the model's vLLM would refuse half a minute later.

    A shipped table speaks for no installed vLLM, so by it alone nothing is refused.
    """
    if not flags.is_asked:
        return
    for flag, wrong, cure in complaints(model.config, flags):
        key = f"models.{model.name}.args.{flag}"
        line = model.core.loaded.lines.get(key) or model.core.loaded.lines.get(f"models.{model.name}.args", 1)
        raise UsageError(f"{model.core.loaded.path}:{line}: {key}: {wrong}.", cure)
