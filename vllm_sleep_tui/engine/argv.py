"""The command line and the environment of one `vllm serve`."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.config.flags import (
    SWITCH,
    WORDS,
    Flag,
    FlagTable,
    shipped_table,
    shipped_tables,
    wrong_value,
)
from vllm_sleep_tui.engine.endpoints import GATE, HEALTH, IS_SLEEPING, METRICS
from vllm_sleep_tui.engine.guard import SOCKET_VARIABLE
from vllm_sleep_tui.engine.guard_files import BACKEND, BACKEND_WORKER
from vllm_sleep_tui.engine.serve_args import PORT, UTILIZATION, ServeArgs

READY_SECONDS = 600
"""vLLM's own limit for a start, `VLLM_ENGINE_READY_TIMEOUT_S` (vLLM 0.33, read in source)."""
QUIET_PATHS = ",".join((HEALTH, METRICS, IS_SLEEPING, GATE))
LAUNCH_VARIABLE = "SLEEP_TUI_LAUNCH"
"""vLLM copies what starts with VLLM_, HF_ and the like to Ray's workers (0.32); what names a launch stays."""
POOL_VARIABLE = "VLLM_SLEEP_TUI_POOL"
"""The folder of the KV pools, for our sleep mode; in the panel's own environment, another than usual."""
LAUNCH_VARIABLES = (LAUNCH_VARIABLE, "VLLM_SLEEP_TUI_LAUNCH")
"""The second is that of servers which the version before started."""

NEVER_INHERITED = (
    "VLLM_API_KEY",  # a key would lock the panel out, unless it is the model's own
    "VLLM_PORT",  # not the API port but vLLM's internal one, which collides between servers
    "VLLM_USE_RUST_FRONTEND",  # it would not load the guard
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",  # a server whose engine is dead must end, so that it can be restarted
    "PYTHONHOME",  # it would mix two Pythons
    POOL_VARIABLE,  # a server that has no part in the pools must not find them
)
"""Variables of the person's shell that no server gets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeSpec:
    """Everything that one launch of `vllm serve` depends on."""

    command: tuple[str, ...]
    model: str
    served_name: str
    port: int
    args: Mapping[str, Any]
    env: Mapping[str, str]
    gpus: tuple[int, ...]
    """NVML indices; empty is vLLM on the CPU."""
    utilization: float | None
    """Share of each GPU's memory, 0 to 1; None leaves it to vLLM."""
    guard_dir: Path
    tmp_dir: Path
    socket: Path
    """Where the guard lets the panel in, and nobody else."""
    launch_id: str
    sleep_mode: bool
    aliases: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    flags: FlagTable = field(default_factory=shipped_table, repr=False)
    """What the vLLM that will read the command line knows."""
    own_backend: bool = False
    """Whether our sleep mode lies in `guard_dir` too."""
    pool: Path | None = None
    """The folder of the KV pools that it may use."""


def serve_argv(spec: ServeSpec) -> list[str]:
    """The argument vector; it holds no secret. `args` have passed `check_args` against the same flags."""
    argv = [*spec.command, "serve", spec.model, "--served-model-name", spec.served_name, *spec.aliases]
    argv += ["--host", "127.0.0.1", PORT, str(spec.port), "--api-server-count", "1"]
    argv += ["--middleware", "panel_guard.PanelGuard", "--disable-access-log-for-endpoints", QUIET_PATHS]
    # vLLM on the CPU refuses to start with this flag (0.32, log-enable-sleep-mode-refused.txt).
    if spec.sleep_mode and spec.gpus:
        argv.append("--enable-sleep-mode")
    if spec.own_backend and "worker-extension-cls" not in spec.args:
        argv += ["--worker-extension-cls", BACKEND_WORKER]
    if spec.gpus and spec.utilization is not None and UTILIZATION not in spec.args:
        argv += [f"--{UTILIZATION}", f"{spec.utilization:.4f}"]
    for name, value in spec.args.items():
        argv += _words(spec.flags.find(name), name, value)
    return argv


def port_words(port: int) -> tuple[str, str]:
    """The words of the command line by which a server is told from what wraps it."""
    return PORT, str(port)


def check_args(args: Mapping[str, Any], flags: FlagTable) -> Iterator[tuple[str, str, str]]:
    """What this vLLM would refuse of the arguments: the flag, what is wrong with it, what to do."""
    for name, value in args.items():
        head, _, tail = name.partition(".")
        flag = flags.find(name)
        if flag is None:
            near = flags.nearest(name)
            others = [table.version for table in shipped_tables() if table.find(name)]
            elsewhere = f" (vLLM {', '.join(others)} does)" if others else ""
            cure = f"The nearest that it knows is {near}." if near else "Remove it."
            yield name, f"vLLM {flags.version} knows no --{head}{elsewhere}", cure
        elif tail and flag.type == SWITCH:
            yield name, f"--{head} takes no value, so nothing of it can be set", "Write true or false."
        elif not tail and (wrong := wrong_value(flag, _texts(value))):
            yield name, f"--{head}: {wrong}", "Correct the value."
        elif flag.type == SWITCH and _texts(value) == "false" and not flag.off and flag.default:
            yield name, f"vLLM {flags.version} cannot turn --{head} off", "Remove it."


def _texts(value: Any) -> str | tuple[str, ...]:
    return tuple(map(_text, value)) if isinstance(value, list | tuple) else _text(value)


def _words(flag: Flag | None, name: str, value: Any) -> Iterator[str]:
    """The words of one flag."""
    given = _texts(value)
    is_whole = "." not in name
    if value is None or (given == () and is_whole):
        return
    if is_whole and (flag is None or flag.type == SWITCH) and given in WORDS:
        spelling = _switched(flag, name, WORDS[given])
        if spelling is not None:
            yield spelling
    elif is_whole and flag is not None and flag.nargs == "?" and given in WORDS:
        # It may stand alone: true is that, false is not to be there.
        if WORDS[given]:
            yield f"--{name}"
    elif isinstance(given, tuple) and flag is not None and flag.repeats:
        for item in given:
            yield f"--{name}={item}"
    elif isinstance(given, tuple):
        yield f"--{name}"
        yield from given
    elif given.startswith("-"):
        yield f"--{name}={given}"  # or argparse takes it for another flag
    else:
        yield f"--{name}"
        yield given


def _switched(flag: Flag | None, name: str, on: bool) -> str | None:
    """The spelling that turns the flag on or off; None where leaving it out does."""
    if flag is None:
        return f"--{name}" if on else f"--no-{name}"
    if on:
        return f"--{flag.name}"
    return next((spelling for spelling in flag.off if spelling.startswith("--no-")), None)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return msgspec.json.encode(value).decode()


def serve_environment(
    spec: ServeSpec, base: Mapping[str, str], *, ready_seconds: float | None = None
) -> dict[str, str]:
    """The environment: `base` (the panel's own), over it the model's `env`, over that what must hold.

    `ready_seconds` raises vLLM's limit for its own start, never lowers it.
    """
    own_python = {"PYTHONPATH", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__"}
    environment = {key: value for key, value in base.items() if key not in own_python}
    environment |= {"NO_COLOR": "1", "VLLM_NO_USAGE_STATS": "1"}
    if ready_seconds is not None:
        environment["VLLM_ENGINE_READY_TIMEOUT_S"] = str(max(READY_SECONDS, math.ceil(ready_seconds)))
    environment |= spec.env
    if spec.own_backend and environment.get("VLLM_PLUGINS"):
        # A list of what may be loaded: ours would not be.
        environment["VLLM_PLUGINS"] += f",{BACKEND}"
    for name in NEVER_INHERITED:
        environment.pop(name, None)
    if spec.api_key is not None:
        environment["VLLM_API_KEY"] = spec.api_key
    environment["PATH"] = _path(spec.command[0], environment.get("PATH", os.defpath))
    return environment | _fixed(spec)


def _fixed(spec: ServeSpec) -> dict[str, str]:
    python_path = [str(spec.guard_dir), *filter(None, [spec.env.get("PYTHONPATH")])]
    # Other machines must reach a model that spans them, so its address is the person's to choose.
    own_address = {} if ServeArgs(spec.args).spans_machines else {"VLLM_HOST_IP": "127.0.0.1"}
    pool = {} if spec.pool is None else {POOL_VARIABLE: str(spec.pool)}
    return (
        own_address
        | pool
        | {
            "VLLM_SERVER_DEV_MODE": "1",
            # NVML counts by PCI bus; CUDA by default puts the fastest first, which differs on mixed cards.
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, spec.gpus)),
            "PYTHONPATH": os.pathsep.join(python_path),
            "TMPDIR": str(spec.tmp_dir),
            # Or vLLM's engine and workers wipe their environment in /proc as they rename themselves.
            "SPT_NOENV": "1",
            LAUNCH_VARIABLE: spec.launch_id,
            SOCKET_VARIABLE: str(spec.socket),
        }
    )


def _path(program: str, path: str) -> str:
    """PATH with the program's folder first: an environment that is not activated fails on `ninja`."""
    binary = shutil.which(program, path=path)
    if binary is None:
        return path
    # A tool installer's link lies outside the environment; a venv's python is itself a link out of it.
    ahead = dict.fromkeys([str(Path(binary).absolute().parent), str(Path(binary).resolve().parent)])
    rest = [folder for folder in path.split(os.pathsep) if folder not in ahead]
    return os.pathsep.join([*ahead, *rest])
