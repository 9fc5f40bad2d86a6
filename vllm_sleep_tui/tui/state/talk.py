"""One conversation as the panel has it: its turns, what the model is told of them, and what is kept."""

from __future__ import annotations

import time
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

import msgspec

from vllm_sleep_tui.config.parameters import Parameters
from vllm_sleep_tui.fleet.conversations import Conversations, Handle, KeptCall, KeptTurn
from vllm_sleep_tui.fleet.pictures import said
from vllm_sleep_tui.fleet.snapshot import WHOLE, ChatEvent, cut_words
from vllm_sleep_tui.tui.drawing.paint import Line
from vllm_sleep_tui.tui.drawing.preview import Preview
from vllm_sleep_tui.tui.drawing.turns import Answer, Notice, Question, Turn
from vllm_sleep_tui.units import took

MOST_WORDS = 600
"""Of answers that are compared: it takes the square of that."""
NOT_CALLED = "This was not carried out: nobody here runs tools."
CHARACTERS_A_TOKEN = 3.0
"""Of what was not counted yet: on the safe side for English."""


class Pace(msgspec.Struct):
    """The figures of one answer."""

    switch_seconds: float | None = None
    was_started: bool = False
    ttft: float | None = None
    first: float | None = None
    last: float | None = None
    prompt_tokens: int | None = None
    tokens: int | None = None
    rate: float | None = None
    finish_reason: str | None = None
    context_tokens: int | None = None
    is_new: bool = True
    """Nothing of the answer has come yet."""

    def see(self, event: ChatEvent) -> None:
        """Take the figures of one event."""
        now = time.monotonic()
        self.is_new = False
        if event.text or event.reasoning or event.calls:
            self.first = self.first or now
            self.last = now
        self.switch_seconds = self.switch_seconds if event.switch_seconds is None else event.switch_seconds
        self.ttft = self.ttft if event.ttft is None else event.ttft
        self.tokens = self.tokens if event.completion_tokens is None else event.completion_tokens
        self.prompt_tokens = self.prompt_tokens if event.prompt_tokens is None else event.prompt_tokens
        self.context_tokens = event.context_tokens or self.context_tokens
        self.finish_reason = event.finish_reason or self.finish_reason
        if self.tokens and self.tokens > 1 and self.first and self.last and self.last > self.first:
            self.rate = (self.tokens - 1) / (self.last - self.first)

    def words(self) -> str:
        """`woke in 0.36 s · TTFT 26 ms · 212 tok/s`, as far as it is known."""
        parts = []
        if self.switch_seconds is not None:
            parts.append(f"{'started' if self.was_started else 'woke'} in {took(self.switch_seconds)}")
        if self.ttft is not None:
            parts.append(f"TTFT {took(self.ttft)}")
        if self.rate is not None:
            parts.append(f"{self.rate:.0f} tok/s")
        return " · ".join(parts)


class Entry(msgspec.Struct, eq=False):
    """A turn, and what is kept of it beside its words."""

    turn: Turn
    at: float = msgspec.field(default_factory=time.time)
    pace: Pace = msgspec.field(default_factory=Pace)
    error: str | None = None
    cure: str = ""
    is_dropped: bool = False
    parameters: Parameters = msgspec.field(default_factory=Parameters)
    """What an answer was asked with."""

    @property
    def is_whole(self) -> bool:
        """Whether an answer ended where the model wanted it to; what is not known was cut, as by a kill."""
        return self.error is None and self.pace.finish_reason in WHOLE

    def note(self) -> list[Line]:
        """How an answer went, in lines below it."""
        words = " · ".join(filter(None, (self.pace.words(), self.parameters.words())))
        cut = cut_words(self.pace.finish_reason)
        lines: list[Line] = []
        if words or cut:
            lines.append(((words, "muted"), (" · " if words and cut else "", "muted"), (cut, "warning")))
        if self.error is not None:
            assert isinstance(self.turn, Answer)
            said = "The answer is not whole. " if self.turn.text else ""
            lines.append(((f"{said}{self.error}", "bad"),))
            lines += [((self.cure, "muted"),)] if self.cure else []
        return lines

    def kept(self) -> KeptTurn:
        """As it is written down."""
        turn, pace = self.turn, self.pace
        if isinstance(turn, Answer):
            return KeptTurn(
                role="assistant",
                text=turn.text,
                at=self.at,
                model=turn.model,
                reasoning=turn.reasoning,
                calls=tuple(
                    KeptCall(name=call.name, arguments=call.arguments, id=call.id) for call in turn.calls
                ),
                chances=tuple(turn.chances),
                parameters=self.parameters,
                thought_seconds=turn.thought_seconds,
                finish_reason=pace.finish_reason,
                error=self.error,
                switch_seconds=pace.switch_seconds,
                ttft=pace.ttft,
                prompt_tokens=pace.prompt_tokens,
                completion_tokens=pace.tokens,
                tokens_per_s=pace.rate,
                is_dropped=self.is_dropped,
            )
        assert isinstance(turn, Question)
        return KeptTurn(
            role="user", text=turn.text, at=self.at, pictures=turn.pictures, is_dropped=self.is_dropped
        )


class Talk:
    """A conversation with `model`, kept by `store`; `turns` is what is shown."""

    def __init__(
        self,
        store: Conversations,
        model: str,
        id: int | None = None,
        parameters: Parameters | None = None,
    ) -> None:
        self.handle = Handle(model, id, parameters=parameters)
        self.turns: list[Turn] = []
        self.row_at_top: int | None = None
        """Where the person was; None: at the end."""
        self.blind: set[str] = set()
        """Models of which it was told that they are not shown its pictures."""
        self._store = store
        self._entries: list[Entry] = []

    # ── what is there ────────────────────────────────────────────────────────────────────────────────────

    @property
    def last(self) -> Entry | None:
        """The last answer that was not replaced."""
        return next((entry for entry in reversed(self._shown()) if isinstance(entry.turn, Answer)), None)

    @property
    def last_asked(self) -> Entry | None:
        """The last question that was not replaced, whether or not anything was answered."""
        return next((entry for entry in reversed(self._shown()) if isinstance(entry.turn, Question)), None)

    @property
    def asked(self) -> str | None:
        """The last question that was not replaced, as it was typed."""
        entry = self.last_asked
        return entry.turn.text if entry is not None and isinstance(entry.turn, Question) else None

    @property
    def answer(self) -> Answer | None:
        """The last answer."""
        entry = self.last
        return entry.turn if entry is not None and isinstance(entry.turn, Answer) else None

    @property
    def questions(self) -> list[str]:
        """What was asked, the first one first."""
        return [entry.turn.text for entry in self._entries if isinstance(entry.turn, Question)]

    def _shown(self) -> list[Entry]:
        return [entry for entry in self._entries if not entry.is_dropped]

    @property
    def parameters(self) -> Parameters:
        """What the next question is asked with."""
        return self.handle.parameters

    @parameters.setter
    def parameters(self, parameters: Parameters) -> None:
        self._store.keep_parameters(self.handle, parameters)

    def messages(self) -> list[dict[str, Any]]:
        """What the model is told: questions with what was answered; one that got no word is left out."""
        system = self.parameters.system
        told: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        asked: Question | None = None
        for entry in self._shown():
            turn = entry.turn
            if isinstance(turn, Question):
                asked = turn
            elif isinstance(turn, Answer) and asked is not None and (answered := _answered(turn)):
                told += [said(asked.text, asked.pictures), *answered]
                asked = None
        if asked is not None:
            told.append(said(asked.text, asked.pictures))
        return told

    def tokens_used(self, more: str = "") -> int | None:
        """About how many tokens the next prompt has, with `more` asked; None before anything was counted."""
        entry = self.last
        if entry is None or entry.pace.prompt_tokens is None:
            return None
        counted = entry.pace.prompt_tokens + (entry.pace.tokens or 0)
        return counted + round(len(more) / CHARACTERS_A_TOKEN)

    # ── what is added ────────────────────────────────────────────────────────────────────────────────────

    def ask(
        self, text: str, model: str, paint: str, *, was_started: bool, shows: Sequence[Preview] = ()
    ) -> Entry:
        """Add a question, with the pictures that it shows, and an empty answer to it."""
        self._add(Entry(Question(text, shows)))
        entry = Entry(Answer(model, paint), pace=Pace(was_started=was_started), parameters=self.parameters)
        self._add(entry)
        return entry

    def ask_another(self, model: str, paint: str, *, was_started: bool) -> Entry:
        """Add an empty answer of another model to the last question.

        What was answered first is what is gone on with.
        """
        entry = Entry(Answer(model, paint), pace=Pace(was_started=was_started), parameters=self.parameters)
        self._add(entry)
        return entry

    def last_question(self) -> list[dict[str, Any]]:
        """What the model was told when it was asked last; empty if nothing was answered."""
        told = self.messages()
        asked = [at for at, turn in enumerate(told) if turn["role"] == "user"]
        return told[: asked[-1] + 1] if asked and told[-1]["role"] != "user" else []

    def pair(self) -> tuple[Entry, Entry] | None:
        """The last two answers to one question; None if there are no two."""
        pair = [entry for entry in self._shown()[-2:] if isinstance(entry.turn, Answer)]
        return (pair[0], pair[1]) if len(pair) == 2 else None

    def compare(self) -> str:
        """How the last two answers to one question differ, in words; empty if that is not to be said.

        What each took stands below it.
        """
        pair = self.pair()
        texts = [entry.turn.text.split() for entry in pair or () if isinstance(entry.turn, Answer)]
        if not texts or max(map(len, texts)) >= MOST_WORDS:
            return ""
        share = SequenceMatcher(None, texts[0], texts[1], autojunk=False).ratio()
        return f"{share * 100:.0f} % of the words are the same"

    def _add(self, entry: Entry) -> None:
        self._entries.append(entry)
        self.turns.append(entry.turn)
        self.keep(entry)

    def tell(self, words: str, paint: str, *, passes: bool = False) -> None:
        """Add a word on what happened to the model; it is shown and not kept.

        Of words that pass only the last is shown: a model that others use all night would bury what was said.
        """
        if passes and self.turns and isinstance(last := self.turns[-1], Notice) and last.passes:
            self.turns.pop()
        self.turns.append(Notice(words, paint, passes=passes))

    def keep(self, entry: Entry, *, is_whole: bool = True) -> None:
        """Keep what became of a turn.

        Of an answer under way its words alone: the probabilities of all its tokens, written anew again and
        again, would be a hundred times as much.
        """
        kept = entry.kept()
        if not is_whole:
            kept = msgspec.structs.replace(kept, chances=())
        self._store.keep(self.handle, self._entries.index(entry), kept)
        if entry.is_dropped:
            _let_go(entry)

    def drop_last(self) -> None:
        """Take the last question and its answer out of the conversation; both are kept, as replaced."""
        shown = self._shown()
        at = next((at for at in reversed(range(len(shown))) if isinstance(shown[at].turn, Question)), None)
        if at is not None:
            self._drop(shown[at:])

    def drop_first(self) -> bool:
        """Take the oldest question and its answer out of what the model is told; False if it is the last."""
        shown = self._shown()
        starts = [at for at, entry in enumerate(shown) if isinstance(entry.turn, Question)]
        if len(starts) < 2:
            return False
        self._drop(shown[: starts[1]])
        return True

    def _drop(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.is_dropped = True
            self.turns.remove(entry.turn)
            self.keep(entry)

    def restore(self, turns: tuple[KeptTurn, ...], colors: dict[str, str]) -> None:
        """Take over what was said in an earlier run."""
        self.handle.known.update(range(len(turns)))
        for kept in turns:
            entry = Entry(_turn(kept, colors), kept.at, is_dropped=kept.is_dropped, error=kept.error)
            entry.parameters = kept.parameters
            entry.pace = Pace(
                switch_seconds=kept.switch_seconds,
                ttft=kept.ttft,
                prompt_tokens=kept.prompt_tokens,
                tokens=kept.completion_tokens,
                rate=kept.tokens_per_s,
                finish_reason=kept.finish_reason,
            )
            self._entries.append(entry)
            if entry.is_dropped:
                _let_go(entry)
                continue
            if isinstance(entry.turn, Answer):
                entry.turn.say(*entry.note())
            self.turns.append(entry.turn)


def _let_go(entry: Entry) -> None:
    """Forget an answer that was replaced, once it has ended: it is kept, and nobody is shown it again."""
    if isinstance(entry.turn, Answer) and entry.turn.is_over:
        entry.turn = Answer(entry.turn.model, entry.turn.paint)


def _turn(kept: KeptTurn, colors: dict[str, str]) -> Turn:
    if kept.role == "user":
        return Question(kept.text, [Preview(picture) for picture in kept.pictures])
    model = kept.model or "?"
    answer = Answer(model, colors.get(model, "muted"))
    answer.restore(kept)
    return answer


def _answered(answer: Answer) -> list[dict[str, Any]]:
    """What a model is told that it said; empty for not a word.

    A call that can be read is told with the truth about it: vLLM refuses a conversation with a broken one.
    """
    calls = [call for call in answer.calls if not call.fault]
    if not calls:
        return [{"role": "assistant", "content": answer.text}] if answer.text else []
    made = [
        {
            "id": call.id or f"call-{number}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for number, call in enumerate(calls)
    ]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": NOT_CALLED} for call in made]
    return [{"role": "assistant", "content": answer.text, "tool_calls": made}, *results]
