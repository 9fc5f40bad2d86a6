"""One file of prompts over several models: a small evaluation, as JSON Lines that it goes on with.

Each model is asked all that is missing in one go, those that are awake first, so that each is woken once. An
answer is a line of its own, written when it is whole: killed in the middle, the next run asks the rest.
"""

from __future__ import annotations

import fcntl
import os
import stat
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, RefusedError, UsageError
from vllm_sleep_tui.files import read_regular
from vllm_sleep_tui.fleet.snapshot import Report
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.text import clean

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet

MOST_BYTES = 16 * 2**20
"""Of a file of prompts."""
MOST_ANSWERS = 2**30
"""Bytes of a file of answers."""
MOST_FAILURES = 3
"""In a row, after which a model is left: it is not the questions."""
SUFFIX = ".answers.jsonl"
BEGINNING = b'{"model":"'
"""Of every answer's line: what is cut off and begins otherwise is none."""


class Prompt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One question of the file."""

    prompt: str
    system: str | None = None
    id: str | None = None
    """What the person calls it; it goes into the answer's line."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the result; times are UTC seconds, durations seconds, and what is not known is left out."""

    model: str
    prompt: str
    system: str | None = None
    id: str | None = None
    params: dict[str, Any] = {}
    text: str
    reasoning: str = ""
    finish_reason: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    switch_seconds: float | None = None
    """What waking or starting the model took; of the first question that it was asked in a run."""
    ttft: float | None = None
    tokens_per_s: float | None = None
    at: float
    version: int = 1

    @property
    def key(self) -> bytes:
        """What was asked of whom: the same is not asked again."""
        return _key(self.model, self.prompt, self.system, self.params)


def _key(model: str, prompt: str, system: str | None, params: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode([model, prompt, system, params], order="deterministic")


class Tally(msgspec.Struct, kw_only=True):
    """What came of one model."""

    model: str
    answered: int
    missing: int
    switch_seconds: float | None
    """Of the last time it was woken for this."""
    ttft: float | None
    """Median, as the next."""
    tokens_per_s: float | None
    completion_tokens: int


def read_prompts(path: Path) -> list[Prompt]:
    """The questions of a file: one a line, or with the suffix .jsonl an object a line; raises UsageError."""
    try:
        # Not splitlines: JSON may have other ends of lines, such as U+2028, in the middle of a text.
        lines = read_regular(path, MOST_BYTES, follow=True).decode("utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.", "Name a file of prompts.") from None
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is not UTF-8 text.", "Convert it first, as with: iconv -f latin1 -t utf-8"
        ) from None
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(
                msgspec.json.decode(line, type=Prompt)
                if path.suffix == ".jsonl"
                else Prompt(prompt=line.strip())
            )
        except msgspec.DecodeError as error:
            raise UsageError(
                f"{path}, line {number}: {error}.",
                'A line is such as: {"prompt": "Why?", "system": "Be brief."}',
            ) from None
    if not prompts:
        raise UsageError(f"{path} has no prompt.", "Write one a line.")
    return list(dict.fromkeys(prompts))


class Answers:
    """The file of answers, held by one process at a time; a line that was cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.given: dict[bytes, Answer] = {}
        """All whole answers of the file, the last one of each question."""
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise OperationError(
                f"{path} cannot be written: {error.strerror}.", "Name another with --out."
            ) from None
        try:
            self._take()
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise RefusedError(f"{self.path} is no regular file.", "Name another with --out.")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RefusedError(
                f"Another process is writing {self.path}.", "Wait for it, or name another with --out."
            ) from None
        if os.fstat(self._file).st_size > MOST_ANSWERS:
            raise RefusedError(f"{self.path} is larger than 1 GiB.", "Name another with --out.")
        with open(os.dup(self._file), "rb") as file:
            content = file.read()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                answer = msgspec.json.decode(line, type=Answer)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                raise RefusedError(
                    f"{self.path}, line {number} is no answer: {error}.", "Name another with --out."
                ) from None
            self.given[answer.key] = answer
        if content[whole:][: len(BEGINNING)] != BEGINNING[: len(content) - whole]:
            raise RefusedError(f"{self.path} ends with what is no answer.", "Name another with --out.")
        os.ftruncate(self._file, whole)
        os.lseek(self._file, whole, os.SEEK_SET)

    def add(self, answer: Answer) -> None:
        """Write an answer; it is on the disk when this returns. Raises OperationError."""
        line = msgspec.json.encode(answer) + b"\n"
        try:
            while line:
                line = line[os.write(self._file, line) :]
            os.fsync(self._file)
        except OSError as error:
            raise OperationError(
                f"{self.path} cannot be written: {error.strerror}.", "Make room, then ask again: it goes on."
            ) from None
        self.given[answer.key] = answer

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


async def evaluate(
    fleet: Fleet,
    names: Sequence[str],
    prompts: Sequence[Prompt],
    answers: Answers,
    *,
    system: str | None = None,
    params: Mapping[str, Any] | None = None,
    stays: bool = False,
    report: Report | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> list[Tally]:
    """Ask each model what is missing; one that fails is told of and left, and the others are asked.

    With `stays` no model is woken. The result is in the order of `names`.
    """
    asked = dict(params or {})
    states = {model.name: model.state for model in fleet.snapshot().models}
    for name in sorted(names, key=lambda name: states[name] is not State.AWAKE):
        missing = list(_missing(name, prompts, answers, system, asked))
        tell(f"{name}: {len(missing)} of {len(prompts)} to ask")
        failed = 0
        for number, prompt in enumerate(missing, 1):
            try:
                answers.add(
                    await _ask(fleet, name, prompt, prompt.system or system, asked, report, stays=stays)
                )
            except CancelledByUser:
                raise
            except PanelError as error:
                failed += 1
                tell(f"{name}, {number}/{len(missing)}: {error.what} {error.cure}".rstrip())
                if failed == MOST_FAILURES or fleet.snapshot().model(name).state is not State.AWAKE:
                    break
            else:
                failed = 0
                tell(f"{name}, {number}/{len(missing)}")
    return [_tally(name, prompts, answers, system, asked) for name in names]


def _missing(
    name: str, prompts: Sequence[Prompt], answers: Answers, system: str | None, params: Mapping[str, Any]
) -> Iterator[Prompt]:
    for prompt in prompts:
        if _key(name, prompt.prompt, prompt.system or system, params) not in answers.given:
            yield prompt


async def _ask(
    fleet: Fleet,
    name: str,
    prompt: Prompt,
    system: str | None,
    params: Mapping[str, Any],
    report: Report | None,
    *,
    stays: bool,
) -> Answer:
    """One whole answer; raises OperationError for one that is cut off by anything but its limit."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": prompt.prompt})
    texts: list[str] = []
    thoughts: list[str] = []
    found: dict[str, Any] = {}
    first = last = 0.0
    async for event in fleet.chat(name, messages, params=params, report=report, switches=not stays):
        if event.error:
            raise OperationError(event.error)
        if event.text or event.reasoning:
            last = time.monotonic()
            first = first or last
        texts.append(event.text)
        thoughts.append(event.reasoning)
        for field in ("finish_reason", "prompt_tokens", "completion_tokens", "switch_seconds", "ttft"):
            if (value := getattr(event, field)) is not None:
                found[field] = value
    if found.get("finish_reason") in (None, "abort"):
        raise OperationError("It was stopped or put to sleep in the middle of its answer.")
    tokens = found.get("completion_tokens") or 0
    rate = (tokens - 1) / (last - first) if tokens > 1 and last > first else None
    return Answer(
        model=name,
        prompt=prompt.prompt,
        system=system,
        id=prompt.id,
        params=dict(params),
        text=clean("".join(texts)),
        reasoning=clean("".join(thoughts)),
        tokens_per_s=rate,
        at=time.time(),
        **found,
    )


def _tally(
    name: str, prompts: Sequence[Prompt], answers: Answers, system: str | None, params: Mapping[str, Any]
) -> Tally:
    keys = [_key(name, prompt.prompt, prompt.system or system, params) for prompt in prompts]
    given = [answers.given[key] for key in keys if key in answers.given]
    woken = [answer for answer in given if answer.switch_seconds is not None]
    return Tally(
        model=name,
        answered=len(given),
        missing=len(keys) - len(given),
        switch_seconds=max(woken, key=lambda answer: answer.at).switch_seconds if woken else None,
        ttft=_median([answer.ttft for answer in given]),
        tokens_per_s=_median([answer.tokens_per_s for answer in given]),
        completion_tokens=sum(answer.completion_tokens or 0 for answer in given),
    )


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
