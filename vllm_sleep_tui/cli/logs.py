"""`logs`: what a server said."""

from __future__ import annotations

import time
from pathlib import Path

import click

from vllm_sleep_tui.cli.common import config_option, load_config
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.records import RecordStore
from vllm_sleep_tui.paths import state_dir

POLL_SECONDS = 0.2


@click.command()
@click.argument("name")
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said from now on, until Ctrl-C.")
@click.option("-n", "count", type=click.IntRange(0), default=100, show_default=True, help="How many lines.")
@config_option
@click.pass_context
def logs(ctx: click.Context, name: str, follow: bool, count: int) -> None:
    """Show the last lines of a model's log."""
    from vllm_sleep_tui.engine.logs import LogTail, strip_escapes

    loaded = load_config(ctx)
    loaded.model(name)
    recorded = RecordStore(state_dir(), loaded.path).read(name).log
    path = Path(recorded) if recorded else state_dir() / "logs" / f"{name}.log"
    if not path.exists() and not follow:
        raise OperationError(f"{name} has no log yet.", f"Start it: vllm-sleep-tui start {name}")
    tail = LogTail(path)
    lines = tail.read_new()
    lines = lines[len(lines) - min(count, len(lines)) :]
    while True:
        for line in lines:
            click.echo(strip_escapes(line))
        if not follow:
            return
        time.sleep(POLL_SECONDS)
        lines = tail.read_new()
