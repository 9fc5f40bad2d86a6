"""What an open panel costs while nobody touches it, and one `status`, beside peers in the same run.

    python benchmarks/idle_panel.py [--seconds 30] [--peers] [--json]

Each subject runs alone in a terminal of 160×48; its processes' CPU time is read before and after. Ours shows
simulated servers that are all started, one a GPU awake. `--peers` installs vllmstat, vllmops and, where NVML
finds a GPU, nvitop from PyPI into a folder that is removed afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import os
import pty
import select
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import pynvml

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet

SIZE = (48, 160)
SETTLING = 10.0
"""Seconds after the start that are not counted: imports, the first screen, the first looks."""

STOCK, OWN = "0.32.0", "0.26.0"
"""Versions of vLLM whose own sleep mode and ours are used."""
BACKENDS = {STOCK: "vLLM's sleep mode", OWN: "ours"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one subject costs."""

    name: str
    cpu_per_cent: float
    """Of one core."""
    pss_bytes: int
    written_per_second: float
    """Bytes to the terminal."""
    status_seconds: float | None
    """Of one report on the command line, the median of ten; None if it has none."""
    goal: str = ""


@contextlib.contextmanager
def in_terminal(command: list[str], env: dict[str, str], folder: Path) -> Iterator[tuple[int, list[int]]]:
    """Run a command in a terminal of its own that is read to the end; its pid and the bytes it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd=folder, start_new_session=True
    )
    os.close(theirs)
    written = [0]
    ended = threading.Event()

    def drain() -> None:
        while not ended.is_set():
            if select.select([ours], [], [], 0.2)[0]:
                try:
                    written[0] += len(os.read(ours, 65536))
                except OSError:  # the other end is closed
                    return

    reader = threading.Thread(target=drain)
    reader.start()
    try:
        yield process.pid, written
        if process.poll() is not None:
            raise SystemExit(f"{command[0]} ended by itself with {process.returncode}.")
    finally:
        process.kill()
        process.wait()
        ended.set()
        reader.join()
        os.close(ours)


def tree(pid: int) -> list[psutil.Process]:
    """The process and all below it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def cpu_seconds(pid: int) -> float:
    """User and system time of the tree, ended children included."""
    times = [process.cpu_times() for process in tree(pid)]
    own: float = sum(spent.user + spent.system for spent in times)
    ended: float = times[0].children_user + times[0].children_system
    return own + ended


def status_seconds(command: list[str], env: dict[str, str], folder: Path) -> float:
    """The median of ten runs of a command that reports once."""
    took = []
    for _ in range(10):
        began = time.monotonic()
        subprocess.run(command, env=env, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        took.append(time.monotonic() - began)
    return statistics.median(took)


def measure(
    name: str,
    command: list[str],
    report: list[str] | None,
    seconds: float,
    *,
    env: dict[str, str],
    folder: Path,
    goal: str = "",
) -> Cost:
    """One subject, alone: its panel for so many seconds, its report ten times."""
    terminal = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", **env}
    with in_terminal(command, terminal, folder) as (pid, written):
        time.sleep(SETTLING)
        before, bytes_before, began = cpu_seconds(pid), written[0], time.monotonic()
        time.sleep(seconds)
        took = time.monotonic() - began
        spent, output = cpu_seconds(pid) - before, written[0] - bytes_before
        pss = sum(process.memory_full_info().pss for process in tree(pid))
    return Cost(
        name=name,
        cpu_per_cent=100 * spent / took,
        pss_bytes=pss,
        written_per_second=output / took,
        status_seconds=status_seconds(report, terminal, folder) if report else None,
        goal=goal,
    )


def write_config(folder: Path, models: int, gpus: int, version: str = STOCK) -> Path:
    """So many models, spread over so many GPUs; half (of many: all) sleep at level 2, as RAM goes."""
    content = {
        "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
        "simulated_gpus": [{"name": "Bench", "memory": "24GiB"}] * gpus,
        "models": {
            f"m{index:02}": {
                "model": "sim/1GiB",
                "gpus": [index % gpus],
                "level": 1 + (2 * index >= models or models > 16),
                "args": {"max-model-len": 2048, "gpu-memory-utilization": 0.5},
                "env": {"VLLM_SIM_TIMES": "instant", "VLLM_SIM_VERSION": version},
            }
            for index in range(models)
        },
    }
    path = folder / "vllm-sleep-tui.yaml"
    path.write_text(json.dumps(content))
    return path


def measure_ours(models: int, gpus: int, seconds: float, goal: str, version: str = STOCK) -> Cost:
    """The panel over a fleet of simulated servers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = write_config(folder, models, gpus, version)
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
        env = {"XDG_STATE_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
        try:
            asyncio.run(start_all(config, folder / "vllm-sleep-tui", gpus))
            label = f"vllm-sleep-tui, {models} models on {gpus} GPUs, {BACKENDS[version]}"
            report = [*command, "status"]
            return measure(label, command, report, seconds, env=env, folder=folder, goal=goal)
        finally:
            asyncio.run(stop_all(config, folder / "vllm-sleep-tui"))


async def start_all(config: Path, state_dir: Path, gpus: int, only: list[str] | None = None) -> None:
    """Every server runs, or only these; the first of each GPU is awake."""
    state_dir.mkdir(exist_ok=True)
    async with Fleet(load(config), state_dir) as fleet:
        names = only or list(fleet.loaded.config.models)
        await fleet.start(names)
        for name in names[:gpus]:
            await fleet.switch(name)


async def stop_all(config: Path, state_dir: Path) -> None:
    """Nothing is left."""
    async with Fleet(load(config), state_dir) as fleet:
        await fleet.stop(fleet.snapshot().with_servers(), force=True)


def install(package: str, folder: Path) -> Path:
    """The folder of the commands of a package from PyPI, in an environment of its own."""
    subprocess.run([sys.executable, "-m", "venv", folder / package], check=True)
    programs = folder / package / "bin"
    pip = [str(programs / "pip"), "install", "--quiet", "--disable-pip-version-check", package]
    subprocess.run(pip, check=True)
    return programs


def measure_peers(seconds: float) -> list[Cost]:
    """vllmstat with its invented figures, vllmops with eight models, none of which it has started; nvitop."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        home = {"HOME": name, "XDG_CONFIG_HOME": name, "XDG_STATE_HOME": name}
        stat = [str(install("vllmstat", folder) / "vllmstat"), "--mock"]
        ops = str(install("vllmops", folder) / "vllmops")
        models = [["-n", f"m{i}", "-m", "a/b", "-g", str(i % 2), "-p", str(18001 + i)] for i in range(8)]
        for step in (["init"], *(["create-model", *words] for words in models)):
            env = {**os.environ, **home}
            subprocess.run(
                [ops, *step],
                cwd=folder,
                env=env,
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        label = f"vllmops {version(ops)}, 8 models stopped"
        costs = [
            measure(f"vllmstat {version(stat[0])} --mock", stat, None, seconds, env=home, folder=folder),
            measure(label, [ops, "tui"], [ops, "status"], seconds, env=home, folder=folder),
        ]
        if gpus := gpus_here():
            top = str(install("nvitop", folder) / "nvitop")
            label = f"nvitop {version(top)}, {gpus} GPU{'s' * (gpus > 1)}"
            costs.append(measure(label, [top], [top, "--once"], seconds, env=home, folder=folder))
        return costs


def gpus_here() -> int:
    """How many GPUs NVML finds."""
    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetCount())
    except pynvml.NVMLError:
        return 0


def version(program: str) -> str:
    """What a program says its version is."""
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return done.stdout.split()[-1]


def in_words(seconds: float | None) -> str:
    """Seconds with two decimals; a dash for none."""
    return "–" if seconds is None else f"{seconds:.2f}"


def table(costs: list[Cost]) -> str:
    """The figures as Markdown."""
    lines = [
        "| Panel | CPU, % of a core | PSS, MB | Terminal, bytes/s | One report, s | Goal |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {cost.name} | {cost.cpu_per_cent:.1f} | {cost.pss_bytes / 1e6:.0f} "
        f"| {cost.written_per_second:.0f} | {in_words(cost.status_seconds)} | {cost.goal} |"
        for cost in costs
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each one is watched")
    parser.add_argument("--peers", action="store_true", help="also install and measure others")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    given = parser.parse_args()
    costs = [
        measure_ours(8, 2, given.seconds, "≤ 3 %, ≤ 60 MB, ≤ 0.35 s"),
        measure_ours(16, 8, given.seconds, "≤ 6 %"),
        measure_ours(64, 8, given.seconds, "≤ 2 %"),
        measure_ours(64, 8, given.seconds, "≤ 2 %", OWN),
    ]
    if given.peers:
        costs += measure_peers(given.seconds)
    print(json.dumps([asdict(cost) for cost in costs], indent=2) if given.json else table(costs))


if __name__ == "__main__":
    main()
