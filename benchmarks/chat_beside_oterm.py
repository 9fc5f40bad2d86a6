"""What the chat pane costs beside oterm: the same answers from the same server, in turns, in a terminal each.

    python benchmarks/chat_beside_oterm.py --oterm FOLDER/bin/python [--rounds 3] [--kinds KIND,…] [--json]

oterm is wanted in an environment of its own (`pip install oterm`). It asks Ollama's API which models there
are and chats by the OpenAI API that Ollama serves too, as the panel does: both get the same events at the
same pace, at 120×40. CPU is that of the client's process and its children, from the question to one second
after the answer was kept; what was kept is compared with what was sent, and the end of the answer must stand
on the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import re
import select
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

SIZE = (40, 120)
RESTING = 120.0
"""Seconds that a client has to come to rest."""
LIMIT = 60.0
"""Seconds of its own CPU for one answer: a client that is not done then is told as such, on any machine."""
END = "THE-END"
LINE = "    total += weights[index] * values[index]  # line {}\n"
TOKENS = [f"w{number} " if number % 50 else f"w{number}\n\n" for number in range(4000)]
KINDS: dict[str, tuple[list[str], list[str], int]] = {
    "tokens": ([], TOKENS, 1000),
    "reasoning": ([f"thought{number} " for number in range(16_000)], ["It follows. "], 1000),
    "code": ([], ["```python\n", *(LINE.format(number) for number in range(2000)), "```\n\n"], 200),
}
"""What a question gets: reasoning, answer, and events per second."""
NAMES = {
    "tokens": "4,000 tokens at 1,000 a second",
    "reasoning": "16,000 words of reasoning at 1,000 a second",
    "code": "a code block of 2,000 lines at 200 a second",
}
KEPT_CHAT = """
import asyncio
from oterm.store.store import Store
from oterm.types import ChatModel
async def keep():
    store = await Store.get_store()
    await store.save_chat(ChatModel(name="chat", model="far", provider="ollama", thinking=True))
asyncio.run(keep())
"""
"""What its own dialog for a new chat writes."""


class Server(BaseHTTPRequestHandler):
    """A vLLM server to the panel, Ollama to oterm."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """What both ask of a server."""
        pages = {
            "/health": {},
            "/version": {"version": "0.32.0"},
            "/is_sleeping": {"is_sleeping": False},
            "/v1/models": {"object": "list", "data": [{"id": "far", "object": "model"}]},
            "/api/tags": {"models": [{"model": "far", "name": "far"}]},
            "/api/ps": {"models": []},
        }
        self._answer(pages.get(self.path.partition("?")[0]))

    def do_POST(self) -> None:
        """A model's abilities to oterm, or an answer."""
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or b"{}")
        if self.path == "/api/show":
            self._answer({"capabilities": ["completion", "thinking"], "details": {}, "model_info": {}})
        elif self.path == "/v1/chat/completions" and asked.get("stream"):
            self._stream(*KINDS[_text(asked["messages"][-1]["content"])])
        else:
            self._answer(None)

    def _answer(self, page: object) -> None:
        body = json.dumps({} if page is None else page).encode()
        self.send_response(404 if page is None else 200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, reasoning: list[str], answer: list[str], rate: int) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        self.close_connection = True
        deltas = [{"reasoning": text} for text in reasoning]
        deltas += [{"content": text} for text in [*answer, END]]
        began = time.monotonic()
        for number, delta in enumerate(deltas):
            self._event(delta)
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
        self._event({}, "stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, delta: dict[str, str], reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        event = {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": "far",
            "choices": [choice],
        }
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


class Client:
    """A chat client in a terminal of its own, that is read to the end."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path, database: Path) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, SIZE)
        self._database = database
        self.screen = b""
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                select.select([self._ours], [], [])
                self.screen += os.read(self._ours, 65536)

    def type(self, keys: str) -> None:
        """Type; what was on the screen before is forgotten."""
        self.screen = b""
        os.write(self._ours, keys.encode())

    def shows(self, text: str) -> bool:
        """Whether a text was written since the last key, escapes aside."""
        return text in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.screen.decode(errors="replace"))

    def cpu(self) -> float:
        """Seconds of CPU so far, with those of its children."""
        spent = 0.0
        root = psutil.Process(self._process.pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                spent += times.user + times.system
        return spent

    def settle(self) -> None:
        """Wait until it does next to nothing for two seconds."""
        deadline = time.monotonic() + RESTING
        while time.monotonic() < deadline:
            before = self.cpu()
            time.sleep(2.0)
            if self.cpu() - before < 0.15:
                return
        raise SystemExit(f"It did not come to rest: {self.screen[-2000:]!r}")

    def kept(self) -> str:
        """All that was kept of conversations, as it lies in the database."""
        try:
            database = sqlite3.connect(f"file:{self._database}?mode=ro", uri=True)
            with contextlib.closing(database) as connection:
                if self._database.name == "store.db":
                    found = connection.execute("SELECT text FROM message WHERE author = 'assistant'")
                    return "\n".join(text for (text,) in found)
                found = connection.execute("SELECT turn FROM turns ORDER BY conversation, number")
                turns = [json.loads(turn) for (turn,) in found]
                return "\n".join(turn["text"] + turn.get("reasoning", "") for turn in turns)
        except sqlite3.OperationalError:  # not made yet
            return ""

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        os.close(self._ours)


@contextlib.contextmanager
def panel(url: str, folder: Path) -> Iterator[Client]:
    """The panel over the server, with its chat open."""
    config = folder / "vllm-sleep-tui.yaml"
    config.write_text(json.dumps({"models": {"far": {"url": url}}}))
    state = folder / "state"
    environment = _environment(folder) | {"XDG_STATE_HOME": str(state), "XDG_CONFIG_HOME": str(folder)}
    database = state / "vllm-sleep-tui" / "conversations.db"
    command = [sys.executable, "-m", "vllm_sleep_tui", "--config", str(config)]
    client = Client(command, environment, folder, database)
    try:
        client.settle()
        client.type("c")
        client.settle()
        yield client
    finally:
        client.end()


@contextlib.contextmanager
def oterm(python: str, url: str, folder: Path) -> Iterator[Client]:
    """A chat with the same server in oterm, ready for a question."""
    data = folder / "oterm"
    data.mkdir()
    (data / "config.json").write_text(json.dumps({"theme": "textual-dark", "splash-screen": False}))
    # It asks PyPI for a newer version at the start; nothing of a measurement leaves the machine.
    nowhere = dict.fromkeys(("HTTPS_PROXY", "https_proxy"), "http://127.0.0.1:9")
    environment = _environment(folder) | {"OLLAMA_URL": url, "OTERM_DATA_DIR": str(data), **nowhere}
    subprocess.run([python, "-c", KEPT_CHAT], env=environment, cwd=folder, check=True)
    script = str(Path(python).with_name("oterm"))
    client = Client([script], environment, folder, data / "store.db")
    try:
        client.settle()
        yield client
    finally:
        client.end()


def _environment(folder: Path) -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    return kept | {
        "HOME": str(folder),
        "TERM": "xterm-256color",
        "COLORTERM": "truecolor",
        "NO_PROXY": "127.0.0.1",
    }


def ask(client: Client, kind: str, limit: float) -> dict[str, float]:
    """One question; its figures."""
    reasoning, answer, rate = KINDS[kind]
    whole = "".join(answer) + END
    before, began = client.cpu(), time.monotonic()
    client.type(kind)
    time.sleep(0.3)
    client.type("\r")
    while END not in client.kept():
        if client.cpu() - before > limit:
            return {"cpu": limit, "behind": float("inf"), "kept": 0.0, "shown": 0.0}
        time.sleep(0.1)
    took = time.monotonic() - began
    time.sleep(1.0)
    return {
        "cpu": client.cpu() - before,
        "behind": took - 0.3 - (len(reasoning) + len(answer)) / rate,
        "kept": float(whole in client.kept()),
        "shown": float(client.shows(END)),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--oterm", metavar="PYTHON", required=True, help="the Python that has oterm")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds of CPU for one answer")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--server", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.server:
        server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
        server.daemon_threads = True
        print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
        server.serve_forever()
    command = [sys.executable, __file__, "--server", "--oterm", ""]
    server_process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server_process.stdout is not None
    url = server_process.stdout.readline().strip()
    figures: dict[str, dict[str, list[dict[str, float]]]] = {}
    try:
        for _ in range(given.rounds):
            for kind in given.kinds.split(","):
                for name in ("the panel", "oterm"):
                    with tempfile.TemporaryDirectory() as folder:
                        here = Path(folder)
                        is_oterm = name == "oterm"
                        with oterm(given.oterm, url, here) if is_oterm else panel(url, here) as client:
                            found = ask(client, kind, given.limit)
                    figures.setdefault(kind, {}).setdefault(name, []).append(found)
                    print(kind, name, found, f"load {os.getloadavg()[0]:.1f}", file=sys.stderr, flush=True)
    finally:
        server_process.kill()
        server_process.wait()
    print(json.dumps(figures, indent=2) if given.json else table(figures))


def table(figures: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The figures as Markdown: medians, and in how many of the rounds all was there."""
    lines = [
        "| | client | CPU, s | kept behind the server's end, s | all kept | end shown |",
        "|---|---|---|---|---|---|",
    ]
    for kind, clients in figures.items():
        for name, found in clients.items():
            cpu, behind = (statistics.median(one[key] for one in found) for key in ("cpu", "behind"))
            whole, shown = (
                f"{sum(one[key] for one in found):.0f} of {len(found)}" for key in ("kept", "shown")
            )
            spent = f"over {cpu:.0f}, not done" if behind == float("inf") else f"{cpu:.2f}"
            late = "—" if behind == float("inf") else f"{behind:.1f}"
            lines.append(f"| {NAMES[kind]} | {name} | {spent} | {late} | {whole} | {shown} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
