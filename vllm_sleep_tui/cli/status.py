"""`status`: what runs, what it holds; the fixed JSON of it."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import msgspec

from vllm_sleep_tui.cli.common import (
    config_option,
    draw,
    json_option,
    json_text,
    load_config,
    put,
    put_json,
)
from vllm_sleep_tui.cli.scrape import page
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot, GpuSnapshot, ModelSnapshot
from vllm_sleep_tui.fleet.survey import looking, read_once
from vllm_sleep_tui.paths import APP, state_dir
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.units import NONE, age, gib, took

MODEL_FIELDS = (
    "name",
    "state",
    "level",
    "phase",
    "operation",
    "pid",
    "port",
    "gpus",
    "vram_bytes",
    "vram_by_gpu",
    "ram_bytes",
    "pinned_bytes",
    "since",
    "reason",
    "cure",
    "last_switch",
)
GPU_FIELDS = ("index", "uuid", "name", "used_bytes", "total_bytes", "utilization", "simulated")
SWITCH_PHASES = ("drain", "sleep", "settle", "wake", "weights", "reload", "kv_cache", "reset", "prove")
WATCH_SECONDS = 1.0
_CLEAR, _HOME, _TO_END_OF_LINE, _TO_END_OF_SCREEN = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"


@click.command()
@click.option("--watch", is_flag=True, help="Again every second, until Ctrl-C; with --json a line each time.")
@click.option("--prometheus", is_flag=True, help="One page in Prometheus' text format, for scraping.")
@json_option
@config_option
@click.pass_context
def status(ctx: click.Context, watch: bool, prometheus: bool, as_json: bool) -> None:
    """Show every model and GPU."""
    if prometheus and (watch or as_json):
        raise click.UsageError("--prometheus goes with neither --watch nor --json.")
    loaded = load_config(ctx, only_looks=True)
    if watch:
        with looking(loaded, state_dir()) as look:
            _watch(look, as_json=as_json)
        return
    snapshot = read_once(loaded, state_dir())
    if prometheus:
        put(page(snapshot), nl=False)
    elif as_json:
        put_json(status_json(snapshot))
    else:
        put("\n".join(status_lines(snapshot)))


def _watch(look: Callable[[], FleetSnapshot], *, as_json: bool) -> None:
    """Show it again and again: in place on a terminal, one below the other elsewhere."""
    in_place = sys.stdout.isatty() and not as_json
    if in_place:
        draw(_CLEAR)
    while True:
        began = time.monotonic()
        snapshot = look()
        if as_json:
            put(json_text(status_json(snapshot)))
        elif in_place:
            draw(redrawn(status_lines(snapshot), shutil.get_terminal_size()))
        else:
            put("\n".join([*status_lines(snapshot), ""]))
        time.sleep(max(0.0, began + WATCH_SECONDS - time.monotonic()))


def redrawn(lines: Sequence[str], size: os.terminal_size) -> str:
    """What draws the lines over those before, without a flicker; what does not fit is left out."""
    flat = [line for text in lines for line in clean(text).split("\n")]
    shown = (f"{line[: size.columns]}{_TO_END_OF_LINE}" for line in flat[: size.lines - 1])
    return "".join((_HOME, *(f"{line}\n" for line in shown), _TO_END_OF_SCREEN))


def status_json(snapshot: FleetSnapshot) -> dict[str, Any]:
    """The fixed contract of ``status --json``, its fields in their order."""
    return {
        "version": snapshot.version,
        "models": [model_json(model) for model in snapshot.models],
        "gpus": [gpu_json(gpu) for gpu in snapshot.gpus],
        "host": msgspec.to_builtins(snapshot.host),
    }


def model_json(model: ModelSnapshot) -> dict[str, Any]:
    """One model as the contract has it."""
    shown = {name: msgspec.to_builtins(getattr(model, name)) for name in MODEL_FIELDS}
    if model.last_failure is not None:
        shown["last_failure"] = msgspec.to_builtins(model.last_failure)
    if model.last_switch is not None:
        phases = {phase: model.last_switch.phases.get(phase) for phase in SWITCH_PHASES}
        shown["last_switch"] = {"phases": phases, "total": model.last_switch.total}
    return shown


def gpu_json(gpu: GpuSnapshot) -> dict[str, Any]:
    """One GPU as the contract has it; beyond it, its KV pool where there is one."""
    shown = {name: getattr(gpu, name) for name in GPU_FIELDS}
    return shown if gpu.pool_bytes is None else {**shown, "pool_bytes": gpu.pool_bytes}


def status_lines(snapshot: FleetSnapshot) -> list[str]:
    """The same for people: a table, then what failed and why."""
    now = snapshot.time or time.time()
    rows: list[tuple[str, ...]] = [("MODEL", "STATE", "VRAM", "RAM", "GPUS", "PORT", "FOR", "LAST SWITCH")]
    rows += [_row(model, now) for model in snapshot.models]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.append("")
    lines += [_gpu_line(gpu) for gpu in snapshot.gpus]
    host = snapshot.host
    lines.append(f"RAM    {gib(host.ram_available_bytes)} free of {gib(host.ram_total_bytes)}")
    for model in snapshot.models:
        if model.reason:
            lines += ["", f"{model.name}: {model.reason}", *([f"  {model.cure}"] if model.cure else [])]
        if (died := model.last_failure) is not None:
            lines += ["", f"{model.name}: {died.sentence}", f"  What it said last: {APP} logs {model.name}"]
    return [*lines, *backend_lines(snapshot.models), *snapshot.notes]


def backend_lines(models: Sequence[ModelSnapshot]) -> list[str]:
    """Who runs on our sleep mode, and who on vLLM's own although ours was to be had."""
    by_why: dict[str, list[str]] = {}
    for model in models:
        if model.sleep_backend == "own":
            by_why.setdefault("", []).append(model.name)
        elif model.sleep_backend_why:
            by_why.setdefault(model.sleep_backend_why, []).append(model.name)
    words = {why: f"vLLM's own, {why}" if why else "the fast one" for why in by_why}
    return [f"Sleep mode of {', '.join(names)}: {words[why]}" for why, names in by_why.items()]


def _row(model: ModelSnapshot, now: float) -> tuple[str, ...]:
    state = str(model.state)
    if model.level is not None:
        state += f" L{model.level}"
    if model.phase is not None:
        state += f" ({model.phase})"
    switch = model.last_switch
    return (
        model.name,
        state,
        gib(model.vram_bytes),
        gib(model.ram_bytes),
        ",".join(str(gpu) for gpu in model.gpus) or (NONE if model.frees_memory else "CPU"),
        str(model.port or NONE),
        age(now - model.since) if model.since else NONE,
        took(switch.total) if switch else NONE,
    )


def _gpu_line(gpu: GpuSnapshot) -> str:
    simulated = "  SIMULATED" if gpu.simulated else ""
    busy = "" if gpu.utilization is None else f"  {gpu.utilization:.0f} %"
    memory = f"{gib(gpu.used_bytes)} of {gib(gpu.total_bytes)}"
    pool = f"\n       {gib(gpu.pool_bytes)}  KV pool" if gpu.pool_bytes else ""
    others = "".join(f"\n       {gib(p.bytes)}  pid {p.pid}  {p.user}  {p.command}" for p in gpu.others)
    return f"GPU {gpu.index}  {memory}{busy}  {gpu.name}{simulated}{pool}{others}"
