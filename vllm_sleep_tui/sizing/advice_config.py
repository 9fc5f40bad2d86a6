"""The advice as a changed config file: what it would say, and writing it with its comments kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_sleep_tui.config.edit import edited, replace_text
from vllm_sleep_tui.config.flags import spelled
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.yaml import Key
from vllm_sleep_tui.engine.serve_args import UTILIZATION
from vllm_sleep_tui.files import trust, trusted
from vllm_sleep_tui.sizing.advice import Advice, changes

AFTERWARDS = "It holds from each model's next start on; models with new arguments are measured anew."
"""What a person must know who has applied it."""


def proposed_text(loaded: LoadedConfig, advice: Advice) -> str | None:
    """The config's text with the advice in it, None if it says so already; raises RefusedError."""
    values = _values(loaded, advice)
    return edited(loaded.path, values) if values else None


def apply_text(loaded: LoadedConfig, text: str, state_dir: Path) -> LoadedConfig:
    """Write the text to the config, trusted if it was before; raises PanelError."""
    was_trusted = trusted(loaded.found, loaded.agreement(), state_dir)
    replace_text(loaded.path, text)
    changed = load(loaded.found)
    if was_trusted:
        trust(changed.found, changed.agreement(), state_dir)
    return changed


def _values(loaded: LoadedConfig, advice: Advice) -> dict[Key, Any]:
    configured = {name: str(model.level) for name, model in loaded.config.models.items()}
    values: dict[Key, Any] = {}
    for name, (level, utilization) in changes(advice, configured).items():
        if level is not None:
            values["models", name, "level"] = level if level == "none" else int(level)
        if utilization is not None:
            values["models", name, "args", _spelled(loaded, name)] = utilization
    return values


def _spelled(loaded: LoadedConfig, name: str) -> str:
    """The flag as the config spells it."""
    prefix = f"models.{name}.args."
    inside = (key.removeprefix(prefix) for key in loaded.lines if key.startswith(prefix))
    return next((key for key in inside if spelled(key).name == UTILIZATION), UTILIZATION)
