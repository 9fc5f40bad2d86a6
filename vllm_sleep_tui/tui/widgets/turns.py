"""The turns of a conversation on the screen: Markdown laid out block by block as it streams in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Markdown, MarkdownElement
from rich.segment import Segment
from rich.syntax import Syntax
from rich.text import Text
from textual.app import ComposeResult
from textual.color import Color
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Static

from vllm_sleep_tui.text import clean

_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


class Blocks:
    """Takes text as it streams in; gives finished blocks, and the tail that may still change."""

    def __init__(self) -> None:
        self.tail = ""
        self._fence = ""
        self._scanned = 0
        self._blank_at: int | None = None

    def feed(self, text: str) -> list[str]:
        """The blocks that this text finished; the rest is in `tail`."""
        self.tail += text
        finished: list[str] = []
        while (end := self.tail.find("\n", self._scanned)) >= 0:
            line = self.tail[self._scanned : end]
            if self._blank_at is not None and line.strip() and not line[0].isspace():
                finished.append(self.tail[: self._blank_at].rstrip("\n"))
                self.tail = self.tail[self._scanned :]
                end -= self._scanned
                self._blank_at = None
            self._scanned = end + 1
            self._see(line)
        return finished

    def _see(self, line: str) -> None:
        fence = _FENCE.match(line)
        if self._fence:
            if fence and fence[1].startswith(self._fence) and not line.strip(" `~"):
                self._fence = ""
        elif fence:
            self._fence = fence[1]
        if line.strip():
            # An indented line after a blank one still belongs to the list item above it.
            self._blank_at = None
        elif not self._fence and self._blank_at is None and self.tail[: self._scanned].strip():
            self._blank_at = self._scanned


class _Code(CodeBlock):
    """A block of code on the ground that the theme has for it, without blank lines around."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        style = console.get_style("markdown.code_block")
        ground = style.bgcolor.name if style.bgcolor is not None else "default"
        is_dark = style.bgcolor is None or style.bgcolor.get_truecolor()[1] < 128
        theme = "github-dark" if is_dark else "friendly"
        code = str(self.text).rstrip()
        yield Syntax(
            code, self.lexer_name, theme=theme, word_wrap=True, padding=(0, 1), background_color=ground
        )


class _Markdown(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "fence": _Code,
        "code_block": _Code,
    }


class _Block:
    """One block of Markdown, without the blank lines that some kinds of block bring along."""

    def __init__(self, source: str) -> None:
        # Links stay text: an address that is hidden behind other words is not for a model to choose.
        self._markdown = _Markdown(_shown(source), hyperlinks=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options.reset_height(), pad=False)
        while lines and _is_blank(lines[-1]):
            lines.pop()
        while lines and _is_blank(lines[0]):
            lines.pop(0)
        for line in lines:
            yield from line
            yield Segment.line()


def _shown(text: str) -> str:
    return clean(text).expandtabs(4)


def _is_blank(line: list[Segment]) -> bool:
    return not any(segment.text.strip() for segment in line)


class Turn(Vertical):
    """Who speaks, in the colour of the speaker, and what is said."""

    def __init__(self, speaker: str, color: str) -> None:
        super().__init__(classes="turn")
        self._speaker = speaker
        self._color = color

    def compose(self) -> ComposeResult:
        """The name; the text follows below."""
        name = Static(Text(self._speaker, style="bold"), classes="speaker")
        name.styles.color = Color.parse(self._color)
        self.styles.border_left = ("outer", Color.parse(self._color))
        yield name


class Question(Turn):
    """What the person asked."""

    def __init__(self, text: str, color: str) -> None:
        super().__init__("you", color)
        self._text = text

    def compose(self) -> ComposeResult:
        """The name and the words as they were typed."""
        yield from super().compose()
        yield Static(Text(_shown(self._text)))


class Answer(Turn):
    """What a model answers: finished blocks laid out once, the tail as plain text."""

    def __init__(self, model: str, color: str) -> None:
        super().__init__(model, color)
        self.text = ""
        self._blocks = Blocks()
        self._unshown = ""
        self._reasoning = ""
        self._shown_reasoning = ""
        self._tail = Static("", classes="tail", markup=False)
        self._thought = Static("", classes="reasoning", markup=False)
        self._note = Static("", classes="note", markup=False)

    def compose(self) -> ComposeResult:
        """The name, the reasoning, the text, and a line on how it went."""
        yield from super().compose()
        self._thought.display = False
        yield self._thought
        yield self._tail
        yield self._note

    def add(self, text: str, reasoning: str = "") -> None:
        """Take a piece; it is shown with the next `flush`."""
        self.text += text
        self._unshown += text
        self._reasoning += reasoning

    def flush(self) -> None:
        """Show what came since the last time."""
        if self._reasoning != self._shown_reasoning:
            self._shown_reasoning = self._reasoning
            self._thought.display = True
            self._thought.update(Text(_shown(self._reasoning).strip()))
        if not self._unshown:
            return
        finished = self._blocks.feed(self._unshown)
        self._unshown = ""
        self._mount_blocks(finished)
        self._tail.update(Text(_shown(self._blocks.tail).strip("\n")))

    def finish(self, note: Text) -> None:
        """Lay out the rest, and say how it went."""
        self.flush()
        if self._blocks.tail.strip():
            self._mount_blocks([self._blocks.tail])
        self._tail.display = False
        self.say(note)

    def say(self, note: Text) -> None:
        """Replace the line on how it goes."""
        self._note.update(note)

    def _mount_blocks(self, blocks: Iterable[str]) -> None:
        widgets = [Static(_Block(block), classes="block") for block in blocks if block.strip()]
        if widgets:
            self.mount(*widgets, before=self._tail)


class Conversation(VerticalScroll, can_focus=True):
    """All turns with one model, and what the model is told of them."""

    def __init__(self, model: str) -> None:
        super().__init__(id=f"with-{model.encode().hex()}")
        self.messages: list[dict[str, Any]] = []
        self.answer: Answer | None = None
        """The last one."""

    def compose(self) -> ComposeResult:
        """A word on what this is, until something is said."""
        yield Static("Nothing said yet. c goes to the input below.", classes="hint", markup=False)

    def on_mount(self) -> None:
        """Stay at the end while text comes in."""
        self.anchor()

    def ask(self, question: str, *, model: str, color: str, own_color: str) -> Answer:
        """Add a question and an empty answer to it."""
        self.messages.append({"role": "user", "content": question})
        self.answer = Answer(model, color)
        self.query(".hint").remove()
        self.mount(Question(question, own_color), self.answer)
        self.anchor()
        return self.answer

    def close_answer(self) -> None:
        """Keep what was said for the next question; a question without any answer is taken back."""
        if self.answer is not None and self.answer.text:
            self.messages.append({"role": "assistant", "content": self.answer.text})
        elif self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()
