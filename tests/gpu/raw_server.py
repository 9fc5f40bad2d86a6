"""A server called by hand, over one open connection: what the panel's own times are compared with."""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.fleet.store.records import Record

CALL_SECONDS = 120
WAKES = {
    1: ("/wake_up",),
    2: ("/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache"),
}
"""What a wake from each level takes (vLLM 0.24, measured)."""


class RawServer:
    """One server, called by hand over one open connection."""

    def __init__(self, record: Record) -> None:
        assert record.socket is not None
        self.name = record.name
        self.headers = {"Content-Type": "application/json"}
        self.connection = http.client.HTTPConnection("127.0.0.1", timeout=CALL_SECONDS)
        self.connection.sock = socket.socket(socket.AF_UNIX)
        self.connection.sock.settimeout(CALL_SECONDS)
        self.connection.sock.connect(record.socket)

    def close(self) -> None:
        """End the connection."""
        self.connection.close()

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The whole answer to one POST; raises RuntimeError unless it is a 200."""
        self.connection.request("POST", path, json.dumps(body) if body else None, self.headers)
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{self.name} {path}: {answer.status} {text[:300]!r}")
        return text

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> float:
        """Seconds of one call; raises RuntimeError unless it answers 200."""
        began = time.perf_counter()
        self.call(path, body)
        return time.perf_counter() - began

    def sleep(self, level: int) -> float:
        """Seconds of the call that puts it to sleep."""
        return self.post(f"/sleep?level={level}")

    def wake(self, level: int) -> float:
        """Seconds of all calls that wake it."""
        reload = {"method": "reload_weights"}
        return sum(self.post(path, reload if path == "/collective_rpc" else None) for path in WAKES[level])

    def first_token(self) -> float:
        """Seconds of the panel's own proof request: one token."""
        question = {"model": self.name, "prompt": list(proof.PROMPT), "max_tokens": 1, "temperature": 0}
        return self.post("/v1/completions", question | {"prompt_logprobs": 1})

    def chat(self, question: str, tokens: int) -> tuple[float, int | None]:
        """Seconds of a whole streamed answer, and its tokens: as the benchmark asks for it."""
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        began = time.perf_counter()
        answer = self.call("/v1/chat/completions", body)
        seconds = time.perf_counter() - began
        events = [line[6:] for line in answer.splitlines() if line.startswith(b"data: {")]
        usages = [usage for event in events if (usage := json.loads(event).get("usage"))]
        return seconds, usages[-1].get("completion_tokens") if usages else None
