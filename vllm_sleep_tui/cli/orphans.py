"""`orphans`: what is left of servers whose keeper is gone."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

import click

from vllm_sleep_tui.cli.common import json_option, put_json
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.discovery import Orphan, find_orphans
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.telemetry.processes import is_alive, signal_process

END_SECONDS = 10.0


@click.command()
@click.option("--end", is_flag=True, help="End them (SIGKILL: nobody is left to ask them kindly).")
@json_option
def orphans(end: bool, as_json: bool) -> None:
    """List what is left of servers whose keeper is gone.

    Servers that were not started here are never touched.
    """
    found = find_orphans(state_dir())
    if end:
        end_orphans(found)
    if as_json:
        shown = [{"pid": o.process.pid, "launch": o.launch, "command": o.command} for o in found]
        put_json({"version": 1, "ended": end, "orphans": shown})
        return
    for orphan in found:
        click.echo(f"{'ended' if end else 'orphan'}  pid {orphan.process.pid}  {orphan.command}")
    if not found:
        click.echo("No orphans.")
    elif not end:
        click.echo("End them with: vllm-sleep-tui orphans --end")


def end_orphans(found: Sequence[Orphan]) -> None:
    """Kill them and wait until they are gone; raises OperationError for any that stays 10 s."""
    for orphan in found:
        signal_process(orphan.process, signal.SIGKILL)
    deadline = time.monotonic() + END_SECONDS
    while left := [orphan.process.pid for orphan in found if is_alive(orphan.process)]:
        if time.monotonic() > deadline:
            raise OperationError(
                f"Still there after {END_SECONDS:.0f} s: pid {', '.join(map(str, left))}.",
                "A process that waits for its driver ends late: look again in a minute.",
            )
        time.sleep(0.05)
