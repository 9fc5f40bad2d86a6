"""Closes terminals under panels, and stops and continues panels, while answers stream; counts what is left.

    python tests/tui/closings.py [COUNT]

Each closing: a panel leads and shows an answer, its terminal vanishes; it must be gone in
the orderly way, and its seat free.
Each stop: SIGSTOP and SIGCONT, 10 to a panel, which must go on with the threads that it had; SIGTERM while
its terminal does not read: it must be gone, and its seat free. Exit code 0 if nothing was left.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pty_terminal import Terminal
from talker import talker
from test_tui_leaving import Desk, threads_of

from vllm_sleep_tui.leaving import CUT_OFF

PATIENCE = 30.0
STOPS_EACH = 10


class Count:
    """What was seen."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.left = 0
        self.seats = 0
        self.cut = 0
        """Ends that came by the limit."""

    def ends(self, desk: Desk, panel: Terminal) -> None:
        """Wait for the end of a panel that is to end now."""
        began = time.monotonic()
        try:
            panel.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.left += 1
        self.cut += panel.process.returncode == CUT_OFF
        self.seconds.append(time.monotonic() - began)
        self.seats += desk.leader() is not None
        panel.close()
        desk.panels.remove(panel)

    def __str__(self) -> str:
        ranked = sorted(self.seconds)
        middle = ranked[len(ranked) // 2]
        took = f"{middle:.2f} s, at most {ranked[-1]:.2f} s"
        return f"{len(ranked)} ends: {self.left} left, {self.cut} cut off, {self.seats} seats kept; {took}"


def close(desk: Desk, count: int) -> Count:
    """So many terminals vanish."""
    seen = Count()
    for number in range(count):
        panel = desk.talking(controlling=number % 2 == 0)
        assert desk.leader() == panel.process.pid
        panel.vanish()
        seen.ends(desk, panel)
        print(f"\r{seen}", end="", file=sys.stderr, flush=True)
    return seen


def stop(desk: Desk, count: int, chance: random.Random) -> Count:
    """So many stops, with a continue after each."""
    seen = Count()
    for _ in range(0, count, STOPS_EACH):
        panel = desk.talking()
        threads = threads_of(panel.process.pid)
        for _ in range(STOPS_EACH):
            panel.process.send_signal(signal.SIGSTOP)
            time.sleep(chance.uniform(0, 0.1))
            panel.process.send_signal(signal.SIGCONT)
            panel.written = b""
            panel.wait_for("word")
        # Threads that do work off the loop come and go; a second pair of Textual's came with each continue.
        assert threads_of(panel.process.pid) < threads + STOPS_EACH, "threads were added"
        panel.wait_until_full()
        panel.process.send_signal(signal.SIGTERM)
        seen.ends(desk, panel)
    return seen


def main() -> int:
    """The exit code."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    with tempfile.TemporaryDirectory() as folder, talker() as url:
        desk = Desk(Path(folder), url, None)
        try:
            closed = close(desk, count)
            print(f"closed terminals, {closed}", flush=True)
            stopped = stop(desk, count, random.Random(1))
            print(f"{count} stops, {stopped}", flush=True)
        finally:
            desk.close()
    return 1 if closed.left or closed.cut or closed.seats or stopped.left or stopped.seats else 0


if __name__ == "__main__":
    sys.exit(main())
