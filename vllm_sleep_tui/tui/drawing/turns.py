"""The turns of a conversation as rows; what is added costs what is added, whatever stands before it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from vllm_sleep_tui.fleet.conversations import KeptTurn
from vllm_sleep_tui.fleet.snapshot import CallDelta, TokenChance
from vllm_sleep_tui.text import Cleaner, Pieces, clean, one_line
from vllm_sleep_tui.tui.drawing.code import Code
from vllm_sleep_tui.tui.drawing.document import Document
from vllm_sleep_tui.tui.drawing.flow import BLANK, Flow, Growing, PlainRow, Row
from vllm_sleep_tui.tui.drawing.paint import Line
from vllm_sleep_tui.tui.drawing.preview import Preview
from vllm_sleep_tui.units import took

THOUGHT_BEFORE: Line = (("┆ ", "faint"),)
CALL_BEFORE: Line = (("  ", ""),)


class FoldRow(PlainRow):
    """The row that tells of the reasoning; a click shows or hides it."""


class Turn:
    """Who speaks, in the colour of the speaker, and what is said."""

    def __init__(self, speaker: str, paint: str) -> None:
        self.speaker = speaker
        self.paint = paint
        self._width = 0
        self._rows: list[Sequence[Row]] = []

    def lay(self, width: int) -> int:
        """Lay it out for a width; how many rows that makes."""
        self._width = width
        self._rows = self._sections(width)
        return sum(map(len, self._rows))

    def row(self, number: int) -> Row:
        """One row, counted as the last `lay` did."""
        for section in self._rows:
            if number < len(section):
                return section[number]
            number -= len(section)
        return BLANK

    def code_near(self, row: int) -> Code | None:
        """The last block of code that begins at or before a row."""
        return None

    def _sections(self, width: int) -> list[Sequence[Row]]:
        raise NotImplementedError

    def _head(self) -> list[Row]:
        return [PlainRow(((self.speaker, f"{self.paint} bold"),))]


class Question(Turn):
    """What the person asked."""

    def __init__(self, text: str, shows: Sequence[Preview] = ()) -> None:
        super().__init__("you", "muted")
        self.text = text
        """As it was typed."""
        self.pictures = tuple(preview.picture for preview in shows)
        self._previews = shows
        self._shown = Growing("text")
        self._shown.feed(clean(text))

    def _sections(self, width: int) -> list[Sequence[Row]]:
        self._shown.lay(width)
        previews = [row for preview in self._previews for row in preview.rows(width)]
        return [self._head(), self._shown.rows, previews]


class Notice(Turn):
    """What happened to a model meanwhile; one that `passes` gives way to the next that follows at once."""

    def __init__(self, words: str, paint: str, *, passes: bool = False) -> None:
        super().__init__("", "border")
        self.passes = passes
        self._line: Line = ((clean(words), paint),)

    def _sections(self, width: int) -> list[Sequence[Row]]:
        return [Flow(self._line).rows(width)]


class Call:
    """What a model calls: the arguments grow as they come, and are shown as they were written."""

    def __init__(self, name: str = "", arguments: str = "", id: str = "") -> None:
        self.id = id
        self._name = [name]
        self._arguments = [arguments]
        self._cleaner = Cleaner()
        self._shown = Growing("accent", before=CALL_BEFORE)
        self._shown.feed(arguments)

    @property
    def name(self) -> str:
        """Of the function."""
        return one_line("".join(self._name))

    @property
    def arguments(self) -> str:
        """As far as they came, cleaned."""
        return "".join(self._arguments)

    def add(self, delta: CallDelta) -> None:
        """Take a piece."""
        self.id = self.id or delta.id
        self._name.append(delta.name)
        self._take(self._cleaner.feed(delta.arguments))

    def end(self) -> None:
        """No more comes."""
        self._take(self._cleaner.end())

    def _take(self, text: str) -> None:
        if text:
            self._arguments.append(text)
            self._shown.feed(text)

    @property
    def fault(self) -> str:
        """What is wrong with the arguments once they are there; empty where nothing is."""
        try:
            read = msgspec.json.decode(self.arguments)
        except (msgspec.DecodeError, RecursionError):
            return "the arguments are no JSON"
        return "" if isinstance(read, dict) else "the arguments are no JSON object"

    def rows(self, width: int, *, is_over: bool) -> list[Row]:
        """Its name, and the arguments below it."""
        self._shown.lay(width)
        head: Line = (("⚙ ", "accent"), ("calls ", "muted"), (self.name or "?", "text bold"))
        if is_over and (fault := self.fault):
            head = (*head, (f" · {fault}", "warning"))
        return [*Flow(head).rows(width), *(self._shown.rows if self.arguments else [])]


class Answer(Turn):
    """What a model answers; `add` takes pieces as they come, `flush` has them shown."""

    def __init__(self, model: str, paint: str) -> None:
        super().__init__(model, paint)
        self.model = model
        self.is_folded = True
        self.is_over = False
        self.thought_seconds: float | None = None
        self._began: float | None = None
        self._text = Pieces()
        self._reasoning = Pieces()
        self._cleaners = (Cleaner(), Cleaner())
        self._unshown = ""
        self._document = Document()
        self._thought: Growing | None = None
        self._unshown_thought = ""
        self._words = 0
        self.chances: list[TokenChance] = []
        """Of each token, where they were asked for."""
        self._calls: dict[int, Call] = {}
        self._has_calls_to_show = False
        self._above: Sequence[Line] = ()
        self._below: Sequence[Line] = ()

    @property
    def text(self) -> str:
        """What was answered so far, cleaned: what is shown is what is copied and kept."""
        return self._text.whole()

    @property
    def reasoning(self) -> str:
        """What was thought so far, cleaned."""
        return self._reasoning.whole()

    @property
    def calls(self) -> list[Call]:
        """What it calls, in order."""
        return list(self._calls.values())

    def share_calls(self, other: Answer) -> None:
        """Show what another answer calls, as it comes there."""
        self._calls = other._calls

    def call(self, deltas: Sequence[CallDelta]) -> None:
        """Take pieces of calls; they are shown with the next `flush`."""
        for delta in deltas:
            self._calls.setdefault(delta.index, Call()).add(delta)
            self._has_calls_to_show = True

    def add(self, text: str, reasoning: str = "") -> None:
        """Take a piece; it is shown with the next `flush`."""
        self._take(self._cleaners[0].feed(text), self._cleaners[1].feed(reasoning))

    def _take(self, text: str, reasoning: str) -> None:
        if reasoning:
            self._began = self._began or time.monotonic()
            self._reasoning.add(reasoning)
            self._unshown_thought += reasoning
        if text:
            if self._began is not None and self.thought_seconds is None:
                self.thought_seconds = time.monotonic() - self._began
            self._text.add(text)
            self._unshown += text

    def flush(self) -> bool:
        """Have it shown; False if nothing came."""
        has_calls, self._has_calls_to_show = self._has_calls_to_show, False
        if not self._unshown and not self._unshown_thought:
            return has_calls
        text, self._unshown = self._unshown, ""
        thought, self._unshown_thought = self._unshown_thought, ""
        self._document.feed(text)
        self._words += len(thought.split())
        if self._thought is not None:
            self._thought.feed(thought)
        return True

    def end(self) -> None:
        """No more comes."""
        self._take(self._cleaners[0].end(), self._cleaners[1].end())
        for call in self.calls:
            call.end()
        if self._began is not None and self.thought_seconds is None:
            self.thought_seconds = time.monotonic() - self._began
        self.flush()
        self._document.end()
        self.is_over = True

    def say(self, *lines: Line) -> None:
        """Tell below it how it goes or went, in place of what was told."""
        self._below = lines

    def say_above(self, *lines: Line) -> None:
        """Tell above it what came before the first word."""
        self._above = lines

    @property
    def above(self) -> Sequence[Line]:
        """What is told above it."""
        return self._above

    def fold(self) -> None:
        """Hide the reasoning, or show it."""
        self.is_folded = not self.is_folded
        if self.is_folded:
            self._thought = None  # what is not shown is not laid out
        else:
            self._thought = Growing("muted italic", before=THOUGHT_BEFORE)
            self._thought.feed(self.reasoning)
            self._words, self._unshown_thought = len(self.reasoning.split()), ""

    def _sections(self, width: int) -> list[Sequence[Row]]:
        self._document.lay(width)
        top = self._head()
        for line in self._above:
            top += Flow(line).rows(width)
        thought: list[Row] = []
        if self._reasoning:
            top.append(FoldRow((("▸ " if self.is_folded else "▾ ", "accent"), (self._fold_words(), "muted"))))
            if self._thought is not None:
                self._thought.lay(width)
                thought = self._thought.rows
        tail = self._document.tail
        gap: list[Row] = [BLANK] if self._reasoning and (self._document.rows or tail) else []
        bottom: list[Row] = []
        for call in self.calls:
            bottom += call.rows(width, is_over=self.is_over)
        for line in self._below:
            bottom += Flow(line).rows(width)
        return [top, thought, gap, self._document.rows, tail, bottom]

    def _fold_words(self) -> str:
        if self.thought_seconds is None and self._began is not None:
            return f"thinks… {self._words} words"
        seconds = "" if self.thought_seconds is None else f" for {took(self.thought_seconds)}"
        return f"thought{seconds} · {self._words} words"

    def restore(self, kept: KeptTurn) -> None:
        """Put in what was said in an earlier run."""
        text, reasoning, self.thought_seconds = kept.text, kept.reasoning, kept.thought_seconds
        self.chances = list(kept.chances)
        self._calls = {at: Call(call.name, call.arguments, call.id) for at, call in enumerate(kept.calls)}
        self._text, self._reasoning = Pieces(text), Pieces(reasoning)
        self._words = len(reasoning.split())
        self._document.feed(text)
        self._document.end()
        self.is_over = True

    def code_near(self, row: int) -> Code | None:
        """The last block of code that begins at or before a row."""
        codes = self._document.codes
        above = sum(map(len, self._rows[:3]))
        before = [code for start, code in codes if start + above <= row]
        return before[-1] if before else None
