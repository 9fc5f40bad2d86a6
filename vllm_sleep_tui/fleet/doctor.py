"""Is everything there that a config needs? Each check looks at one thing: ok, warn or fail, and the cure."""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import socket
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import msgspec

from vllm_sleep_tui.config.flags import FlagTable
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.config.types import CONFIG_NAME, ModelConfig
from vllm_sleep_tui.engine.argv import POOL_VARIABLE
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.core import simulated_folder
from vllm_sleep_tui.fleet.keeper_client import is_kept
from vllm_sleep_tui.fleet.levels import never_level2, why_no_level2
from vllm_sleep_tui.fleet.observe.discovery import VllmEnvironment, find_command, find_foreign_servers
from vllm_sleep_tui.fleet.observe.orphans import find_orphans
from vllm_sleep_tui.fleet.operations.arguments import complaints, flags_of, simulated_flags
from vllm_sleep_tui.fleet.pool import pools_here, why_no_pool
from vllm_sleep_tui.fleet.store.records import RecordStore
from vllm_sleep_tui.fleet.survey import Surroundings, look_around
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.sizing.chat_template import TEMPLATE_CURE, lacks_template
from vllm_sleep_tui.sizing.hub import hub_cache
from vllm_sleep_tui.telemetry.gpus import VISIBLE, fault_of, is_hidden
from vllm_sleep_tui.telemetry.host import host_memory
from vllm_sleep_tui.telemetry.processes import holder_of_port
from vllm_sleep_tui.units import GIB, MIB, counted, gib

LOW_RAM_BYTES = 8 * GIB
LOW_STATE_BYTES = 200 * MIB
LOW_CACHE_BYTES = 20 * GIB


class Verdict(StrEnum):
    """How a check went."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at."""

    name: str
    verdict: Verdict
    what: str
    cure: str = ""


def examine(loaded: LoadedConfig | None, here: Path, *, may_ask: bool) -> list[Check]:
    """All checks, those of the machine alone without a config; nothing is changed.

    `may_ask`: the person agreed to run what the config names, to ask vLLM for its flags.
    """
    machine = look_around(here)
    if loaded is None:
        return list(_machine(machine, None))
    return [
        *_config(loaded),
        *_flags(loaded, may_ask=may_ask),
        *_models(loaded, machine),
        *_machine(machine, loaded),
    ]


def _config(loaded: LoadedConfig) -> Iterator[Check]:
    """The config and the binary it names."""
    yield Check("config", Verdict.OK, f"{loaded.path}, models: {', '.join(loaded.config.models)}")
    if all(model.is_attached for model in loaded.config.models.values()):
        return
    own = [model for model in loaded.config.models.values() if not model.is_attached]
    for command in dict.fromkeys(model.vllm_command or loaded.config.vllm_command for model in own):
        environment = find_command(command, os.environ)
        if environment is None:
            cure = "Install vLLM in an environment of its own and give the full path of its `vllm`."
            yield Check("vllm", Verdict.FAIL, f"{command[0]} is not there or may not be run", cure)
        elif loaded.config.simulated_gpus:
            yield Check("vllm", Verdict.OK, "SIMULATED: the demo's stand-in")
        else:
            yield _vllm_check(environment)


def _vllm_check(environment: VllmEnvironment) -> Check:
    if environment.version is None:
        what = f"{environment.command}: its version cannot be read beside it"
        return Check("vllm", Verdict.WARN, what, "Sleep mode needs vLLM 0.24 or newer.")
    what = f"{environment.version}, {environment.command}"
    if environment.can_sleep:
        return Check("vllm", Verdict.OK, what)
    return Check(
        "vllm", Verdict.WARN, f"{what}: too old to sleep", "Install vLLM 0.24 or newer to use sleep mode."
    )


def _flags(loaded: LoadedConfig, *, may_ask: bool) -> Iterator[Check]:
    """The arguments of the models, by the parser of the vLLM that would read them.

    It runs vLLM's Python once to ask it, if the person agreed to run what the config names.
    """
    tables: dict[tuple[str, ...], FlagTable] = {}
    for name, model in loaded.config.models.items():
        command = model.vllm_command or loaded.config.vllm_command
        if model.is_attached or find_command(command, os.environ) is None:
            continue
        if loaded.config.simulated_gpus:
            tables[command] = simulated_flags({**os.environ, **model.env})
        elif command not in tables:
            tables[command] = flags_of(command, loaded.path.parent, state_dir(), may_ask=may_ask)
            yield _table_check(command, tables[command], may_ask=may_ask)
        flags = tables[command]
        for flag, wrong, cure in complaints(model, flags):
            verdict = Verdict.FAIL if flags.is_asked else Verdict.WARN
            yield Check(f"{name}.args.{flag}", verdict, wrong, cure)


def _table_check(command: tuple[str, ...], flags: FlagTable, *, may_ask: bool) -> Check:
    if flags.is_asked:
        what = f"{len(flags.flags)} of vLLM {flags.version}, by its own parser"
        return Check("flags", Verdict.OK, what)
    what = f"{command[0]} could not be asked for its flags; those of vLLM {flags.version} stand in"
    asked = shlex.join([*command, "serve", "--help=all"])
    cure = f"Every flag is checked before a start if `{asked}` shows them."
    if not may_ask:
        cure = f"Nobody has agreed to run what this config names; to ask it: --config {CONFIG_NAME} doctor."
    return Check("flags", Verdict.WARN, what, cure)


def _models(loaded: LoadedConfig, machine: Surroundings) -> Iterator[Check]:
    """GPUs, ports and folders that the models name."""
    indices = {gpu.index for gpu in machine.gpus}
    for name, model in loaded.config.models.items():
        faults = [fault for index in model.gpus if (fault := fault_of(machine.gpu_faults, index))]
        missing = [index for index in model.gpus if index not in indices and not faults]
        if faults and not loaded.config.simulated_gpus and not model.is_attached:
            yield Check(f"{name}.gpus", Verdict.FAIL, faults[0].what, faults[0].cure)
        yield from _visible_checks(loaded, name, model, machine)
        if missing and not loaded.config.simulated_gpus and not model.is_attached:
            have = ", ".join(map(str, sorted(indices))) or "none that NVML can see"
            cure = "Correct `gpus`; [] is vLLM on the CPU."
            what = f"there is no GPU {', '.join(map(str, missing))}; this machine has: {have}"
            yield Check(f"{name}.gpus", Verdict.FAIL, what, cure)
        if (
            model.model
            and model.model.startswith("/")
            and not os.path.isfile(Path(model.model) / "config.json")
        ):
            yield Check(
                f"{name}.model", Verdict.FAIL, f"{model.model} holds no config.json", "Correct the path."
            )
        yield from _backend_checks(loaded, name)
        yield from _level_checks(loaded, name, model)
        if lacks_template(model, loaded.path.parent, os.environ):
            yield Check(f"{name}.chat", Verdict.WARN, "no chat template: chats are refused", TEMPLATE_CURE)
        if model.api_key_file:
            yield _key_file_check(name, Path(model.api_key_file))
        if model.port:
            yield _port_check(loaded, name, model.port)


def _visible_checks(
    loaded: LoadedConfig, name: str, model: ModelConfig, machine: Surroundings
) -> Iterator[Check]:
    """Whether the model's GPUs are among those that this shell was given."""
    visible = os.environ.get(VISIBLE)
    hidden = [str(gpu.index) for gpu in machine.gpus if gpu.index in model.gpus and is_hidden(gpu, visible)]
    if hidden and not loaded.config.simulated_gpus and not model.is_attached:
        what = f"GPU {', '.join(hidden)} is not this shell's: {VISIBLE} is {visible!r}"
        cure = f"Correct `gpus`, or unset {VISIBLE} if the GPU is yours to use."
        yield Check(f"{name}.gpus", Verdict.FAIL, what, cure)


def _level_checks(loaded: LoadedConfig, name: str, model: ModelConfig) -> Iterator[Check]:
    """Whether the model comes back from level 2, where it is asked for or `auto` may choose it."""
    if model.level not in (2, "auto") or model.is_attached:
        return
    vllm = find_command(model.vllm_command or loaded.config.vllm_command, os.environ)
    version, base = vllm.version if vllm else None, loaded.path.parent
    never, risk = never_level2(model, version, base), why_no_level2(model, version, base)
    if model.level == "auto":
        if never:
            yield Check(f"{name}.level", Verdict.OK, f"level 1, or none without RAM for it: {never}")
    elif risk:
        cure = "Set `level: 1` or `auto`."
        yield Check(f"{name}.level", Verdict.FAIL if never else Verdict.WARN, f"level 2: {risk}", cure)


def _backend_checks(loaded: LoadedConfig, name: str) -> Iterator[Check]:
    """Whose sleep mode the model runs on, as its last start found."""
    record = RecordStore(state_dir(), loaded.path).read(name)
    if record.sleep_backend == "own":
        yield Check(f"{name}.sleep_backend", Verdict.OK, "the fast sleep mode, see docs/fast-switch.md")
    elif record.sleep_backend_why:
        level_0 = loaded.config.models[name].level == 0
        what = f"vLLM's own sleep mode: {record.sleep_backend_why}"
        cure = "Level 0 needs ours; until then it sleeps as with `level: auto`." if level_0 else ""
        yield Check(f"{name}.sleep_backend", Verdict.WARN if level_0 else Verdict.OK, what, cure)


def _key_file_check(name: str, path: Path) -> Check:
    if path.stat().st_mode & 0o077:
        what = f"{path}: other users of this machine may read the key"
        return Check(f"{name}.api_key_file", Verdict.WARN, what, f"Keep it to yourself: chmod 600 {path}")
    return Check(f"{name}.api_key_file", Verdict.OK, f"{path} is yours alone")


def _port_check(loaded: LoadedConfig, name: str, port: int) -> Check:
    """Whether the port is free or the model's own; vLLM shares ports silently, so it is bound to see."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            pass
        else:
            return Check(f"{name}.port", Verdict.OK, f"{port} is free")
    records = RecordStore(state_dir(), loaded.path)
    if records.read(name).port == port and is_kept(records.path(name, "keeper")):
        return Check(f"{name}.port", Verdict.OK, f"{port} is in use by {name} itself")
    holder = holder_of_port(port)
    who = f"user {holder.user}: {holder.command or 'a process that cannot be seen'}" if holder else "somebody"
    pid = f"pid {holder.process.pid}, " if holder and holder.process else ""
    cure = "Give the model another `port`, or leave it out and a free one is chosen."
    return Check(f"{name}.port", Verdict.FAIL, f"{port} is taken by {pid}{who}", cure)


def _machine(machine: Surroundings, loaded: LoadedConfig | None) -> Iterator[Check]:
    """What does not depend on a model."""
    simulated = bool(loaded and loaded.config.simulated_gpus)
    if loaded is None:
        best = machine.best_environment
        yield (
            _vllm_check(best)
            if best
            else Check("vllm", Verdict.WARN, "none found", "Install vLLM in its own venv.")
        )
    if simulated and loaded:
        yield Check("gpus", Verdict.OK, f"{len(loaded.config.simulated_gpus)}, SIMULATED")
    elif machine.gpus:
        names = ", ".join(f"{gpu.index} {gpu.name} {gib(gpu.total_bytes)}" for gpu in machine.gpus)
        yield Check("gpus", Verdict.OK, names)
    elif not machine.gpu_faults:
        cure = "Without an NVIDIA GPU, models run on the CPU alone: `gpus: []`."
        yield Check("gpus", Verdict.WARN, machine.gpu_note or "none", cure)
    if not simulated:
        yield from (Check("gpus", Verdict.WARN, fault.what, fault.cure) for fault in machine.gpu_faults)
    yield _ram_check(simulated_folder(loaded, state_dir()) if loaded else None)
    yield _state_check()
    if not simulated:
        yield _cache_check(hub_cache(os.environ))
        yield Check(
            "token",
            Verdict.OK,
            "Hugging Face's is " + ("there" if machine.token else "not there: gated models need one"),
        )
        yield from _foreign_checks(machine)
    yield from _pool_checks(simulated=simulated)
    yield from _logout_checks()
    for orphan in find_orphans(state_dir()):
        cure = "End it with: vllm-sleep-tui orphans --end"
        yield Check("orphans", Verdict.WARN, f"pid {orphan.process.pid}: {orphan.command}", cure)


def _ram_check(simulated: Path | None) -> Check:
    host = host_memory(simulated)
    what = f"{gib(host.available_bytes)} free of {gib(host.total_bytes)}"
    what += ", SIMULATED" if simulated else ""
    if host.available_bytes is not None and host.available_bytes < LOW_RAM_BYTES:
        return Check(
            "ram", Verdict.WARN, what, "Sleep level 1 keeps the weights in RAM; use level 2 for large models."
        )
    return Check("ram", Verdict.OK, what)


def _state_check() -> Check:
    try:
        folder = state_dir()
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except PanelError as error:
        return Check("state folder", Verdict.FAIL, error.what, error.cure)
    except OSError as error:
        return Check(
            "state folder",
            Verdict.FAIL,
            f"not writable: {error.strerror}",
            "Correct it or set XDG_STATE_HOME.",
        )
    what = f"{folder}, {gib(free)} free on its disk"
    if free < LOW_STATE_BYTES:
        return Check("state folder", Verdict.WARN, what, "Make room: logs need up to 60 MiB a model.")
    return Check("state folder", Verdict.OK, what)


def _cache_check(cache: Path) -> Check:
    there = next(path for path in (cache, *cache.parents) if os.path.exists(path))
    free = shutil.disk_usage(there).free
    what = f"{cache}, {gib(free)} free on its disk"
    if free < LOW_CACHE_BYTES:
        return Check(
            "model cache", Verdict.WARN, what, "Make room before a model is fetched, or move it: HF_HOME."
        )
    return Check("model cache", Verdict.OK, what)


def _foreign_checks(machine: Surroundings) -> Iterator[Check]:
    for server in find_foreign_servers(machine.gpus):
        vram = f"VRAM {gib(server.vram_bytes)}"
        what = f"pid {server.process.pid}, user {server.user}, {vram}: {server.command}"
        cure = "It is left alone; to see it in the panel, add a model with `url:`."
        yield Check("another vLLM", Verdict.WARN, what, cure)


def _pool_checks(*, simulated: bool) -> Iterator[Check]:
    """The KV pools of this user: who holds them, and whether they can be had; of GPUs as these ones."""
    if why := why_no_pool():
        cure = f"Without it switches are slower: remove it, or set {POOL_VARIABLE} to another, short path."
        yield Check("kv pool", Verdict.WARN, why, cure)
    for pool in pools_here():
        holder, state = pool.holder(), pool.state()
        if holder is None or pool.is_simulated is not simulated:
            continue  # it has ended meanwhile, or is a demo's beside real GPUs
        who = f"pid {holder.pid}"
        if state is None:
            cure = f"Switches are slower until it does; end it and it is started anew: kill -9 {holder.pid}"
            yield Check("kv pool", Verdict.WARN, f"{pool.uuid}: {who} does not answer", cure)
        else:
            whose = counted(len(state.engines), "engine")
            what = f"{pool.uuid}: {who} keeps {gib(state.free_bytes)} of KV cache for the next of {whose}"
            yield Check("kv pool", Verdict.OK, what)


def _logout_checks() -> Iterator[Check]:
    """Whether logging out ends servers: systemd's KillUserProcesses without lingering does."""
    files = [Path("/etc/systemd/logind.conf"), *sorted(Path("/etc/systemd/logind.conf.d").glob("*.conf"))]
    kills = False
    for file in files:
        try:
            settings = re.findall(
                r"^\s*KillUserProcesses\s*=\s*(\w+)", file.read_text(errors="replace"), re.MULTILINE
            )
        except OSError:
            continue
        kills = settings[-1].lower() in ("yes", "true", "1", "on") if settings else kills
    if not kills:
        yield Check("logout", Verdict.OK, "servers outlive it")
        return
    if Path("/var/lib/systemd/linger", getpass.getuser()).exists():
        yield Check("logout", Verdict.OK, "servers outlive it: lingering is enabled")
        return
    what = "KillUserProcesses=yes: logging out ends your servers"
    yield Check("logout", Verdict.WARN, what, "Let your processes stay: loginctl enable-linger")
