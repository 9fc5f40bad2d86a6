"""`demo`: four models on two simulated GPUs, to try everything without a GPU or vLLM."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from vllm_sleep_tui.cli.common import Number, need_terminal, put_done, say
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.schema import write_schema
from vllm_sleep_tui.config.types import CONFIG_NAME, SCHEMA_NAME
from vllm_sleep_tui.config.yaml import MAX_BYTES
from vllm_sleep_tui.errors import OperationError, RefusedError, UsageError
from vllm_sleep_tui.files import is_taken, is_text, private_dir, read_own, trust, write_private
from vllm_sleep_tui.fleet.survey import flag_tables
from vllm_sleep_tui.paths import state_dir

PANEL_SPEED = 5.0
"""How many times faster than measured the panel's demo is, so that nobody waits a minute for a start."""
FIRST = "qwen"
HINT = "The demo starts qwen. Then ↓ and ⏎ switch to phi, c asks it something, ? has all keys."
_MARK = "# The demo:"
_TEMPLATE = """\
# yaml-language-server: $schema={schema}
{mark} two simulated GPUs, four models, and real processes that speak vLLM's HTTP.
vllm_command: [{python}, -m, vllm_sleep_tui.simulator]
simulated_gpus:
  - {{name: Demo, memory: 24GiB}}
  - {{name: Demo, memory: 24GiB}}
models:
  qwen:
    model: Qwen/Qwen3-0.6B
    gpus: [0]
    args: {{max-model-len: 4096, enable-auto-tool-choice: true, tool-call-parser: hermes}}
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
    "--speed", type=Number(), help="How many times faster than on an H100.  [default: 5; with --init: 1]"
)
def demo(folder: Path | None, speed: float | None) -> None:
    """Try it without a GPU: the panel on simulated ones."""
    if speed is not None and not 0.01 <= speed <= 1000:
        raise UsageError(f"--speed {speed:g}: not from 0.01 to 1000.", "Name a number such as 10.")
    if folder is not None:
        path = write_demo(folder, 1.0 if speed is None else speed)
        put_done(str(path))
        say(f"Next: vllm-sleep-tui --config {path} start --all")
        return
    need_terminal()
    click.get_current_context().exit(open_demo(PANEL_SPEED if speed is None else speed))


def open_demo(speed: float = PANEL_SPEED) -> int:
    """The panel over the demo, which begins to start its first model; the exit code."""
    home = private_dir(state_dir() / "demo")
    path = write_demo(home, speed)
    from vllm_sleep_tui.tui.app import run_panel

    return run_panel(load(path), private_dir(home / "state"), lambda _: True, begin=FIRST, hint=HINT)


def write_demo(folder: Path, speed: float) -> Path:
    """Write the demo's config to `folder`; its path. Raises PanelError if it cannot be written."""
    path = folder / CONFIG_NAME
    if is_taken(path) and not _is_demo(path):
        raise RefusedError(f"{path} is there already and is no demo.", "Name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OperationError(f"{path} cannot be written: {error.strerror}.", "Name another folder.") from None
    if not is_text(sys.executable):
        raise OperationError(
            f"{sys.executable}: a path that is not UTF-8 cannot stand in a config.",
            "Install vllm-sleep-tui in another folder.",
        )
    text = _TEMPLATE.format(python=_quoted(sys.executable), schema=SCHEMA_NAME, mark=_MARK, speed=speed)
    write_private(path, text.encode())
    loaded = load(path)
    write_schema(folder / SCHEMA_NAME, flag_tables(loaded, state_dir(), may_ask=False))
    trust(loaded.found, loaded.agreement(), state_dir())
    return path


def _is_demo(path: Path) -> bool:
    """Whether this is an earlier demo, or what a full disk left of it; a link is neither."""
    try:
        there = read_own(path, MAX_BYTES).decode(errors="replace")
    except OSError:
        return False
    return not there.strip() or _MARK in there


def _quoted(text: str) -> str:
    """A YAML text in single quotes."""
    return "'" + text.replace("'", "''") + "'"
