"""Chat, completions, embeddings and tokens: the endpoints that a user's client calls."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from vllm_sleep_tui.simulator import calls, generation, http, messages
from vllm_sleep_tui.simulator.behaviours import Fault
from vllm_sleep_tui.simulator.client import EngineDead, Generation
from vllm_sleep_tui.simulator.http import Answer, HttpError, Request
from vllm_sleep_tui.simulator.params import (
    Wanted,
    chat_tokens,
    check_length,
    check_pictures,
    check_temperature,
    max_tokens,
    question,
)
from vllm_sleep_tui.simulator.server_state import ServerState

NO_CHAT_TEMPLATE = (
    "As of transformers v4.44, default chat template is no longer allowed, so you must provide a chat "
    "template if the tokenizer does not define one."
)
DONE = b"data: [DONE]\n\n"
LATE_SECONDS = 3.0


class Inference:
    """The handlers; each takes a request and answers it."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        self._engine = server.engine
        self._names = server.options.served_names
        # vLLM's fingerprint is its version and a hash of the configuration.
        self._fingerprint = (
            f"vllm-{server.settings.version}-{uuid.uuid5(uuid.NAMESPACE_URL, self._names[0]).hex[:8]}"
        )
        self.in_flight = 0

    def routes(self) -> dict[tuple[str, str], Callable[[Request], Awaitable[Answer]]]:
        """By method and path."""
        routes = {
            ("GET", "/v1/models"): self.models,
            ("POST", "/tokenize"): self.tokenize,
            ("POST", "/detokenize"): self.detokenize,
        }
        if self._server.options.pooling:
            return {**routes, ("POST", "/v1/embeddings"): self.embeddings}
        return {
            **routes,
            ("POST", "/v1/chat/completions"): self.chat,
            ("POST", "/v1/messages"): self.messages,
            ("POST", "/v1/completions"): self.completions,
            ("POST", "/invocations"): self.invocations,
        }

    async def models(self, request: Request) -> Answer:
        """One entry a served name; `created` is the time of the request."""
        now = int(time.time())
        entries = [self._model_entry(name, now) for name in self._names]
        return http.as_json({"object": "list", "data": entries})

    def _model_entry(self, name: str, now: int) -> dict[str, object]:
        options = self._server.options
        permission = {
            "id": f"modelperm-{uuid.uuid4().hex[:16]}",
            "object": "model_permission",
            "created": now,
            "allow_create_engine": False,
            "allow_sampling": True,
            "allow_logprobs": True,
            "allow_search_indices": False,
            "allow_view": True,
            "allow_fine_tuning": False,
            "organization": "*",
            "group": None,
            "is_blocking": False,
        }
        return {
            "id": name,
            "object": "model",
            "created": now,
            "owned_by": "vllm",
            "root": options.model,
            "parent": None,
            "max_model_len": options.max_model_len,
            "permission": [permission],
        }

    async def tokenize(self, request: Request) -> Answer:
        """Text or messages to ids."""
        body = request.json()
        self._check_model(body)
        tokens = (
            chat_tokens(body["messages"])
            if "messages" in body
            else generation.token_ids(str(body.get("prompt", "")))
        )
        length = self._server.options.max_model_len
        return http.as_json(
            {"count": len(tokens), "max_model_len": length, "tokens": tokens, "token_strs": None}
        )

    async def detokenize(self, request: Request) -> Answer:
        """Ids to text."""
        tokens = request.json().get("tokens", ())
        return http.as_json({"prompt": "".join(generation.token_text(token) for token in tokens)})

    async def embeddings(self, request: Request) -> Answer:
        """One vector an input; asks the engine, so that a sleeper hangs."""
        body = request.json()
        self._check_model(body)
        inputs = body["input"] if isinstance(body.get("input"), list) else [body.get("input", "")]
        entries = []
        for index, text in enumerate(inputs):
            tokens = generation.token_ids(str(text))
            wanted = self._wanted(request, {"max_tokens": 1}, tokens, "", chat=False)
            whole = await self._whole(request, wanted)
            vector = generation.embedding(wanted.model, tokens, garbage=whole.garbage)
            entries.append({"index": index, "object": "embedding", "embedding": vector})
        return http.as_json({"object": "list", "model": self._names[0], "data": entries})

    async def invocations(self, request: Request) -> Answer:
        """A chat or a completion, by the body; not guarded by the API key."""
        return await (self.chat(request) if "messages" in request.json() else self.completions(request))

    async def chat(self, request: Request) -> Answer:
        """``/v1/chat/completions``."""
        return await self._chat(request, request.json())

    async def _chat(self, request: Request, body: Mapping[str, Any]) -> Answer:
        self._check_model(body)
        if "messages" not in body:
            raise http.invalid("missing", "body.messages", "Field required", "<dict of 1 items>")
        if not body["messages"]:
            message = "Cannot apply chat template to an empty conversation. Provide at least one message."
            raise HttpError(400, message)
        if (
            self._server.faults.has(Fault.NO_CHAT_TEMPLATE)
            and "chat_template" not in self._server.options.given
        ):
            raise HttpError(400, NO_CHAT_TEMPLATE)
        said = body["messages"]
        check_pictures(said, self._server.options.model, self._names[0])
        wanted = self._wanted(request, body, chat_tokens(said), question(said), chat=True)
        return await self._respond(request, body, wanted)

    async def messages(self, request: Request) -> Answer:
        """``/v1/messages``: the chat in Anthropic's shape."""
        answer = await self._chat(request, messages.as_chat(request.json()))
        if answer.chunks is not None:
            chunks = messages.as_events(answer.chunks, self._names[0])
            return Answer(content_type=answer.content_type, chunks=chunks)
        return http.as_json(messages.as_message(json.loads(answer.body)))

    async def completions(self, request: Request) -> Answer:
        """``/v1/completions``, with text or token ids as the prompt."""
        body = request.json()
        self._check_model(body)
        prompt = body.get("prompt", "")
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        tokens = prompt if isinstance(prompt, list) else generation.token_ids(str(prompt))
        question = prompt if isinstance(prompt, str) else f"{len(tokens)} tokens"
        wanted = self._wanted(request, {"max_tokens": 16, **body}, tokens, question, chat=False)
        return await self._respond(request, body, wanted)

    def _check_model(self, body: Mapping[str, Any]) -> None:
        model = body.get("model") or self._names[0]
        if model not in self._names:
            known = ", ".join(self._names)
            text = f"The model `{model}` does not exist."
            aliases = f" Valid aliases: {known}." if self._server.settings.minor > 24 else ""
            raise HttpError(404, text + aliases, param="model")

    def _wanted(
        self, request: Request, body: Mapping[str, Any], prompt: list[int], question: str, *, chat: bool
    ) -> Wanted:
        length = self._server.options.max_model_len
        check_length(prompt, length)
        check_temperature(body)
        prefix = "chatcmpl" if chat else "cmpl"
        stream_options = body.get("stream_options") or {}
        return Wanted(
            id=self._free_id(f"{prefix}-{request.headers.get('x-request-id') or uuid.uuid4().hex[:16]}"),
            model=self._names[0],
            prompt=prompt,
            question=question,
            max_tokens=max_tokens(body, length, len(prompt)),
            ignore_eos=bool(body.get("ignore_eos")),
            logprobs=body.get("prompt_logprobs") is not None,
            chat=chat,
            include_usage=bool(stream_options.get("include_usage")),
            continuous_usage=bool(stream_options.get("continuous_usage_stats")),
            calls=list(calls.call_events(body["tools"], question)) if self._calls(body) and chat else [],
            alternatives=body.get("top_logprobs", 0) if chat and body.get("logprobs") else None,
        )

    def _calls(self, body: Mapping[str, Any]) -> bool:
        """Whether the model calls its tools: it was started to, and nobody told it not to."""
        started = "enable_auto_tool_choice" in self._server.options.given
        return started and bool(body.get("tools")) and body.get("tool_choice") != "none"

    def _free_id(self, id_: str) -> str:
        return id_ if id_ not in self._engine.generations else f"{id_}-{uuid.uuid4().hex[:8]}"

    async def _respond(self, request: Request, body: Mapping[str, Any], wanted: Wanted) -> Answer:
        if not body.get("stream"):
            whole = await self._whole(request, wanted)
            return http.as_json(self._whole_body(wanted, whole))
        begun = self._begin(wanted)
        chunks = self._chunks(wanted, begun)
        return Answer(content_type="text/event-stream; charset=utf-8", chunks=chunks)

    def _begin(self, wanted: Wanted) -> Generation:
        self.in_flight += 1
        return self._engine.generate(
            wanted.id,
            wanted.prompt,
            question=wanted.question,
            max_tokens=wanted.max_tokens,
            ignore_eos=wanted.ignore_eos,
            logprobs=wanted.logprobs,
        )

    def _end(self, begun: Generation) -> None:
        self.in_flight -= 1
        self._engine.abort(begun.id)

    async def _whole(self, request: Request, wanted: Wanted) -> Whole:
        begun = self._begin(wanted)
        leaving = asyncio.create_task(request.watch())
        collecting = asyncio.create_task(self._collect(begun))
        try:
            await asyncio.wait({leaving, collecting}, return_when=asyncio.FIRST_COMPLETED)
            if collecting.done():
                return collecting.result()
            raise ClientLeft
        finally:
            await http.end_tasks(leaving, collecting)
            self._end(begun)

    async def _collect(self, begun: Generation) -> Whole:
        whole = Whole()
        while whole.finish is None:
            message = await begun.next()
            self._count(begun, message)
            whole.texts += message["texts"]
            whole.finish = message["finish"]
            whole.logprobs = message.get("logprobs") or whole.logprobs
            whole.garbage = whole.garbage or bool(message.get("garbage"))
        self._engine.generations.pop(begun.id, None)
        return whole

    def _count(self, begun: Generation, message: Mapping[str, Any]) -> None:
        is_first = bool(begun.made) and begun.made == len(message["texts"])
        if self._server.faults.has(Fault.COUNTS_LATE):
            asyncio.get_running_loop().call_later(LATE_SECONDS, self._record, begun, message, is_first)
        else:
            self._record(begun, message, is_first)

    def _record(self, begun: Generation, message: Mapping[str, Any], is_first: bool) -> None:
        if is_first:
            self._server.metrics.record_prompt(len(begun.prompt))
        self._server.metrics.record_tokens(len(message["texts"]))
        if message["finish"]:
            self._server.metrics.record_finish(begun, message["finish"])

    def _whole_body(self, wanted: Wanted, whole: Whole) -> dict[str, object]:
        text = "".join(whole.texts)
        usage = {
            **_usage(wanted, len(whole.texts)),
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
        }
        common = {"logprobs": None, "finish_reason": whole.finish, "stop_reason": None, "token_ids": None}
        if wanted.chat:
            message = {
                "role": "assistant",
                "content": text,
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            }
            choice: dict[str, object] = {"index": 0, "message": message, **common, "routed_experts": None}
        else:
            logprobs = {"prompt_logprobs": whole.logprobs, "prompt_token_ids": None, "routed_experts": None}
            choice = {"index": 0, "text": text, **common, **logprobs}
        body: dict[str, object] = {
            "id": wanted.id,
            "object": "chat.completion" if wanted.chat else "text_completion",
            "created": int(time.time()),
            "model": wanted.model,
            "choices": [choice],
            "service_tier": None,
            "system_fingerprint": self._fingerprint,
            "usage": usage,
        }
        if wanted.chat:
            body |= {"prompt_logprobs": whole.logprobs, "prompt_token_ids": None, "prompt_text": None}
        return body | {"kv_transfer_params": None, "ec_transfer_params": None, "metrics": None}

    async def _chunks(self, wanted: Wanted, begun: Generation) -> AsyncIterator[bytes]:
        created = int(time.time())
        opened = not wanted.chat
        try:
            finish = None
            while finish is None:
                message = await begun.next()
                self._count(begun, message)
                if not opened:
                    yield self._event(
                        wanted, created, [_role_choice()], 0, prompt_token_ids=None, prompt_text=None
                    )
                    opened = True
                finish = message["finish"]
                for event in self._token_events(wanted, created, begun, message):
                    yield event
                if wanted.calls and begun.made > len(wanted.calls):
                    finish = "tool_calls"
                    self._engine.abort(begun.id)
            self._engine.generations.pop(begun.id, None)
            if wanted.include_usage:
                usage = {"usage": _usage(wanted, begun.made), "system_fingerprint": self._fingerprint}
                yield self._event(wanted, created, [], None, **usage)
        except EngineDead as dead:
            yield b"data: " + json.dumps(http.error_body(500, str(dead))).encode() + b"\n\n"
        finally:
            self._end(begun)
        yield DONE

    def _token_events(
        self, wanted: Wanted, created: int, begun: Generation, message: Mapping[str, Any]
    ) -> list[bytes]:
        texts, finish = message["texts"], message["finish"]
        if not texts and begun.made == 0:
            return []  # a held request that is aborted gets no finish chunk (09-signals-and-crashes.txt)
        events = []
        before = begun.made - len(texts)
        for place, text in enumerate(texts or [""]):
            last = finish if place >= len(texts) - 1 else None
            if wanted.calls and before + place >= len(wanted.calls):
                last = "tool_calls"
            extra = {"system_fingerprint": self._fingerprint} if last and not wanted.include_usage else {}
            choice = _text_choice(text, last, chat=wanted.chat)
            if wanted.calls:
                piece = wanted.calls[before + place : before + place + 1]
                choice["delta"] = {"content": None, "tool_calls": piece} if piece else {}
            elif wanted.alternatives is not None and text:
                choice["logprobs"] = calls.chances(text, wanted.alternatives)
            events.append(
                self._event(wanted, created, [choice], min(begun.made, before + place + 1), **extra)
            )
            if last == "tool_calls":
                break
        return events

    def _event(
        self,
        wanted: Wanted,
        created: int,
        choices: list[dict[str, object]],
        made: int | None,
        **extra: object,
    ) -> bytes:
        content: dict[str, object] = {
            "id": wanted.id,
            "object": "chat.completion.chunk" if wanted.chat else "text_completion",
            "created": created,
            "model": wanted.model,
            "choices": choices,
        }
        if wanted.continuous_usage and made is not None:
            content["usage"] = {**_usage(wanted, made), "completion_tokens_details": None}
        content |= extra
        return b"data: " + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class ClientLeft(Exception):  # noqa: N818 - nobody is there to answer
    """The client hung up before its answer was ready."""


class Whole:
    """An answer as it comes together."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.finish: str | None = None
        self.logprobs: list[object] | None = None
        self.garbage = False


def _role_choice() -> dict[str, object]:
    return {
        "index": 0,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _text_choice(text: str, finish: str | None, *, chat: bool) -> dict[str, object]:
    if not chat:
        ending = {"stop_reason": None, "prompt_token_ids": None, "token_ids": None}
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, **ending}
    stop = {"stop_reason": None} if finish else {}
    return {
        "index": 0,
        "delta": {"content": text},
        "logprobs": None,
        "finish_reason": finish,
        **stop,
        "token_ids": None,
    }


def _usage(wanted: Wanted, made: int) -> dict[str, object]:
    prompt = len(wanted.prompt)
    return {"prompt_tokens": prompt, "total_tokens": prompt + made, "completion_tokens": made}
