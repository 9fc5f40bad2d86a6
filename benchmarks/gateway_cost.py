"""What the gateway of a real `serve` adds to a request, against a server that answers at once.

    python benchmarks/gateway_cost.py [--requests 3000] [--streams 500] [--waiting 100] [--swap BINARY]

In one run: direct, through the gateway, and with --swap through a llama-swap or llmsnap binary, which no
Python package brings. Milliseconds added, CPU for each request, the first streamed byte, streams at once
without a lost byte, and the memory of requests that wait, each with a body of 100 kB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
from gateway_http import BODY, REPLY, Backend, free_port, measure

PAGES = {
    b"/v1/models": {"object": "list", "data": [{"id": "m", "object": "model", "max_model_len": 4096}]},
    b"/is_sleeping": {"is_sleeping": False},
    b"/version": {"version": "0.32.0"},
    b"/health": {},
}


class Server(Backend):
    """The same, with the pages by which an attached server is known."""

    def data_received(self, data: bytes) -> None:
        """Answer a GET here."""
        if not data.startswith(b"GET "):
            super().data_received(data)
            return
        page = json.dumps(PAGES.get(data.split(b" ")[1].split(b"?")[0], {})).encode()
        top = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(top % len(page) + page)


def run_server(port: int) -> None:
    """The server's process."""

    async def serve() -> None:
        made = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", port, backlog=2048)
        await made.serve_forever()

    asyncio.run(serve())


async def waiting_memory(port: int, pid: int, count: int) -> float:
    """Bytes of memory for each of so many requests that wait for a model which takes long to come."""
    body = json.dumps({"model": "slow", "prompt": "x" * 100_000}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    process = psutil.Process(pid)
    writers = []
    before = 0
    for number in range(count + 10):
        if number == 10:  # the first ones bring what is needed once
            await asyncio.sleep(1)
            before = process.memory_info().rss
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head + body)
        await writer.drain()
        writers.append(writer)
    await asyncio.sleep(1)
    grown = process.memory_info().rss - before
    for writer in writers:
        writer.close()
    return grown / count


def main() -> None:
    """Measure each way in one run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--waiting", type=int, default=100)
    parser.add_argument("--swap", help="A llama-swap or llmsnap binary.")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    multiprocessing.set_start_method("fork")
    ports = {name: free_port() for name in ("server", "gateway", "swap")}
    server = multiprocessing.Process(target=run_server, args=[ports["server"]], daemon=True)
    server.start()
    results: dict[str, dict[str, float]] = {}

    def figures(port: int, pid: int | None) -> dict[str, float]:
        way = lambda: asyncio.open_connection("127.0.0.1", port)  # noqa: E731
        return asyncio.run(measure(way, pid, arguments.requests, arguments.streams))

    with tempfile.TemporaryDirectory() as folder:
        results["direct"] = figures(ports["server"], None)
        config = Path(folder) / "vllm-sleep-tui.yaml"
        slow = {"model": "sim/1GiB", "env": {"VLLM_SIM_SPEED": "0.1"}, "args": {"max-model-len": 2048}}
        content = {
            "vllm_command": [sys.executable, "-m", "vllm_sleep_tui.simulator"],
            "simulated_gpus": [{"name": "Bench", "memory": "24GiB"}],
            "models": {"m": {"url": f"http://127.0.0.1:{ports['server']}"}, "slow": slow},
            "gateway": {"port": ports["gateway"], "queue": 1000},
        }
        config.write_text(json.dumps(content))
        command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
        environment = os.environ | {"XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
        gateway = subprocess.Popen([*command, "serve"], env=environment, stdout=subprocess.DEVNULL)
        try:
            results["gateway"] = figures(ports["gateway"], gateway.pid)
            waiting = asyncio.run(waiting_memory(ports["gateway"], gateway.pid, arguments.waiting))
        finally:
            subprocess.run([*command, "stop", "slow", "--force"], env=environment, capture_output=True)
            gateway.terminate()
            gateway.wait()
        if arguments.swap:
            swap_config = Path(folder) / "swap.yaml"
            entry = {"cmd": "sleep infinity", "proxy": f"http://127.0.0.1:{ports['server']}"}
            swap_config.write_text(json.dumps({"models": {"m": {**entry, "checkEndpoint": "/health"}}}))
            listens = f"127.0.0.1:{ports['swap']}"
            words = [arguments.swap, "--config", str(swap_config), "--listen", listens]
            swap = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                results[Path(arguments.swap).name] = figures(ports["swap"], swap.pid)
            finally:
                swap.terminate()
                swap.wait()
    server.kill()
    if arguments.json:
        print(json.dumps({**results, "bytes_waiting": waiting}))
        return
    direct = results.pop("direct")
    print(
        f"direct: p50 {direct['p50']:.2f} ms, p99 {direct['p99']:.2f} ms, first {direct['first_p50']:.2f} ms"
    )
    print(f"{'ms added by':12}    p50    p99    CPU  first    p99  lost  all in   RSS")
    for name, f in results.items():
        print(
            f"{name:12} {f['p50'] - direct['p50']:6.2f} {f['p99'] - direct['p99']:6.2f} {f['cpu']:6.2f} "
            f"{f['first_p50'] - direct['first_p50']:6.2f} {f['first_p99'] - direct['first_p99']:6.2f} "
            f"{f['lost']:5.0f} {f['streams_s']:6.2f}s {f['rss_mb']:4.0f}M"
        )
    print(f"a request that waits with {100_000 // 1000} kB: {waiting / 1000:.0f} kB")
    print(f"bodies: {len(BODY)} bytes in, {len(REPLY)} out")


if __name__ == "__main__":
    main()
