"""Data parallel replicas: each is asked for its proof by number, as vLLM's servers let a request choose."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.engine.proof import Reference

GOOD = -1.0


class Replicas(ThreadingHTTPServer):
    """A server of several replicas, some of which answer nonsense."""

    bad: frozenset[int] = frozenset()

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[str | None] = []


class Answer(BaseHTTPRequestHandler):
    server: Replicas

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        rank = self.headers.get("X-data-parallel-rank")
        self.server.asked.append(rank)
        figure = GOOD * (9 if rank is not None and int(rank) in self.server.bad else 1)
        likely = [None, *({str(token): {"logprob": figure}} for token in proof.PROMPT[1:])]
        choice = {"text": "x", "finish_reason": "length", "prompt_logprobs": likely}
        body = json.dumps({"choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Replicas]:
    with Replicas() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


REFERENCE = Reference(logprobs=(GOOD,) * (len(proof.PROMPT) - 1))


async def test_each_replica_is_asked_by_its_number(server: Replicas) -> None:
    async with VllmClient(server.server_port) as client:
        assert await proof.is_itself(client, "a", REFERENCE, 5.0, 3)
        assert server.asked == ["0", "1", "2"]
        server.bad = frozenset({1})
        assert not await proof.is_itself(client, "a", REFERENCE, 5.0, 3)


async def test_one_replica_is_asked_without_a_number(server: Replicas) -> None:
    async with VllmClient(server.server_port) as client:
        assert await proof.is_itself(client, "a", REFERENCE, 5.0)
    assert server.asked == [None]


def test_of_embeddings_only_one_replica_is_said_to_be_proven() -> None:
    assert proof.proven(2, Reference(embedding=(1.0,))) == "1 of 2 proven"
    assert proof.proven(2, REFERENCE) == "proven"
