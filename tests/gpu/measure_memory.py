"""The panel's VRAM and pinned RAM of each model beside NVML's and /proc's own figures, read apart from it.

    python tests/gpu/measure_memory.py --config FILE --state-home DIR --out FILE MODEL …

Each model goes through a whole life: start (sampled all the while), level 1 sleep, wake, level 2 sleep, wake,
stop. A row has the panel's figure, as `status --json` gives it, between two readings of our own. The two are
milliseconds apart; while a start takes memory the truth lies between them, so a figure between them is 0 %
off, and any other by its distance from the nearer one; in rows that are "still" the two are equal. Rows are
JSON lines, written at once; bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import CommandLine

from vllm_sleep_tui.cli.status import status_json
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.fleet.core import simulated_folder
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.fleet.survey import looking

EVERY_SECONDS = 0.25
TIMES = 3
"""Readings of a state in which nothing moves."""
LIFE = (
    (("sleep", "--level", "1"), "asleep, level 1"),
    (("wake",), "awake after level 1"),
    (("sleep", "--level", "2"), "asleep, level 2"),
    (("wake",), "awake after level 2"),
)
KINDS = ("vram", "pinned")
Held = Mapping[str, int]
"""Bytes by kind."""


class Eyes(Protocol):
    """Reads what processes hold, without the panel's own reader."""

    def held(self, pids: set[int]) -> Held:
        """What these processes hold together."""


class DriverEyes:
    """NVML's list of compute processes, and RssShmem of /proc."""

    def __init__(self) -> None:
        import pynvml

        self.nvml = pynvml
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        self.devices = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def held(self, pids: set[int]) -> Held:
        listed = [
            process
            for device in self.devices
            for process in self.nvml.nvmlDeviceGetComputeRunningProcesses(device)
            if process.pid in pids
        ]
        vram = sum(process.usedGpuMemory or 0 for process in listed)
        return {"vram": vram, "pinned": sum(shared_memory(pid) for pid in pids)}


class SimulatedEyes:
    """What the simulation's processes wrote down, for trying this script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def held(self, pids: set[int]) -> Held:
        from vllm_sleep_tui.simulator import devices

        ours = [each for each in devices.allocations(self.folder) if each.pid in pids]
        vram = sum(sum(each.vram.values()) for each in ours)
        return {"vram": vram, "pinned": sum(each.pinned_bytes for each in ours)}


def shared_memory(pid: int) -> int:
    """RssShmem of a process in bytes; 0 if it is gone."""
    try:
        found = re.search(r"^RssShmem:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def family(pid: int) -> set[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children[int(fields[1])].append(int(entry.name))
    found, waiting = {pid}, [pid]
    while waiting:
        below = children[waiting.pop()]
        found.update(below)
        waiting += below
    return found


def off(panel: int | None, before: int, after: int) -> float | None:
    """Per cent that the panel's figure is away from the two readings around it; None if it shows none."""
    if panel is None:
        return None
    nearest = min(max(panel, min(before, after)), max(before, after))
    return 0.0 if panel == nearest else 100 * abs(panel - nearest) / max(nearest, 1)


class Ruler:
    """Takes rows and writes each down at once, with `suffix` behind the models' names."""

    def __init__(self, loaded: LoadedConfig, state: Path, path: Path, suffix: str = "") -> None:
        folder = simulated_folder(loaded, state)
        self.eyes: Eyes = DriverEyes() if folder is None else SimulatedEyes(folder)
        self.records, self.names = RecordStore(state, loaded.path), list(loaded.config.models)
        self.path, self.suffix = path, suffix
        self.lock = threading.Lock()
        self.families: dict[str, set[int]] = {}
        self.open = ExitStack()
        self.look = self.open.enter_context(looking(loaded, state))

    def find_family(self, name: str) -> set[int]:
        """The pids that the model's server has or had: of one that is stopped, all must be gone from NVML."""
        server = self.records.read(name).server
        if server is not None:
            self.families[name] = family(server.pid)
        return self.families.get(name, set())

    def take(self, names: Iterable[str], moment: str | None = None) -> None:
        """One row of each model that has or had processes; its state stands in for `moment`."""
        with self.lock:
            known = [name for name in names if self.find_family(name)]
            before = {name: self.eyes.held(self.families[name]) for name in known}
            shown = {model["name"]: model for model in status_json(self.look())["models"]}
            after = {name: self.eyes.held(self.find_family(name)) for name in known}
            rows = [row(shown[name], before[name], after[name], moment) for name in known]
            rows = [each | {"model": each["model"] + self.suffix} for each in rows]
            with self.path.open("a") as file:
                file.writelines(json.dumps(each) + "\n" for each in rows)


def row(shown: Mapping[str, Any], before: Held, after: Held, moment: str | None) -> dict[str, Any]:
    """The panel's figures of a model between our own."""
    panel = {"vram": shown["vram_bytes"], "pinned": shown["pinned_bytes"]}
    return {
        "time": time.time(),
        "model": shown["name"],
        "moment": moment or shown["state"],
        "phase": shown["phase"],
        **{
            kind: {
                "panel": panel[kind],
                "before": before[kind],
                "after": after[kind],
                "off": off(panel[kind], before[kind], after[kind]),
            }
            for kind in KINDS
        },
    }


class Watch:
    """Takes rows of whatever is starting or stopping, in a thread; nothing while a switch is timed."""

    def __init__(self, ruler: Ruler, *states: State) -> None:
        self.ruler, self.states = ruler, states
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.run, name="watch", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()

    def run(self) -> None:
        """Look again and again until it is over."""
        while not self.over.wait(EVERY_SECONDS):
            ruler = self.ruler
            if moving := [name for name in ruler.names if ruler.records.read(name).state in self.states]:
                ruler.take(moving)


def live(panel: CommandLine, name: str, ruler: Ruler) -> None:
    """From awake through both levels and back to awake."""
    for words, moment in LIFE:
        panel(words[0], name, *words[1:])
        for _ in range(TIMES):
            ruler.take([name], moment)


def summary(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """By model and moment: how many rows, the last figures, and the worst deviation of each kind."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for each in rows:
        groups[each["model"], each["moment"]].append(each)
    return [
        {
            "model": model,
            "moment": moment,
            "rows": len(those),
            "still": sum(
                all(each[kind]["before"] == each[kind]["after"] for kind in KINDS) for each in those
            ),
            **{kind: those[-1][kind] for kind in KINDS},
            "worst": {kind: worst(each[kind]["off"] for each in those) for kind in KINDS},
            "not shown": sum(each[kind]["panel"] is None for each in those for kind in KINDS),
        }
        for (model, moment), those in groups.items()
    ]


def worst(values: Iterable[float | None]) -> float | None:
    """The largest that is known."""
    return max((value for value in values if value is not None), default=None)


def table(path: Path) -> str:
    """The summary as Markdown."""
    head = (
        "model",
        "moment",
        "rows",
        "still",
        "VRAM: panel",
        "own",
        "worst",
        "pinned RAM: panel",
        "own",
        "worst",
    )
    lines = [f"| {' | '.join((*head, 'not shown'))} |", "|---" * (len(head) + 1) + "|"]
    for each in summary(json.loads(line) for line in path.read_text().splitlines()):
        cells = [each["model"], each["moment"], str(each["rows"]), str(each["still"])]
        for kind in KINDS:
            found = each["worst"][kind]
            cells += [gib(each[kind]["panel"]), gib(each[kind]["after"])]
            cells.append("–" if found is None else f"{found:.2f} %")
        lines.append(f"| {' | '.join([*cells, str(each['not shown'])])} |")
    return "\n".join(lines) + "\n"


def gib(size: int | None) -> str:
    """Bytes as GiB, a dash for what is not shown."""
    return "–" if size is None else f"{size / 2**30:.3f} GiB"


def whole_life(panel: CommandLine, name: str, ruler: Ruler) -> None:
    """Start, both levels, stop; the rows of all of it."""
    with Watch(ruler, State.STARTING, State.STOPPING):
        panel("start", name)
        ruler.take([name], "awake")
        live(panel, name, ruler)
        panel("stop", name)
        ruler.take([name], "stopped")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--state-home", type=Path, required=True, help="XDG_STATE_HOME of the panel")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("models", nargs="+")
    given = parser.parse_args()
    loaded = load(given.config)
    panel = CommandLine(config=given.config, state_home=given.state_home)
    ruler = Ruler(loaded, given.state_home / "vllm-sleep-tui", given.out)
    for name in given.models:
        whole_life(panel, name, ruler)
    print(table(given.out))


if __name__ == "__main__":
    main()
