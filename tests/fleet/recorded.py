"""State folders as versions before wrote them: two models that ran, one that failed, what was measured.

`data/state-COMMIT` was recorded by that commit on simulated servers; FOLDER stands for the folder of the run.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.fleet.conftest import Box
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.store.records import RecordStore

DATA = Path(__file__).parent / "data"
VERSIONS = ("e6302b7", "07d922e")
MODELS = {"a": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB"}, "c": {"model": "sim/200GiB"}}
SPEED = "20"
"""Part of the recorded models' environment, and so of the name under which their measurements are kept."""
PAGE = 4096


def record(version: str, name: str, machine: Box) -> dict[str, Any]:
    """A recorded record, as if the machine's folder had been the run's."""
    text = (DATA / f"state-{version}" / f"{name}.json").read_text()
    fields: dict[str, Any] = json.loads(text.replace("FOLDER", str(machine.folder)))
    return fields


def write(machine: Box, fields: dict[str, Any]) -> None:
    """Put a record into the state folder, laid out as those versions did."""
    line = json.dumps(fields).encode()
    content = b"%s\n%08x\n" % (line, zlib.crc32(line))
    RecordStore(machine.state_dir, load(machine.config).path).path(fields["name"]).write_bytes(
        content.ljust(PAGE)
    )


def restore(machine: Box, version: str) -> None:
    """The recorded folder: records, measurements and the history, as if it had ended a minute ago."""
    for name in MODELS:
        write(machine, record(version, name, machine))
    restore_measurements(machine, version)
    folder = DATA / f"state-{version}"
    with closing(sqlite3.connect(machine.state_dir / "history.db")) as history, history:
        history.executescript((folder / "history.sql").read_text().replace("FOLDER", str(machine.folder)))
        (last,) = history.execute("SELECT MAX(time) FROM states").fetchone()
        for table in ("states", "switches", "cold_starts"):
            history.execute(f"UPDATE {table} SET time = time + ?", (time.time() - 60 - last,))


def restore_measurements(machine: Box, version: str) -> None:
    """What the recorded models were measured to need."""
    content = (DATA / f"state-{version}" / "footprints.json").read_text()
    (machine.state_dir / "footprints.json").write_text(content)
