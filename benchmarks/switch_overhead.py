"""What a switch costs beyond the HTTP calls it must make, on simulated servers that take no time.

Raw calls by hand and the product's switch take turns in one run:

    python benchmarks/switch_overhead.py [--rounds 100] [--json]

Raw is sleep + wake_up + one completion of one token, on kept connections. Before each switch of either kind
nothing is done for a moment, so that what the last one left to be written (history, measurements) is written.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import httpx

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.fleet.fleet import Fleet
from vllm_sleep_tui.fleet.store.records import RecordStore

REST_SECONDS = 0.05


def write_config(folder: Path) -> Path:
    """Two models of which one GPU holds one awake."""
    instant = {"VLLM_SIM_TIMES": "instant"}
    model = {"args": {"max-model-len": 2048}, "env": instant}
    content = {
        "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
        "simulated_gpus": [{"name": "Bench", "memory": "24GiB"}],
        "models": {"a": {"model": "sim/1GiB", **model}, "b": {"model": "sim/4GiB", **model}},
    }
    path = folder / "vllm-sleep-tui.yaml"
    path.write_text(json.dumps(content))
    return path


async def raw_switch(clients: dict[str, httpx.AsyncClient], leaving: str, coming: str) -> float:
    """Sleep one, wake the other, ask it for one token."""
    went, came = clients[leaving], clients[coming]
    question = {"model": coming, "prompt": [1, 2, 3, 4], "max_tokens": 1, "temperature": 0}
    began = time.perf_counter()
    (await went.post("/sleep?level=1")).raise_for_status()
    (await came.post("/wake_up")).raise_for_status()
    (await came.post("/v1/completions", json=question)).raise_for_status()
    return time.perf_counter() - began


async def measure(folder: Path, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each switch, raw and ours in turn; the records follow the raw ones by hand."""
    loaded = load(write_config(folder))
    took: dict[str, list[float]] = {"raw": [], "ours": []}
    async with contextlib.AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(Fleet(loaded, folder))
        await fleet.start(["a", "b"])
        clients = {}
        for name in ("a", "b"):
            uds = RecordStore(folder, loaded.path).read(name).socket
            # Below the server's own 5 s, so that it never hangs up first.
            transport = httpx.AsyncHTTPTransport(uds=uds, limits=httpx.Limits(keepalive_expiry=3.0))
            client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", trust_env=False)
            clients[name] = await stack.enter_async_context(client)
        try:
            for _ in range(rounds):
                for pair in (("a", "b"), ("b", "a")):  # there and back, so that the records stay true
                    await asyncio.sleep(REST_SECONDS)
                    took["raw"].append(1e3 * await raw_switch(clients, *pair))
                for name in ("b", "a"):
                    await asyncio.sleep(REST_SECONDS)
                    began = time.perf_counter()
                    await fleet.switch(name)
                    took["ours"].append(1e3 * (time.perf_counter() - began))
        finally:
            await fleet.stop(["a", "b"])
    return took


def main() -> None:
    """Measure and print medians with their spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        took = asyncio.run(measure(Path(folder), arguments.rounds))
    summary = {
        kind: dict(zip(("p10", "p50", "p90"), (q[0], q[4], q[8]), strict=True))
        for kind, samples in took.items()
        if (q := statistics.quantiles(samples, n=10))
    }
    if arguments.json:
        print(json.dumps({"milliseconds": summary, "rounds": arguments.rounds}))
        return
    for kind, figures in summary.items():
        print(f"{kind:5}", "  ".join(f"{key} {value:6.2f} ms" for key, value in figures.items()))
    print(f"ours - raw, p50: {summary['ours']['p50'] - summary['raw']['p50']:.2f} ms")


if __name__ == "__main__":
    main()
