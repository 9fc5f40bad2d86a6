"""What the chat pane costs while an answer streams in, and whether what was said before makes it dearer.

    python benchmarks/chat_pane.py [--beside COMMIT] [--json]

The panel runs headless at 120×40 over a server of another process, which streams what the question names. Per
flush means: processor time of the panel for each 100 ms of streaming, 20 words or 2 lines of code each. With
`--beside` the same is measured of an earlier commit, from a copy of its tree.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
STREAMED = 4.0
"""Seconds of streaming that are measured."""
FLUSHES = STREAMED / 0.1
ANSWERS = 100
TOKENS, RATE = 4000, 1000
PAGES = {
    "/health": {},
    "/version": {"version": "0.32.0"},
    "/is_sleeping": {"is_sleeping": False},
    "/v1/models": {"object": "list", "data": [{"id": "far", "object": "model"}]},
}
CODE = "    total += weights[index] * values[index]  # one of many lines\n"
ANSWER = (
    "An answer with **code** in it, and a list:\n\n- one\n- two\n- three\n\n```python\n"
    + CODE * 30
    + "```\n\n"
    + "Some words that end it. " * 40
)


class Server(BaseHTTPRequestHandler):
    """Streams what a question names."""

    protocol_version = "HTTP/1.1"
    begun = 0

    def do_GET(self) -> None:
        """What the panel asks of a server, and how many answers were begun."""
        page = (PAGES | {"/begun": Server.begun}).get(self.path.partition("?")[0])
        body = json.dumps({} if page is None else page).encode()
        self.send_response(404 if page is None else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        """An answer."""
        Server.begun += 1
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        kind = asked["messages"][-1]["content"]
        try:
            if kind == "reasoning":
                self._send("reasoning", "word and more " * (16_000 // 3))
                self._pace("reasoning", "word " * 20)
            elif kind == "code":
                self._send("content", "```python\n" + CODE * 2000)
                self._pace("content", CODE * 2)
            elif kind == "answer":
                self._send("content", ANSWER)
            elif kind == "words":
                self._pace("content", "word " * 20)
            elif kind == "fast":
                self._fast()
            self._event({}, "stop")
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            pass
        self.close_connection = True

    def _pace(self, field: str, text: str) -> None:
        time.sleep(2.0)  # what came before is shown
        for _ in range(int(FLUSHES) + 20):
            self._event({field: text})
            time.sleep(0.1)

    def _fast(self) -> None:
        began = time.monotonic()
        for number in range(TOKENS):
            self._event({"content": f"w{number} " if number % 50 else f"w{number}\n\n"})
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
        self._event({"content": "THE-END"})

    def _send(self, field: str, text: str) -> None:
        for start in range(0, len(text), 2000):
            self._event({field: text[start : start + 2000]})

    def _event(self, delta: dict[str, str], reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        self.wfile.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def serve() -> None:
    """Three servers, on ports that they print."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(3)]
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever).start()
    print(*(f"http://127.0.0.1:{server.server_address[1]}" for server in servers), flush=True)


async def measure(urls: list[str], folder: Path) -> dict[str, float]:
    """The figures of the package that is imported."""
    from vllm_sleep_tui.config.load import load
    from vllm_sleep_tui.fleet.fleet import Fleet
    from vllm_sleep_tui.tui.app import PanelApp
    from vllm_sleep_tui.tui.theme import package_folder

    config = folder / "vllm-sleep-tui.yaml"
    config.write_text(
        json.dumps({"models": {f"far{number}": {"url": url} for number, url in enumerate(urls)}})
    )
    found: dict[str, float] = {}
    async with Fleet(load(config), folder) as fleet:
        app = PanelApp(fleet, state_dir=folder, theme_folders=[package_folder()])

        async def until(condition: object) -> None:
            deadline = time.monotonic() + 300
            while not condition():  # type: ignore[operator]
                if time.monotonic() > deadline:
                    raise SystemExit("The panel did not come to what is measured.")
                await asyncio.sleep(0.02)

        async with app.run_test(size=(120, 40)) as pilot:

            def snapshot_is(state: str) -> bool:
                return all(model.state.value == state for model in fleet.snapshot().models)

            await until(lambda: snapshot_is("awake"))

            def begun() -> int:
                # Asked of the servers: a short answer is over before it was seen under way.
                return int(urlopen(f"{urls[0]}/begun").read())

            async def ask(kind: str) -> None:
                await pilot.press("c")
                await until(lambda: getattr(app.focused, "id", "") == "question")
                app.screen.query_one("#question").text = kind  # type: ignore[attr-defined]
                before = begun()
                await pilot.press("enter")
                await until(lambda: begun() > before)

            async def answered() -> None:
                await until(lambda: not app.dashboard.is_answering)

            async def flushes() -> float:
                await asyncio.sleep(3.0)
                before = time.process_time()
                await asyncio.sleep(STREAMED)
                cost = (time.process_time() - before) / FLUSHES
                await answered()
                return cost * 1000

            async def select(row: int) -> None:
                await pilot.press("escape")
                for _ in range(3):
                    await pilot.press("up")
                for _ in range(row):
                    await pilot.press("down")
                await asyncio.sleep(1)

            await ask("words")
            found["nothing before it, ms a flush"] = await flushes()
            await ask("reasoning")
            found["16,000 words of reasoning, ms a flush"] = await flushes()
            await select(1)
            await ask("code")
            found["a code block of 2,000 lines, ms a flush"] = await flushes()
            await select(2)
            for _ in range(ANSWERS):
                await ask("answer")
                await answered()
            await ask("words")
            found["after 100 answers with code, ms a flush"] = await flushes()

            cpu = time.process_time()
            await pilot.resize_terminal(140, 45)
            await pilot.pause()
            found["a resize after them, ms of CPU until it is shown"] = (time.process_time() - cpu) * 1000
            await asyncio.sleep(2.0)
            found["the same with all that follows, ms of CPU"] = (time.process_time() - cpu) * 1000

            lags: list[float] = []
            done = asyncio.Event()

            async def feel() -> None:
                while not done.is_set():
                    before = time.process_time()  # what others of the machine do is none of it
                    await asyncio.sleep(0.005)
                    lags.append(time.process_time() - before)

            feeling = asyncio.create_task(feel())
            began, cpu = time.monotonic(), time.process_time()
            await ask("fast")
            await answered()
            took = time.monotonic() - began
            done.set()
            await feeling
            found["4,000 tokens at 1,000 a second, CPU in % of a core"] = (
                100 * (time.process_time() - cpu) / took
            )
            found["its end behind the server's, s"] = took - TOKENS / RATE
            lags.sort()
            found["a key waits meanwhile, p50, ms of CPU"] = statistics.median(lags) * 1000
            found["a key waits meanwhile, p99, ms of CPU"] = lags[int(len(lags) * 0.99)] * 1000
            found["a key waits meanwhile, at most, ms of CPU"] = lags[-1] * 1000
        await app.operations.close()
    return found


def run(tree: Path) -> dict[str, float]:
    """The figures of the package in a tree, in a process of its own beside a server of its own."""
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    script = [sys.executable, str(Path(__file__).resolve())]
    with tempfile.TemporaryDirectory() as folder:
        state = {"XDG_STATE_HOME": folder, "XDG_CONFIG_HOME": folder}
        server = subprocess.Popen([*script, "--server"], stdout=subprocess.PIPE, text=True, env=environment)
        try:
            assert server.stdout is not None
            urls = server.stdout.readline().split()
            done = subprocess.run(
                [*script, "--measure", *urls],
                env=environment | state,
                cwd=folder,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        finally:
            server.kill()
            server.wait()
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(figures: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown, a column each."""
    lines = ["| | " + " | ".join(figures) + " |", "|---" * (len(figures) + 1) + "|"]
    for name in next(iter(figures.values())):
        cells = [
            f"{found[name]:.1f}" if found[name] < 10 else f"{found[name]:.0f}" for found in figures.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--beside", metavar="COMMIT", help="measure this commit, too")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="URL", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.server:
        serve()
        return
    if given.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asyncio.run(measure(given.measure, Path(folder)))))
        return
    figures = {"now": run(ROOT)}
    if given.beside:
        with tempfile.TemporaryDirectory() as folder:
            archive = subprocess.run(
                ["git", "archive", given.beside], cwd=ROOT, check=True, stdout=subprocess.PIPE
            )
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            figures[given.beside] = run(Path(folder))
    print(json.dumps(figures, indent=2) if given.json else table(figures))


if __name__ == "__main__":
    main()
