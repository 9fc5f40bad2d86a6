"""What of ours listens: nothing but loopback, of a server's whole family and of `serve`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fleet.beside import record_of
from tests.fleet.conftest import Box, until
from vllm_sleep_tui.telemetry.processes import ProcessTable

MakeBox = Callable[..., Box]
LOOPBACK = ("0100007F", "00000000000000000000000001000000")
"""127.0.0.1 and ::1 as /proc/net writes them, in the byte order of this machine."""


def listening(pid: int) -> Iterator[str]:
    """The local addresses, in the kernel's hexadecimal, on which a process listens."""
    inodes = set()
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except FileNotFoundError:
        return  # it has ended
    for descriptor in descriptors:
        try:
            inodes.add(os.readlink(descriptor))
        except OSError:
            continue
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                yield fields[1]
    for table in ("udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            if f"socket:[{line.split()[9]}]" in inodes:
                yield line.split()[1]


async def test_a_servers_family_and_serve_listen_on_loopback_alone(box: MakeBox) -> None:
    machine = box()
    (machine.folder / "vllm-sleep-tui").symlink_to(machine.state_dir)
    async with machine.open() as fleet:
        await fleet.start(["a", "b"])
        records = [record_of(fleet, name) for name in ("a", "b")]
    log = machine.folder / "serve.log"
    argv = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(machine.config), "serve"]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            argv, env=os.environ | {"XDG_STATE_HOME": str(machine.folder)}, stdout=file, stderr=file
        ) as serve,
    ):
        await until(lambda: "serve: leads" in log.read_text())
        for record in records:
            assert record.keeper is not None
            family = [record.keeper.pid, *ProcessTable.read().descendants(record.keeper.pid)]
            assert len(family) > 2
            found = [address for pid in family for address in listening(pid)]
            assert f"{record.port:04X}" in {address.split(":")[1] for address in found}
            assert {address.split(":")[0] for address in found} <= set(LOOPBACK)
        ours = [address for pid in (serve.pid, os.getpid()) for address in listening(pid)]
        assert {address.split(":")[0] for address in ours} <= set(LOOPBACK)
        serve.terminate()
