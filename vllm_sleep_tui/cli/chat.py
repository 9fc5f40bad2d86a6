"""`chat`: one question, or a conversation; the answer on stdout, the timings on stderr."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vllm_sleep_tui.cli.asking import asked_with, asking_options
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
from vllm_sleep_tui.fleet.snapshot import CallDelta, TokenChance, cut_words
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.text import Cleaner, clean, one_line
from vllm_sleep_tui.units import milliseconds, took

if TYPE_CHECKING:
    from vllm_sleep_tui.cli.line_editor import LineEditor
    from vllm_sleep_tui.config.load import LoadedConfig
    from vllm_sleep_tui.config.parameters import Parameters
    from vllm_sleep_tui.fleet.conversations import Conversations, KeptTurn
    from vllm_sleep_tui.fleet.fleet import Fleet

MEASURED = ("finish_reason", "prompt_tokens", "completion_tokens", "switch_seconds", "ttft")
"""What is kept of the events beside the text."""
EARLIER = 500
"""Questions that ↑ goes back to."""


@click.command()
@click.argument("name", shell_complete=complete_model)
@click.argument("prompt", required=False)
@click.argument("others", nargs=-1, metavar="")
@click.option("-c", "--continue", "goes_on", is_flag=True, help="Go on with the model's last conversation.")
@click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A picture to ask about; more than once for several.",
)
@click.option("--no-switch", "stays", is_flag=True, help="Fail if the model is not awake.")
@asking_options
@click.option(
    "--prompts",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Ask each NAME … the prompts of a file: one a line, or objects in a .jsonl.",
)
@click.option(
    "--out",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the answers to --prompts go; what is there is not asked again.",
)
@json_option
@config_option
@click.pass_context
def chat(
    ctx: click.Context,
    /,
    name: str,
    prompt: str | None,
    others: tuple[str, ...],
    prompts: Path | None,
    out: Path | None,
    goes_on: bool,
    images: tuple[Path, ...],
    stays: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Ask a model.

    What stands on stdin follows PROMPT, as in: cat FILE | vllm-sleep-tui chat NAME "Summarise:".
    On a terminal without PROMPT it is a conversation, until Ctrl-D; Ctrl-C stops an answer. A conversation is
    kept, and a single question with -c. In a conversation @FILE in a question shows a picture.
    With --prompts several models are asked: vllm-sleep-tui chat --prompts FILE NAME NAME.
    """
    loaded = load_config(ctx)
    loaded.model(name)
    if prompts is not None:
        if goes_on or images:
            raise UsageError("--prompts goes with neither -c nor --image.", "Leave them out.")
        _ask_all(loaded, (name, *filter(None, (prompt, *others))), prompts, out, options, stays, as_json)
        return
    if others or out is not None:
        raise UsageError(
            "More than one word follows the name." if others else "--out goes with --prompts.",
            f'Quote the prompt: vllm-sleep-tui chat {name} "Why is it so?"',
        )
    given = _joined(prompt, "" if sys.stdin.isatty() else _read_all())
    pictures = look_at(images)
    if given is not None:
        _check(given, name)
        given = marked(given, pictures)
    elif pictures:
        raise UsageError("--image needs a PROMPT.", "In a conversation write @FILE in a question.")
    keeps = loaded.config.keep_conversations and (goes_on or given is None)
    from vllm_sleep_tui.fleet.conversations import Conversations  # with SQLite

    store = Conversations(state_dir(), loaded.path, keeps=keeps)
    try:
        talk = Talk(store, name, goes_on=goes_on)
        talk.parameters = asked_with(loaded, store, options, talk.parameters)
        asking = Asking(name=name, system=talk.parameters.system, params=talk.parameters.body(), stays=stays)
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


def _ask_all(
    loaded: LoadedConfig,
    names: Sequence[str],
    prompts: Path,
    out: Path | None,
    options: dict[str, Any],
    stays: bool,
    as_json: bool,
) -> None:
    """The prompts of a file to each of the models."""
    from vllm_sleep_tui.cli.evaluation import ask_all  # a single question does without
    from vllm_sleep_tui.config.parameters import Parameters
    from vllm_sleep_tui.fleet.conversations import Conversations

    store = Conversations(state_dir(), loaded.path, keeps=False)
    try:
        asked = asked_with(loaded, store, options, Parameters())  # presets of the panel are in it
    finally:
        store.close()
    ask_all(
        loaded, names, prompts, out, system=asked.system, params=asked.body(), stays=stays, as_json=as_json
    )


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
        whole = None if kept is None else store.whole(kept.id).result()
        turns = () if whole is None else whole.turns
        asked = None if whole is None else whole.parameters
        self._handle = Handle(name, None if kept is None else kept.id, len(turns), asked)
        self._number = len(turns)
        self._said = _told(turns)

    @property
    def parameters(self) -> Parameters:
        """How the model is asked."""
        return self._handle.parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._store.keep_parameters(self._handle, parameters)

    def messages(
        self, question: str, pictures: tuple[Picture, ...], system: str | None
    ) -> list[dict[str, Any]]:
        """What the model is told."""

        first = [] if system is None else [{"role": "system", "content": system}]
        return [*first, *self._said, said(question, pictures)]

    def add(self, question: str, pictures: tuple[Picture, ...], answer: dict[str, Any], name: str) -> None:
        """Keep a question with what was answered."""
        from vllm_sleep_tui.fleet.conversations import KeptCall, KeptTurn

        text = clean(answer["text"])
        if text:
            self._said += [said(question, pictures), {"role": "assistant", "content": text}]
        calls = tuple(KeptCall(**call) for call in answer.get("tool_calls", ()))
        asked = self.parameters
        now = time.time()
        figures = {field: answer[field] for field in MEASURED}
        reasoning = clean(answer.get("reasoning", ""))
        for turn in (
            KeptTurn(role="user", text=question, at=now, pictures=pictures),
            KeptTurn(
                role="assistant",
                text=text,
                at=now,
                model=name,
                reasoning=reasoning,
                calls=calls,
                chances=tuple(answer.get("logprobs", ())),
                parameters=asked,
                **figures,
            ),
        ):
            self._store.keep(self._handle, self._number, turn)
            self._number += 1


def _told(turns: Sequence[KeptTurn]) -> list[dict[str, Any]]:
    """What a model is told of what was kept: questions, each with its first answer that has a word.

    Many templates refuse two messages of one role in a row.
    """
    told: list[dict[str, Any]] = []
    asked: KeptTurn | None = None
    for turn in turns:
        if turn.is_dropped:
            continue
        if turn.role == "user":
            asked = turn
        elif asked is not None and turn.text:
            told += [said(asked.text, asked.pictures), {"role": "assistant", "content": turn.text}]
            asked = None
    return told


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
    calls: dict[int, dict[str, str]] = {}
    chances: list[TokenChance] = []
    cleaner = Cleaner()
    answer: dict[str, Any] = dict.fromkeys(("text", *MEASURED))
    before = {model.name: model.state for model in fleet.snapshot().models}[name]
    was_started = before not in (State.AWAKE, State.ASLEEP)
    began = time.monotonic()
    messages = talk.messages(question, pictures, asking.system)
    try:
        stream = fleet.chat(
            name, messages, params=asking.params, report=Reporter(), switches=not asking.stays
        )
        async for event in stream:
            _add_calls(calls, event.calls)
            chances += event.chances
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
        if calls:
            answer["tool_calls"] = list(calls.values())
        if chances:
            answer["logprobs"] = chances
        if any(texts) or calls:
            talk.add(question, pictures, answer, name)
    if aloud:
        put(cleaner.end(), nl=any(texts) or not calls)
        for call in calls.values():
            put(f"⚙ {one_line(call['name'])} {one_line(call['arguments'])}")
        say(_timings(answer, was_started=was_started))
    if answer["finish_reason"] == "abort":
        raise OperationError(f"{name} was stopped or put to sleep in the middle of its answer.", "Ask again.")
    if cut := cut_words(answer["finish_reason"]):
        say(f"The answer is {cut}.")
    return answer


def _add_calls(calls: dict[int, dict[str, str]], deltas: Sequence[CallDelta]) -> None:
    """Take pieces of what the model calls."""
    for delta in deltas:
        call = calls.setdefault(delta.index, {"id": delta.id, "name": "", "arguments": ""})
        call["name"] += delta.name
        call["arguments"] += delta.arguments


def _timings(answer: dict[str, Any], *, was_started: bool) -> str:
    """Such as: woke in 0.36 s · TTFT 26 ms · 212 tok/s."""
    switched, ttft, tokens = answer["switch_seconds"], answer["ttft"], answer["completion_tokens"]
    parts = [f"{'started' if was_started else 'woke'} in {took(switched)}"] if switched else []
    if ttft is not None:
        parts.append(f"TTFT {milliseconds(ttft)}")
    streamed = answer["seconds"] - (switched or 0) - (ttft or 0)
    if tokens and tokens > 1 and streamed > 0:
        parts.append(f"{(tokens - 1) / streamed:.0f} tok/s")
    return " · ".join(parts)
