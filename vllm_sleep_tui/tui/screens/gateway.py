"""The endpoint for every client: its address, whether it is open, who asks now and what came of the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.geometry import Size
from textual.screen import Screen

from vllm_sleep_tui.fleet.snapshot import FleetSnapshot
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, Span, cut_line, left, right, wrap
from vllm_sleep_tui.tui.widgets.bands import FollowingBand, KeyLine
from vllm_sleep_tui.units import UNKNOWN, counted, took

if TYPE_CHECKING:  # with an HTTP server, for who opens it
    from vllm_sleep_tui.gateway.asks import AskView
    from vllm_sleep_tui.gateway.post import GatewayView, Post

STEP_SECONDS = 0.5
LAST_SHOWN = 50
_WHAT_FOR = (
    "Key o opens it: one address for every client and all models. A request for a model that is not awake "
    "waits until it has been switched to."
)
_KEYS = "esc back   o open, close   y copy address   m copy a model's   ↑ ↓ scroll"


class Requests(Painted):
    """The gateway in lines: what it is, who is answered, who waits, what is over."""

    def __init__(self) -> None:
        super().__init__()
        self._view: GatewayView | None = None
        self._ports: list[tuple[str, str]] = []

    def show(self, view: GatewayView, ports: list[tuple[str, str]]) -> None:
        """Show this moment, with the addresses of models of their own."""
        self._view, self._ports = view, ports
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """Every line."""
        view = self._view
        if view is None:
            return []
        state: Span = ("open", "good bold") if view.is_open else ("closed", "warning bold")
        head: list[Span] = [(view.url, "accent bold"), ("   ", ""), state]
        lines = [cut_line(head, size.width)]
        if view.note:
            lines += [((line, "muted"),) for line in wrap(one_line(view.note), size.width)]
        if view.is_open:
            running = sum(ask.state == "running" for ask in view.asks)
            caused = counted(view.switches, "switch", "switches")
            figures = f"{running} being answered, {len(view.asks) - running} waiting, {caused} caused"
            lines.append(cut_line([(figures, "text")], size.width))
        lines += [
            cut_line([(left(name, 20), "text"), (url, "muted")], size.width) for name, url in self._ports
        ]
        if not (view.is_open or view.asks or view.last):
            return [*lines, (), *(((line, "text"),) for line in wrap(_WHAT_FOR, size.width))]
        for title, asks in (("Now", view.asks), ("Before", view.last[:LAST_SHOWN])):
            lines += [(), cut_line([(title, "muted")], size.width)]
            lines += [cut_line(_row(ask), size.width) for ask in asks] or [(("nothing", "muted"),)]
        return lines


def _row(ask: AskView) -> list[Span]:
    """One request: whose, for whom, how far."""
    paint = {"running": "good", "waiting": "warning"}.get(ask.state, "text" if ask.state == "200" else "bad")
    spans: list[Span] = [
        (left(one_line(ask.client), 14), "text"),
        (left(one_line(ask.model), 20), "text"),
        (left(ask.state, 9), paint),
        (right(_seconds(ask.took), 9), "text"),
    ]
    if ask.waits_for:  # instead of figures that there are none of yet: on 80 columns it has to be near
        spans.append((f"  for {one_line(ask.waits_for)}", "warning"))
    else:
        size = f"{ask.events:,} ev" if ask.events else f"{ask.sent:,} B"
        spans += [(right(_seconds(ask.first), 9), "muted"), (right(size, 12), "muted")]
    return [*spans, (f"  {ask.path}", "muted")]


def _seconds(value: float | None) -> str:
    return UNKNOWN if value is None else took(value)


class GatewayScreen(Screen[None]):
    """What the gateway does, and the key that opens and closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,e,q", "back", "back"),
        Binding("o", "open_or_close", "open or close"),
        Binding("y", "copy", "copy"),
        Binding("m", "copy_model", "copy a model's"),
    ]

    def __init__(
        self, post: Post, addresses: list[tuple[str, str]], look: Callable[[], FleetSnapshot]
    ) -> None:
        super().__init__()
        self._look_at_fleet = look
        self._post = post
        self._addresses = addresses
        self._copied = -1

    def compose(self) -> ComposeResult:
        """The lines, and the keys."""
        yield FollowingBand(self._look_at_fleet, id="top")
        with VerticalScroll(id="gateway") as box:
            box.border_title = "Gateway"
            yield Requests()
        yield KeyLine(_KEYS, id="keys")

    def on_mount(self) -> None:
        """Look now, and again and again."""
        self.call_after_refresh(self._look)
        self.set_interval(STEP_SECONDS, self._look)

    def _look(self) -> None:
        self.query_one(Requests).show(self._post.view(), self._addresses)

    def action_back(self) -> None:
        """To the dashboard."""
        self.dismiss()

    def action_open_or_close(self) -> None:
        """Open it if it is closed, else close it, which waits for a switch under way."""
        if self._post.view().is_open:
            self.app.run_worker(self._post.close(), group="gateway")
        elif not self._post.is_closing:
            if self._post.is_started:  # what kept it closed may be there still: nothing else would be seen
                self.notify("Trying again; it is tried every few seconds, too.", markup=False)
            self._post.start()
        self._look()

    def action_copy(self) -> None:
        """The gateway's address."""
        self._copy(self._post.view().url, "the gateway's address")

    def action_copy_model(self) -> None:
        """The address of a running model of its own; of the next one each time."""
        if not self._addresses:
            self.notify("No model runs that has an address of its own.", markup=False)
            return
        self._copied = (self._copied + 1) % len(self._addresses)
        name, address = self._addresses[self._copied]
        self._copy(address, f"the address of {name}")

    def _copy(self, text: str, what: str) -> None:
        app: Any = self.app
        app.copy_to_clipboard(text, what)
