"""The processes behind the memory, and whom an operation would wait for."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fleet.beside import core_of
from tests.fleet.conftest import GIB, Box, seen, until
from vllm_sleep_tui.fleet.snapshot import HeldProcess

MakeBox = Callable[..., Box]
STRANGER = """
import sys
from pathlib import Path
from vllm_sleep_tui.simulator import devices
devices.claim(Path(sys.argv[1]), vram={0: 2 << 30}, pinned_bytes=0, private_bytes=1 << 30, title="x")
print("claimed", flush=True)
sys.stdin.read()
"""


@contextmanager
def stranger(folder: Path) -> Iterator[int]:
    """A process of somebody else that holds 2 GiB of the first simulated GPU; its pid."""
    process = subprocess.Popen(
        [sys.executable, "-c", STRANGER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"claimed\n"
        yield process.pid
    finally:
        process.communicate()


def line_to_root(held: tuple[HeldProcess, ...], leaf: HeldProcess) -> list[HeldProcess]:
    by_pid = {each.pid: each for each in held}
    line = [leaf]
    while line[-1].parent is not None:
        line.append(by_pid[line[-1].parent])
    return line


async def test_our_processes_are_trees_below_their_keepers_and_strangers_are_named(box: MakeBox) -> None:
    async with box().open() as fleet:
        await fleet.start(["a"])
        gpus = core_of(fleet).simulated
        assert gpus is not None
        with stranger(gpus) as pid:
            await until(lambda: any(each.pid == pid for each in fleet.snapshot().gpus[0].others))
            held = await fleet.processes()
        ours = [each for each in held if each.model == "a"]
        engine = max(ours, key=lambda each: each.vram_bytes or 0)
        assert engine.vram_bytes == seen(fleet, "a").vram_bytes
        assert sum(each.ram_bytes or 0 for each in ours) >= (seen(fleet, "a").ram_bytes or 0) > 0
        line = line_to_root(held, engine)
        assert "keeper" in line[-1].command
        assert seen(fleet, "a").pid in [each.pid for each in line]
        assert held.index(line[-1]) < held.index(engine)
        other = next(each for each in held if each.pid == pid)
        assert (other.model, other.parent, other.vram_by_gpu) == (None, None, {"0": 2 * GIB})
        assert other.ram_bytes == GIB
        assert "devices.claim" in other.command


async def test_who_holds_the_gpu_is_told_until_the_operation_ends(box: MakeBox) -> None:
    async with box(speed="40").open() as fleet:
        assert fleet.waits("b") is None
        start = asyncio.create_task(fleet.start(["a"]))
        await until(lambda: "start of a" in (fleet.waits("b") or ""))
        await start
        assert fleet.waits("b") is None
