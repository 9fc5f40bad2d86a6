"""One conversation as the panel has it: its turns, and what the model is told of them."""

from __future__ import annotations

from typing import Any

from vllm_sleep_tui.tui.drawing.turns import Answer, Question, Turn


class Talk:
    """A conversation."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []
        self.row_at_top: int | None = None
        """Where the person was; None: at the end."""

    @property
    def answer(self) -> Answer | None:
        """The last answer."""
        return next((turn for turn in reversed(self.turns) if isinstance(turn, Answer)), None)

    def messages(self) -> list[dict[str, Any]]:
        """What the model is told: questions with what was answered; one that got no word is left out."""
        told: list[dict[str, Any]] = []
        asked: str | None = None
        for turn in self.turns:
            if isinstance(turn, Question):
                asked = turn.text
            elif isinstance(turn, Answer) and asked is not None and turn.text:
                told += [{"role": "user", "content": asked}, {"role": "assistant", "content": turn.text}]
                asked = None
        if asked is not None:
            told.append({"role": "user", "content": asked})
        return told

    def ask(self, text: str, model: str, paint: str) -> Answer:
        """Add a question and an empty answer to it."""
        answer = Answer(model, paint)
        self.turns += [Question(text), answer]
        return answer
