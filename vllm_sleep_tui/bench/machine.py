"""What a run was made on: hardware, driver, and the versions that decide its figures."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from vllm_sleep_tui.bench.results import Gpu, Machine
from vllm_sleep_tui.fleet.snapshot import FleetSnapshot

CPU_INFO = Path("/proc/cpuinfo")
NVIDIA_VERSION = Path("/proc/driver/nvidia/version")


def describe(snapshot: FleetSnapshot, gpus: set[int], commands: Iterable[tuple[str, ...]]) -> Machine:
    """This machine with the GPUs of these indices, and the environments of these `vllm_command`s.

    vLLM's own version is known once it runs.
    """
    environments = [found for command in dict.fromkeys(commands) if (found := environment_of(command))]
    return Machine(
        cpu=_first(CPU_INFO, r"^model name\s*:\s*(.+)$"),
        cores=os.cpu_count(),
        ram_bytes=snapshot.host.ram_total_bytes,
        kernel=platform.release(),
        gpus=tuple(
            Gpu(index=gpu.index, name=gpu.name, total_bytes=gpu.total_bytes, simulated=gpu.simulated)
            for gpu in snapshot.gpus
            if gpu.index in gpus
        ),
        driver=_first(NVIDIA_VERSION, r"Kernel Module(?: for \S+)?\s+([0-9.]+)"),
        torch=each(_version_of("torch", environment) for environment in environments),
        vllm_python=each(environment.parent.name.removeprefix("python") for environment in environments),
        python=platform.python_version(),
    )


def each(versions: Iterable[str | None]) -> str | None:
    """The versions that differ, as text; None if none is known."""
    return " and ".join(dict.fromkeys(filter(None, versions))) or None


def environment_of(vllm_command: tuple[str, ...]) -> Path | None:
    """The site-packages of the environment whose `vllm` this is; None if it does not lie in one."""
    program = shutil.which(vllm_command[0])
    if program is None:
        return None
    for folder in (Path(program).absolute().parent, Path(program).resolve().parent):
        for packages in sorted(folder.parent.glob("lib/python3.*/site-packages")):
            return packages
    return None


def _version_of(package: str, environment: Path) -> str | None:
    """The version of an installed package, by the name of its metadata folder."""
    metadata = next(environment.glob(f"{package}-*.dist-info"), None)
    return None if metadata is None else metadata.name.removeprefix(f"{package}-").removesuffix(".dist-info")


def _first(path: Path, pattern: str) -> str | None:
    try:
        match = re.search(pattern, path.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else match[1].strip()
