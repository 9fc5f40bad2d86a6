"""Why a server failed, told from its log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from vllm_sleep_tui.engine.cause_table import CAUSES, KILLED, SIGNALLED, VANISHED, Cause
from vllm_sleep_tui.engine.failures import ENGINE_DEAD
from vllm_sleep_tui.text import clean

MAX_REASON = 300

_PREFIX = re.compile(
    r"^(?P<worker>\(\w[\w-]* pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]+\] ?)?"
)
_ENGINE_BLOCK = ("EngineCore failed to start", "EngineCore encountered a fatal error")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?(\w*(?:Error|Exception|Interrupt|NotFound)\b)(?::|$)")
_ARGUMENT_ERROR = re.compile(r"^vllm(?: serve)?: error: ")
_PYDANTIC = re.compile(r"^\s+(?:Value|Assertion) error, (.*?)(?: \[type=.*)?$")
# These point at the cause and are none.
_POINTERS = re.compile(
    r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed"
    rf"|{ENGINE_DEAD}|^RuntimeError: cancelled$|^asyncio\.exceptions\.CancelledError"
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Why a server failed and what to do, a sentence each."""

    reason: str
    cure: str
    planned: str = ""
    """What to do where the panel plans `gpu-memory-utilization`; empty: the same."""

    def for_planned(self) -> Diagnosis:
        """The same for a model whose share of the GPU is planned: it does not name that setting."""
        return Diagnosis(self.reason, self.planned or self.cure)


@dataclass(frozen=True, slots=True)
class _Line:
    worker: str
    level: str
    text: str


def diagnose(log: str, *, exit_code: int | None = None) -> Diagnosis:
    """The likeliest cause in `log`, the text of one launch; `exit_code` is negative for a signal.

    The last line of vLLM's log only points elsewhere: the cause is in the first block in which the
    engine reports its failure (vLLM 0.32, log-kv-cache-too-big.txt), or in the first exceptions.
    """
    lines = [_parse(line) for line in clean(log).splitlines()]
    engine = [text for text in _engine_exceptions(lines) if not _POINTERS.search(text)]
    others = [text for text in _exceptions(lines) if not _POINTERS.search(text)]
    everything = "\n".join(line.text for line in lines)
    return (
        _known(CAUSES, engine)
        or _known(CAUSES, others)
        or _by_exit(exit_code, engine or others)
        or _unknown(engine or others)
        or _known(KILLED, [everything])
        or _known(SIGNALLED, [everything])
        or _known(VANISHED, [everything])
        or _silent(exit_code)
    )


def diagnose_engine(log: str) -> Diagnosis | None:
    """Why the engine ended, told by itself in `log` while its API server may still run; None if it is not.

    Other exceptions are left out: what a request met hours ago is no cause.
    """
    lines = [_parse(line) for line in clean(log).splitlines()]
    engine = [text for text in _engine_exceptions(lines) if not _POINTERS.search(text)]
    everything = "\n".join(line.text for line in lines)
    return _known(CAUSES, engine) or _unknown(engine) or _known(KILLED, [everything])


def _parse(line: str) -> _Line:
    prefix = _PREFIX.match(line)
    assert prefix is not None  # every part of it is optional
    return _Line(prefix["worker"] or "", prefix["level"] or "", line[prefix.end() :])


def _engine_exceptions(lines: list[_Line]) -> list[str]:
    """The exceptions of the first block in which the engine tells of its end, the last one first."""
    start = next((i for i, line in enumerate(lines) if line.text.startswith(_ENGINE_BLOCK)), None)
    if start is None:
        return []
    head = lines[start]
    # Other processes write between the lines of the block.
    block = [line for line in lines[start + 1 :] if (line.worker, line.level) == (head.worker, head.level)]
    return list(_exceptions(block))[::-1]


def _exceptions(lines: list[_Line]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if _ARGUMENT_ERROR.match(line.text):
            yield line.text
        elif found := _EXCEPTION.match(line.text):
            yield _pydantic(lines, number) if found[1] == "ValidationError" else line.text


def _pydantic(lines: list[_Line], number: int) -> str:
    """The sentence inside a validation error, which stands on a line of its own."""
    for line in lines[number + 1 : number + 4]:
        if found := _PYDANTIC.match(line.text):
            return f"ValueError: {found[1]}"
    return lines[number].text


def _known(causes: tuple[Cause, ...], texts: list[str]) -> Diagnosis | None:
    # The table decides, not the order of the log: a gated model fails with a plain 401 first.
    for cause in causes:
        for text in texts:
            if found := cause.pattern.search(text):
                groups = {name: value or "?" for name, value in found.groupdict().items()}
                sentences = (cause.reason, cause.cure, cause.planned)
                return Diagnosis(*(sentence.format(**groups) for sentence in sentences))
    return None


def _by_exit(exit_code: int | None, exceptions: list[str]) -> Diagnosis | None:
    if exit_code == -9:
        return Diagnosis(
            "The server was killed (SIGKILL), most often by the kernel because the machine's memory ran out.",
            "Look for `Out of memory` in `dmesg`; free RAM, use level 2, or lower what the model needs.",
        )
    if exit_code in (126, 127) and not exceptions:
        return Diagnosis(
            "The vLLM command could not be run.",
            "Set `vllm_command:` to the `vllm` of the environment that holds it.",
        )
    return None


def _unknown(exceptions: list[str]) -> Diagnosis | None:
    if not exceptions:
        return None
    return Diagnosis(exceptions[0].strip()[:MAX_REASON], "The log (key l) has the whole traceback.")


def _silent(exit_code: int | None) -> Diagnosis:
    ending = "ended" if exit_code is None else f"ended with exit code {exit_code}"
    if exit_code is not None and exit_code < 0:
        ending = f"was ended by signal {-exit_code}"
    return Diagnosis(f"The server {ending} without giving a reason.", "Look at its log (key l).")
