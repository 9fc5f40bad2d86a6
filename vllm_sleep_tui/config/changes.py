"""What a changed config file means for what runs, in sentences for `serve` and the panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from vllm_sleep_tui.config.types import Config


class Change(NamedTuple):
    """One thing that is another than before."""

    words: str
    model: str = ""
    """The model that it is about; empty: none alone."""
    needs_care: bool = False
    """Whether it does nothing until somebody acts."""

    @property
    def sentence(self) -> str:
        """The model and what is another of it."""
        return f"{self.model} {self.words}".strip()


def changes(old: Config, new: Config, running: Mapping[str, int | None]) -> list[Change]:
    """What differs, for a person; `running` has the models with a server of ours, each with its pid."""
    found = [Change("is new", name) for name in new.models if name not in old.models]
    for name, model in old.models.items():
        runs = name in running
        if name not in new.models:
            left = (
                f"; its server (pid {running[name]}) is left running, `orphans --end` ends it" if runs else ""
            )
            found.append(Change(f"is no longer in the config{left}", name, needs_care=runs))
            continue
        before, now = launch_part(old, name), launch_part(new, name)
        launched = [key for key in before if before[key] != now[key]] if runs else []
        if launched:
            what = _what(before, now, launched)
            found.append(
                Change(f"changed and needs a restart ({what}): `restart {name}`", name, needs_care=True)
            )
        values, new_values = msgspec.structs.asdict(model), msgspec.structs.asdict(new.models[name])
        told = {*launched, *(f"{key}_file" for key in launched)}  # where its values are from
        rest = [key for key in values if values[key] != new_values[key] and key not in told]
        if rest:
            found.append(Change(f"changed ({_what(values, new_values, rest)})", name))
    if new.simulated_gpus != old.simulated_gpus:
        found.append(Change("simulated_gpus changed, which only a new serve or panel heeds", needs_care=True))
    others = ("vllm_command", "gateway", "presets", "keep_conversations")
    return found + [Change(f"{key} changed") for key in others if getattr(new, key) != getattr(old, key)]


def _what(old: Mapping[str, Any], new: Mapping[str, Any], differing: Sequence[str]) -> str:
    """The keys that differ, by name alone: values may be secrets, but for aliases."""
    parts: list[str] = []
    for key in differing:
        before, after = old[key], new[key]
        if key == "aliases":
            parts += [f"alias {alias} added" for alias in after if alias not in before]
            parts += [f"alias {alias} removed" for alias in before if alias not in after]
        elif isinstance(before, dict):
            names = dict.fromkeys([*before, *after])
            parts += [f"{key} {name}" for name in names if before.get(name) != after.get(name)]
        else:
            parts.append(key)
    return ", ".join(parts or differing)


_LAUNCHED_WITH = (
    "model",
    "gpus",
    "level",
    "args",
    "env",
    "port",
    "aliases",
    "sleep_backend",
    "kv_cache",
    "api_key",
)


def launch_part(config: Config, name: str) -> dict[str, Any]:
    """What of the config the running server of a model was launched with."""
    model = config.models[name]
    return {key: getattr(model, key) for key in _LAUNCHED_WITH} | {
        "vllm_command": model.vllm_command or config.vllm_command
    }
