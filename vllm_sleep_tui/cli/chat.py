"""`chat`: one question, or a conversation; the answer on stdout, the timings on stderr."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from vllm_sleep_tui.cli.common import config_option, draw, json_option, load_config, put, put_json, say
from vllm_sleep_tui.cli.running import Reporter, with_fleet
from vllm_sleep_tui.errors import OperationError, UsageError
from vllm_sleep_tui.fleet.snapshot import cut_words
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.text import Cleaner
from vllm_sleep_tui.units import hundredths, milliseconds

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet

MEASURED = ("finish_reason", "prompt_tokens", "completion_tokens", "switch_seconds", "ttft")
"""What is kept of the events beside the text."""
_READ_BYTES = 65536


@click.command()
@click.argument("name")
@click.argument("prompt", required=False)
@json_option
@config_option
@click.pass_context
def chat(ctx: click.Context, name: str, prompt: str | None, as_json: bool) -> None:
    """Ask a model.

    Without PROMPT it is read from stdin, on a terminal line by line until Ctrl-D.
    """
    loaded = load_config(ctx)
    loaded.model(name)
    if prompt is None and not sys.stdin.isatty():
        prompt = _read_all()
    if prompt is not None:
        _check(prompt, name)
    if prompt is None:
        with_fleet(loaded, lambda fleet: _converse(fleet, name))
        return
    question = [{"role": "user", "content": prompt}]
    answer = with_fleet(loaded, lambda fleet: _ask(fleet, name, question, aloud=not as_json))
    if as_json:
        put_json({"version": 1, "model": name, **answer})


def _read_all() -> str:
    """What stands on stdin; raises UsageError if it cannot be read."""
    try:
        return sys.stdin.read()
    except OSError as error:
        raise UsageError(
            f"The prompt cannot be read from stdin: {error.strerror}.", "Write it as an argument."
        ) from None


def _check(prompt: str, name: str) -> None:
    """Raises UsageError if nothing is asked, or in bytes that are no text: no model is sent a guess."""
    if not prompt.strip():
        raise UsageError("The prompt is empty.", f'Write one: vllm-sleep-tui chat {name} "Hello"')
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "The prompt is not UTF-8 text.", "Convert it first, as with: iconv -f latin1 -t utf-8"
        ) from None


async def _converse(fleet: Fleet, name: str) -> None:
    """Questions from the terminal, each with all that was said before, until Ctrl-D."""
    messages: list[dict[str, Any]] = []
    while True:
        say(f"{name}> ", nl=False)
        line = await _read_line()
        if not line:
            say("")
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = await _ask(fleet, name, messages, aloud=True)
        messages.append({"role": "assistant", "content": answer["text"]})


async def _read_line() -> str:
    """A line of the terminal; empty at its end. Not in a thread: one that waits for input cannot be ended."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, readable.set)
    try:
        await readable.wait()
        return os.read(descriptor, _READ_BYTES).decode(errors="replace")
    except OSError:  # the terminal is gone
        return ""
    finally:
        loop.remove_reader(descriptor)


async def _ask(fleet: Fleet, name: str, messages: list[dict[str, Any]], *, aloud: bool) -> dict[str, Any]:
    """Stream one answer; what it was and took, in seconds. Raises OperationError if it breaks off."""
    texts: list[str] = []
    thoughts: list[str] = []
    cleaner = Cleaner()
    answer: dict[str, Any] = dict.fromkeys(("text", *MEASURED))
    before = {model.name: model.state for model in fleet.snapshot().models}[name]
    was_started = before not in (State.AWAKE, State.ASLEEP)
    began = time.monotonic()
    async for event in fleet.chat(name, messages, report=Reporter()):
        texts.append(event.text)
        thoughts.append(event.reasoning)
        if aloud:
            draw(cleaner.feed(event.text))
        if event.error:
            if aloud:
                put(cleaner.end(), nl=any(texts))
            what = "broke off" if any(texts) else "does not answer"
            raise OperationError(f"{name} {what}: {event.error}", f"See: vllm-sleep-tui logs {name}")
        answer |= {field: value for field in MEASURED if (value := getattr(event, field)) is not None}
    answer |= {"text": "".join(texts), "seconds": time.monotonic() - began}
    if any(thoughts):
        answer["reasoning"] = "".join(thoughts)
    if aloud:
        put(cleaner.end())
        say(_timings(answer, was_started=was_started))
    if answer["finish_reason"] == "abort":
        raise OperationError(f"{name} was stopped or put to sleep in the middle of its answer.", "Ask again.")
    if cut := cut_words(answer["finish_reason"]):
        say(f"The answer is {cut}.")
    return answer


def _timings(answer: dict[str, Any], *, was_started: bool) -> str:
    """Such as: woke in 0.36 s · TTFT 26 ms · 212 tok/s."""
    switched, ttft, tokens = answer["switch_seconds"], answer["ttft"], answer["completion_tokens"]
    parts = [f"{'started' if was_started else 'woke'} in {hundredths(switched)}"] if switched else []
    if ttft is not None:
        parts.append(f"TTFT {milliseconds(ttft)}")
    streamed = answer["seconds"] - (switched or 0) - (ttft or 0)
    if tokens and tokens > 1 and streamed > 0:
        parts.append(f"{(tokens - 1) / streamed:.0f} tok/s")
    return " · ".join(parts)
