"""How fast the panel is there, and how fast it answers keys while everything happens at once.

    python benchmarks/panel_speed.py [--first 10] [--keys 200] [--hours 0] [--json]

The first screen: from the start of the process until the last line of the screen has come out of its
terminal, over the demo's config with nothing running; wall time, and the processor time that the process had
taken by then. Keys: from the key until the terminal shows what it asked for, in a panel of 64 models on 8
GPUs (63 simulated servers run, 8 of them awake, beside the one that streams), while an answer streams at
1,000 tokens/s and 50,000 lines/s are written to the log of a model. With `--hours` the storm goes on for that
long, an answer of 45,000 tokens each minute, three in a conversation, and a look into the flooded log; what
the panel holds is noted each minute. On a machine that does other things too, read the processor time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import pty
import re
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from idle_panel import start_all, stop_all, write_config

from vllm_sleep_tui.cli.demo import write_demo

SIZE = (40, 120)
LIMIT = 60.0
LINES_PER_SECOND = 50_000
_ESCAPES = re.compile(r"\x1b\[[0-9;?<>=]*[A-Za-z$]")


class Screen:
    """A panel in a terminal of its own, and what it wrote since the last key."""

    def __init__(self, command: list[str], env: dict[str, str], folder: Path) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **env},
            cwd=folder,
            start_new_session=True,
        )
        os.close(theirs)
        self.written = ""

    def press(self, keys: str) -> float:
        """Type; when."""
        self.written = ""
        os.write(self._ours, keys.encode())
        return time.perf_counter()

    def until(self, pattern: str) -> float:
        """Read until this was written; when that was seen."""
        deadline = time.monotonic() + LIMIT
        while not re.search(pattern, _ESCAPES.sub("", self.written)):
            if time.monotonic() > deadline:
                raise SystemExit(f"{pattern} did not come.")
            if select.select([self._ours], [], [], 0.5)[0]:
                self.written += os.read(self._ours, 65536).decode(errors="replace")
        return time.perf_counter()

    def drain(self, seconds: float) -> None:
        """Read what comes."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self._ours], [], [], left)[0]:
                os.read(self._ours, 65536)

    def cpu(self) -> float:
        """Processor seconds of the process so far."""
        spent = psutil.Process(self.process.pid).cpu_times()
        return float(spent.user + spent.system)

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


def own(folder: Path) -> dict[str, str]:
    """Folders of its own."""
    return {"XDG_STATE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}


def first_screens(count: int) -> dict[str, object]:
    """So many starts, one after the other; the first, with nothing compiled, does not count."""
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_demo(folder / "demo", 5)
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
        for number in range(count + 1):
            screen = Screen(command, own(folder), folder)
            try:
                # The last thing that is drawn of the table's own screen, with the last model's row before it.
                took = screen.until(r"(?s)big.*q quit") - screen.began
                if number:
                    wall.append(took)
                    cpu.append(screen.cpu())
            finally:
                screen.close()
    return {"first screen, wall s": spread(wall), "first screen, CPU s": spread(cpu)}


@contextlib.contextmanager
def fleet(tokens: int) -> Iterator[tuple[Screen, Path]]:
    """A panel over 63 running servers and one that streams answers of so many tokens; the flood's log."""
    with tempfile.TemporaryDirectory() as name, talker(tokens) as url:
        folder = Path(name)
        config = write_config(folder, 63, 8)
        content = json.loads(config.read_text())
        content["models"]["talker"] = {"url": url}
        config.write_text(json.dumps(content))
        state = folder / "vllm-sleep-tui"
        asyncio.run(start_all(config, state, 8, [f"m{number:02}" for number in range(63)]))
        screen = Screen(
            [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)], own(folder), folder
        )
        try:
            screen.until("q quit")
            screen.drain(5)
            yield screen, state / "logs" / "m00.log"
        finally:
            screen.close()
            asyncio.run(stop_all(config, state))


@contextlib.contextmanager
def flood(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that appends LINES_PER_SECOND lines to a file, which begins anew at 64 MiB."""
    script = (
        "import sys, time\n"
        f"n, path = {LINES_PER_SECOND} // 20, sys.argv[1]\n"
        "began, k = time.monotonic(), 0\n"
        "while True:\n"
        "    with open(path, 'a') as f:\n"
        "        f.write(''.join(f'INFO line {k * n + i} of the flood, as an engine may write it\\n'"
        " for i in range(n)))\n"
        "        if f.tell() > 2**26: f.truncate(0)\n"
        "    k += 1\n"
        "    time.sleep(max(0, began + k / 20 - time.monotonic()))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)])
    try:
        yield writer
    finally:
        writer.kill()
        writer.wait()


@contextlib.contextmanager
def talker(tokens: int = 10**7, rate: int = 1000) -> Iterator[str]:
    """A server of another process that streams so many tokens, so many a second; its address."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import chat_pane as c\n"
        "c.TOKENS, c.RATE = map(int, sys.argv[2:]); c.serve()"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tokens), str(rate)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield server.stdout.readline().split()[0]
    finally:
        server.kill()
        server.wait()


def keys(count: int) -> dict[str, object]:
    """Times from key to screen, quiet and in the storm, and what the storm costs."""
    with fleet(10**7) as (screen, log):
        found: dict[str, object] = {"key to screen, quiet, ms": spread(moves(screen, count), 1000)}
        ask(screen)
        with flood(log):
            memory = [memory_of(screen)]
            began, spent = time.monotonic(), screen.cpu()
            found["key to screen, a stream and the flood, ms"] = spread(moves(screen, count), 1000)
            logs = [open_log(screen) for _ in range(max(3, count // 10))]
            found["log of the flood opened, ms"] = spread(logs, 1000)
            took = time.monotonic() - began
            found["CPU in the storm, % of a core"] = round(100 * (screen.cpu() - spent) / took, 1)
            memory.append(memory_of(screen))
        found["memory, MB, before the storm and after it"] = [round(size / 1e6) for size in memory]
        found["storm, s"] = round(took)
        return found


def long_storm(hours: float) -> dict[str, object]:
    """Keys and memory, minute by minute."""
    with fleet(45_000) as (screen, log), flood(log):
        times, memory, spent = list[float](), [memory_of(screen)], screen.cpu()
        began = time.monotonic()
        while time.monotonic() < began + 3600 * hours:
            minute = time.monotonic()
            ask(screen, anew=len(memory) % 3 == 0)
            times += moves(screen, 40)
            open_log(screen)
            screen.drain(max(0.0, minute + 60 - time.monotonic()))
            memory.append(memory_of(screen))
        took = time.monotonic() - began
        return {
            "storm, s": round(took),
            "key to screen in it, ms": spread(times, 1000),
            "CPU in it, % of a core": round(100 * (screen.cpu() - spent) / took, 1),
            "memory, MB, by the minute": [round(size / 1e6) for size in memory],
        }


def ask(screen: Screen, *, anew: bool = False) -> None:
    """Ask the model that streams, which is the last, in a new conversation if so wanted; its answer runs."""
    screen.press("\x1b[F")
    screen.until("Chat with talker|talker ·")
    screen.press("c" + ("\x0e" if anew else ""))
    screen.drain(0.5)
    screen.press("fast\r")
    screen.until(r"w\d+ w\d+")
    screen.press("\x1b")
    screen.drain(1)


def open_log(screen: Screen) -> float:
    """Seconds until the flooded log, the first model's, is on the screen; closed again."""
    screen.press("\x1b[H")
    screen.drain(0.5)
    at = screen.press("l")
    took = screen.until("log of|Log of|esc back|follow") - at
    screen.drain(1)
    screen.press("\x1b")
    screen.drain(0.5)
    return took


def moves(screen: Screen, count: int) -> list[float]:
    """The cursor down and up again, each time until it is drawn where it belongs."""
    took = []
    screen.press("\x1b[H")
    screen.drain(0.5)
    for number in range(count):
        wanted = f"m{1 - number % 2:02}"
        at = screen.press("j" if number % 2 == 0 else "k")
        took.append(screen.until(rf"▶ . {wanted}") - at)
        screen.drain(0.05)
    return took


def memory_of(screen: Screen) -> int:
    """What the panel alone holds."""
    return int(psutil.Process(screen.process.pid).memory_full_info().uss)


def spread(values: list[float], factor: float = 1) -> dict[str, float]:
    """Median, 99th percentile, lowest and highest."""
    ordered = sorted(value * factor for value in values)
    at = min(len(ordered) - 1, int(0.99 * len(ordered)))
    found = {"p50": statistics.median(ordered), "p99": ordered[at], "min": ordered[0], "max": ordered[-1]}
    return {name: round(value, 2) for name, value in found.items()} | {"n": len(ordered)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--first", type=int, default=10, help="starts until the first screen; 0: none")
    parser.add_argument("--keys", type=int, default=200, help="keys of each kind; 0: none")
    parser.add_argument(
        "--hours", type=float, default=0, help="how long the storm goes on beside that; 0: not"
    )
    parser.add_argument("--json", action="store_true", help="JSON instead of lines")
    given = parser.parse_args()
    found = first_screens(given.first) if given.first else {}
    found |= keys(given.keys) if given.keys else {}
    found |= long_storm(given.hours) if given.hours else {}
    print(json.dumps(found, indent=2) if given.json else "\n".join(f"{k}: {v}" for k, v in found.items()))


if __name__ == "__main__":
    main()
