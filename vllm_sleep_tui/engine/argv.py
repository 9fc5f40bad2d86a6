"""The command line and the environment of one `vllm serve`."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from vllm_sleep_tui.config_checks import spans_machines
from vllm_sleep_tui.engine.guard import SOCKET_VARIABLE

READY_SECONDS = 600
"""vLLM's own limit for a start, `VLLM_ENGINE_READY_TIMEOUT_S` (vLLM 0.33, read in source)."""
QUIET_PATHS = "/health,/metrics,/is_sleeping,/panel/gate"
LAUNCH_VARIABLE = "SLEEP_TUI_LAUNCH"
"""vLLM copies what starts with VLLM_, HF_ and the like to Ray's workers (0.32); what names a launch stays."""
LAUNCH_VARIABLES = (LAUNCH_VARIABLE, "VLLM_SLEEP_TUI_LAUNCH")
"""The second is that of servers which the version before started."""

RESERVED_ARGS: dict[str, str] = {
    "host": "The panel keeps every server on 127.0.0.1; leave it out.",
    "port": "Set `port:` of the model, beside `args:`.",
    "uds": "Clients reach a server by its port, the panel by a socket of the guard; leave it out.",
    "served-model-name": "The model is served under its name in this file; rename it there.",
    "api-key": "A key would lock the panel out and does not cover the sleep endpoints; the guard does.",
    "middleware": "The panel's guard takes this place; leave it out.",
    "api-server-count": "Each server has one API process, which the guard counts in; leave it out.",
    "enable-sleep-mode": "The panel sets it; `level: none` turns sleeping off.",
    "headless": "A server without HTTP can neither sleep nor answer; leave it out.",
    "config": "A file of flags could set the ones the panel needs; write them under `args:`.",
    "model": "Set `model:`, beside `args:`.",
    "ssl-keyfile": "The panel speaks plain HTTP on loopback; put a proxy in front for TLS.",
    "ssl-certfile": "The panel speaks plain HTTP on loopback; put a proxy in front for TLS.",
    "root-path": "The panel and its guard know vLLM's paths as they are; put a proxy in front.",
    "disable-access-log-for-endpoints": "The panel sets it for what it polls; leave it out.",
}
"""Flags that `args:` may not set, and what to do instead."""

RESERVED_ENV: dict[str, str] = {
    "VLLM_API_KEY": "A key would lock the panel out; the guard protects the server.",
    "VLLM_PORT": "It is not the API port but vLLM's internal one, and collides between servers.",
    "VLLM_USE_RUST_FRONTEND": "That front end would not load the guard.",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH": "A server whose engine is dead must end, so that it can be restarted.",
    "PYTHONHOME": "It would mix two Pythons; name the right one in `vllm_command:`.",
}
"""Variables that no server gets, from nowhere, and why."""


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


def flag_name(key: str) -> str:
    """The name of a flag as vLLM writes it: no dashes in front, dashes for underscores inside."""
    head, dot, rest = key.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + rest


def serve_argv(spec: ServeSpec) -> list[str]:
    """The argument vector; it holds no secret."""
    argv = [*spec.command, "serve", spec.model, "--served-model-name", spec.served_name]
    argv += ["--host", "127.0.0.1", "--port", str(spec.port), "--api-server-count", "1"]
    argv += ["--middleware", "panel_guard.PanelGuard", "--disable-access-log-for-endpoints", QUIET_PATHS]
    # vLLM on the CPU refuses to start with this flag (0.32, log-enable-sleep-mode-refused.txt).
    if spec.sleep_mode and spec.gpus:
        argv.append("--enable-sleep-mode")
    given = {flag_name(key) for key in spec.args}
    if spec.gpus and spec.utilization is not None and "gpu-memory-utilization" not in given:
        argv += ["--gpu-memory-utilization", f"{spec.utilization:.4f}"]
    for key, value in spec.args.items():
        argv += _flag(key, value)
    return argv


def _flag(key: str, value: Any) -> Iterator[str]:
    # A short alias such as -tp has one dash, and vLLM knows no --tp.
    flag = key if key.startswith("-") and not key.startswith("--") else f"--{flag_name(key)}"
    match value:
        case None | [] | ():
            return
        case True:
            yield flag
        case False:
            yield f"--no-{flag_name(key)}"
        case list() | tuple():
            yield flag
            yield from map(_text, value)
        case _ if _text(value).startswith("-"):
            yield f"{flag}={_text(value)}"  # or argparse takes it for another flag
        case _:
            yield flag
            yield _text(value)


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
    for name in RESERVED_ENV:
        environment.pop(name, None)
    environment["PATH"] = _path(spec.command[0], environment.get("PATH", os.defpath))
    return environment | _fixed(spec)


def _fixed(spec: ServeSpec) -> dict[str, str]:
    python_path = [str(spec.guard_dir), *filter(None, [spec.env.get("PYTHONPATH")])]
    # Other machines must reach a model that spans them, so its address is the person's to choose.
    own_address = {} if spans_machines(spec.args) else {"VLLM_HOST_IP": "127.0.0.1"}
    return own_address | {
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


def _path(program: str, path: str) -> str:
    """PATH with the program's folder first: an environment that is not activated fails on `ninja`."""
    found = shutil.which(program, path=path)
    if found is None:
        return path
    # A tool installer's link lies outside the environment; a venv's python is itself a link out of it.
    ahead = dict.fromkeys([str(Path(found).absolute().parent), str(Path(found).resolve().parent)])
    rest = [folder for folder in path.split(os.pathsep) if folder not in ahead]
    return os.pathsep.join([*ahead, *rest])
