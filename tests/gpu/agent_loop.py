"""An agent that alternates two models, turn by turn, through the gateway, beside one model doing both.

    python tests/gpu/agent_loop.py --out DIR [--turns 200] [--level 0] [--tokens 64] [--gpus 1]

The environment names vLLM and the two models (`gpu_config.py`); `serve` has the gateway. In blocks of ten
turns, one kind after the other: `both` asks a planner and a worker that are two models, `a` and `b` ask one
model for both. Each turn is a streamed chat with what the turn before said, and as many tokens as any other.
DIR/agent-loop.jsonl has a line for each turn: seconds to its first token and to its end. Begun again it goes
on where it stopped; what came out is DIR/agent-loop.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from command_line import write_config
from gpu_config import PASSED_ON, missing

MODELS = {"a": "VLLM_GPU_MODEL_A", "b": "VLLM_GPU_MODEL_B"}
KINDS = {"both": "ab", "a": "aa", "b": "bb"}
"""Who answers the planner's turns and the worker's."""
BLOCK = 10
"""Turns of a kind in a row, so that what changes on the machine meanwhile changes all kinds."""
SETTLE = 4
"""Turns before each block that do not count: its models are awake, and a switch was measured."""
ROLES = (
    "You plan. Say the next small step of sorting a list of names, in one sentence.",
    "You work. Do the step that you are told, and say what came of it, in one sentence.",
)
ANSWER_SECONDS = 900


class Agent:
    """The loop, and what is known of it."""

    def __init__(self, out: Path, port: int, tokens: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self._lines = out / "agent-loop.jsonl"
        self._client = httpx.Client(timeout=ANSWER_SECONDS)
        self._tokens = tokens
        self._said = "Begin."

    def turns(self) -> list[dict[str, Any]]:
        """Every turn so far that counts; a line that was cut off is none."""
        found = []
        if self._lines.exists():
            for line in self._lines.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def mend(self) -> None:
        """Take a line that was cut off out of the file, so that the next one stands by itself."""
        whole = "".join(json.dumps(turn) + "\n" for turn in self.turns())
        self._lines.write_text(whole)

    def ask(self, model: str, role: int) -> dict[str, Any]:
        """One turn."""
        body = {
            "model": model,
            "messages": [
                {"role": "system", "content": ROLES[role]},
                {"role": "user", "content": self._said[-400:]},
            ],
            "max_tokens": self._tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        began = time.perf_counter()
        first, said = None, ""
        with self._client.stream("POST", f"{self.base}/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                sys.exit(f"{model}: {answer.status_code} {answer.read().decode(errors='replace')[:500]}")
            for line in answer.iter_lines():
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    sys.exit(f"{model}: {event['error']}")
                if event["model"] != model:
                    sys.exit(f"{model} was asked, and {event['model']} answered")
                pieces = [choice["delta"].get("content") or "" for choice in event["choices"]]
                if any(pieces) and first is None:
                    first = time.perf_counter() - began
                said += "".join(pieces)
        self._said = said or "Go on."
        return {"model": model, "first": first, "seconds": time.perf_counter() - began}

    def block(self, kind: str, begin: int, end: int) -> None:
        """Some turns of a kind, each written as it is over."""
        for turn in range(begin - SETTLE, end):
            took = self.ask(KINDS[kind][turn % 2], turn % 2)
            if turn >= begin:
                with self._lines.open("a") as file:
                    file.write(json.dumps({"kind": kind, "turn": turn, **took}) + "\n")

    def page(self, path: str) -> httpx.Response:
        """A page of the gateway's own."""
        return self._client.get(f"{self.base}{path}")

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds by kind and model, and what the change of model adds to a turn."""
    rows: dict[str, Any] = {}
    for kind in KINDS:
        for model in sorted(set(KINDS[kind])):
            mine = [turn for turn in turns if turn["kind"] == kind and turn["model"] == model]
            if mine:
                rows[f"{kind}, {model}"] = {
                    part: described([turn[part] for turn in mine if turn[part] is not None])
                    for part in ("first", "seconds")
                }
    for model in MODELS:
        if f"both, {model}" in rows and f"{model}, {model}" in rows:
            rows[f"the change to {model} adds"] = {
                part: rows[f"both, {model}"][part]["median"] - rows[f"{model}, {model}"][part]["median"]
                for part in ("first", "seconds")
            }
    return rows


def described(seconds: list[float]) -> dict[str, float]:
    """How many, their median, the 99th of a hundred and the worst."""
    ordered = sorted(seconds)
    return {
        "turns": len(ordered),
        "median": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "worst": ordered[-1],
        "mean": statistics.fmean(ordered),
    }


def write_models(options: argparse.Namespace, port: int) -> Path:
    """The config of the two models and the gateway; the weights of one must fit beside the other awake."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    args: dict[str, Any] = {"max-model-len": 4096, "gpu-memory-utilization": options.share}
    if options.gpus > 1:
        args["tensor-parallel-size"] = options.gpus
    models = {
        name: {
            "model": os.environ[variable],
            "gpus": list(range(options.gpus)),
            "level": options.level,
            "args": args,
            "env": passed,
        }
        for name, variable in MODELS.items()
    }
    simulated = [{"name": "Simulated", "memory": options.simulated}] * options.gpus
    more: dict[str, Any] = {"simulated_gpus": simulated} if options.simulated else {}
    command = shlex.split(os.environ["VLLM_GPU_COMMAND"])
    return write_config(options.out / "agent-loop.yaml", command, models, gateway={"port": port}, **more)


@contextlib.contextmanager
def served(config: Path, out: Path) -> Iterator[None]:
    """`serve` over the config, its models started; afterwards they are stopped, whatever happened."""
    verb = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
    env = os.environ | {"XDG_STATE_HOME": str(out / "state")}
    with (out / "serve.log").open("ab") as log:
        process = subprocess.Popen([*verb, "serve"], env=env, stdout=log, stderr=log)
    try:
        subprocess.run([*verb, "start", "--all"], env=env, check=True)
        yield
    finally:
        subprocess.run([*verb, "stop", "--all", "--force"], env=env, check=False)
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def main() -> None:
    """Start, measure, stop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=200, help="of each kind")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--level", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("--gpus", type=int, default=1, help="that each model spans, by tensor parallelism")
    parser.add_argument("--share", type=float, default=0.75, help="gpu-memory-utilization of each")
    parser.add_argument("--simulated", help="Try it without a GPU: the memory of one, such as 80GiB.")
    options = parser.parse_args()
    if lacks := missing():
        sys.exit(f"Not set: {'; '.join(lacks)}")
    options.out.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = write_models(options, port)
    agent = Agent(options.out, port, options.tokens)
    agent.mend()
    done = Counter(turn["kind"] for turn in agent.turns())
    try:
        if any(done[kind] < options.turns for kind in KINDS):
            with served(config, options.out):
                wait_for(agent)
                for begin in range(0, options.turns, BLOCK):
                    end = min(begin + BLOCK, options.turns)
                    for kind in KINDS:
                        if done[kind] < end:
                            agent.block(kind, max(begin, done[kind]), end)
                    print(f"{end} turns of each kind", flush=True)
                counted = agent.page("/metrics").text
                listed = agent.page("/v1/models").json()["data"]
            found = {
                "level": options.level,
                "asleep": {model["id"]: model["level"] for model in listed if model["state"] == "asleep"},
                "switches": [line for line in counted.splitlines() if line.startswith("gateway_switches")],
            }
            (options.out / "agent-loop-gateway.json").write_text(json.dumps(found, indent=2))
        result = summary(agent.turns())
        (options.out / "agent-loop.json").write_text(json.dumps(result, indent=2))
        for name, row in result.items():
            print(f"{name:20}", json.dumps(row))
    finally:
        agent.close()


def wait_for(agent: Agent) -> None:
    """Until the gateway listens."""
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if agent.page("/health").status_code == 200:
                return
        if time.monotonic() > deadline:
            sys.exit("The gateway did not open; serve.log says why.")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
