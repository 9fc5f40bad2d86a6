"""What can go wrong between asking a server for something and seeing it done, and what is done about it.

The one table of it: the code takes its sentences from here, docs/cures.md is written from it.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from vllm_sleep_tui.engine.endpoints import IS_SLEEPING, SLEEP, WAKE_UP
from vllm_sleep_tui.engine.failures import EngineRefused
from vllm_sleep_tui.engine.loaders import CANNOT_RELOAD
from vllm_sleep_tui.engine.versions import capabilities
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.fleet.store.records import Record

OUT_OF_MEMORY = "out of memory"
"""In vLLM's answer to a wake without room (vLLM 0.24, h100/contract.jsonl)."""
RESTART = "It must be restarted: `start` it again."
LOOK = "Look at its log, then start it again."


class Failure(StrEnum):
    """What goes wrong, as it is seen."""

    SLEEP_REFUSED = f"{SLEEP} answers 500"
    SLEEP_LATE = f"{SLEEP} does not answer in time, and works"
    WAKE_REFUSED = f"{WAKE_UP} or the reload of level 2 answers 500"
    RELOAD_UNKNOWN = "the reload of level 2 answers 500: its loader cannot load weights again"
    WAKE_OUT_OF_MEMORY = f"{WAKE_UP} answers 500, out of memory"
    WAKE_LATE = f"{WAKE_UP} or the reload does not answer in time, and works"
    SILENT = f"{IS_SLEEPING} is blocked, or the server says nothing at all"
    ENGINE_DEAD = "the engine's process dies"
    ANSWER_WRONG = "it wakes and answers nonsense"
    PROOF_REFUSED = "it wakes and does not answer"
    MEMORY_KEPT = "it sleeps and its VRAM is not freed"
    NO_ROOM = "there is no room for a wake"
    TOO_OLD = "vLLM is older than 0.24"


class Cure(msgspec.Struct, frozen=True, kw_only=True):
    """One row: what is tried, where the model ends, and what the person is told."""

    failure: Failure
    tried: str
    helped: State | None = None
    """The state if what was tried helps; None where there is nothing to try."""
    state: State | None
    """The state otherwise; None where what is tried cannot fail."""
    reason: str = ""
    """`{why}` is the server's own word; empty where nothing needs to be told."""
    advice: str = ""
    """What the person can do."""

    def told(self, why: object = "") -> tuple[str, str]:
        """The reason and the cure for a person."""
        return self.reason.format(why=why).strip(), self.advice


_ROWS = (
    Cure(
        failure=Failure.SLEEP_REFUSED,
        tried="nothing: part of its memory may be gone already",
        state=State.FAILED,
        reason="vLLM refused to sleep: {why}",
        advice=RESTART,
    ),
    Cure(
        failure=Failure.SLEEP_LATE,
        tried="it is asked whether it sleeps, which waits for the engine",
        helped=State.ASLEEP,
        state=None,
    ),
    Cure(
        failure=Failure.WAKE_REFUSED,
        tried="nothing: the engine does not come back from it",
        state=State.FAILED,
        reason="vLLM could not wake it: {why}",
        advice=RESTART,
    ),
    Cure(
        failure=Failure.RELOAD_UNKNOWN,
        tried="nothing: loaders that are known for it are refused level 2 before they sleep at it",
        state=State.FAILED,
        reason="vLLM's loader cannot load its weights again: {why}",
        advice="Set `level: 1` for it and start it again: level 2 fails every time.",
    ),
    Cure(
        failure=Failure.WAKE_OUT_OF_MEMORY,
        tried="the others on its GPU go to sleep and it is asked once more (one GPU, vLLM 0.26 and newer)",
        helped=State.AWAKE,
        state=State.FAILED,
        reason="It ran out of VRAM while it woke: {why}",
        advice="Start it again; see what else holds memory on its GPU (`status`, key g).",
    ),
    Cure(
        failure=Failure.WAKE_LATE,
        tried="it is asked whether it sleeps, which waits for the engine, then proven",
        helped=State.AWAKE,
        state=None,
    ),
    Cure(
        failure=Failure.SILENT,
        tried="nothing: it is ended, so that its memory is free",
        state=State.FAILED,
        reason="It does not answer: {why}",
        advice=LOOK,
    ),
    Cure(
        failure=Failure.ENGINE_DEAD,
        tried="nothing; an open panel or `serve` starts one again that died while it did nothing",
        state=State.FAILED,
        reason="Its engine process died.",
        advice=LOOK,
    ),
    Cure(
        failure=Failure.ANSWER_WRONG,
        tried="it is asked twice, then its weights are loaded once more",
        helped=State.AWAKE,
        state=State.FAILED,
        reason="It woke and answers nonsense. {why}",
        advice="Start it again; if it happens again, use the other sleep level for it.",
    ),
    Cure(
        failure=Failure.PROOF_REFUSED,
        tried="nothing: it is ended, so that its memory is free",
        state=State.FAILED,
        reason="It woke and does not answer: {why}",
        advice=LOOK,
    ),
    Cure(
        failure=Failure.MEMORY_KEPT,
        tried="its memory is watched for some seconds; the sleep is called unverified",
        state=State.ASLEEP,
        reason="It sleeps and its VRAM was not seen to go: {why} are held.",
        advice="If the VRAM is needed, stop it; report it to vLLM with its log.",
    ),
    Cure(
        failure=Failure.NO_ROOM,
        tried="nothing is begun: a wake without room wedges the engine",
        state=State.ASLEEP,
        reason="{why}",
        advice="Sleep another model on that GPU first, or `switch` to this one.",
    ),
    Cure(
        failure=Failure.TOO_OLD,
        tried="it is stopped and started in place of sleep and wake; `sleep` with a level is refused",
        state=State.AWAKE,
        reason="{why}",
        advice="Use vLLM 0.24 or newer and restart it, or `stop` it.",
    ),
)
CURES: dict[Failure, Cure] = {row.failure: row for row in _ROWS}
"""The table."""


def wake_failure(record: Record, refusal: EngineRefused) -> Failure:
    """Which row a wake that was refused like this belongs to."""
    if CANNOT_RELOAD in refusal.message:
        return Failure.RELOAD_UNKNOWN
    return Failure.WAKE_OUT_OF_MEMORY if may_wake_again(record, refusal) else Failure.WAKE_REFUSED


def may_wake_again(record: Record, refusal: EngineRefused) -> bool:
    """Whether a wake that was refused like this may be asked for again: out of memory, one GPU, vLLM 0.26.

    Our sleep mode gives back what it had taken, so that each worker may be asked again.
    """
    return (
        OUT_OF_MEMORY in refusal.message.lower()
        and (len(record.gpus) == 1 or record.sleep_backend == "own")
        and capabilities(record.vllm_version or "").retry_wake
    )
