"""A new user's minutes: from nothing to the demo's first switch, or to the first answer, step by step.

python benchmarks/first_minutes.py clone|wheel|uv
python benchmarks/first_minutes.py panel|verbs VLLM_ENVIRONMENT MODEL_FOLDER

`clone` is what the README says; `wheel` installs a wheel that was built before with pip into a new
environment, `uv` with `uv tool install` (uv must be on PATH). Each begins with an empty home, so packages
come from the index. The demo is opened in a terminal (a pty) and its keys are pressed.

`panel` and `verbs` go from a home that holds vLLM in `~/vllm` and one model in the cache to the first answer:
by the screen of somebody without a config, or by init, doctor, start and chat. The model is a folder as
`vllm serve` takes it; nothing is fetched. uv installs the panel.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests/tui"))

import pty_terminal  # noqa: E402 - a folder of tests is no package
from pty_terminal import Terminal  # noqa: E402

pty_terminal.DEADLINE = 900.0  # a first start of vLLM takes minutes
QUESTION = "Why is the sky blue?"


def timed(what: str, work: Callable[[], object]) -> None:
    """Do one step and say what it took."""
    began = time.monotonic()
    work()
    print(f"{time.monotonic() - began:7.1f} s  {what}", flush=True)


def run(*command: str | Path, env: dict[str, str], cwd: Path | None = None) -> None:
    """One command of the way, as a person types it."""
    words = [str(one) for one in command]
    subprocess.run(words, env=env, cwd=cwd, check=True, stdout=subprocess.DEVNULL)


def install(way: str, work: Path, env: dict[str, str]) -> Path:
    """Install in this way; the command."""
    if way == "clone":
        timed(
            "git clone", lambda: run("git", "clone", "--quiet", "--no-local", ROOT, work / "clone", env=env)
        )
        timed("python3 -m venv", lambda: run("python3", "-m", "venv", work / "venv", env=env))
        timed("pip install .", lambda: run(work / "venv/bin/pip", "install", "-q", work / "clone", env=env))
        return work / "venv/bin/vllm-sleep-tui"
    uv = shutil.which("uv") or sys.exit("uv is not on PATH")
    run(uv, "build", "--quiet", "--wheel", "--out-dir", work / "dist", ROOT, env=env)
    (wheel,) = (work / "dist").glob("*.whl")
    if way == "wheel":
        timed("python3 -m venv", lambda: run("python3", "-m", "venv", work / "venv", env=env))
        timed("pip install the wheel", lambda: run(work / "venv/bin/pip", "install", "-q", wheel, env=env))
        return work / "venv/bin/vllm-sleep-tui"
    more = env | {"UV_TOOL_DIR": str(work / "tools"), "UV_TOOL_BIN_DIR": str(work / "bin")}
    timed(
        "uv tool install",
        lambda: run(uv, "tool", "install", "--quiet", "--python", sys.executable, wheel, env=more),
    )
    return work / "bin/vllm-sleep-tui"


def demo(command: Path, env: dict[str, str]) -> None:
    """To the first switch in the demo."""
    terminal = Terminal([str(command), "demo"], env, 120, 40)
    try:
        timed("vllm-sleep-tui demo: the first screen", lambda: terminal.wait_for("SIMULATED", "coder"))
        timed("… its first model is awake, nothing pressed", lambda: terminal.wait_for("qwen awake"))
        timed(
            "down, enter: the second starts, the first sleeps",
            lambda: press(terminal, "\x1b[B\r", "phi awake"),
        )
        timed("up, enter: the first switch", lambda: press(terminal, "\x1b[A\r", "last switch to qwen"))
    finally:  # whatever came of it, no server is left
        leave(terminal)


def panel(command: Path, env: dict[str, str], _: Path) -> None:
    """From no config to the first answer, in the panel."""
    terminal = Terminal([str(command)], env, 120, 40)
    try:
        timed("vllm-sleep-tui: what was found here", lambda: terminal.wait_for("Models", "Writes 1 model"))
        timed("enter: the config is written, the panel is open", lambda: press(terminal, "\r", "starting"))
        timed("… its model is awake, nothing pressed", lambda: terminal.wait_for("● awake"))
        terminal.press("c")
        terminal.press(QUESTION)
        timed("c, a question, enter: the whole answer", lambda: press(terminal, "\r", "TTFT"))
        press(terminal, "\x1b", "switch")  # out of the input: letters are keys again
    finally:
        leave(terminal)


def verbs(command: Path, env: dict[str, str], work: Path) -> None:
    """From no config to the first answer, by verbs."""
    try:
        timed("init", lambda: run(command, "init", env=env, cwd=work))
        timed("doctor (asks vLLM for its flags)", lambda: run(command, "doctor", env=env, cwd=work))
        timed("start --all", lambda: run(command, "start", "--all", env=env, cwd=work))
        timed("chat", lambda: run(command, "chat", "model", QUESTION, env=env, cwd=work))
    finally:
        run(command, "stop", "--all", "--force", env=env, cwd=work)


def press(terminal: Terminal, keys: str, *said: str) -> None:
    """Press keys, and wait for what the screen then says."""
    terminal.press(keys)
    terminal.wait_for(*said)


def leave(terminal: Terminal) -> None:
    """Close the panel and stop what it started."""
    if terminal.process.poll() is None:
        press(terminal, "q", "Stop them")
        terminal.press("s")
        terminal.end()
    terminal.close()


def furnish(home: Path, environment: Path, model: Path) -> None:
    """vLLM in ~/vllm, and a model where the Hugging Face hub's own downloads lie."""
    (home / "vllm").symlink_to(environment.absolute())
    cached = home / ".cache/huggingface/hub/models--new--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs/main").write_text("0" * 40)
    shutil.copytree(model, cached / "snapshots" / ("0" * 40))


def main() -> None:
    """Go one way to its end."""
    parser = argparse.ArgumentParser(description="Time a new user's first steps.")
    parser.add_argument("way", choices=("clone", "wheel", "uv", "panel", "verbs"))
    parser.add_argument("vllm", nargs="?", type=Path, help="the environment that holds vLLM")
    parser.add_argument("model", nargs="?", type=Path, help="a folder with a model")
    given = parser.parse_args()
    is_real = given.way in ("panel", "verbs")
    if is_real and (given.vllm is None or given.model is None):
        parser.error(f"{given.way} needs an environment of vLLM and a folder with a model")
    with tempfile.TemporaryDirectory(prefix="vst-") as name:
        work = Path(name)
        home, here = work / "home", work / "here"
        home.mkdir()
        here.mkdir()
        own = ("XDG", "VIRTUAL_ENV", "HF_", "VLLM")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env |= {"HOME": str(home), "TERM": "xterm-256color", "COLORTERM": "truecolor", "HF_HUB_OFFLINE": "1"}
        if is_real:
            furnish(home, given.vllm, given.model)
        os.chdir(here)  # no config of this repository's folder
        began = time.monotonic()
        command = install(given.way, work, env)
        if is_real:
            {"panel": panel, "verbs": verbs}[given.way](command, env, here)
        else:
            demo(command, env)
        print(f"{time.monotonic() - began:7.1f} s  in all ({given.way})")


if __name__ == "__main__":
    main()
