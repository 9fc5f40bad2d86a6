"""The endpoint itself: who may come in, what there is, and each answer passed through as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote, urlsplit

from vllm_sleep_tui.config.types import GatewayConfig, parse_bytes, parse_duration
from vllm_sleep_tui.engine import endpoints
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.snapshot import Way
from vllm_sleep_tui.gateway.asks import GONE, Ask, Asks, view
from vllm_sleep_tui.gateway.bodies import Body, Gone, Store, understand
from vllm_sleep_tui.gateway.desk import Desk, Operator
from vllm_sleep_tui.gateway.keys import Client, Clients
from vllm_sleep_tui.gateway.names import Names, Target
from vllm_sleep_tui.gateway.replies import (
    SSE_TYPE,
    Receive,
    Refusal,
    Scope,
    Send,
    error_event,
    refuse,
    reply,
    reply_json,
)
from vllm_sleep_tui.upstream import Address, Answer, Upstream, UpstreamError

FIRST_COMMENT = 2.0
"""Seconds that a stream waits before its client hears that it is alive; until then it gets a true status."""
COMMENT_SECONDS = 5.0
PAUSES = (0.0, 0.1, 0.3, 1.0, 2.0, 2.0, 2.0)
"""Seconds before a request waits anew because its model was not awake after all; then it is refused.

A server that has just died is awake in its record until somebody has looked.
"""
BODIES_HELD = 8
"""How many of the longest bodies may be held at once."""
MAX_ERROR = 1024 * 1024
NOT_FORWARDED = frozenset(
    b"host connection keep-alive proxy-connection transfer-encoding upgrade te trailer content-length "
    b"expect authorization x-api-key proxy-authorization cookie origin referer".split()
)
OURS = b"x-panel-"
STORED_METHODS = ("GET", "POST", "DELETE")
"""Of an answer that was kept. Not HEAD: its answer's length is of a body that never comes."""
REALTIME = "/v1/realtime"
"""vLLM's path for speech, by WebSocket."""
NOT_RETURNED = frozenset(b"connection keep-alive transfer-encoding trailer upgrade x-panel-gate".split())
log = logging.getLogger(__name__)


class App:
    """An ASGI application over the models of one fleet."""

    def __init__(self, fleet: Operator, config: GatewayConfig, desk: Desk, asks: Asks, names: Names) -> None:
        self._fleet = fleet
        self._desk = desk
        self._asks = asks
        self._clients = Clients(config.keys)
        self._give_up = parse_duration(config.give_up)
        longest = parse_bytes(config.max_body)
        self._store = Store(longest, BODIES_HELD * longest)
        self._upstreams: dict[str, tuple[str, Upstream]] = {}
        self._unheard: set[tuple[str, str]] = set()
        """Aliases that a launch does not know, as it is older than they are."""
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "Not served here."})
            return
        path = scope["raw_path"].decode("latin-1")
        try:
            if foreign := endpoints.why_foreign(scope):
                raise Refusal(HTTPStatus.FORBIDDEN, foreign)
            await self._serve(path, scope, receive, send)
        except Refusal as refusal:
            await refuse(send, refusal, path)
        except Gone:
            pass
        except Exception:
            log.exception("gateway: something unforeseen went wrong with %s", path[:200])
            with contextlib.suppress(RuntimeError):  # the answer may have begun
                await refuse(send, Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Something went wrong."), path)

    def close(self) -> None:
        """Close the connections to the servers that are not in use."""
        for _, upstream in self._upstreams.values():
            upstream.close()

    async def _serve(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if method == "GET" and path == endpoints.HEALTH:
            await reply_json(send, {"status": "ok"})
            return
        client = self._clients.who(scope["headers"])
        target, rest = self.names.split(path)
        is_stored = method in STORED_METHODS and endpoints.is_stored(rest.removesuffix("/cancel"))
        if is_stored and target is None and len(self.names.models) > 1:
            message = f"This path does not say which model has kept it: ask for /MODEL{rest[:200]} instead."
            raise Refusal(HTTPStatus.NOT_FOUND, message)
        if is_stored or (method == "POST" and (endpoints.is_inference(rest) or endpoints.is_read_only(rest))):
            await self._post(rest, target, client, scope, receive, send)
        elif any(name == b"upgrade" for name, _ in scope["headers"]) or rest == REALTIME:
            message = "No WebSockets are served here: connect to the model's own port, which the panel shows."
            raise Refusal(HTTPStatus.NOT_IMPLEMENTED, message)
        elif method == "GET" and target is None:
            await self._page(path, client, send)
        elif method == "GET" and rest == endpoints.MODELS and target is not None:
            await reply_json(send, self._listed([target.model], client))
        else:
            message = f"{method} {path[:200]} is not served here."
            raise Refusal(HTTPStatus.NOT_FOUND, message)

    # ── pages of our own ─────────────────────────────────────────────────────────────────────────────────

    async def _page(self, path: str, client: Client, send: Send) -> None:
        if path == endpoints.MODELS:
            await reply_json(send, self._listed(self.names.models, client))
        elif path.startswith(f"{endpoints.MODELS}/"):
            target = self.names.find(unquote(path.removeprefix(f"{endpoints.MODELS}/")))
            listed = self._listed([target.model], client)["data"]
            if not listed:
                raise Refusal(HTTPStatus.NOT_FOUND, "There is no such model.", code="model_not_found")
            await reply_json(send, listed[0])
        elif path == "/running":
            await reply_json(send, self._running(client))
        elif path == endpoints.METRICS:
            await reply(send, HTTPStatus.OK, self._asks.metrics().encode(), b"text/plain; version=0.0.4")
        else:
            raise Refusal(HTTPStatus.NOT_FOUND, f"GET {path[:200]} is not served here.")

    def _listed(self, models: list[str], client: Client) -> dict[str, Any]:
        """The models in a shape that OpenAI's and Anthropic's clients both read."""
        states = {model.name: model for model in self._fleet.snapshot().models}
        data = []
        for name in models:
            if not client.may_ask(name) or name not in states:
                continue
            known, aliases = states[name], self.names.others(name)
            data += [
                {
                    "id": shown,
                    "object": "model",
                    "type": "model",
                    "display_name": shown,
                    "created": int(known.since or 0),
                    "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(known.since or 0)),
                    "owned_by": "vllm-sleep-tui",
                    "root": name,
                    "aliases": aliases if shown == name else [],
                    "state": known.state.value,
                    "level": known.level,
                }
                for shown in (name, *aliases)
            ]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
        return {"object": "list", "data": data, "has_more": False, **ends}

    def _running(self, client: Client) -> dict[str, Any]:
        """The models with a server, and the requests under way that this client may know of."""
        models = [model for model in self._fleet.snapshot().models if client.may_ask(model.name)]
        return {
            "running": [
                {"model": model.name, "state": model.state.value, "level": model.level}
                for model in models
                if model.pid is not None or model.is_external
            ],
            "requests": [view(ask) for ask in self._asks.under_way if client.may_ask(ask.target.model)],
        }

    # ── a request for a model ────────────────────────────────────────────────────────────────────────────

    async def _post(
        self, path: str, target: Target | None, client: Client, scope: Scope, receive: Receive, send: Send
    ) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        fields = dict(headers)
        length = fields.get(b"content-length", b"")
        content = await self._store.read(receive, int(length) if length.isdigit() else None)
        size = len(content)
        try:
            body = await understand(content, fields.get(b"content-type", b""))
            named = self.names.find(body.model, path=target) if body.model is not None else None
            if target is None or (named is not None and named.model == target.model):
                target = named or target  # an adapter's name in the body says more than the path
            if target is None:
                target = self._only_one()
            client.check(target.model)
            ask = Ask(client=client, target=target, path=path, streams=body.streams)
            await self._answered(ask, body, scope, receive, send)
        finally:
            self._store.release(content, size)

    def _only_one(self) -> Target:
        """The model that is meant where a request names none."""
        if len(self.names.models) == 1:
            return self.names.find(self.names.models[0])
        message = f"Name a `model`. There are: {', '.join(self.names.models)}."
        raise Refusal(HTTPStatus.BAD_REQUEST, message)

    async def _answered(self, ask: Ask, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and stop as soon as its client has gone."""
        this = asyncio.current_task()
        assert this is not None
        gone = asyncio.ensure_future(receive())  # after the body only its end can come

        def stop(_: object) -> None:
            this.cancel()

        gone.add_done_callback(stop)
        out = Outgoing(ask, send)
        self._asks.begin(ask)
        try:
            await self._pass_on(ask, body, scope, out)
        except asyncio.CancelledError:
            if not gone.done():
                raise
            this.uncancel()
            ask.status = GONE
        except Refusal as refusal:
            ask.status = refusal.status
            await out.refuse(refusal)
        finally:
            gone.remove_done_callback(stop)
            gone.cancel()
            self._desk.done(ask)
            self._asks.end(ask)

    async def _pass_on(self, ask: Ask, body: Body, scope: Scope, out: Outgoing) -> None:
        turn: asyncio.Future[None] | None = None
        if endpoints.is_inference(ask.path):
            turn = self._desk.enter(ask)
        deadline = asyncio.get_running_loop().time() + self._give_up
        async with _Telling(ask, out) as telling:
            for pause in (*PAUSES, None):
                if turn is not None and not turn.done():
                    telling.begin()
                    await self._waited(turn, deadline, ask)
                elif turn is not None:
                    turn.result()
                way = await self._way(ask)
                answer = None if way is None else await self._sent(ask, body, scope, way)
                if answer is None:
                    if pause is None:
                        break
                    telling.begin()
                    await asyncio.sleep(pause)
                    turn = self._again(ask)
                    continue
                self._store.release(body.content, body.size)
                try:
                    await telling.end()
                    await out.relay(answer)
                finally:
                    answer.close()
                return
        message = f"{ask.target.model} was put away again and again before it could answer."
        raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after=5)

    def _again(self, ask: Ask) -> asyncio.Future[None]:
        """Its turn was none: wait for another, or, of what needs no turn as a rule, for the first one."""
        return self._desk.bounce(ask) if ask.began is not None else self._desk.enter(ask)

    async def _waited(self, turn: asyncio.Future[None], deadline: float, ask: Ask) -> None:
        """Wait for the turn."""
        await asyncio.wait({turn}, timeout=max(0.0, deadline - asyncio.get_running_loop().time()))
        if not turn.done():
            message = f"{ask.target.model} could not be made awake in {self._give_up:.0f} s."
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, message, retry_after=10)
        turn.result()

    async def _way(self, ask: Ask) -> Way | None:
        """How to get to the server; None if it does not run."""
        try:
            return await self._desk.way(ask.target.model)
        except PanelError:
            return None

    async def _sent(self, ask: Ask, body: Body, scope: Scope, way: Way) -> Answer | None:
        """Send the request and get the head of its answer; None if the model was not awake after all."""
        served, launch = ask.target.served, way.launch
        if way.served != ask.target.model or (launch, served) in self._unheard:
            served = way.served
        answer = await self._sent_as(served, ask, body, scope, way)
        is_alias = served != way.served and not ask.target.is_adapter
        if answer is not None and answer.status == HTTPStatus.NOT_FOUND and is_alias:
            # An alias that the config got after this server was launched: it has the model's name.
            answer.close()
            answer = await self._sent_as(way.served, ask, body, scope, way)
            if answer is not None and answer.status != HTTPStatus.NOT_FOUND:
                self._unheard.add((launch, served))
        return answer

    async def _sent_as(self, served: str, ask: Ask, body: Body, scope: Scope, way: Way) -> Answer | None:
        """The same, for the model by the name that its server has for it."""
        if body.model is not None and body.model != served:
            body.rename(served)
        upstream = self._upstream(ask.target.model, way)
        head = request_head(scope, ask.path, way, len(body.content))
        try:
            answer = await upstream.send(head, body.slices())
        except UpstreamError as error:
            if not error.sent:
                return None
            message = f"The server of {ask.target.model} broke off before it answered."
            raise Refusal(HTTPStatus.BAD_GATEWAY, message, code="upstream_error") from error
        except PanelError as error:
            raise Refusal(HTTPStatus.BAD_GATEWAY, f"{error.what} {error.cure}") from error
        if answer.status == HTTPStatus.SERVICE_UNAVAILABLE and answer.header(endpoints.GATE_CLOSED):
            answer.close()
            return None
        return answer

    def _upstream(self, model: str, way: Way) -> Upstream:
        launch, upstream = self._upstreams.get(model, ("", None))
        if upstream is None or launch != way.launch:
            if upstream is not None:
                upstream.close()
            parts = urlsplit(way.url)
            is_tls = parts.scheme == "https"
            address = Address(
                uds=way.uds, host=parts.hostname or "", port=parts.port or (443 if is_tls else 80), tls=is_tls
            )
            upstream = Upstream(address, way.check)
            self._upstreams[model] = (way.launch, upstream)
        return upstream


def request_head(scope: Scope, path: str, way: Way, length: int) -> bytes:
    """The head of the request as the server gets it: the client's own headers but those that end here."""
    parts = urlsplit(way.url)
    query = b"?" + scope["query_string"] if scope["query_string"] else b""
    target = parts.path.encode() + path.encode("latin-1") + query
    method = scope["method"].encode()
    lines = [b"%b %b HTTP/1.1" % (method, target), b"host: " + parts.netloc.encode()]
    lines += [
        b"%b: %b" % (name, value)
        for name, value in scope["headers"]
        if name not in NOT_FORWARDED and not name.startswith(OURS) and b"\n" not in value
    ]
    lines += [b"%b: %b" % pair for pair in way.headers]
    lines.append(b"content-length: %d" % length)
    return b"\r\n".join(lines) + b"\r\n\r\n"


class Outgoing:
    """The answer to one client: its head once, by whoever is first to have something to say."""

    def __init__(self, ask: Ask, send: Send) -> None:
        self._ask = ask
        self._send = send
        self._has_begun = False

    async def comment(self, words: str) -> None:
        """Say something that a client of a stream does not read, so that nobody thinks the line dead."""
        await self._begin(HTTPStatus.OK, [(b"content-type", SSE_TYPE), (b"cache-control", b"no-cache")])
        await self._write(b": " + words.encode(errors="replace").replace(b"\n", b" ") + b"\n\n")

    async def relay(self, answer: Answer) -> None:
        """Pass an answer on as it comes; what breaks off in a stream of events is told as an event."""
        ask = self._ask
        is_stream = (answer.header(b"content-type") or b"").startswith(b"text/event-stream")
        if self._has_begun and not (answer.status == HTTPStatus.OK and is_stream):
            ask.status = answer.status
            await self._write(await _as_event(answer, ask.path))
            await self._end()
            return
        ask.status = answer.status
        kept = [(name, value) for name, value in answer.headers if name.lower() not in NOT_RETURNED]
        await self._begin(answer.status, kept)
        try:
            async for part in answer.parts():
                if ask.first is None:
                    ask.first = time.time()
                if is_stream:
                    ask.events += part.count(b"\ndata:") + part.startswith(b"data:")
                ask.sent += len(part)
                await self._write(part)
        except UpstreamError:
            ask.status = HTTPStatus.BAD_GATEWAY
            if not is_stream:
                await self._send({"type": "http.response.body", "body": b"", "more_body": True})
                return  # incomplete: the connection is closed, by which the client knows
            message = f"The server of {ask.target.model} broke off in the middle of its answer."
            await self._write(error_event(Refusal(HTTPStatus.BAD_GATEWAY, message), ask.path))
        await self._end()

    async def refuse(self, refusal: Refusal) -> None:
        """End with a refusal, in whatever way is left."""
        if not self._has_begun:
            await refuse(self._send, refusal, self._ask.path)
            return
        await self._write(error_event(refusal, self._ask.path))
        await self._end()

    async def _begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        if not self._has_begun:
            await self._send({"type": "http.response.start", "status": int(status), "headers": headers})
            self._has_begun = (
                True  # not before: a comment may be cut off while it waits for its turn to be sent
            )

    async def _write(self, part: bytes) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": True})

    async def _end(self) -> None:
        await self._send({"type": "http.response.body", "body": b""})


class _Telling:
    """Tells a client that streams, from `begin` on, that it is waited: for a turn, or for the answer's head.

    A request that need not wait has no task for it.
    """

    def __init__(self, ask: Ask, out: Outgoing) -> None:
        self._ask = ask
        self._out = out
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> _Telling:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    def begin(self) -> None:
        """Tell from now on, unless it is told already."""
        if self._task is None and self._ask.streams:
            self._task = asyncio.create_task(self._tell())

    async def end(self) -> None:
        """Say no more; after this somebody else may write."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _tell(self) -> None:
        await asyncio.sleep(FIRST_COMMENT)
        while True:
            ask = self._ask
            waits_for = "the answer" if ask.began else ask.waits_for or ask.target.model
            await self._out.comment(f"waits for {waits_for}")
            await asyncio.sleep(COMMENT_SECONDS)


async def _as_event(answer: Answer, path: str) -> bytes:
    """An answer that is no stream, for a client that was promised one."""
    content = bytearray()
    with contextlib.suppress(UpstreamError):
        async for part in answer.parts():
            content += part
            if len(content) > MAX_ERROR:
                break
    if answer.status != HTTPStatus.OK and content.lstrip().startswith(b"{"):
        name = b"event: error\n" if path.startswith("/v1/messages") else b""
        return name + b"data: " + bytes(content).replace(b"\n", b" ") + b"\n\n"
    return error_event(Refusal(HTTPStatus.BAD_GATEWAY, f"The server answered {answer.status}."), path)
