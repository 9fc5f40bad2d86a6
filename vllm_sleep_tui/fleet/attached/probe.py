"""What attached servers (`url:`) say of themselves, seen from outside, with one limit for all together.

Asked in this order: `/is_sleeping`, which exists with VLLM_SERVER_DEV_MODE=1 alone; where it is closed,
`/health`, and the gauge in `/metrics`, which every vLLM with sleep mode has. `/is_sleeping` waits while the
engine falls asleep or wakes (vLLM 0.32, 06-frozen-engine.txt); then the state is not known.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from http.client import HTTPException
from urllib.parse import urlsplit

import msgspec

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.endpoints import HEALTH
from vllm_sleep_tui.engine.failures import EngineStranger
from vllm_sleep_tui.engine.plain_client import CLOSED, PlainClient
from vllm_sleep_tui.fleet.peer_checks import check_for_key
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, OperationSnapshot
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Intent, Record
from vllm_sleep_tui.telemetry.processes import is_alive

QUICK = 0.3
"""Seconds that `status` gives to all attached servers together."""
FIRST_SHARE = 0.6
"""Of the time, for the first question; the rest is for what is asked if it is not answered."""
LOOK = "Look whether it runs, and whether its address or its SSH forwarding is still right."


class ProbeResult(msgspec.Struct, frozen=True, kw_only=True):
    """One look at one server."""

    state: State
    level: int | None = None
    """Of its sleep; None if it does not say."""
    reason: str | None = None
    cure: str | None = None
    is_certain: bool = True
    """False if it answers and does not say whether it sleeps: it is busy."""
    tells_sleep: bool = True
    """False if neither endpoint nor gauge told whether it sleeps: it is taken for awake."""
    since: float | None = None
    """UTC seconds at which it was first seen so by this process."""
    unsure_since: float | None = None
    """Since when, on the monotonic clock, it answers without saying whether it sleeps."""


def after(before: ProbeResult | None, now: ProbeResult) -> ProbeResult:
    """A look, with what the look before it knew."""
    unsure_since = None
    if not now.is_certain:
        unsure_since = (before and before.unsure_since) or time.monotonic()
        if before is not None and before.state is not State.STOPPED:
            now = msgspec.structs.replace(before, tells_sleep=False)  # nothing else is new
    since = before.since if before is not None and before.state is now.state else time.time()
    return msgspec.structs.replace(now, since=since, unsure_since=unsure_since)


def base_of(url: str) -> str:
    """The server's address without a slash or OpenAI's /v1 at its end."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


def wants_key(model: ModelConfig) -> tuple[str, str]:
    """What is wrong when the model's server answers 401, and what to do."""
    if model.api_key is None:
        cure = 'Name it in the config: api_key: "${VAR}", or api_key_file: FILE'
        return "Its server wants an API key, and the config names none.", cure
    named = f"the file {model.api_key_file}" if model.api_key_file else "the variable of `api_key:`"
    return "Its server does not take the API key that is given.", f"Correct the key in {named}."


def probe_all(models: Mapping[str, ModelConfig], seconds: float) -> dict[str, ProbeResult]:
    """Look at the servers of those that are attached, side by side; no more than `seconds` pass."""
    probes = {name: _Probe(model, seconds) for name, model in models.items() if model.is_attached}
    for probe in probes.values():
        probe.start()
    deadline = time.monotonic() + seconds
    found = {}
    for name, probe in probes.items():
        probe.join(max(0.0, deadline - time.monotonic()))
        found[name] = probe.result or _silent(probe.client.where, seconds)
        probe.client.hang_up()
    return found


class _Probe(threading.Thread):
    """One look; a daemon, because a name may take longer to look up than anybody waits."""

    def __init__(self, model: ModelConfig, seconds: float) -> None:
        super().__init__(daemon=True, name=f"look at {model.url}")
        self.result: ProbeResult | None = None
        self._wants_key = wants_key(model)
        self._seconds = seconds
        self.client = PlainClient(
            base_of(model.url or ""), seconds, api_key=model.api_key, check=check_for_key(model)
        )

    def run(self) -> None:
        """Look; what goes wrong is what is seen."""
        try:
            self.result = self._with_key(self._look())
        except TimeoutError:
            self.result = _silent(self.client.where, self._seconds)
        except EngineStranger as error:
            self.result = _gone(error.what, error.cure)
        except (OSError, HTTPException, ValueError) as error:
            if isinstance(error, ConnectionRefusedError | socket.gaierror):
                what = f"Nothing answers at {self.client.where}."
            else:
                what = f"{self.client.where} does not speak like a server of vLLM ({type(error).__name__})."
            self.result = _gone(what)

    def _look(self) -> ProbeResult:
        try:
            status, sleeps = self.client.is_sleeping(FIRST_SHARE)
        except TimeoutError:
            return self._if_healthy(ProbeResult(state=State.AWAKE, is_certain=False, tells_sleep=False))
        if status in CLOSED:
            return self._if_healthy(self._by_gauge(ProbeResult(state=State.AWAKE, tells_sleep=False)))
        if status != HTTPStatus.OK:
            return _gone(f"{self.client.where} answers {status}: its engine may have died.")
        if sleeps:
            return self._by_gauge(ProbeResult(state=State.ASLEEP))
        return ProbeResult(state=State.AWAKE)

    def _if_healthy(self, seen: ProbeResult) -> ProbeResult:
        status = self.client.health()
        if status == HTTPStatus.OK:
            return seen
        if status == HTTPStatus.UNAUTHORIZED:
            return _gone(*self._wants_key)
        where = self.client.where
        return _gone(f"{where} answers {status} to {HEALTH}: it is no vLLM, or its engine has died.")

    def _with_key(self, seen: ProbeResult) -> ProbeResult:
        """With what is wrong about the key, if anything: vLLM wants it under /v1 alone (05-api-key.txt)."""
        if seen.state is State.STOPPED or not seen.is_certain:
            return seen
        with contextlib.suppress(OSError, HTTPException):
            if self.client.models() == HTTPStatus.UNAUTHORIZED:
                reason, cure = self._wants_key
                return msgspec.structs.replace(seen, reason=reason, cure=cure)
        return seen

    def _by_gauge(self, otherwise: ProbeResult) -> ProbeResult:
        """Asleep and at which level, if the gauge says so."""
        try:
            page = self.client.metrics()
        except (OSError, HTTPException):
            return otherwise
        if page.sleep_level is not None:
            return ProbeResult(state=State.ASLEEP, level=page.sleep_level)
        return msgspec.structs.replace(otherwise, tells_sleep=True) if page.tells_sleep else otherwise


def _silent(where: str, seconds: float) -> ProbeResult:
    return _gone(f"{where} did not answer within {seconds:g} s.")


def _gone(what: str, cure: str = LOOK) -> ProbeResult:
    return ProbeResult(state=State.STOPPED, reason=what, cure=cure)


def snapshot_of(record: Record, model: ModelConfig, seen: ProbeResult | None) -> ModelSnapshot:
    """An attached model for the screen: what it holds is not known here, so it is null."""
    intent = record.intent if record.intent and is_alive(record.intent.actor) else None
    seen = seen or ProbeResult(state=State.STOPPED, reason="It has not been looked at yet.")
    state = _moving(intent) or seen.state
    reason, cure = (None, None) if intent else (seen.reason, seen.cure)
    if state is State.AWAKE and reason is None:
        reason, cure = _hangs(record)
    if owns_server(record) and record.server is not None:
        left = f"A server that was started here before it had `url:` still runs, pid {record.server.pid}."
        reason = left if reason is None else f"{reason} {left}"
        cure = f"`stop {record.name}` ends that one."
    level = seen.level or record.level or 1
    return ModelSnapshot(
        name=record.name,
        state=state,
        level=None if state in (State.AWAKE, State.STOPPED) else level,
        phase=intent.phase if intent else None,
        operation=OperationSnapshot(name=intent.operation, since=intent.since) if intent else None,
        port=urlsplit(base_of(model.url or "")).port,
        since=seen.since,
        reason=reason,
        cure=cure,
        last_switch=record.last_switch,
        configured_level=str(model.level),
        resolved_level=resolved(model),
        proof=record.proof,
        source=model.url or "",
        is_external=True,
        has_own_server=owns_server(record),
    )


def owns_server(record: Record) -> bool:
    """Whether a server of ours belongs to the record of a model that is attached now."""
    runs = record.state not in (State.STOPPED, State.FAILED)
    return runs and record.server is not None and is_alive(record.server)


def _hangs(record: Record) -> tuple[str | None, str | None]:
    """What is wrong and what to do, if a leader that is still there saw it hang."""
    hang = record.hang
    if hang is None or not is_alive(hang.by):
        return None, None
    reason = f"It hangs: {hang.symptom} for {time.time() - hang.since:.0f} s."
    return reason, "Look at its log where it was started, and restart it there; here it is left alone."


def resolved(model: ModelConfig) -> str:
    """The level at which an attached model sleeps; `auto` is 1, because its machine's RAM is not seen."""
    return "1" if model.level == "auto" else str(model.level)


def _moving(intent: Intent | None) -> State | None:
    if intent is None:
        return None
    return State.FALLING_ASLEEP if intent.phase in ("drain", "sleep") else State.WAKING
