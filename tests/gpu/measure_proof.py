"""How far a woken model's proof is from its reference, and how far garbage is: for `engine/proof.py`.

    python tests/gpu/measure_proof.py --config FILE --state DIR --out FILE [--wakes 100] [MODEL …]

The models must run, asleep or awake; each in turn is the only one awake. Distances are mean absolute
differences of log-probabilities in nats.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine import proof
from vllm_sleep_tui.engine.client import VllmClient
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.store.records import Record, RecordStore

SECONDS = 120.0


async def distance(client: VllmClient, name: str, reference: tuple[float, ...]) -> float:
    """One proof request, compared."""
    answer = await client.complete(proof.PROMPT, model=name, max_tokens=1, prompt_logprobs=1, timeout=SECONDS)
    return proof.distance(answer.prompt_logprobs or (), reference)


async def wake(client: VllmClient, level: int, *, reload: bool = True) -> None:
    """The calls of a wake; without the reload a level 2 wake leaves garbage."""
    if level == 1:
        await client.wake_up(timeout=SECONDS)
        return
    await client.wake_up(("weights",), timeout=SECONDS)
    if reload:
        await client.collective_rpc("reload_weights", SECONDS)
    await client.wake_up(("kv_cache",), timeout=SECONDS)
    await client.reset_prefix_cache(SECONDS)


async def measure(client: VllmClient, name: str, reference: tuple[float, ...], wakes: int) -> dict[str, Any]:
    """Distances while awake, after wakes from both levels, and after level 2 wakes without the reload."""
    found: dict[str, list[float]] = {"awake": [await distance(client, name, reference) for _ in range(10)]}
    for level in (1, 2):
        found[f"level {level}"] = []
        for _ in range(wakes // level):
            await client.sleep(level, SECONDS)
            await wake(client, level)
            found[f"level {level}"].append(await distance(client, name, reference))
    found["garbage"] = []
    for _ in range(3):
        await client.sleep(2, SECONDS)
        await wake(client, 2, reload=False)
        found["garbage"].append(await distance(client, name, reference))
        await client.collective_rpc("reload_weights", SECONDS)
        await client.reset_prefix_cache(SECONDS)
    found["after a late reload"] = [await distance(client, name, reference)]
    return found


async def measure_running(record: Record, wakes: int) -> dict[str, Any]:
    """The distances of a model that is awake; it is so again at the end."""
    assert record.port is not None
    assert record.reference is not None, f"{record.name} has no reference"
    async with VllmClient(record.port, uds=record.socket) as client:
        await restore(client)
        return await measure(client, record.name, record.reference.logprobs, wakes)


async def restore(client: VllmClient) -> None:
    """Awake with its weights, wherever a measurement that was killed has left it."""
    if await client.is_sleeping(SECONDS):
        await wake(client, 2)
    else:
        await client.collective_rpc("reload_weights", SECONDS)
        await client.reset_prefix_cache(SECONDS)


def summary(found: Mapping[str, list[float]]) -> str:
    """One line a state."""
    return "\n".join(
        f"  {state:20} n {len(seen):4}  median {statistics.median(seen):9.5f}  highest {max(seen):9.5f}"
        for state, seen in found.items()
        if seen
    )


async def run(arguments: argparse.Namespace) -> None:
    """Every model in turn."""
    loaded = load(arguments.config)
    records = RecordStore(arguments.state, loaded.path)
    result: dict[str, Any] = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    async with Fleet(loaded, arguments.state) as fleet:
        for name in arguments.models or loaded.config.models:
            await fleet.switch(name)
            result[name] = await measure_running(records.read(name), arguments.wakes)
            arguments.out.write_text(json.dumps(result))
            print(f"{name}\n{summary(result[name])}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--wakes", type=int, default=100, help="from level 1, half as many from level 2")
    parser.add_argument("models", nargs="*")
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
