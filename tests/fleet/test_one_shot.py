"""A one-shot verb is a new process: what it loads and opens must not keep a closed gate waiting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

from tests.fleet.conftest import Box

MakeBox = Callable[..., Box]
SWITCH = """
import asyncio, sys
from pathlib import Path
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet

async def main():
    loaded = {}
    def report(progress):
        loaded.setdefault(progress.phase, set(sys.modules))
    async with Fleet(load(Path(sys.argv[1])), Path(sys.argv[2])) as fleet:
        await fleet.switch("b", report=report)
    late = sorted(loaded["sleep"] - loaded["drain"])
    print(late)

asyncio.run(main())
"""


async def test_nothing_is_loaded_between_the_closed_gate_and_the_sleep(box: MakeBox) -> None:
    machine = box()
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
    done = subprocess.run(
        [sys.executable, "-c", SWITCH, str(machine.config), str(machine.state_dir)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
