"""`orphans`: what is left of servers that nobody looks after, and whose the other servers are."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from vllm_sleep_tui.cli.common import confirm, json_option, put, put_json, say
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.observe.discovery import ForeignServer, find_foreign_servers
from vllm_sleep_tui.fleet.observe.orphans import Orphan, end_orphans, find_orphans
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.telemetry.gpus import open_reader
from vllm_sleep_tui.units import gib


@click.command()
@click.option("--end", is_flag=True, help="End them, after a question.")
@click.option("--yes", is_flag=True, help="With --end: do not ask.")
@json_option
def orphans(end: bool, yes: bool, as_json: bool) -> None:
    """List what is left of servers that nobody looks after.

    Servers that were not started here are named and never touched.
    """
    found = find_orphans(state_dir())
    ours = {orphan.process for orphan in found}
    strangers = [stranger for stranger in find_strangers() if stranger.process not in ours]
    if end and found:
        if not yes:
            ask(found)
        end_orphans(found)
    if as_json:
        put_json({"version": 1, "ended": end, **in_json(found, strangers)})
    else:
        put_lines(found, strangers, ended=end)


def find_strangers() -> tuple[ForeignServer, ...]:
    """vLLM servers that were not started here, with their VRAM where NVML tells."""
    reader = open_reader(None)
    try:
        return find_foreign_servers(reader.read())
    finally:
        reader.close()


def ask(found: Sequence[Orphan]) -> None:
    """Name what would be ended and ask; raises RefusedError without a yes."""
    for orphan in found:
        say(line_of(orphan, "orphan"))
    try:
        agreed = confirm(f"End these {len(found)}, which loses what they hold?")
    except click.Abort:
        agreed = False
    if not agreed:
        cure = "Say yes to end them." if sys.stdin.isatty() else "Say --yes to end them without a question."
        raise RefusedError("Nothing was ended.", cure)


def in_json(found: Sequence[Orphan], strangers: Sequence[ForeignServer]) -> dict[str, object]:
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
            for orphan in found
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


def put_lines(found: Sequence[Orphan], strangers: Sequence[ForeignServer], *, ended: bool) -> None:
    """Both lists for a person."""
    for orphan in found:
        put(line_of(orphan, "ended" if ended else "orphan"))
    if not found:
        put("No orphans.")
    elif not ended:
        put("End them with: vllm-sleep-tui orphans --end")
    for stranger in strangers:
        held = gib(stranger.vram_bytes)
        put(
            f"not ours, left alone  pid {stranger.process.pid}  user {stranger.user}  VRAM {held}  "
            f"{stranger.command}"
        )


def line_of(orphan: Orphan, word: str) -> str:
    """One orphan for a person."""
    held = gib(orphan.ram_bytes)
    return f"{word}  pid {orphan.process.pid}  RAM {held}  {orphan.why}  {orphan.command}"
