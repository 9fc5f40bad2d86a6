"""The engine process: it holds the memory, does one thing at a time, and makes the tokens."""

from __future__ import annotations

import itertools
import os
import select
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from vllm_sleep_tui.simulator import generation
from vllm_sleep_tui.simulator.behaviours import Fault, Faults
from vllm_sleep_tui.simulator.logs import Log
from vllm_sleep_tui.simulator.memory import Memory, WorkerDied, WorkerRank
from vllm_sleep_tui.simulator.processes import Channel, wait_for_ever
from vllm_sleep_tui.simulator.settings import Settings
from vllm_sleep_tui.simulator.sleep_state import OperationFailed, SleepState, die

TOKENS_PER_SECOND = 100.0
FIRST_TOKEN_SECONDS = 0.015
BATCH_SECONDS = 0.002
"""The shortest pause between two steps; at high speeds a step makes several tokens."""
KNOWN_METHODS = ("check_health", "reset_mm_cache", "reset_encoder_cache")
TOKENS_BEFORE_DEATH = 5
DEATH_SECONDS = 2.0
BUSY_PERCENT = 93.0
"""GPU utilization while it makes tokens."""


@dataclass
class Request:
    """One request that the engine has."""

    id: str
    tokens: Iterator[str]
    left: int
    due: float
    finish: str
    prompt: list[int]
    wants_logprobs: bool
    running: bool = False
    made: int = 0


class Engine:
    """Serves one API server over a channel, until a signal or a crash ends it."""

    def __init__(
        self,
        *,
        channel: Channel,
        name: str,
        memory: Memory,
        state: SleepState,
        settings: Settings,
        faults: Faults,
        has_extension: bool = False,
    ) -> None:
        self._has_extension = has_extension
        self._channel = channel
        self._name = name
        self._memory = memory
        self._state = state
        self._settings = settings
        self._faults = faults
        self._requests: dict[str, Request] = {}
        self._paused = ""
        self._draining: list[Mapping[str, Any]] = []
        self._log = Log("EngineCore")

    def serve(self) -> None:
        """Work until the API server is gone, and then go on existing: nobody tells an orphan to end."""
        self._plan_death()
        try:
            while True:
                self._take_turn()
        except WorkerDied:
            self._log.error(
                "multiproc_executor.py:290",
                "Worker proc VllmWorker-0 died unexpectedly, shutting down executor.",
            )
            raise SystemExit(1) from None

    def _take_turn(self) -> None:
        """Wait for a message or for the next token's time, and do what is due; raises WorkerDied."""
        workers = [rank.channel for rank in self._memory.ranks if isinstance(rank, WorkerRank)]
        readable, _, _ = select.select([self._channel, *workers], [], [], self._pause_before_step())
        if any(worker in readable for worker in workers):
            raise WorkerDied
        if self._channel in readable:
            messages = self._channel.receive()
            if messages is None:
                wait_for_ever()
            for message in messages:
                self._handle(message)
        self._step()

    def _plan_death(self) -> None:
        # Nobody handles SIGALRM, so the timer ends the process.
        planned = self._faults.use(Fault.ENGINE_DIES_LATER)
        signal.setitimer(signal.ITIMER_REAL, DEATH_SECONDS / self._settings.speed if planned else 0)

    def _pause_before_step(self) -> float | None:
        running = [request.due for request in self._requests.values() if request.running]
        if not running or self._paused == "keep" or self._faults.has(Fault.HANG):
            return None
        return max(0.0, min(running) - time.monotonic())

    def _handle(self, message: Mapping[str, Any]) -> None:
        match message["do"]:
            case "add":
                self._add(message)
            case "abort":
                self._finish(message["request"], "abort")
            case "faults":
                self._faults.replace(message["names"])
                self._plan_death()
            case "sleep" | "pause" if message["mode"] == "wait" and self._running():
                self._paused = "wait"
                self._draining.append(message)
            case _:
                self._answer(message)

    def _answer(self, message: Mapping[str, Any]) -> None:
        try:
            answer = {"call": message["call"], "result": self._call(message)}
        except OperationFailed as error:
            self._log.error("core.py:1310", f"Invocation of {message['do']} method failed")
            answer = {"call": message["call"], "error": self._explain(str(error))}
        self._channel.send(answer)
        if self._state.crashes_on_request and "error" in answer and "increased" in answer["error"]:
            die()

    def _explain(self, text: str) -> str:
        workers = any(isinstance(rank, WorkerRank) for rank in self._memory.ranks)
        return (
            f"Worker failed with error '{text}', please check the stack trace above for the root cause"
            if workers
            else text
        )

    def _call(self, message: Mapping[str, Any]) -> object:
        match message["do"]:
            case "sleep":
                self._pause(message["mode"])
                if message["level"] != 0:
                    self._state.sleep(message["level"])
            case "release":
                if not self._paused or self._requests:
                    raise OperationFailed("release_kv_cache_memory() requires a completed pause first")
                self._state.release()
            case "wake":
                return self._wake(message["tags"])
            case "pause":
                self._pause(message["mode"])
            case "resume":
                self._resume()
            case "is_sleeping":
                return bool(self._paused or self._state.asleep)
            case "is_paused":
                return bool(self._paused)
            case "abort_all":
                ids = [id_ for id_ in message["requests"] or list(self._requests) if id_ in self._requests]
                for id_ in ids:
                    self._finish(id_, "abort")
                return len(ids)
            case "rpc":
                return self._rpc(message["method"], message["arguments"])
        return None

    def _wake(self, tags: list[str] | None) -> bool:
        if tags is None or [tag for tag in tags if tag != "scheduling"]:
            self._state.wake([tag for tag in tags if tag != "scheduling"] if tags else None)
        if not self._state.asleep:
            self._resume()
        return not self._state.asleep

    def _rpc(self, method: str, arguments: list[Any]) -> list[Any]:
        if method.startswith("panel_sleep_") or method == "panel_keep_weights":
            return self._panel_rpc(method, arguments)
        if method == "reload_weights":
            self._state.reload()
        elif method not in KNOWN_METHODS:
            raise OperationFailed(f"Method '{method}' is not implemented.")
        return [None] * len(self._memory.ranks)

    def _panel_rpc(self, method: str, arguments: list[Any]) -> list[Any]:
        """The methods that the panel's extension gives each worker."""
        if not self._has_extension:
            raise OperationFailed(f"'Worker' object has no attribute '{method}'")
        if method == "panel_keep_weights":
            self._state.keeps_weights_next = self._state.is_own and arguments != [False]
        elif method == "panel_sleep_deeper" and self._state.is_own:
            self._state.deepen(int(arguments[0]))
        return [self._state.facts()] * max(1, len(self._memory.ranks))

    def _pause(self, mode: str) -> None:
        self._paused = mode
        self._log.info(
            "scheduler.py:2756", f"setting pause state to {'PAUSED_ALL' if mode == 'keep' else 'PAUSED_NEW'}"
        )
        if mode == "abort":
            for request in self._running():
                self._finish(request.id, "abort")
        self._log.info("block_pool.py:861", "Successfully reset prefix cache")

    def _resume(self) -> None:
        self._paused = ""
        self._log.info("scheduler.py:2756", "setting pause state to UNPAUSED")
        for request in self._requests.values():
            request.due = time.monotonic() + self._seconds(FIRST_TOKEN_SECONDS)
            self._start(request)

    def _seconds(self, seconds: float) -> float:
        return 0.0 if self._settings.instant else seconds / self._settings.speed

    def _running(self) -> list[Request]:
        return [request for request in self._requests.values() if request.running]

    def _add(self, message: Mapping[str, Any]) -> None:
        tokens = generation.answer(self._name, message["question"])
        wanted, goes_on = message["max_tokens"], message["ignore_eos"]
        left = wanted if goes_on or wanted <= len(tokens) else len(tokens)
        request = Request(
            id=message["request"],
            tokens=generation.endless(tokens),
            left=left,
            due=time.monotonic() + self._seconds(FIRST_TOKEN_SECONDS),
            finish="length" if left == wanted else "stop",
            prompt=message["prompt"],
            wants_logprobs=message["logprobs"],
        )
        self._requests[request.id] = request
        if not self._paused:
            self._start(request)

    def _start(self, request: Request) -> None:
        if request.running:
            return
        if self._state.crashes_on_request or (self._state.asleep and self._state.frees):
            # A step that touches unmapped memory is an illegal access, which no CUDA process survives.
            self._log.error("core.py:1310", "CUDA error: an illegal memory access was encountered")
            die()
        request.running = True
        self._tell_load()

    def _step(self) -> None:
        if self._paused == "keep" or self._faults.has(Fault.HANG):
            return
        now = time.monotonic()
        for request in self._running():
            if request.due <= now:
                self._advance(request, now)
        if self._draining and not self._running():
            drained, self._draining = self._draining, []
            for message in drained:
                self._answer(message)

    def _advance(self, request: Request, now: float) -> None:
        pace = self._seconds(1 / TOKENS_PER_SECOND)
        count = request.left if pace == 0 else min(request.left, max(1, round(BATCH_SECONDS / pace)))
        garbage = generation.GARBAGE if self._settings.minor > 24 else ""
        made = list(itertools.islice(request.tokens, count))
        texts = [garbage] * count if self._state.garbage else made
        message: dict[str, Any] = {"request": request.id, "texts": texts, "finish": None}
        if self._state.garbage:
            message["garbage"] = True
        if request.made == 0 and request.wants_logprobs:
            message["logprobs"] = generation.prompt_logprobs(
                self._name, request.prompt, garbage=self._state.garbage
            )
        request.made += count
        request.left -= count
        request.due = max(request.due + pace * count, now)
        if request.made >= TOKENS_BEFORE_DEATH and self._faults.use(Fault.ENGINE_DIES):
            die()
        if request.left <= 0:
            message["finish"] = request.finish
            del self._requests[request.id]
        self._channel.send(message)
        if request.left <= 0:
            self._tell_load()

    def _finish(self, id_: str, reason: str) -> None:
        request = self._requests.pop(id_, None)
        if request is not None:
            self._channel.send({"request": id_, "texts": [], "finish": reason})
            self._tell_load()

    def _tell_load(self) -> None:
        running = len(self._running())
        self._memory.show_work(BUSY_PERCENT if running else 0.0)
        self._channel.send({"running": running})


def end_quietly() -> None:
    """Let SIGTERM and SIGINT end this process at once; an engine has nothing to save."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))
