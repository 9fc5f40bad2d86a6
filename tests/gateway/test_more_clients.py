"""`llm` and litellm, unchanged. The extra `clients` is large: `.ci/run` installs it and runs these."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.conftest import Gated, MakeGated

pytestmark = pytest.mark.clients
LLM = str(Path(sys.executable).with_name("llm"))


@pytest.fixture
def here(gated: MakeGated) -> Gated:
    made = gated()
    made.verb("start", "--all")
    return made


def test_the_program_llm(here: Gated, tmp_path: Path) -> None:
    use_llm(here.base, tmp_path, ("a", "b"))
    here.until(lambda: not here.requests())


def use_llm(base: str, folder: Path, names: tuple[str, str]) -> list[str]:
    """Both models by the program, streamed (as it does by itself) and not, and broken off; what they said."""
    models = [{"model_id": name, "model_name": name, "api_base": f"{base}/v1"} for name in names]
    (folder / "extra-openai-models.yaml").write_text(json.dumps(models))
    env = os.environ | {"LLM_USER_PATH": str(folder)}
    said = []
    for name in (*names, names[0]):
        for how in ([], ["--no-stream"]):
            command = [
                LLM,
                "-m",
                name,
                "-n",
                *how,
                "-o",
                "max_tokens",
                "6",
                "-o",
                "temperature",
                "0",
                "Hello",
            ]
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            said.append(done.stdout)
        assert said[-1] == said[-2] != ""
    endless = [LLM, "-m", names[1], "-n", "-o", "max_tokens", "1500", "Hello"]
    with subprocess.Popen(endless, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
    return said


def test_litellm(here: Gated) -> None:
    found = use_litellm(here.base, ("a", "b"))
    assert [model for model, _ in found["whole"]] == ["a", "b", "a"]
    assert [text for _, text in found["whole"]] == found["streamed"]
    assert found["anthropic"]
    assert found["broken off"]
    assert found["unknown"]
    here.until(lambda: not here.requests())


def use_litellm(base: str, names: tuple[str, str]) -> dict[str, list[list[str]]]:
    """What `use_litellm.py` found."""
    script = str(Path(__file__).with_name("use_litellm.py"))
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [sys.executable, script, base, *names], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found
