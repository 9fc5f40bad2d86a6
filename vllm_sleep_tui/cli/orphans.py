"""`orphans`: what is left of servers that nobody looks after, and whose the other servers are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from vllm_sleep_tui.cli.common import confirm, json_option, put, put_json, say
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.survey import ForeignServer, Orphan, end_orphans, find_orphans, find_strangers
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.units import gib


@click.command()
@click.option("--end", is_flag=True, help="End them, after a question.")
@click.option("--yes", is_flag=True, help="With --end: do not ask.")
@json_option
def orphans(end: bool, yes: bool, as_json: bool) -> None:
    """List what is left of servers that nobody looks after.

    Servers that were not started here are named and never touched.
    """
    processes = find_orphans(state_dir())
    ours = {orphan.process for orphan in processes}
    strangers = [stranger for stranger in find_strangers() if stranger.process not in ours]
    if end and processes:
        if not yes:
            ask(processes)
        end_orphans(processes)
    if as_json:
        put_json({"version": 1, "ended": end, **in_json(processes, strangers)})
    else:
        put_lines(processes, strangers, ended=end)


def ask(processes: Sequence[Orphan]) -> None:
    """Name what would be ended and ask; raises RefusedError without a yes."""
    for orphan in processes:
        say(line_of(orphan, "orphan"))
    try:
        agreed = confirm(f"End these {len(processes)}, which loses what they hold?")
    except click.Abort:
        agreed = False
    if not agreed:
        cure = "Say yes to end them." if sys.stdin.isatty() else "Say --yes to end them without a question."
        raise RefusedError("Nothing was ended.", cure)


def in_json(processes: Sequence[Orphan], strangers: Sequence[ForeignServer]) -> dict[str, object]:
    """Both lists for a program."""
    return {
        "orphans": [
            {
                "pid": orphan.process.pid,
                "launch": orphan.launch,
                "command": orphan.command,
                "why": orphan.why,
                "ram_bytes": orphan.ram_bytes,
            }
            for orphan in processes
        ],
        "strangers": [
            {
                "pid": stranger.process.pid,
                "user": stranger.user,
                "command": stranger.command,
                "vram_bytes": stranger.vram_bytes,
            }
            for stranger in strangers
        ],
    }


def put_lines(processes: Sequence[Orphan], strangers: Sequence[ForeignServer], *, ended: bool) -> None:
    """Both lists for a person."""
    for orphan in processes:
        put(line_of(orphan, "ended" if ended else "orphan"))
    if not processes:
        put("No orphans.")
    elif not ended:
        put("End them with: vllm-sleep-tui orphans --end")
    for stranger in strangers:
        vram = gib(stranger.vram_bytes)
        put(
            f"not ours, left alone  pid {stranger.process.pid}  user {stranger.user}  VRAM {vram}  "
            f"{stranger.command}"
        )


def line_of(orphan: Orphan, word: str) -> str:
    """One orphan for a person."""
    return f"{word}  pid {orphan.process.pid}  RAM {gib(orphan.ram_bytes)}  {orphan.why}  {orphan.command}"
