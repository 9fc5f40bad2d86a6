"""The development endpoints: sleep, wake, pause, calls into the workers, and the simulator's own faults."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from vllm_sleep_tui.simulator import http
from vllm_sleep_tui.simulator.behaviours import Fault
from vllm_sleep_tui.simulator.client import CallFailed
from vllm_sleep_tui.simulator.http import Answer, Request
from vllm_sleep_tui.simulator.server_state import ServerState
from vllm_sleep_tui.simulator.startup import describe

MODES = ("abort", "wait", "keep")
JSON_BODIES_FROM = 32
"""The minor version from which /sleep and /wake_up answer with JSON and /sleep checks its level."""


RELEASES_FROM = 31
"""The minor version from which the KV cache alone can be given up."""


class Admin:
    """The handlers; each takes a request and answers it."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        self._engine = server.engine
        self._says_json = server.settings.minor >= JSON_BODIES_FROM
        self._releases = server.settings.minor >= RELEASES_FROM

    def routes(self) -> dict[tuple[str, str], Callable[[Request], Awaitable[Answer]]]:
        """By method and path."""
        return {
            ("POST", "/sleep"): self.sleep,
            ("POST", "/wake_up"): self.wake_up,
            **({("POST", "/release_kv_cache_memory"): self.release} if self._releases else {}),
            ("GET", "/is_sleeping"): self.is_sleeping,
            ("POST", "/pause"): self.pause,
            ("POST", "/resume"): self.resume,
            ("GET", "/is_paused"): self.is_paused,
            ("POST", "/abort_requests"): self.abort_requests,
            ("POST", "/collective_rpc"): self.collective_rpc,
            ("POST", "/reset_prefix_cache"): self.reset_prefix_cache,
            ("POST", "/reset_mm_cache"): self.reset_other_cache,
            ("POST", "/reset_encoder_cache"): self.reset_other_cache,
            ("GET", "/server_info"): self.server_info,
            ("GET", "/get_world_size"): self.world_size,
            ("POST", "/simulator/faults"): self.faults,
        }

    async def sleep(self, request: Request) -> Answer:
        """``/sleep?level=1&mode=abort``."""
        level = self._level(request)
        mode = self._mode(request)
        with self._server.metrics.operation("sleep"):
            await self._call("sleep", "sleep", level=level, mode=mode)
        self._server.metrics.record_sleep(level)
        return http.as_json({"status": "sleeping", "level": level}) if self._says_json else http.empty()

    async def release(self, request: Request) -> Answer:
        """``/release_kv_cache_memory``: only of a server that is paused and holds all its memory."""
        with self._server.metrics.operation("release_kv_cache_memory"):
            await self._call("release_kv_cache_memory", "release")
        return http.as_json({"status": "kv_cache_released"})

    async def wake_up(self, request: Request) -> Answer:
        """``/wake_up?tags=weights&tags=kv_cache``; 200 whatever the tags are."""
        tags = request.query.get("tags")
        self._server.log.info("api_router.py:50", f"wake up the engine with tags: {tags}")
        with self._server.metrics.operation("wake"):
            awake = await self._call("wake_up", "wake", tags=tags)
        # Up to 0.30 any wake counts as awake, even of one tag (h100/contract.jsonl).
        if awake or self._server.settings.minor < 31:
            self._server.metrics.record_wake()
        status = "awake" if awake else "sleeping"
        return http.as_json({"status": status, "tags": tags}) if self._says_json else http.empty()

    async def is_sleeping(self, request: Request) -> Answer:
        """Waits while the engine is busy."""
        return http.as_json({"is_sleeping": await self._engine.call("is_sleeping")})

    async def pause(self, request: Request) -> Answer:
        """``/pause?mode=abort``."""
        await self._call("pause", "pause", mode=self._mode(request))
        return http.as_json({"status": "paused"})

    async def resume(self, request: Request) -> Answer:
        """Lets requests run, asleep or not."""
        await self._call("resume", "resume")
        return http.as_json({"status": "resumed"})

    async def is_paused(self, request: Request) -> Answer:
        """Also true while asleep."""
        return http.as_json({"is_paused": await self._engine.call("is_paused")})

    async def abort_requests(self, request: Request) -> Answer:
        """Body ``{"request_ids": […]}``, or ``{}`` for all."""
        try:
            wanted = json.loads(request.body).get("request_ids") or []
        except (ValueError, AttributeError):
            raise http.HttpError(400, "Invalid JSON format", kind="Bad Request") from None
        aborted = await self._engine.call("abort_all", requests=wanted)
        return http.as_json({"status": "aborted", "aborted": aborted})

    async def collective_rpc(self, request: Request) -> Answer:
        """Body ``{"method": "reload_weights"}``; one result a worker."""
        try:
            body = json.loads(request.body)
        except ValueError as bad:
            raise http.HttpError(400, f"JSON decode error: {bad}", kind="Bad Request") from None
        if not isinstance(body, dict):
            raise http.HttpError(400, "Request body must be a JSON object", kind="Bad Request")
        if not body.get("method"):
            raise http.HttpError(400, "Missing 'method' in request body", kind="Bad Request")
        arguments = body.get("args") or []
        results = await self._call("collective_rpc", "rpc", method=body["method"], arguments=arguments)
        return http.as_json({"results": results})

    async def reset_prefix_cache(self, request: Request) -> Answer:
        """An empty 200 up to 0.25."""
        self._server.log.info("api_router.py:39", "Resetting prefix cache...")
        await self._engine.call("reset")
        return http.as_json({"success": True}) if self._server.settings.minor >= 26 else http.empty()

    async def reset_other_cache(self, request: Request) -> Answer:
        """The caches of images."""
        await self._engine.call("reset")
        return http.empty()

    async def server_info(self, request: Request) -> Answer:
        """The configuration; ``config_format`` is text or json."""
        form = request.query.get("config_format", ["text"])[-1]
        options = self._server.options
        if form not in ("text", "json"):
            expected = "'text' or 'json'"
            raise http.invalid(
                "literal_error",
                "query.config_format",
                f"Input should be {expected}",
                form,
                f"{{'expected': \"{expected}\"}}",
            )
        config: object = describe(options)
        if form == "json":
            model = {"model": options.model, "quantization": options.quantization}
            config = {
                "model_config": {**options.given, "enable_sleep_mode": options.sleep_mode, **model},
                "load_config": {"load_format": options.load_format},
                "lora_config": {} if "enable_lora" in options.given else None,
            }
        return http.as_json(
            {"vllm_config": config, "vllm_env": {"VLLM_SERVER_DEV_MODE": True}, "system_env": {}}
        )

    async def world_size(self, request: Request) -> Answer:
        """How many workers there are."""
        return http.as_json({"world_size": self._server.world_size})

    async def faults(self, request: Request) -> Answer:
        """Body ``{"faults": ["wake_500:1"]}``: exactly these are on from now; no endpoint of vLLM's."""
        names = [str(name) for name in request.json().get("faults", ())]
        try:
            self._server.faults.replace(names)
        except ValueError:
            known = ", ".join(Fault)
            raise http.HttpError(400, f"Unknown fault in {names}. Known: {known}.") from None
        self._engine.tell("faults", names=names)
        return http.as_json({"faults": names})

    async def _call(self, method: str, do: str, /, **arguments: object) -> Any:
        try:
            return await self._engine.call(do, **arguments)
        except CallFailed as error:
            raise http.Unhandled(f"Call to {method} method failed: {error}") from None

    def _level(self, request: Request) -> int:
        given = request.query.get("level", ["1"])[-1]
        try:
            level = int(given)
        except ValueError:
            message = "Input should be a valid integer, unable to parse string as an integer"
            raise http.invalid("int_parsing", "query.level", message, given) from None
        if self._says_json and level > 2:
            message = "Input should be less than or equal to 2"
            raise http.invalid("less_than_equal", "query.level", message, given, "{'le': 2}")
        if self._says_json and level < 0:
            message = "Input should be greater than or equal to 0"
            raise http.invalid("greater_than_equal", "query.level", message, given, "{'ge': 0}")
        return level

    def _mode(self, request: Request) -> str:
        mode: str = request.query.get("mode", ["abort"])[-1]
        if mode not in MODES:
            expected = "'abort', 'wait' or 'keep'"
            context = f"{{'expected': \"{expected}\"}}"
            raise http.invalid("literal_error", "query.mode", f"Input should be {expected}", mode, context)
        return mode
