"""What a changed config file means for what runs, in sentences for `serve` and the panel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from vllm_sleep_tui.config.types import Config


class Change(NamedTuple):
    """One thing that is another than before."""

    sentence: str
    needs_care: bool = False
    """Whether it does nothing until somebody acts."""


def changes(old: Config, new: Config, running: Mapping[str, int | None]) -> list[Change]:
    """What differs, for a person; `running` has the models with a server of ours, each with its pid."""
    found = [Change(f"{name} is new") for name in new.models if name not in old.models]
    for name, model in old.models.items():
        if name not in new.models:
            left = (
                f"; its server (pid {running[name]}) is left running, `orphans --end` ends it"
                if name in running
                else ""
            )
            found.append(Change(f"{name} is no longer in the config{left}", needs_care=name in running))
        elif name in running and launch_part(new, name) != launch_part(old, name):
            found.append(Change(f"{name} changed and needs a restart: `restart {name}`", needs_care=True))
        elif new.models[name] != model:
            found.append(Change(f"{name} changed"))
    if new.simulated_gpus != old.simulated_gpus:
        found.append(Change("simulated_gpus changed, which only a new serve or panel heeds", needs_care=True))
    others = ("vllm_command", "gateway", "keep_conversations")
    return found + [Change(f"{key} changed") for key in others if getattr(new, key) != getattr(old, key)]


def launch_part(config: Config, name: str) -> tuple[object, ...]:
    """What of the config the running server of a model was launched with."""
    model = config.models[name]
    return (
        model.model,
        model.gpus,
        model.level,
        model.args,
        model.env,
        model.port,
        model.aliases,
        model.vllm_command or config.vllm_command,
        model.sleep_backend,
        model.kv_cache,
        model.api_key,
    )
