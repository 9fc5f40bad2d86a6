"""`advise`: who should sleep at which level, with this machine's numbers; estimates before a launch."""

from __future__ import annotations

import sys
from typing import Any

import click
import msgspec

from vllm_sleep_tui.cli.common import (
    complete_model,
    config_option,
    confirm,
    given_config,
    json_option,
    load_config,
    put,
    put_json,
    say,
)
from vllm_sleep_tui.config.edit import difference
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import CancelledByUser, RefusedError, UsageError
from vllm_sleep_tui.fleet.advice import (
    AFTERWARDS,
    HIGHEST_UTILIZATION,
    Advice,
    Estimate,
    GpuAdvice,
    ModelAdvice,
    advise_config,
    apply_text,
    estimate_of,
    proposed_text,
)
from vllm_sleep_tui.paths import here, state_dir
from vllm_sleep_tui.units import KIB, gib, start_time, took


@click.command()
@click.argument("names", metavar="[NAME…]", nargs=-1, shell_complete=complete_model)
@click.option(
    "--apply", "is_applied", is_flag=True, help="Write it to the config, after showing what changes."
)
@click.option("--yes", "is_agreed", is_flag=True, help="With --apply: do not ask.")
@json_option
@config_option
@click.pass_context
def advise(
    ctx: click.Context, names: tuple[str, ...], is_applied: bool, is_agreed: bool, as_json: bool
) -> None:
    """Say which model should sleep at which level, and what fits together.

    A NAME that is not in the config is a folder or a hub name in the cache: its needs are estimated from its
    files, and nothing is launched or fetched.
    """
    loaded = _config(ctx, is_needed=not names)
    configured = loaded.config.models if loaded else {}
    others = [name for name in names if name not in configured]
    if is_applied and others:
        raise UsageError(
            f"{others[0]!r} is not in the config, so nothing can be written for it.", "Name others."
        )
    estimates = {name: _estimate(name, loaded) for name in others}
    chosen = [name for name in names if name in configured] if names else list(configured)
    advice = advise_config(loaded, state_dir(), chosen) if loaded and chosen else Advice(models=(), gpus=())
    if as_json:
        put_json(_as_json(advice, estimates))
    else:
        put("\n".join(_lines(advice, estimates)))
    if is_applied and loaded is not None:
        _apply(loaded, advice, is_agreed=is_agreed)


def _config(ctx: click.Context, *, is_needed: bool) -> LoadedConfig | None:
    """The config; None if there is none and nobody asked for one."""
    try:
        return load_config(ctx, only_looks=True)
    except UsageError:
        if is_needed or given_config(ctx) is not None:
            raise
        return None


# ── estimates ────────────────────────────────────────────────────────────────────────────────────────────


def _estimate(name: str, loaded: LoadedConfig | None) -> Estimate:
    """What a model would need that the config does not name; raises UsageError if it is not here."""
    try:
        return estimate_of(name, here(), loaded, state_dir())
    except UsageError as error:
        configured = f" In the config: {', '.join(loaded.config.models)}." if loaded else ""
        cure = f"{error.cure.rstrip('.')}.{configured}" if configured else error.cure
        raise UsageError(error.what, cure) from None


# ── output ───────────────────────────────────────────────────────────────────────────────────────────────


def _as_json(advice: Advice, estimates: dict[str, Estimate]) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(advice)
    named = [{"name": name, **msgspec.to_builtins(estimate)} for name, estimate in estimates.items()]
    return {"version": 1, **shown, "estimates": named}


def _lines(advice: Advice, estimates: dict[str, Estimate]) -> list[str]:
    """The same for people."""
    width = max((len(model.name) for model in advice.models), default=0)
    lines = [line for model in advice.models for line in _model_lines(model, width)]
    if advice.gpus:
        lines += [""] if lines else []
        lines += [line for gpu in advice.gpus for line in _gpu_lines(gpu)]
    for name, estimate in estimates.items():
        lines += [""] if lines else []
        lines += _estimate_lines(name, estimate)
    return lines


def _model_lines(model: ModelAdvice, width: int) -> list[str]:
    lines = [f"{model.name.ljust(width)}  {model.verdict.ljust(13)}  {model.why}"]
    if model.level_0 is not None:
        lines.append(f"{' ' * (width + 17)}{model.level_0.sentence}")
    return lines


def _gpu_lines(gpu: GpuAdvice) -> list[str]:
    lines = [f"GPU {gpu.index}  {gpu.sentence}"]
    if gpu.sharing is not None:
        lines.append("       Two could stay awake with smaller KV caches (estimate):")
        for name in gpu.sharing.models:
            contexts = gpu.sharing.contexts[name]
            fits = "" if contexts is None else f", {contexts:.1f} full contexts"
            cache = gib(gpu.sharing.kv_cache_memory_bytes[name])
            lines.append(
                f"         {name}: {cache}{fits}: gpu-memory-utilization {gpu.sharing.utilization[name]:g}"
            )
    return lines


def _estimate_lines(name: str, estimate: Estimate) -> list[str]:
    """An estimate, a line for each thing; what is not known says why."""
    count = "" if estimate.parameters is None else f", {estimate.parameters / 1e9:.2f} billion parameters"
    kind = ", ".join(filter(None, (estimate.architecture, estimate.task, estimate.quantization)))
    lines = [f"{name}: an estimate from its files; nothing was launched", f"  model         {kind}{count}"]
    lines.append(f"  weights       {gib(estimate.weights_bytes)}")
    if estimate.kv_bytes_per_token is not None:
        context = (
            f", {gib(estimate.context_bytes)} for {estimate.max_length} tokens" if estimate.max_length else ""
        )
        lines.append(f"  KV cache      {estimate.kv_bytes_per_token / KIB:.0f} KiB a token{context}")
    least = f"; {gib(estimate.floor_per_gpu)} at least, for one context" if estimate.floor_per_gpu else ""
    at = f" at gpu-memory-utilization {HIGHEST_UTILIZATION:g}" if estimate.awake_per_gpu else ""
    lines.append(f"  VRAM awake    {gib(estimate.awake_per_gpu)}{at}{least}")
    lines.append(f"  VRAM asleep   {gib(estimate.asleep_per_gpu)}")
    lines.append(f"  RAM, level 1  {gib(estimate.pinned_bytes)} pinned for good")
    lines += _time_lines(estimate)
    return [
        *lines,
        *(f"  not known     {what.replace('_', ' ')}: {why}" for what, why in estimate.unknown.items()),
    ]


def _time_lines(estimate: Estimate) -> list[str]:
    times = estimate.times
    if times is None:
        return []
    return [
        f"  start         {start_time(times.start)}, the first {start_time(times.first_start)} (on an H100)",
        f"  level 1       sleeps in {took(times.sleep1)}, first in {took(times.sleep1_first)}; "
        f"wakes in {took(times.wake1)}",
        f"  level 2       sleeps in {took(times.sleep2)}; wakes in {took(times.wake2)}",
    ]


# ── --apply ──────────────────────────────────────────────────────────────────────────────────────────────


def _apply(loaded: LoadedConfig, advice: Advice, *, is_agreed: bool) -> None:
    """Write the advice to the config, after a look at what changes; raises PanelError."""
    text = proposed_text(loaded, advice)
    if text is None:
        say("The config says so already.")
        return
    say(difference(loaded.path, text).rstrip())
    if not is_agreed:
        if not sys.stdin.isatty():
            raise RefusedError("Nothing was written: there is nobody to ask.", "Add --yes.")
        if not confirm("Write this?"):
            raise CancelledByUser("Nothing was written.")
    apply_text(loaded, text, state_dir())
    say(f"Written. {AFTERWARDS}")
