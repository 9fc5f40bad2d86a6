"""Builds the wheel and installs it as people do, each time in an environment that holds nothing else.

python3.11 tests/install/wheel.py [--out DIR]

With uv and pipx, which come from the package index into a folder of this run; on each Python from 3.11 to
3.14 that is on the machine. Installed, it must know its version and show the demo's models, and on the
newest Python switch between two of them. Exits 1 at the first thing that is wrong; says what took how long,
and which Pythons there are not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
IN_WHEEL = ("py.typed", "themes/night.yaml", "tui/panel.tcss", "vllm_flags/0.33.json", "web/page.html")
IN_SDIST = ("README.md", "CHANGELOG.md", "LICENSE", "docs/vllm-sleep-tui.service", "themes/night.yaml")
NOT_IN_WHEEL = ("tests/", "docs/", "screenshots/", "benchmarks/")
SPEED = "40"


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run to its end; its stdout. Exits with what it said if it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        env=env or dict(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"exit {done.returncode}: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def say(what: str, since: float) -> None:
    """One line on what is done."""
    print(f"{time.monotonic() - since:6.1f} s  {what}", flush=True)


def found(version: str) -> str | None:
    """A Python of this version that runs; None if there is none."""
    homes = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin"))
    names = [f"/usr/bin/python{version}", shutil.which(f"python{version}")]
    for name in (*names, *(str(home / f"python{version}") for home in homes)):
        if name and Path(name).exists():
            probe = "import sys, ensurepip, venv; print('%d.%d' % sys.version_info[:2])"
            done = subprocess.run([name, "-c", probe], capture_output=True, text=True, check=False)
            if done.stdout.strip() == version:
                return name
    return None


def share_index(python: Path) -> None:
    """Let uv ask the package index that pip is told to ask: it reads none of pip's settings."""
    for key in (":env:.index-url", "install.index-url", "global.index-url"):
        command = [python, "-m", "pip", "config", "get", key]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            os.environ.setdefault("UV_DEFAULT_INDEX", done.stdout.strip())
            return


def check_contents(wheel: Path, sdist: Path) -> None:
    """What must be in them is, and what is not for users is not."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    missing = [name for name in IN_WHEEL if f"vllm_sleep_tui/{name}" not in names]
    strange = [name for name in names if name.startswith(NOT_IN_WHEEL)]
    if missing or strange:
        sys.exit(f"the wheel lacks {missing} and should not hold {strange}")
    for line in (
        "Requires-Python: >=3.11",
        "License-Expression: Apache-2.0",
        "Description-Content-Type: text/markdown",
    ):
        if line not in metadata:
            sys.exit(f"the wheel's metadata lack: {line}")
    with tarfile.open(sdist) as archive_of_source:
        names = [name.partition("/")[2] for name in archive_of_source.getnames()]
    if missing := [name for name in IN_SDIST if name not in names]:
        sys.exit(f"the source archive lacks {missing}")


def build_in_container(tools: Path, work: Path) -> None:
    """What the container file copies is enough to install from; the image itself is built nowhere here."""
    work.mkdir()
    for line in (ROOT / "Containerfile").read_text().splitlines():
        if line.startswith("COPY "):
            *sources, target = line.split()[1:]
            for source in sources:
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, work / target.removeprefix("/src").strip("/"))
    run(
        tools / "uv",
        "build",
        "--quiet",
        "--wheel",
        "--python",
        sys.executable,
        "--out-dir",
        work / "dist",
        work,
    )
    (wheel,) = (work / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if missing := [name for name in IN_WHEEL if f"vllm_sleep_tui/{name}" not in archive.namelist()]:
            sys.exit(f"a wheel of what the container file copies lacks {missing}")


def use(command: Path, home: Path, *, switches: bool) -> None:
    """From an empty home to the demo's models, or to a switch between two, and nothing left running."""
    (home / "run").mkdir(parents=True)
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VIRTUAL_ENV", "PYTHON", "XDG"))
    }
    env |= {"HOME": str(home), "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")}
    config = run(command, "demo", "--init", home / "demo", "--speed", SPEED, env=env).strip()
    if not switches:
        run(command, "--config", config, "status", "--json", env=env)
        return
    try:
        run(command, "--config", config, "start", "qwen", env=env)
        run(command, "--config", config, "switch", "phi", env=env)
        models = json.loads(run(command, "--config", config, "status", "--json", env=env))["models"]
        states = {model["name"]: model["state"] for model in models}
        if (states["qwen"], states["phi"]) != ("asleep", "awake"):
            sys.exit(f"after the switch: {states}")
    finally:
        run(command, "--config", config, "stop", "--all", "--force", env=env)


def main() -> None:
    """Build, look inside, install and use."""
    parser = argparse.ArgumentParser(description="Build the wheel, install it, and use it.")
    parser.add_argument("--out", type=Path, help="keep the wheel and the source archive there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vst-") as name:
        work, began = Path(name), time.monotonic()
        venv.create(work / "tools", with_pip=True)
        tools = work / "tools/bin"
        run(tools / "python", "-m", "pip", "install", "--quiet", "uv", "pipx")
        share_index(tools / "python")
        say("uv and pipx", began)

        began = time.monotonic()
        run(tools / "uv", "build", "--quiet", "--python", sys.executable, "--out-dir", work / "dist", ROOT)
        (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        check_contents(wheel, sdist)
        version = wheel.name.split("-")[1]
        say(f"{wheel.name}, {wheel.stat().st_size // 1024} KiB", began)
        began = time.monotonic()
        build_in_container(tools, work / "container")
        say("a wheel of what the container file copies", began)
        if given.out:
            shutil.copytree(work / "dist", given.out, dirs_exist_ok=True)

        pythons = {number: python for number in PYTHONS if (python := found(number))}
        for number, python in pythons.items():
            began, folder = time.monotonic(), work / number
            env = os.environ | {"UV_TOOL_DIR": str(folder / "tools"), "UV_TOOL_BIN_DIR": str(folder / "bin")}
            run(tools / "uv", "tool", "install", "--quiet", "--python", python, wheel, env=env)
            command = folder / "bin/vllm-sleep-tui"
            if version not in run(command, "--version"):
                sys.exit(f"{command} does not say that it is {version}")
            say(f"uv tool install, Python {number}", began)
            began, is_newest = time.monotonic(), number == max(pythons)
            use(command, folder / "home", switches=is_newest)
            what = "a start and a switch" if is_newest else "its models"
            say(f"the demo, {what}, Python {number}", began)

        began, folder = time.monotonic(), work / "pipx"
        env = os.environ | {
            "PIPX_HOME": str(folder),
            "PIPX_BIN_DIR": str(folder / "bin"),
            "PIPX_MAN_DIR": str(folder / "man"),
        }
        run(tools / "pipx", "install", "--quiet", "--python", next(iter(pythons.values())), wheel, env=env)
        if version not in run(folder / "bin/vllm-sleep-tui", "--version"):
            sys.exit("what pipx installed does not say its version")
        say("pipx install", began)
        absent = [number for number in PYTHONS if number not in pythons]
        print(f"not on this machine: Python {', '.join(absent)}" if absent else "on all Pythons", flush=True)


if __name__ == "__main__":
    main()
