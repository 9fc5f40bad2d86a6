"""Where a run takes place: the person's own fleet, or one of the pair alone with this run's changes.

The changed pair has a config file of its own beside the person's, so that relative paths in it stay true, and
so records of its own; whatever ends the run, `--config` on that file reaches its servers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from vllm_sleep_tui.bench.plan import Override, Plan
from vllm_sleep_tui.config.flags import AmbiguousError, spelled
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.yaml import as_yaml, parse, typed
from vllm_sleep_tui.errors import PanelError, UsageError
from vllm_sleep_tui.files import write_private
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.snapshot import Report


def changed_models(loaded: LoadedConfig, plan: Plan) -> dict[str, dict[str, Any]]:
    """The pair's entries in the config with the plan's changes, as written: ${VAR} stays."""
    written = parse(loaded.path).values["models"]
    models: dict[str, dict[str, Any]] = {}
    for name in plan.pair:
        entry = dict(written[name])
        for override in plan.overrides:
            if override.model in (name, "*"):
                _change(entry, override)
        models[name] = entry
    return models


def recorded_models(loaded: LoadedConfig, plan: Plan) -> dict[str, dict[str, Any]]:
    """The same for a result file, which people show around: digests stand for the values in `env`.

    Those may be tokens. The digests tell a run that is resumed whether a value has changed.
    """
    models: dict[str, dict[str, Any]] = typed(changed_models(loaded, plan))
    for entry in models.values():
        if values := entry.get("env"):
            if isinstance(values, list):
                values = dict(item.split("=", 1) if "=" in item else (item, "") for item in values)
            entry["env"] = {key: _digest(str(value)) for key, value in values.items()}
    return models


def _digest(value: str) -> str:
    return f"sha256:{hashlib.sha256(value.encode()).hexdigest()[:8]}"


def _change(entry: dict[str, Any], override: Override) -> None:
    if override.argument is None:
        entry["level"] = override.value
        return
    given = entry.get("args")
    if isinstance(given, list):
        raise UsageError(
            f"--set {override.model}.args.{override.argument}: its `args:` are a list of words.",
            "Write them as flags and values, as in {max-model-len: 8192}.",
        )
    same = _name(override.argument)
    arguments = {key: value for key, value in (given or {}).items() if _name(key) != same}
    if override.value is not None:
        arguments[override.argument] = override.value
    entry["args"] = arguments


def _name(flag: str) -> str:
    """One spelling of a flag."""
    try:
        return spelled(flag).name
    except AmbiguousError:
        return flag


def check_changes(loaded: LoadedConfig, plan: Plan) -> None:
    """Raises UsageError if the pair's config with the plan's changes could not be loaded."""
    if plan.overrides:
        path = write_config(loaded, plan)
        try:
            load(path)
        finally:
            path.unlink(missing_ok=True)


def write_config(loaded: LoadedConfig, plan: Plan) -> Path:
    """Write the config of the changed pair; the same changes always have the same file."""
    written = parse(loaded.path).values
    kept = {key: written[key] for key in ("vllm_command", "simulated_gpus") if written.get(key)}
    content = as_yaml({**kept, "models": changed_models(loaded, plan)}).encode()
    name = f".{loaded.path.stem}.bench-{hashlib.sha256(content).hexdigest()[:8]}.yaml"
    path = loaded.path.with_name(name)
    write_private(path, content)
    return path


@contextlib.asynccontextmanager
async def open_bed(fleet: Fleet, plan: Plan, report: Report | None) -> AsyncIterator[Fleet]:
    """The fleet to measure on; a changed pair is stopped and its file removed at the end."""
    if not plan.overrides:
        yield fleet
        return
    await fleet.stop(plan.pair, report=report)
    path = write_config(fleet.loaded, plan)
    try:
        async with Fleet(load(path), fleet.state_dir) as bed:
            try:
                yield bed
            finally:
                await _stop_all(bed, plan.pair, report)
    finally:
        path.unlink(missing_ok=True)


async def _stop_all(bed: Fleet, pair: Sequence[str], report: Report | None) -> None:
    """Stop the pair, with force if it does not go willingly."""
    try:
        await bed.stop(pair, report=report)
    except PanelError:
        await bed.stop(pair, force=True, report=report)
