"""The requests: those under way as they are now, the last ones as they ended, and sums for `/metrics`."""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field

import msgspec

from vllm_sleep_tui.gateway.keys import Client
from vllm_sleep_tui.gateway.names import Target
from vllm_sleep_tui.gateway.replies import Refusal

LAST = 200
"""Requests that are remembered after their end; never their bodies."""
GONE = 499
"""The status of a request whose client left, as nginx writes it."""


@dataclass(eq=False, slots=True)
class Ask:
    """One request. It is known by being itself; times are UTC seconds."""

    client: Client
    target: Target
    path: str
    streams: bool
    arrived: float = field(default_factory=time.time)
    began: float | None = None
    """When its model's turn came."""
    first: float | None = None
    """When the first byte of the answer came."""
    ended: float | None = None
    status: int | None = None
    events: int = 0
    """Of a streamed answer: about as many as tokens."""
    sent: int = 0
    """Bytes of the answer."""
    waits_for: str = ""
    refusal: Refusal | None = None
    """Why its model will not come."""


class AskView(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a screen; seconds, None where it has not come to that."""

    client: str
    model: str
    path: str
    state: str
    """waiting, running, or the status that it ended with."""
    since: float
    """UTC seconds."""
    waited: float | None
    first: float | None
    """From its arrival to the first byte."""
    took: float | None
    events: int
    sent: int
    waits_for: str


def view(ask: Ask) -> AskView:
    """The request as it is now."""
    now = time.time()
    state = "running" if ask.began else "waiting"
    return AskView(
        client=ask.client.name,
        model=ask.target.model,
        path=ask.path,
        state=state if ask.ended is None else str(ask.status),
        since=ask.arrived,
        waited=(ask.began or ask.ended or now) - ask.arrived,
        first=None if ask.first is None else ask.first - ask.arrived,
        took=(ask.ended or now) - ask.arrived,
        events=ask.events,
        sent=ask.sent,
        waits_for="" if ask.began else ask.waits_for,
    )


class Asks:
    """All requests of one gateway."""

    def __init__(self) -> None:
        self.under_way: dict[Ask, None] = {}
        self.last: deque[AskView] = deque(maxlen=LAST)
        self.answered: Counter[tuple[str, str, int]] = Counter()
        """By model, client and status."""
        self.seconds: Counter[str] = Counter()
        """Of waiting, by model."""
        self.switches: Counter[tuple[str, str]] = Counter()
        """By model and how they ended: done, failed."""

    def begin(self, ask: Ask) -> None:
        """It has come in."""
        self.under_way[ask] = None
        ask.client.under_way += 1

    def end(self, ask: Ask) -> None:
        """It is over, with its status set."""
        del self.under_way[ask]
        ask.client.under_way -= 1
        ask.ended = time.time()
        status = ask.status if ask.status is not None else GONE
        ask.status = status
        self.answered[ask.target.model, ask.client.name, status] += 1
        self.seconds[ask.target.model] += (ask.began or ask.ended) - ask.arrived  # type: ignore[assignment]
        self.last.append(view(ask))

    def metrics(self) -> str:
        """The sums in Prometheus' format."""
        lines = ["# TYPE gateway_requests_total counter"]
        for (model, client, status), count in sorted(self.answered.items()):
            labels = f'model="{_label(model)}",client="{_label(client)}",status="{status}"'
            lines.append(f"gateway_requests_total{{{labels}}} {count}")
        lines.append("# TYPE gateway_waited_seconds_total counter")
        lines += [
            f'gateway_waited_seconds_total{{model="{_label(model)}"}} {seconds:.6f}'
            for model, seconds in sorted(self.seconds.items())
        ]
        lines.append("# TYPE gateway_switches_total counter")
        lines += [
            f'gateway_switches_total{{model="{_label(model)}",outcome="{outcome}"}} {count}'
            for (model, outcome), count in sorted(self.switches.items())
        ]
        for state in ("waiting", "running"):
            count = sum((ask.began is not None) == (state == "running") for ask in self.under_way)
            lines += [f"# TYPE gateway_{state} gauge", f"gateway_{state} {count}"]
        return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
