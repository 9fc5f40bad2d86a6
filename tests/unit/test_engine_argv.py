"""The command line and the environment that a server is started with."""

from __future__ import annotations

import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_sleep_tui.engine.argv import (
    NEVER_INHERITED,
    ServeSpec,
    serve_argv,
    serve_environment,
)
from vllm_sleep_tui.engine.guard_files import copy_backend, copy_guard
from vllm_sleep_tui.engine.serve_args import RESERVED

SPEC = ServeSpec(
    command=("vllm",),
    model="Qwen/Qwen3-0.6B",
    served_name="qwen",
    port=8001,
    args={},
    env={},
    gpus=(1, 3),
    utilization=0.73,
    guard_dir=Path("/run/guard"),
    tmp_dir=Path("/tmp/v1"),
    socket=Path("/tmp/v1/panel.sock"),
    launch_id="launch-1",
    sleep_mode=True,
)


def after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def with_args(**args: Any) -> list[str]:
    return serve_argv(replace(SPEC, args=args))


def test_the_server_is_on_loopback_under_its_name_behind_the_guard() -> None:
    argv = serve_argv(SPEC)

    assert argv[:3] == ["vllm", "serve", "Qwen/Qwen3-0.6B"]
    assert after(argv, "--served-model-name") == "qwen"
    assert after(argv, "--host") == "127.0.0.1"
    assert after(argv, "--port") == "8001"
    assert after(argv, "--api-server-count") == "1"
    assert after(argv, "--middleware") == "panel_guard.PanelGuard"
    assert after(argv, "--gpu-memory-utilization") == "0.7300"
    assert "--enable-sleep-mode" in argv


def test_what_names_a_launch_is_not_copied_to_rays_workers() -> None:
    environment = serve_environment(SPEC, {})
    ours = {name for name, value in environment.items() if value in ("/tmp/v1/panel.sock", "launch-1")}

    assert ours == {"SLEEP_TUI_SOCKET", "SLEEP_TUI_LAUNCH"}
    # vLLM 0.32, ray/ray_env.py: DEFAULT_ENV_VAR_PREFIXES.
    copied = ("VLLM_", "FLASH_ATTENTION_", "LMCACHE_", "NCCL_", "UCX_", "HF_", "HUGGING_FACE_")
    assert not any(name.startswith(copied) for name in ours)


def test_vllm_on_the_cpu_gets_neither_sleep_mode_nor_a_share_of_gpu_memory() -> None:
    argv = serve_argv(replace(SPEC, gpus=()))

    assert "--enable-sleep-mode" not in argv
    assert "--gpu-memory-utilization" not in argv


def test_level_none_leaves_sleep_mode_out() -> None:
    assert "--enable-sleep-mode" not in serve_argv(replace(SPEC, sleep_mode=False))


def test_a_share_of_memory_in_the_args_wins() -> None:
    argv = with_args(**{"gpu-memory-utilization": "0.5"})

    assert argv.count("--gpu-memory-utilization") == 1
    assert after(argv, "--gpu-memory-utilization") == "0.5"


def test_every_flag_that_the_panel_sets_is_reserved() -> None:
    argv = serve_argv(replace(SPEC, utilization=None))
    ours = {word.removeprefix("--") for word in argv if word.startswith("--")}

    assert ours <= RESERVED.keys()


def test_the_environment_holds_what_the_panel_relies_on() -> None:
    environment = serve_environment(replace(SPEC, env={"VLLM_SERVER_DEV_MODE": "0"}), {"HF_TOKEN": "t"})

    assert environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert environment["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert environment["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert environment["VLLM_HOST_IP"] == "127.0.0.1"
    assert environment["TMPDIR"] == "/tmp/v1"
    assert environment["SLEEP_TUI_LAUNCH"] == "launch-1"
    assert environment["SLEEP_TUI_SOCKET"] == "/tmp/v1/panel.sock"
    assert environment["HF_TOKEN"] == "t"


def test_our_own_python_does_not_leak_into_vllms() -> None:
    base = {"PYTHONPATH": "/ours", "PYTHONHOME": "/ours", "VIRTUAL_ENV": "/ours", "VLLM_SIM_SPEED": "9"}

    environment = serve_environment(replace(SPEC, env={"PYTHONPATH": "/theirs"}), base)

    assert environment["PYTHONPATH"] == "/run/guard:/theirs"
    assert "PYTHONHOME" not in environment
    assert "VIRTUAL_ENV" not in environment
    assert environment["VLLM_SIM_SPEED"] == "9"


def test_what_would_lock_the_panel_out_reaches_no_server() -> None:
    values = dict.fromkeys(NEVER_INHERITED, "1")

    environment = serve_environment(replace(SPEC, env=values), values)

    assert not set(NEVER_INHERITED) & environment.keys()


def test_the_models_own_environment_wins_over_the_panels_defaults() -> None:
    environment = serve_environment(
        replace(SPEC, env={"NO_COLOR": "", "VLLM_ENGINE_READY_TIMEOUT_S": "9"}), {}, ready_seconds=900.2
    )

    assert environment["NO_COLOR"] == ""
    assert environment["VLLM_ENGINE_READY_TIMEOUT_S"] == "9"


def test_vllms_limit_for_a_start_is_raised_and_never_lowered() -> None:
    assert serve_environment(SPEC, {}, ready_seconds=900.2)["VLLM_ENGINE_READY_TIMEOUT_S"] == "901"
    assert serve_environment(SPEC, {}, ready_seconds=5)["VLLM_ENGINE_READY_TIMEOUT_S"] == "600"
    assert "VLLM_ENGINE_READY_TIMEOUT_S" not in serve_environment(SPEC, {})


def test_the_folder_of_the_vllm_program_comes_first_in_the_path_and_so_does_what_it_links_to(
    tmp_path: Path,
) -> None:
    real = tmp_path / "env" / "bin" / "vllm"
    real.parent.mkdir(parents=True)
    real.write_text("#!/bin/sh\n")
    real.chmod(0o755)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "vllm").symlink_to(real)
    base = {"PATH": f"/usr/bin:{tmp_path}/local:/bin"}

    environment = serve_environment(SPEC, base)

    assert environment["PATH"] == f"{tmp_path}/local:{real.parent}:/usr/bin:/bin"


def test_a_missing_program_leaves_the_path_alone() -> None:
    spec = replace(SPEC, command=("/no/such/vllm",))

    assert serve_environment(spec, {"PATH": "/usr/bin"})["PATH"] == "/usr/bin"


def test_the_guard_is_copied_alone_and_privately_and_a_copy_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "guard"
    copy_guard(folder)
    (folder / "panel_guard.py").write_text("old")
    copy_guard(folder)

    assert [file.name for file in folder.iterdir()] == ["panel_guard.py"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "panel_guard.py").stat().st_mode) == 0o600
    assert "class PanelGuard" in (folder / "panel_guard.py").read_text()


def test_our_sleep_mode_is_asked_for_where_it_lies_and_loaded_where_a_list_limits_plugins() -> None:
    own = replace(SPEC, own_backend=True)
    assert after(serve_argv(own), "--worker-extension-cls") == "panel_sleep.worker.PanelWorker"
    assert "--worker-extension-cls" not in serve_argv(SPEC)
    theirs = replace(own, args={"worker-extension-cls": "mine.Worker"})
    assert after(serve_argv(theirs), "--worker-extension-cls") == "mine.Worker"
    assert serve_environment(own, {"VLLM_PLUGINS": "lora"})["VLLM_PLUGINS"] == "lora,panel_sleep"
    assert "VLLM_PLUGINS" not in serve_environment(own, {})
    assert serve_environment(SPEC, {"VLLM_PLUGINS": "lora"})["VLLM_PLUGINS"] == "lora"


def test_a_python_with_the_folder_on_its_path_finds_our_plugin_which_never_hinders_it(tmp_path: Path) -> None:
    copy_backend(tmp_path / "guard")
    for path in (tmp_path / "guard").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
    program = (
        "from importlib.metadata import entry_points\n"
        "found, = entry_points(group='vllm.general_plugins', name='panel_sleep')\n"
        "found.load()(); found.load()(); print('goes on')"
    )
    environment = {"PYTHONPATH": str(tmp_path / "guard")}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "goes on\n", done.stderr
    # Without vLLM: said once, in one line, and nothing raised.
    (line,) = done.stderr.splitlines()
    assert line.startswith('panel-sleep-backend {"state": "stock", "why": "ModuleNotFoundError')
