"""`demo`: four models on two simulated GPUs, to try everything without a GPU or vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vllm_sleep_tui.cli.common import need_terminal, say
from vllm_sleep_tui.config import CONFIG_NAME, SCHEMA_NAME
from vllm_sleep_tui.config_file import load, write_schema
from vllm_sleep_tui.errors import OperationError, RefusedError, UsageError
from vllm_sleep_tui.paths import private_dir, state_dir, trust, write_private

PANEL_SPEED = 5.0
"""How many times faster than measured the panel's demo is, so that nobody waits a minute for a start."""
_MARK = "# The demo:"
_TEMPLATE = """\
# yaml-language-server: $schema={schema}
{mark} two simulated GPUs, four models, and real processes that speak vLLM's HTTP.
vllm_command: [{python}, -m, vllm_sleep_tui.simulator]
simulated_gpus:
  - {{name: Demo 24 GB, memory: 24GiB}}
  - {{name: Demo 24 GB, memory: 24GiB}}
models:
  qwen:
    model: Qwen/Qwen3-0.6B
    gpus: [0]
    args: {{max-model-len: 4096}}
    env: {{VLLM_SIM_SPEED: "{speed:g}"}}
  phi:
    model: microsoft/Phi-3-vision-128k-instruct
    gpus: [0]
    args: {{max-model-len: 4096, trust-remote-code: true}}
    env: {{VLLM_SIM_SPEED: "{speed:g}"}}
  coder:
    model: Qwen/Qwen3-Coder-30B-A3B-Instruct-AWQ
    gpus: [1]
    args: {{max-model-len: 4096}}
    env: {{VLLM_SIM_SPEED: "{speed:g}"}}
  big:
    model: Qwen/Qwen3-32B-AWQ
    gpus: [0, 1]
    args: {{max-model-len: 4096, tensor-parallel-size: 2}}
    env: {{VLLM_SIM_SPEED: "{speed:g}"}}
"""


@click.command()
@click.option(
    "--init",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    help="Only write the demo's config there, for use with --config.",
)
@click.option(
    "--speed", type=float, help="How many times faster than on an H100.  [default: 5; with --init: 1]"
)
def demo(folder: Path | None, speed: float | None) -> None:
    """Try it without a GPU: the panel on simulated ones."""
    if speed is not None and not 0.01 <= speed <= 1000:
        raise UsageError(f"--speed {speed:g}: not from 0.01 to 1000.", "Name a number such as 10.")
    if folder is not None:
        path = write_demo(folder, 1.0 if speed is None else speed)
        click.echo(path)
        say(f"Next: vllm-sleep-tui --config {path} start --all")
        return
    need_terminal()
    home = private_dir(state_dir() / "demo")
    path = write_demo(home, PANEL_SPEED if speed is None else speed)
    from vllm_sleep_tui.tui.app import run_panel

    click.get_current_context().exit(run_panel(load(path), private_dir(home / "state")))


def write_demo(folder: Path, speed: float) -> Path:
    """Write the demo's config to `folder`; its path. Raises OperationError if it cannot be written."""
    path = folder / CONFIG_NAME
    try:
        there = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if there.strip() and _MARK not in there:
            raise RefusedError(f"{path} is there already and is no demo.", "Name another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        text = _TEMPLATE.format(python=_quoted(sys.executable), schema=SCHEMA_NAME, mark=_MARK, speed=speed)
        write_private(path, text.encode())
        write_schema(folder / SCHEMA_NAME)
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror}.", "Name another folder.") from None
    loaded = load(path)
    trust(loaded.path, loaded.digest, state_dir())
    return path


def _quoted(text: str) -> str:
    """A YAML text in single quotes."""
    return "'" + text.replace("'", "''") + "'"
