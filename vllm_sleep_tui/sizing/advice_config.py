"""The advice as a changed config file: what it would say, and writing it with its comments kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_sleep_tui.config.edit import edited, replace_text
from vllm_sleep_tui.config.flags import spelled
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.yaml import Key
from vllm_sleep_tui.engine.serve_args import UTILIZATION
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.files import trust, trusted
from vllm_sleep_tui.sizing.advice import Advice, changes
from vllm_sleep_tui.sizing.sharing import listed

AFTERWARDS = "It holds from each model's next start on; models with new arguments are measured anew."
"""What a person must know who has applied it."""


def proposed_text(loaded: LoadedConfig, advice: Advice) -> str | None:
    """The config's text with the advice in it, None if it says so already; raises RefusedError.

    Raises UsageError if the advice is on some of the models whose smaller caches only fit together.
    """
    _check_whole(advice)
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


def _check_whole(advice: Advice) -> None:
    """Raises UsageError if smaller caches would be written for some who share a GPU, but not all."""
    named = {model.name for model in advice.models}
    for model in advice.models:
        missing = [name for name in model.beside if name not in named]
        if model.utilization is not None and model.level == "none" and missing:
            raise UsageError(
                f"The advice on {model.name} holds only with that on {listed(missing)}.",
                "Name them too, or nobody.",
            )


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
