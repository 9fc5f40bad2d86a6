"""Many requests for six models on two simulated GPUs while servers, keepers and gateways are killed.

    python -m tests.gateway.storm [--requests 5000] [--kills 100] [--seed 1]

Two `serve`s, so that one takes over when the other dies. Every request ends in the whole answer of its model
or in an error of the right shape; a client whose connection breaks because the gateway was killed asks again.
Prints what came of it, and exits with 1 if a request was lost, wrong, or took longer than the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.gateway.conftest import Gated

CLIENTS = 16
MAX_WAIT = 10.0
"""Seconds, as the config says; afterwards a request goes before all that came later."""
START = 10.0
"""Seconds that a killed simulated server takes, at most, until it answers again on two busy cores."""
PER_GPU = 3
"""Models; one at a time is awake."""
BOUND = MAX_WAIT + PER_GPU * START + 5.0
"""Seconds that no request may take: its wait, a start of each model of its GPU, and 5 s for answers."""
MODELS: dict[str, dict[str, Any]] = {
    f"m{number}": {"model": f"sim/{4 + number}GiB", "gpus": [number % 2], "restart": "on-failure"}
    for number in range(2 * PER_GPU)
}


@dataclass
class Outcome:
    """What came of all requests."""

    statuses: Counter[int] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    """Connections that a killed gateway took along."""
    wrong: list[str] = field(default_factory=list)
    refusals: Counter[str] = field(default_factory=Counter)
    """By their first words."""
    took: list[float] = field(default_factory=list)
    """Seconds of each request, by the gateway that answered it."""
    seconds: float = 0.0
    bound: float = BOUND
    """Seconds that a request may take; twice as many, and nobody waits for it any more."""


def bound_where(start: float) -> float:
    """The bound where the start of one server takes `start` seconds while nothing else is asked."""
    return BOUND + PER_GPU * max(0.0, 4 * start - START)  # four and more start at once


def check(answer: httpx.Response, model: str, streams: bool) -> str:
    """What is wrong with an answer; empty if nothing is."""
    if answer.status_code != 200:
        try:
            error = answer.json()["error"]
        except (ValueError, KeyError, TypeError):
            return f"{answer.status_code} without an error: {answer.text[:100]!r}"
        return "" if error["message"] and answer.status_code in (429, 500, 502, 503) else answer.text[:100]
    if not streams:
        named = answer.json().get("model")
        return "" if named == model else f"{model} was answered by {named}"
    payloads = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    if payloads and '"error"' in payloads[-1]:
        return ""
    if not payloads or payloads[-1] != "[DONE]":
        return f"a stream of {model} without an end: {answer.text[-100:]!r}"
    named = {json.loads(payload).get("model") for payload in payloads[:-1]}
    return "" if named == {model} else f"{model} was answered by {named}"


async def ask(here: Gated, client: httpx.AsyncClient, chance: random.Random, outcome: Outcome) -> None:
    """One request, asked again where only the gateway's death kept it from an answer."""
    model, streams = chance.choice(list(MODELS)), chance.random() < 0.5
    body = {"model": model, "prompt": "storm", "max_tokens": chance.randint(1, 20), "stream": streams}
    first, lost = time.monotonic(), 2 * outcome.bound
    while True:
        began = time.monotonic()
        try:
            answer = await client.post(f"{here.url}/completions", json=body, timeout=lost)
        except httpx.TimeoutException:
            outcome.wrong.append(f"{model}: no answer in {lost:.0f} s")
            return
        except httpx.TransportError:
            outcome.broken += 1
            await asyncio.sleep(0.1)
            if time.monotonic() - first > lost:
                outcome.wrong.append(f"{model}: no gateway for {lost:.0f} s")
                return
            continue
        break
    took = time.monotonic() - began
    outcome.took.append(took)
    if took > outcome.bound:
        outcome.wrong.append(f"{model}: {took:.1f} s, longer than {outcome.bound:.0f} s")
    outcome.statuses[answer.status_code] += 1
    if answer.status_code != 200:
        outcome.refusals[f"{answer.status_code} {answer.text[:90]}"] += 1
    if wrong := check(answer, model, streams):
        outcome.wrong.append(wrong)
    if answer.status_code == 503:
        await asyncio.sleep(min(2.0, float(answer.headers.get("retry-after", 1))))


async def kill(here: Gated, chance: random.Random, outcome: Outcome) -> None:
    """Kill a gateway, a server or a keeper."""
    what = chance.choice(["gateway", "server", "server", "keeper"])
    if what == "gateway":
        running = [process for process in here.processes if process.poll() is None]
        victim = chance.choice(running)
        victim.kill()
        victim.wait()
        here.serve()
    else:
        status = await asyncio.to_thread(here.verb, "status", "--json")
        pids = [model["pid"] for model in json.loads(status)["models"] if model["pid"]]
        if not pids:
            return
        pid = chance.choice(pids)
        with contextlib.suppress(OSError, ValueError, IndexError):
            if what == "keeper":
                pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
            if b"vllm_sleep_tui" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    outcome.kills[what] += 1


async def storm(here: Gated, outcome: Outcome, requests: int, kills: int, seed: int) -> None:
    """All of it; what comes of it is in `outcome`, also if it is broken off."""
    left = iter(range(requests))
    chance = random.Random(seed)
    began = time.monotonic()
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=CLIENTS)) as client:

        async def work(number: int) -> None:
            own = random.Random(seed * 1000 + number)
            for _ in left:
                await ask(here, client, own, outcome)

        async def killer() -> None:
            done = 0
            while done < kills:
                due = requests * (done + 1) // (kills + 1)
                if sum(outcome.statuses.values()) >= due:
                    await kill(here, chance, outcome)
                    done += 1
                await asyncio.sleep(0.05)

        killing = asyncio.create_task(killer())
        await asyncio.gather(*(work(number) for number in range(CLIENTS)))
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
    outcome.seconds = time.monotonic() - began


def main() -> None:
    """From the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="vst-") as folder:
        here = Gated(
            Path(folder), port, MODELS, {"max_wait": f"{MAX_WAIT:.0f}s"}, ["24GiB", "24GiB"], "instant"
        )
        outcome = Outcome()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            here.serve()
            here.until(here.answers)
            here.serve()
            asyncio.run(storm(here, outcome, arguments.requests, arguments.kills, arguments.seed))
        except KeyboardInterrupt:
            print("broken off")
        finally:
            here.close()
    print(f"{sum(outcome.statuses.values())} requests in {outcome.seconds:.0f} s: {dict(outcome.statuses)}")
    print(f"killed {dict(outcome.kills)}; {outcome.broken} connections broke with a gateway")
    took = sorted(outcome.took) or [0.0]
    print(
        f"half took {statistics.median(took):.2f} s at most, 99 of 100 {took[int(len(took) * 0.99)]:.1f} s, "
        f"the longest {took[-1]:.1f} s, where {outcome.bound:.0f} s are the bound"
    )
    for refusal, count in outcome.refusals.most_common(12):
        print(f"{count:5} {refusal}")
    print(f"wrong: {outcome.wrong or 'none'}")
    sys.exit(bool(outcome.wrong))


if __name__ == "__main__":
    main()
