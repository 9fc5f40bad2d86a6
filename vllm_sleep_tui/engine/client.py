"""The calls that the panel makes to one vLLM server, typed."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self, TypeVar

import msgspec

from vllm_sleep_tui.engine import endpoints
from vllm_sleep_tui.engine.chat import ChatDelta, chat_body, deltas
from vllm_sleep_tui.engine.failures import NOT_JSON, EngineError, EngineRefused, refused, unreadable
from vllm_sleep_tui.engine.guard import CLIENT_HEADER
from vllm_sleep_tui.engine.wire import Wire
from vllm_sleep_tui.upstream import Check

JSON = {"content-type": "application/json"}
Decoded = TypeVar("Decoded")


class ModelCard(msgspec.Struct, frozen=True):
    """One entry of `/v1/models`: the served name, its longest context in tokens."""

    id: str
    max_model_len: int | None = None


class SleepReply(msgspec.Struct, frozen=True):
    """What `/sleep` answered; both are None before vLLM 0.32, whose answers are empty.

    `level` is the level asked for, not the one the server is at (vLLM 0.32, 03-admin-sleep-pause.txt).
    """

    status: str | None = None
    level: int | None = None


class WakeReply(msgspec.Struct, frozen=True):
    """What `/wake_up` answered: "awake" only when everything is; None before vLLM 0.32 (empty answer)."""

    status: str | None = None


class Gate(msgspec.Struct, frozen=True):
    """The guard's gate; `last_request` is in UTC seconds, when one last began or ended."""

    closed: bool
    in_flight: int
    last_request: float | None = None


class Completion(msgspec.Struct, frozen=True):
    """A finished completion; `prompt_logprobs` holds one figure per prompt token but the first."""

    text: str
    finish_reason: str | None
    prompt_logprobs: tuple[float, ...] | None


class _ModelConfig(msgspec.Struct, frozen=True):
    model: str = ""
    quantization: str | None = None


class _LoadConfig(msgspec.Struct, frozen=True):
    load_format: str


class Configured(msgspec.Struct, frozen=True):
    """What of `/server_info` decides whether a model can be loaded again (0.32, server_info-json.json)."""

    model_config: _ModelConfig
    load_config: _LoadConfig
    lora_config: Any = None

    @property
    def args(self) -> dict[str, str]:
        """The arguments that decide it, as the command line would have them."""
        lora = {} if self.lora_config is None else {"enable-lora": "true"}
        return {"load-format": self.load_config.load_format, **lora}


class _ServerInfo(msgspec.Struct):
    vllm_config: Configured


class _Models(msgspec.Struct):
    data: tuple[ModelCard, ...]


class _Version(msgspec.Struct):
    version: str


class _IsSleeping(msgspec.Struct):
    is_sleeping: bool


class _Results(msgspec.Struct):
    results: list[Any]


class _Logprob(msgspec.Struct):
    logprob: float


class _CompletionChoice(msgspec.Struct):
    text: str
    finish_reason: str | None = None
    prompt_logprobs: list[dict[str, _Logprob] | None] | None = None


class _Completion(msgspec.Struct):
    choices: tuple[_CompletionChoice, ...]


class _Embedding(msgspec.Struct):
    embedding: tuple[float, ...]


class _Embeddings(msgspec.Struct):
    data: tuple[_Embedding, ...]


class VllmClient:
    """One server's HTTP; every call may raise one of the EngineErrors.

    A server of ours is driven by its guard's `uds`, where all calls but `chat` pass a closed gate; one that
    the version before started, by its port with the launch's `secret`. `check` looks at each connection
    before anything is sent over it. Timeouts are seconds for the whole call.
    """

    def __init__(
        self,
        port: int,
        *,
        uds: str | None = None,
        secret: str | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        check: Check | None = None,
    ) -> None:
        self._wire = Wire(base_url or f"http://127.0.0.1:{port}", uds=uds, check=check)
        plain = {"accept": "*/*"} | ({"authorization": f"Bearer {api_key}"} if api_key else {})
        self._client = plain | JSON | ({CLIENT_HEADER.decode(): "1"} if uds else {})
        self._trusted = plain | ({"x-panel-secret": secret} if secret and not uds else {})
        self._trusted_json = self._trusted | JSON

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection."""
        await self._wire.aclose()

    @property
    def is_warm(self) -> bool:
        """Whether a call was answered before: the first one of a process takes 60 ms longer."""
        return self._wire.has_answered

    async def health(self, timeout: float = 2) -> bool:
        """Whether `/health` answers 200 in time; never raises. True says nothing about a frozen engine."""
        try:
            answer = await self._wire.call("GET", endpoints.HEALTH, timeout=timeout, headers=self._trusted)
        except EngineError:
            return False
        return answer.status == 200

    async def version(self, timeout: float = 5) -> str:
        """vLLM's own version, such as "0.32.0"."""
        return (await self._get(endpoints.VERSION, _Version, timeout)).version

    async def models(self, timeout: float = 5) -> tuple[ModelCard, ...]:
        """What the server serves, aliases as entries of their own."""
        return (await self._get(endpoints.MODELS, _Models, timeout)).data

    async def metrics(self, timeout: float = 5) -> str:
        """The Prometheus text of `/metrics`, about 60 kB."""
        return (await self._call("GET", endpoints.METRICS, timeout=timeout)).decode(errors="replace")

    async def configured(self, timeout: float) -> Configured | None:
        """What it loads, and how; None where it does not say, as without its development endpoints."""
        try:
            answer = await self._get(f"{endpoints.SERVER_INFO}?config_format=json", _ServerInfo, timeout)
        except EngineRefused:
            return None
        return answer.vllm_config

    async def is_sleeping(self, timeout: float) -> bool:
        """Whether anything is asleep or paused; blocks while the engine sleeps, wakes or reloads."""
        return (await self._get(endpoints.IS_SLEEPING, _IsSleeping, timeout)).is_sleeping

    async def sleep(self, level: int, timeout: float) -> SleepReply:
        """Put the model to sleep; 200 alone is no proof of freed memory."""
        body = await self._act(f"{endpoints.SLEEP}?level={level:d}", timeout)
        return _decode(f"POST {endpoints.SLEEP}", body, SleepReply) if body else SleepReply()

    async def release_kv_cache(self, timeout: float) -> None:
        """Give up the memory of the KV cache alone (vLLM 0.31); the server is paused and has all of it."""
        await self._act(endpoints.RELEASE_KV_CACHE, timeout)

    async def wake_up(self, tags: Sequence[str] = (), *, timeout: float) -> WakeReply:
        """Wake what `tags` name ("weights", "kv_cache"), or all that sleeps; unknown tags answer 200 too."""
        # A list with commas would be one unknown tag (vLLM 0.32, 03-admin-sleep-pause.txt).
        query = "&".join(f"tags={tag}" for tag in tags)
        body = await self._act(endpoints.WAKE_UP + (f"?{query}" if query else ""), timeout)
        return _decode(f"POST {endpoints.WAKE_UP}", body, WakeReply) if body else WakeReply()

    async def collective_rpc(self, method: str, timeout: float, args: Sequence[Any] = ()) -> list[Any]:
        """Run `method` in every worker; one result per worker."""
        body = await self._act(endpoints.COLLECTIVE_RPC, timeout, {"method": method, "args": list(args)})
        return _decode(f"POST {endpoints.COLLECTIVE_RPC}", body, _Results).results

    async def reset_prefix_cache(self, timeout: float) -> None:
        """Forget the KV blocks of earlier prompts."""
        await self._act(endpoints.RESET_PREFIX_CACHE, timeout)

    async def gate(self, timeout: float = 2) -> Gate:
        """The state of the guard's gate."""
        return await self._get(endpoints.GATE, Gate, timeout)

    async def set_gate(self, closed: bool, timeout: float = 2) -> Gate:
        """Close or open the gate for inference; the state after it."""
        body = await self._call("POST", endpoints.GATE, timeout=timeout, payload={"closed": closed})
        return _decode(f"POST {endpoints.GATE}", body, Gate)

    async def complete(
        self,
        prompt: Sequence[int] | str,
        *,
        model: str,
        timeout: float,
        max_tokens: int = 1,
        prompt_logprobs: int | None = None,
        replica: int | None = None,
    ) -> Completion:
        """One greedy completion; with `prompt_logprobs` also how likely each token of the prompt was.

        `replica` is the data parallel one that is to answer; without it vLLM takes the least busy.
        """
        payload: dict[str, Any] = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        if prompt_logprobs is not None:
            payload["prompt_logprobs"] = prompt_logprobs
        body = await self._call("POST", "/v1/completions", timeout=timeout, payload=payload, replica=replica)
        choices = _decode("POST /v1/completions", body, _Completion).choices
        if not choices:
            raise unreadable("POST /v1/completions", body)
        figures = _logprobs(prompt, choices[0].prompt_logprobs)
        return Completion(choices[0].text, choices[0].finish_reason, figures)

    async def embed(self, text: Sequence[int] | str, *, model: str, timeout: float) -> tuple[float, ...]:
        """The embedding of one text or list of token ids."""
        payload = {"model": model, "input": text, "encoding_format": "float"}
        body = await self._call("POST", "/v1/embeddings", timeout=timeout, payload=payload)
        data = _decode("POST /v1/embeddings", body, _Embeddings).data
        if not data:
            raise unreadable("POST /v1/embeddings", body)
        return data[0].embedding

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str,
        first_timeout: float,
        params: Mapping[str, Any] | None = None,
        stall_timeout: float = 120,
    ) -> AsyncGenerator[ChatDelta, None]:
        """Stream an answer; close the generator to stop it.

        `first_timeout` covers everything up to the first event: a sleeping vLLM sends status 200 and headers
        at once, then nothing, or with `sse-keep-alive-interval` comments without an end.
        It goes as a client's request: it counts as in flight and a closed gate answers 503.
        """
        body = chat_body(messages, model, params or {})
        parts = self._wire.stream(
            "/v1/chat/completions",
            headers=self._client,
            body=body,
        )
        return deltas(parts, self._wire.where, first_timeout=first_timeout, stall_timeout=stall_timeout)

    async def _get(self, path: str, kind: type[Decoded], timeout: float) -> Decoded:
        return _decode(f"GET {path}", await self._call("GET", path, timeout=timeout), kind)

    async def _act(self, target: str, timeout: float, payload: Any = None) -> bytes:
        return await self._call("POST", target, timeout=timeout, payload=payload, repeatable=False)

    async def _call(
        self,
        method: str,
        target: str,
        *,
        timeout: float,
        payload: Any = None,
        repeatable: bool = True,
        replica: int | None = None,
    ) -> bytes:
        headers = self._trusted if payload is None else self._trusted_json
        if replica is not None:
            headers = headers | {"x-data-parallel-rank": str(replica)}
        answer = await self._wire.call(
            method,
            target,
            timeout=timeout,
            headers=headers,
            body=None if payload is None else msgspec.json.encode(payload),
            repeatable=repeatable,
        )
        if answer.status != 200:
            raise refused(answer.status, answer.body)
        return answer.body


def _decode(request: str, body: bytes, kind: type[Decoded]) -> Decoded:
    try:
        return msgspec.json.decode(body, type=kind)
    except NOT_JSON:
        raise unreadable(request, body) from None


def _logprobs(
    prompt: Sequence[int] | str, tokens: list[dict[str, _Logprob] | None] | None
) -> tuple[float, ...] | None:
    """The figure of each token that was given: a map may also hold likelier ones.

    vLLM keys the maps by token id and puts the given token first (vLLM 0.32, measured).
    """
    if tokens is None:
        return None
    ids = [None] * len(tokens) if isinstance(prompt, str) else [str(token) for token in prompt]
    logprobs = []
    for token, likely in zip(ids, tokens, strict=False):
        if likely:
            own = likely.get(token) if token is not None else None
            logprobs.append((own or next(iter(likely.values()))).logprob)
    return tuple(logprobs)
