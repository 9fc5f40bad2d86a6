"""Answers of real vLLM whose engine stands still."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import CommandLine

from tests.real.conftest import CHEAP, SAME_ANSWER, command_line, model_config
from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.engine.failures import EngineTimeout

pytestmark = pytest.mark.real
STALL_SECONDS = 4.0
"""Of a stream; vLLM's comments come every second (0.32)."""


@pytest.fixture(scope="module")
def kept_alive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """tiny, awake, on a server that sends comments while it has nothing else to send."""
    args = CHEAP | SAME_ANSWER | {"sse-keep-alive-interval": 1}
    panel = command_line(tmp_path_factory.mktemp("alive"), {"tiny": model_config("tiny", args=args)})
    panel("switch", "tiny")
    yield panel
    panel.close()


@pytest.mark.parametrize("begun", [True, False], ids=["in the middle", "before the first token"])
def test_comments_of_a_server_whose_engine_stands_still_keep_no_answer_alive(
    kept_alive: CommandLine, begun: bool
) -> None:
    port = kept_alive.status()["tiny"]["port"]
    engine = kept_alive.engine("tiny")
    began = time.monotonic()
    try:
        with pytest.raises(EngineTimeout, match=rf"within {STALL_SECONDS:g} s"):
            asyncio.run(ask(port, engine.pid, begun=begun))
        assert time.monotonic() - began < 60
    finally:
        os.kill(engine.pid, signal.SIGCONT)


async def ask(port: int, engine: int, *, begun: bool) -> None:
    """Ask for a long answer, and stop the engine before it or in its middle."""
    params: dict[str, Any] = {"max_tokens": 2000, "ignore_eos": True}
    if not begun:
        os.kill(engine, signal.SIGSTOP)
    async with VllmClient(port, secret=None) as client:
        stream = client.chat(
            [{"role": "user", "content": "hi"}],
            model="tiny",
            params=params,
            first_timeout=30 if begun else STALL_SECONDS,
            stall_timeout=STALL_SECONDS,
        )
        async for delta in stream:
            if begun and delta.text:
                begun = False
                os.kill(engine, signal.SIGSTOP)
