"""Whether a model comes back from sleep level 2, by its loader and the vLLM that runs it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.loaders import RELOADS_SINCE, why_no_reload
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.engine.versions import release_of
from vllm_sleep_tui.errors import RefusedError, UsageError
from vllm_sleep_tui.fleet.model import Model
from vllm_sleep_tui.fleet.observe.discovery import find_command
from vllm_sleep_tui.fleet.states import RUNNING
from vllm_sleep_tui.fleet.store.records import Record
from vllm_sleep_tui.sizing.estimate import checkpoint_of


def installed_version(model: Model) -> str | None:
    """The vLLM that runs the model, else the one that would; None if neither is known."""
    record = model.read()
    if record.state in RUNNING and record.vllm_version:
        return record.vllm_version
    vllm = find_command(model.vllm_command, os.environ)
    return (vllm.version if vllm else None) or record.vllm_version


def never_level2(model: ModelConfig, version: str | None, base: Path) -> str | None:
    """Why level 2 could not bring this model back, in words; None if it can.

    `base` is the config's folder; a `version` that is not known counts as the newest.
    """
    if model.model is None:
        return None
    return why_no_reload(model.model, model.args, version, _quantization(model, version, base))


def why_no_level2(model: ModelConfig, version: str | None, base: Path) -> str | None:
    """Why level 2 would lose something of this model, in words; None if it would not."""
    if never := never_level2(model, version, base):
        return never
    if ServeArgs(model.args).drafts:
        return "vLLM does not reload the draft model of speculative decoding"
    return None


def _quantization(model: ModelConfig, version: str | None, base: Path) -> str | None:
    """What the checkpoint says it is quantised with, where an old vLLM chooses its loader by that."""
    release = release_of(version or "")
    if release is None or release >= RELOADS_SINCE["bitsandbytes"]:
        return None
    with contextlib.suppress(UsageError):
        return checkpoint_of(model, base).quantization
    return None


def check_same_level(record: Record, level: int | None) -> None:
    """Raises RefusedError if a sleeper is asked to sleep at another level."""
    if level is not None and level != record.level:
        raise RefusedError(
            f"{record.name} sleeps at level {record.level}; vLLM cannot go to level {level} without a wake.",
            f"Wake it first, then sleep it at level {level}; its pinned RAM stays until it is stopped.",
        )
