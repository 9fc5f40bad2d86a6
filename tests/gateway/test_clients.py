"""The official clients, unchanged: they are told the gateway's address and nothing else."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import anthropic
import httpx
import openai
import pytest

from tests.gateway.conftest import Gated, MakeGated


@pytest.fixture
def here(gated: MakeGated) -> Gated:
    made = gated({"a": {"model": "sim/1GiB"}, "b": {"model": "sim/4GiB", "aliases": ["claude-b"]}})
    made.verb("start", "--all")
    return made


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_openais_client(here: Gated) -> None:
    with openai.OpenAI(base_url=here.url, api_key="none", max_retries=0) as client:
        use_openais(client, here)


def use_openais(client: openai.OpenAI, here: Gated) -> None:
    assert {model.id for model in client.models.list()} == {"a", "b", "claude-b"}
    for name in ("a", "b", "a"):
        whole = client.chat.completions.create(model=name, messages=question("hi"), max_tokens=8)  # type: ignore[arg-type]
        assert whole.model == name
        stream = client.chat.completions.create(
            model=name,
            messages=question("hi"),  # type: ignore[arg-type]
            max_tokens=8,
            stream=True,
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == whole.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="aa", messages=question("hi"))  # type: ignore[arg-type]
    with client.chat.completions.create(
        model="a",
        messages=question("hi"),  # type: ignore[arg-type]
        max_tokens=1000,
        stream=True,
    ) as stopped:
        next(iter(stopped))
    here.until(lambda: not here.requests())


def test_anthropics_client(here: Gated) -> None:
    with anthropic.Anthropic(base_url=here.base, api_key="none", max_retries=0) as client:
        use_anthropics(client)


def use_anthropics(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model="claude-b", messages=question("hi"), max_tokens=8)  # type: ignore[arg-type]
    with client.messages.stream(model="a", messages=question("hi"), max_tokens=8) as stream:  # type: ignore[arg-type]
        text = "".join(stream.text_stream)
    assert whole.content[0].type == "text"
    assert whole.content[0].text
    assert text
    assert {model.id for model in client.models.list()} == {"a", "b", "claude-b"}
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="zz", messages=question("hi"), max_tokens=8)  # type: ignore[arg-type]


def test_an_agent_that_alternates_two_models_and_others_beside_it(here: Gated) -> None:
    """A loop of calls that each need the one before, while two others talk to a model each."""

    async def work() -> list[str]:
        client = openai.AsyncOpenAI(base_url=here.url, api_key="none", max_retries=0)

        async def ask(model: str, text: str) -> str:
            whole = await client.chat.completions.create(
                model=model,
                messages=question(text),  # type: ignore[arg-type]
                max_tokens=6,
            )
            assert whole.model == model
            return whole.choices[0].message.content or ""

        async def agent() -> None:
            said = "begin"
            for turn in range(20):
                said = await ask("ab"[turn % 2], said)

        async def person(model: str) -> None:
            for turn in range(10):
                await ask(model, f"turn {turn}")

        async with client, asyncio.timeout(240):
            await asyncio.gather(agent(), person("a"), person("b"))
        return [name for name, state in here.states().items() if state == "awake"]

    assert len(asyncio.run(work())) in (1, 2)  # b counts with its alias
    counted = httpx.get(f"{here.base}/metrics", timeout=60).text
    assert 'status="200"' in counted
    assert 'status="5' not in counted


def test_an_agent_with_tools_of_its_own_decides_with_one_model_and_does_with_the_other(here: Gated) -> None:
    """As MCP has it: the tool server, a process of its own, asks the other model through the same gateway."""
    said = json.loads(agent(here, turns=6).communicate(timeout=240)[0])
    assert len(said) == 6
    assert all(text.startswith("b: ") and len(text) > 3 for text in said), said
    broken_off = agent(here, turns=1000)
    here.until(lambda: len(here.requests()) == 1)
    broken_off.send_signal(signal.SIGINT)
    broken_off.communicate(timeout=60)
    here.until(lambda: not here.requests())
    counted = httpx.get(f"{here.base}/metrics", timeout=60).text
    assert 'status="5' not in counted, counted


def agent(here: Gated, turns: int) -> subprocess.Popen[str]:
    script = str(Path(__file__).with_name("mcp_agent.py"))
    command = [sys.executable, script, here.base, "a", "b", str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
