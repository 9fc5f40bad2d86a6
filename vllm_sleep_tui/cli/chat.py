"""`chat`: one question, or a conversation; the answer on stdout, the timings on stderr."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vllm_sleep_tui.cli.common import (
    complete_model,
    config_option,
    draw,
    json_option,
    json_text,
    load_config,
    put,
    put_json,
    say,
)
from vllm_sleep_tui.cli.running import Reporter, with_fleet
from vllm_sleep_tui.errors import CancelledByUser, OperationError, PanelError, UsageError
from vllm_sleep_tui.fleet.pictures import Picture, look_at, marked, pictures_in, said
from vllm_sleep_tui.fleet.snapshot import cut_words
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.text import Cleaner, clean, one_line
from vllm_sleep_tui.units import hundredths, milliseconds

if TYPE_CHECKING:
    from vllm_sleep_tui.cli.line_editor import LineEditor
    from vllm_sleep_tui.fleet.conversations import Conversations
    from vllm_sleep_tui.fleet.fleet import Fleet

MEASURED = ("finish_reason", "prompt_tokens", "completion_tokens", "switch_seconds", "ttft")
"""What is kept of the events beside the text."""
EARLIER = 500
"""Questions that ↑ goes back to."""


@click.command()
@click.argument("name", shell_complete=complete_model)
@click.argument("prompt", required=False)
@click.option("-c", "--continue", "goes_on", is_flag=True, help="Go on with the model's last conversation.")
@click.option("--system", metavar="TEXT", help="What the model is told before everything else.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture to ask about; more than once for several.",
)
@click.option("--no-switch", "stays", is_flag=True, help="Fail if the model is not awake.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is the likeliest word each time.")
@click.option("--max-tokens", type=click.IntRange(1), help="The longest answer.")
@click.option("--seed", type=int, help="The same seed, the same answer, as far as the server can.")
@json_option
@config_option
@click.pass_context
def chat(
    ctx: click.Context,
    name: str,
    prompt: str | None,
    goes_on: bool,
    system: str | None,
    images: tuple[Path, ...],
    stays: bool,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    as_json: bool,
) -> None:
    """Ask a model.

    What stands on stdin follows PROMPT, as in: cat FILE | vllm-sleep-tui chat NAME "Summarise:".
    On a terminal without PROMPT it is a conversation, until Ctrl-D; Ctrl-C stops an answer. A conversation is
    kept, and a single question with -c. In a conversation @FILE in a question shows a picture.
    """
    loaded = load_config(ctx)
    loaded.model(name)
    given = _joined(prompt, "" if sys.stdin.isatty() else _read_all())
    pictures = look_at(images)
    if given is not None:
        _check(given, name)
        given = marked(given, pictures)
    elif pictures:
        raise UsageError("--image needs a PROMPT.", "In a conversation write @FILE in a question.")
    params = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    asking = Asking(
        name=name,
        system=system,
        params={key: value for key, value in params.items() if value is not None},
        stays=stays,
    )
    keeps = loaded.config.keep_conversations and (goes_on or given is None)
    from vllm_sleep_tui.fleet.conversations import Conversations  # with SQLite

    store = Conversations(state_dir(), loaded.path, keeps=keeps)
    try:
        talk = Talk(store, name, goes_on=goes_on)
        if given is None:
            from vllm_sleep_tui.cli.line_editor import LineEditor  # with prompt_toolkit

            editor = LineEditor(f"{name}> ", store.questions(EARLIER).result())
            with editor.quiet():
                with_fleet(loaded, lambda fleet: _converse(fleet, asking, talk, editor, as_json=as_json))
            return
        answer = with_fleet(
            loaded, lambda fleet: _ask(fleet, asking, talk, given, pictures, aloud=not as_json)
        )
    finally:
        store.close()
        if store.note:
            say(store.note)
    if as_json:
        put_json({"version": 1, "model": name, **answer})


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """Whom to ask, and how."""

    name: str
    system: str | None
    params: dict[str, Any]
    stays: bool
    """Whether a model that is not awake is left so."""


class Talk:
    """What was said so far; with `goes_on` what was kept of the model's last conversation comes first."""

    def __init__(self, store: Conversations, name: str, *, goes_on: bool) -> None:
        from vllm_sleep_tui.fleet.conversations import Handle

        self._store = store
        kept = store.latest(name).result() if goes_on else None
        turns = () if kept is None else store.turns(kept.id).result()
        self._handle = Handle(name, None if kept is None else kept.id, len(turns))
        self._number = len(turns)
        self._said: list[dict[str, Any]] = [
            said(turn.text, turn.pictures)
            if turn.role == "user"
            else {"role": turn.role, "content": turn.text}
            for turn in turns
            if turn.text and not turn.is_dropped
        ]

    def messages(
        self, question: str, pictures: tuple[Picture, ...], system: str | None
    ) -> list[dict[str, Any]]:
        """What the model is told."""

        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, *self._said, said(question, pictures)]

    def add(self, question: str, pictures: tuple[Picture, ...], answer: dict[str, Any], name: str) -> None:
        """Keep a question with what was answered."""
        from vllm_sleep_tui.fleet.conversations import KeptTurn

        text = clean(answer["text"])
        self._said += [said(question, pictures), {"role": "assistant", "content": text}]
        now = time.time()
        figures = {field: answer[field] for field in MEASURED}
        reasoning = clean(answer.get("reasoning", ""))
        for turn in (
            KeptTurn(role="user", text=question, at=now, pictures=pictures),
            KeptTurn(role="assistant", text=text, at=now, model=name, reasoning=reasoning, **figures),
        ):
            self._store.keep(self._handle, self._number, turn)
            self._number += 1


def _joined(prompt: str | None, given: str) -> str | None:
    """The prompt and what stands on stdin, one after the other; None for a conversation on a terminal."""
    if prompt is None:
        return None if sys.stdin.isatty() else given
    return f"{prompt}\n\n{given}" if given.strip() else prompt


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


async def _converse(fleet: Fleet, asking: Asking, talk: Talk, editor: LineEditor, *, as_json: bool) -> None:
    """Questions from the terminal, each with what was said before, until Ctrl-D.

    Ctrl-C stops an answer, puts away what was typed, and ends nothing.
    """
    loop = asyncio.get_running_loop()
    answering: asyncio.Task[None] | None = None

    def interrupt() -> None:
        if answering is not None and not answering.done():
            answering.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    say("alt+⏎ or ctrl+j begins a line, ctrl+c stops an answer, ctrl+d leaves.")
    while (question := await editor.read()) is not None:
        if not question:
            continue
        answering = asyncio.create_task(_answered(fleet, asking, talk, question, as_json=as_json))
        await asyncio.wait({answering})
        if answering.cancelled() or isinstance(error := answering.exception(), CancelledByUser):
            say("\nStopped.")
        elif isinstance(error, PanelError):
            say(one_line(error.what))
            say(one_line(error.cure))
        elif error is not None:
            raise error


async def _answered(fleet: Fleet, asking: Asking, talk: Talk, question: str, *, as_json: bool) -> None:
    """One question of a conversation, with the pictures that it names, and its answer; as JSON on a line."""
    pictures = await asyncio.to_thread(pictures_in, question)
    answer = await _ask(fleet, asking, talk, question, pictures, aloud=not as_json)
    if as_json:
        put(json_text({"version": 1, "model": asking.name, **answer}))


async def _ask(
    fleet: Fleet,
    asking: Asking,
    talk: Talk,
    question: str,
    pictures: tuple[Picture, ...],
    *,
    aloud: bool,
) -> dict[str, Any]:
    """Stream one answer; what it was and took, in seconds. Raises OperationError if it breaks off.

    What was said until then, by whatever end, is kept.
    """
    name = asking.name
    texts: list[str] = []
    thoughts: list[str] = []
    cleaner = Cleaner()
    answer: dict[str, Any] = dict.fromkeys(("text", *MEASURED))
    before = {model.name: model.state for model in fleet.snapshot().models}[name]
    if asking.stays and before is not State.AWAKE:
        raise OperationError(
            f"{name} is {before.value}, and --no-switch leaves it so.",
            f"Switch: vllm-sleep-tui switch {name}",
        )
    was_started = before not in (State.AWAKE, State.ASLEEP)
    began = time.monotonic()
    messages = talk.messages(question, pictures, asking.system)
    try:
        async for event in fleet.chat(name, messages, params=asking.params, report=Reporter()):
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
    finally:
        answer |= {"text": "".join(texts), "seconds": time.monotonic() - began}
        if any(thoughts):
            answer["reasoning"] = "".join(thoughts)
        if any(texts):
            talk.add(question, pictures, answer, name)
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
