"""Why a server failed, told from its log."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from vllm_sleep_tui.engine.cause_table import API_PORT, CAUSES, KILLED, SIGNALLED, VANISHED, Cause
from vllm_sleep_tui.engine.failures import ENGINE_DEAD
from vllm_sleep_tui.text import clean

MAX_REASON = 300
"""Characters of a reason that a log gives: it stands in one cell, and whole in the log."""

_PREFIX = re.compile(
    r"^(?P<worker>\(\w[\w-]* pid=\d+\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\d-]+ [\d:.]+ \[[^\]]+\] ?)?"
)
_ENGINE_BLOCK = ("EngineCore failed to start", "EngineCore encountered a fatal error")
_EXCEPTION = re.compile(
    r"^(?:[A-Za-z_][\w.]*\.)?(\w*(?:Error|Exception|Interrupt|NotFound|Timeout|Expired|IsEnabled)\b)(?::|$)"
)
_ARGUMENT_ERROR = re.compile(r"^vllm(?: serve)?: error: ")
_PYDANTIC = re.compile(r"^\s+(?:Value|Assertion) error, (.*?)(?: \[type=.*)?$")
# These point at the cause and are none.
_POINTERS = re.compile(
    r"Engine core initialization failed|EngineDeadError|WorkerProc initialization failed"
    rf"|{ENGINE_DEAD}|^RuntimeError: cancelled$|^asyncio\.exceptions\.CancelledError"
)


# These are the end of a story that the log tells further up.
_ENDINGS = re.compile(
    r"Invalid repository ID or local directory|failed to be inspected|Error raised in subprocess"
    r"|CalledProcessError"
)
_EMPTY_LINES = 3
"""Before the words of an exception, at the most: some begin with an empty line."""
_TRACEBACK = re.compile(r"^(?:Traceback \(|\s+File \"|During handling of|The above exception)")
_HUB = "Error retrieving file list"
_HUB_LINES = 9
_INSPECTION = "Error in inspecting model architecture"


class Diagnosis(msgspec.Struct, frozen=True):
    """Why a server failed and what to do, a sentence each."""

    reason: str
    cure: str
    planned: str = ""
    """What to do where the panel plans `gpu-memory-utilization`; empty: the same."""
    port: str | None = None
    """What was taken: an address inside vLLM, OWN_PORT; None if it was no port."""

    def for_planned(self) -> Diagnosis:
        """The same for a model whose share of the GPU is planned: it does not name that setting."""
        return msgspec.structs.replace(self, cure=self.planned or self.cure)


OWN_PORT = "port"
"""The server's own, as `Diagnosis.port`."""


class _Line(msgspec.Struct, frozen=True):
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
    if any(_ENDINGS.search(text) for text in others) and (above := [*_inspection(lines), *_hub_words(lines)]):
        others = above + [text for text in others if not _ENDINGS.search(text)]
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


def diagnose_download(said: str) -> str:
    """Why a download tool failed, from what it said: a sentence, or its own last words."""
    lines = [line.strip() for line in clean(said).splitlines() if line.strip()]
    cause = _known(CAUSES, [f"huggingface_hub: {line}" for line in lines])
    if cause is not None:
        return cause.reason
    lines = [line for line in lines if not line.startswith("Hint:")]
    return lines[-1][:MAX_REASON] if lines else "It ended without a word."


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


def _inspection(lines: list[_Line]) -> Iterator[str]:
    """What went wrong while vLLM looked at the model's class, the last first: it runs a process for that.

    vLLM's own last line is "failed to be inspected" (0.32, cause-inspection.txt).
    """
    start = next((i for i, line in enumerate(lines) if line.text.startswith(_INSPECTION)), None)
    if start is None:
        return
    head = lines[start]
    block = [line for line in lines[start + 1 :] if (line.worker, line.level) == (head.worker, head.level)]
    yield from (text for text in list(_exceptions(block))[::-1] if not _ENDINGS.search(text))


def _hub_words(lines: list[_Line]) -> Iterator[str]:
    """What the hub answered; vLLM then calls the model an "invalid repository ID" (0.32, cause-hub-*.txt)."""
    for number, line in enumerate(lines):
        if line.text.startswith(_HUB):
            yield from (line.text for line in lines[number : number + _HUB_LINES])


def _exceptions(lines: list[_Line]) -> Iterator[str]:
    for number, line in enumerate(lines):
        if _ARGUMENT_ERROR.match(line.text):
            yield line.text
        elif match := _EXCEPTION.match(line.text):
            yield _pydantic(lines, number) if match[1] == "ValidationError" else _whole(lines, number)


def _whole(lines: list[_Line], number: int) -> str:
    """An exception's line, with the first line of its words where those begin further down."""
    own, text = lines[number], lines[number].text.rstrip()
    if text.endswith(":"):
        for line in lines[number + 1 : number + 2 + _EMPTY_LINES]:
            is_others = (line.worker, line.level) != (own.worker, own.level)
            if is_others or _TRACEBACK.match(line.text) or _EXCEPTION.match(line.text):
                break
            if words := line.text.strip():
                return f"{text} {words}"
    return lines[number].text


def _pydantic(lines: list[_Line], number: int) -> str:
    """The sentence inside a validation error, which stands on a line of its own."""
    for line in lines[number + 1 : number + 4]:
        if match := _PYDANTIC.match(line.text):
            return f"ValueError: {match[1]}"
    return lines[number].text


def _known(causes: tuple[Cause, ...], texts: list[str]) -> Diagnosis | None:
    # The table decides, not the order of the log: a gated model fails with a plain 401 first.
    for cause in causes:
        for text in texts:
            if match := cause.pattern.search(text):
                groups = {name: value or "?" for name, value in match.groupdict().items()}
                reason, cure, planned = (
                    sentence.format(**groups) for sentence in (cause.reason, cause.cure, cause.planned)
                )
                return Diagnosis(reason, cure, planned, _port(cause, groups))
    return None


def _port(cause: Cause, groups: Mapping[str, str]) -> str | None:
    if cause.pattern.pattern == API_PORT:
        return OWN_PORT
    return groups.get("inner")


def _by_exit(exit_code: int | None, exceptions: list[str]) -> Diagnosis | None:
    if exit_code == -9:
        return Diagnosis(
            "The server was killed (SIGKILL), most often by the kernel because the machine's memory ran out.",
            "Look for `Out of memory` in `dmesg`; free RAM, use level 2, or lower what the model needs.",
        )
    if exit_code == -7:
        return Diagnosis(
            "The server died of a bus error (SIGBUS), most often because /dev/shm is full.",
            "Make it larger: a container's `--shm-size 16g` or `--ipc=host`.",
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
