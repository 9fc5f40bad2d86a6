"""A server that answers every question with words without end."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PACE = 0.03
"""Seconds between two pieces of eight words."""
PAGES = {
    "/health": {},
    "/version": {"version": "0.32.0"},
    "/is_sleeping": {"is_sleeping": False},
    "/v1/models": {"object": "list", "data": [{"id": "talker", "object": "model"}]},
}


class _Talker(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        page = PAGES.get(self.path.partition("?")[0])
        self._answer(404 if page is None else 200, json.dumps(page or {}).encode())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        number = 0
        try:
            while True:
                words = " ".join(f"word{number + place}" for place in range(8)) + " "
                number += 8
                choice = {"index": 0, "delta": {"content": words}, "finish_reason": None}
                chunk = {"id": "x", "object": "chat.completion.chunk", "model": "talker", "choices": [choice]}
                self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
                time.sleep(PACE)
        except OSError:
            self.close_connection = True  # whoever asked has gone

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def talker() -> Iterator[str]:
    """The address of a server that talks."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Talker)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
