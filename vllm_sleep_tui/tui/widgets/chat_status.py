"""The line above the chat's input: who would answer, what that costs, and how full the context is."""

from __future__ import annotations

from textual.geometry import Size

from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, Prediction
from vllm_sleep_tui.fleet.states import State
from vllm_sleep_tui.tui.drawing.paint import Line, Painted, Span, cut_line, line_width
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.words import LOOKS, expected_time, state_words

FULL_SHARE = 0.8
"""Of the context, from which on its meter warns."""


def listing(names: tuple[str, ...]) -> str:
    """Names as a person lists them: `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def cost_words(prediction: Prediction) -> str:
    """What an answer would cost before its first word; empty where it costs nothing."""
    if prediction.action == "nothing":
        return ""
    if prediction.action == "refused":
        return prediction.sentence
    about = expected_time(prediction)
    parts = [f"about {about}" if about else "not timed yet"]
    if prediction.sleeps:
        parts.append(f"puts {listing(prediction.sleeps)} to sleep")
    if prediction.stops:
        parts.append(f"stops {listing(prediction.stops)}")
    return ", ".join(parts)


def context_words(used: int | None, limit: int | None) -> str:
    """`ctx 1.2k/4.1k`; empty before anything was counted."""
    if used is None:
        return ""
    return f"ctx {_thousands(used)}" + (f"/{_thousands(limit)}" if limit else "")


def _thousands(tokens: int) -> str:
    return (
        str(tokens)
        if tokens < 1000
        else f"{tokens / 1000:.1f}k"
        if tokens < 100_000
        else f"{tokens // 1000}k"
    )


class ChatStatus(Painted):
    """One line, and a second where the first is too long."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._view: View | None = None
        self._used: int | None = None
        self._limit: int | None = None

    def show(self, view: View, used: int | None, limit: int | None) -> None:
        """Show this moment, and how many tokens the conversation has of how many."""
        self._view, self._used, self._limit = view, used, limit
        self.repaint()

    def paint(self, size: Size) -> list[Line]:
        """Who would answer, and the context."""
        view = self._view
        if view is None or (model := view.model) is None:
            return []
        meter = context_words(self._used, self._limit)
        is_full = self._used and self._limit and self._used > FULL_SHARE * self._limit
        right: Line = ((meter, "warning bold" if is_full else "muted"),) if meter else ()
        head, cost = _who(view, model), self._cost(view, model)
        one = (*head, (" ", ""), *cost) if cost else head
        if line_width(one) + line_width(right) + 1 <= size.width or not cost:
            gap = size.width - line_width(one) - line_width(right)
            return [cut_line((*one, (" " * max(1, gap), ""), *right), size.width)]
        gap = size.width - line_width(head) - line_width(right)
        below = [(text.removeprefix("· "), paint) for text, paint in cost]
        return [
            cut_line((*head, (" " * max(1, gap), ""), *right), size.width),
            cut_line((("  ", ""), *below), size.width),
        ]

    def _cost(self, view: View, model: ModelSnapshot) -> tuple[Span, ...]:
        """Why it cannot answer, unless that stands in full beside the chat; else what an answer costs."""
        is_alone = self.screen.has_class("-narrow") or self.screen.has_class("-zoomed")
        return (_failure(model) if is_alone else ()) or _cost(view, model)


def _failure(model: ModelSnapshot) -> tuple[Span, ...]:
    if model.state is State.FAILED and model.reason:
        return ((f"· {model.reason}", "bad"),)
    return ((f"· {model.last_failure.sentence}", "bad"),) if model.last_failure is not None else ()


def _who(view: View, model: ModelSnapshot) -> tuple[Span, ...]:
    look = LOOKS[model.state]
    words = state_words(model.state, model.level)
    return (
        (model.name, f"{view.colors[model.name]} bold"),
        (" ", ""),
        (f"{look.glyph} {words}", look.paint),
    )


def _cost(view: View, model: ModelSnapshot) -> tuple[Span, ...]:
    if model.operation is not None or model.state in (State.STARTING, State.WAKING, State.FALLING_ASLEEP):
        return (
            ((f"· {model.phase or ''} {model.progress or ''}".rstrip(" ·"), "warning"),)
            if model.phase
            else ()
        )
    prediction = view.prediction
    if prediction is None or prediction.target != model.name:
        return ()
    words = cost_words(prediction)
    return ((f"· {words}", "warning"),) if words else ()
