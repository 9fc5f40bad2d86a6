"""Who asks: the keys of the config, each with its models and how much it may ask at once."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from http import HTTPStatus

from vllm_sleep_tui.config.types import GatewayKeyConfig
from vllm_sleep_tui.gateway.replies import Refusal

ANYBODY = "anybody"
HeaderPairs = Iterable[tuple[bytes, bytes]]


class Client:
    """Who has sent a key, and how many of its requests are under way."""

    def __init__(self, config: GatewayKeyConfig | None = None) -> None:
        self.name = config.name if config else ANYBODY
        self._models = frozenset(config.models) if config else frozenset[str]()
        self._limit = config.requests if config else None
        self._key = (config.api_key or "").encode() if config else b""
        self.under_way = 0

    def has(self, key: bytes) -> bool:
        """Whether this is its key."""
        return bool(self._key) and hmac.compare_digest(self._key, key)

    def may_ask(self, model: str) -> bool:
        """Whether it may use a model."""
        return not self._models or model in self._models

    def check(self, model: str) -> None:
        """Raises Refusal if it may not ask this model, or not yet."""
        if not self.may_ask(model):
            raise Refusal(HTTPStatus.FORBIDDEN, f"The key of {self.name} is not for the model {model!r}.")
        if self._limit is not None and self.under_way >= self._limit:
            message = f"{self.name} has {self.under_way} requests under way, as many as it may."
            raise Refusal(HTTPStatus.TOO_MANY_REQUESTS, message, retry_after=1)


class Clients:
    """All that may come in."""

    def __init__(self, keys: Iterable[GatewayKeyConfig]) -> None:
        self.all = [Client(key) for key in keys]
        self._anybody = None if self.all else Client()

    def who(self, headers: HeaderPairs) -> Client:
        """Whose key it is that these headers carry; raises Refusal if nobody's."""
        if self._anybody is not None:
            return self._anybody
        sent = None
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                sent = value[7:].strip()
            elif name == b"x-api-key" and sent is None:
                sent = value
        found = [client for client in self.all if sent is not None and client.has(sent)]
        if not found:
            why = "A key is wanted: `Authorization: Bearer …`." if sent is None else "This key is not known."
            raise Refusal(HTTPStatus.UNAUTHORIZED, why, code="invalid_api_key")
        return found[0]
