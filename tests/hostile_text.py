"""What others would write on the person's terminal, and a server that tries to."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

OSC = "\x1b]52;c;ZXZpbA==\x07"
PAYLOAD = f"{OSC}\x1b[2J\x1b[31mevil\x9b1m\u202etxt.\u2066\u200f\u061c\u2028\x7f end"
SHOWN = "evil"
_OBEYED = "\x1b\x07\x7f\x80\x9b\x9d\x9f\u061c\u200e\u200f\u2028\u202a\u202e\u2066\u2069"
FORBIDDEN = [char.encode() for char in _OBEYED]
"""What none of it may leave on a terminal, as UTF-8."""


def assert_harmless(*outputs: bytes) -> None:
    for output in outputs:
        assert [char for char in FORBIDDEN if char in output] == [], output


class HostileServer:
    """An attached server that answers, and errs, with words of its own."""

    def __init__(self) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def put(self, status: int, body: bytes, kind: str = "application/json") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                if self.path == "/v1/models":
                    self.put(200, dumped({"data": [{"id": "far"}, {"id": PAYLOAD}]}))
                elif self.path == "/is_sleeping":
                    self.put(200, dumped({"is_sleeping": False}))
                elif self.path in ("/version", "/metrics"):
                    self.put(200, dumped({"version": f"0.32.0{PAYLOAD}"}))
                else:
                    self.put(200, b"")

            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if b"/chat/" in self.path.encode() and b"err" not in asked:
                    # The escape is cut in two, as a stream may cut it.
                    parts = [PAYLOAD[:5], PAYLOAD[5:9], PAYLOAD[9:], " done"]
                    events = [{"choices": [{"delta": {"content": part}}]} for part in parts]
                    events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
                    lines = [f"data: {json.dumps(event)}\n\n" for event in events]
                    self.put(200, "".join([*lines, "data: [DONE]\n\n"]).encode(), "text/event-stream")
                else:
                    self.put(400, dumped({"error": {"message": f"no: {PAYLOAD}", "type": PAYLOAD}}))

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()
