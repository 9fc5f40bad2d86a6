"""Questions and help, over the dashboard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.events import Key, Resize
from textual.screen import ModalScreen
from textual.widgets import Button, Label, OptionList, Static
from textual.widgets.option_list import Option

from vllm_sleep_tui.tui.keys import ELSEWHERE, keys_of
from vllm_sleep_tui.tui.widgets.bands import keys_that_fit
from vllm_sleep_tui.tui.words import GLOSSARY

ROOMY_WIDTH = 80
"""Terminals as wide as this have room for a question with wide margins."""
LINE_WIDTH = 70
"""Columns in the widest dialog."""
_CANCEL = "esc  Cancel"
_CORNERS_WIDTH = 6
"""Of a border, where no title can be."""


class KeyedBox(Vertical):
    """A dialog's box with its keys in the lower border, whole ones, as many as fit."""

    def __init__(self, keys: str, *, classes: str) -> None:
        super().__init__(classes=classes)
        self._keys = keys

    def on_resize(self) -> None:
        """Fit them."""
        self.border_subtitle = keys_that_fit(self._keys, self.outer_size.width - _CORNERS_WIDTH)


class Choice(NamedTuple):
    """One answer to a question."""

    key: str
    words: str
    value: str


class Question(ModalScreen[str | None]):
    """A question with a few answers; escape is none of them."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "cancel", show=False),
        Binding("left,up", "app.focus_previous", show=False),
        Binding("right,down", "app.focus_next", show=False),
    ]

    def __init__(self, title: str, text: str, choices: Sequence[Choice]) -> None:
        super().__init__()
        self._title_text = title
        self._text = text
        self._choices = choices

    def compose(self) -> ComposeResult:
        """The question and its answers, the harmless one in focus."""
        with Vertical(classes="dialog") as box:
            box.border_title = Text(self._title_text).markup
            yield Label(Text(self._text), classes="words")
            with Horizontal(classes="choices"):
                for choice in self._choices:
                    yield Button(Text(f"{choice.key}  {choice.words}"), name=choice.value, compact=True)
                yield Button(Text(_CANCEL), name="", compact=True, id="cancel")

    def on_mount(self) -> None:
        """Enter alone never does harm."""
        self.query_one("#cancel").focus()

    def on_resize(self, event: Resize) -> None:
        """Draw in where the terminal is narrower, and stack answers that one line cannot hold."""
        self.set_class(event.size.width < ROOMY_WIDTH, "-narrow")
        words = [f"{choice.key}  {choice.words}" for choice in self._choices] + [_CANCEL]
        taken = sum(len(word) + 6 for word in words) - 2  # padding, and a gap between them
        self.set_class(taken > min(LINE_WIDTH, event.size.width - 8), "-stacked")

    def on_key(self, event: Key) -> None:
        """A choice's own key picks it."""
        for choice in self._choices:
            if event.key == choice.key:
                event.stop()
                self.dismiss(choice.value)

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """A pressed button picks its answer."""
        self.dismiss(event.button.name or None)


class Help(ModalScreen[None]):
    """Every key and what it does, then the words of the screen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark", "dismiss", "close", show=False)
    ]

    def __init__(self, *, read_only: bool = False) -> None:
        super().__init__()
        self._read_only = read_only

    def compose(self) -> ComposeResult:
        """The keys, then the words."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", justify="right")
        for key in keys_of(read_only=self._read_only):
            table.add_row(Text(key.cap), Text(key.help))
        for cap, words in ELSEWHERE:
            table.add_row(Text(cap), Text(words))
        table.add_row(Text(""), Text(""))
        for word, meaning in GLOSSARY:
            table.add_row(Text(word), Text(meaning))
        with VerticalScroll(classes="dialog wide") as box:
            box.border_title = "Keys and words"
            box.border_subtitle = "esc closes"
            yield Static(table)


class Chooser(ModalScreen[str | None]):
    """One of these names, each with a word beside it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss", "cancel", show=False),
        Binding("j", "step(1)", "next", show=False),
        Binding("k", "step(-1)", "previous", show=False),
    ]

    def __init__(self, title: str, names: Sequence[tuple[str, str]], hint: str) -> None:
        super().__init__()
        self._title_text = title
        self._names = names
        self._hint = hint

    def compose(self) -> ComposeResult:
        """One line a name."""
        with Vertical(classes="dialog") as box:
            box.border_title = Text(self._title_text).markup
            box.border_subtitle = self._hint
            options = [
                Option(Text.assemble((name, "bold"), f"  {words}"), id=str(number))
                for number, (name, words) in enumerate(self._names)
            ]
            yield OptionList(*options)

    def on_mount(self) -> None:
        """Begin at the first."""
        self.query_one(OptionList).focus()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """That one."""
        self.dismiss(self._names[event.option_index][0])

    def action_step(self, step: int) -> None:
        """The next name, round and round."""
        options = self.query_one(OptionList)
        options.highlighted = ((options.highlighted or 0) + step) % len(self._names)


class ThemeChooser(ModalScreen[str | None]):
    """The themes; the one under the cursor is tried on at once, escape puts the old one back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "cancel", show=False),
        Binding("t,j", "next(1)", "next", show=False),
        Binding("k", "next(-1)", "previous", show=False),
    ]

    def __init__(self, names: Sequence[str], current: str) -> None:
        super().__init__()
        self._names = names
        self._current = current

    def compose(self) -> ComposeResult:
        """One line a theme."""
        with Vertical(classes="dialog small") as box:
            box.border_title = "Theme"
            box.border_subtitle = "⏎ keeps, esc undoes"
            options = OptionList(*(Option(Text(name), id=name) for name in self._names))
            yield options

    def on_mount(self) -> None:
        """Begin at the theme in use."""
        options = self.query_one(OptionList)
        options.highlighted = self._names.index(self._current)
        options.focus()

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        """Try it on."""
        self.app.theme = self._names[event.option_index]

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Keep it."""
        self.dismiss(self._names[event.option_index])

    def action_next(self, step: int) -> None:
        """The next theme, round and round."""
        options = self.query_one(OptionList)
        options.highlighted = ((options.highlighted or 0) + step) % len(self._names)

    def action_cancel(self) -> None:
        """Put the old one back."""
        self.app.theme = self._current
        self.dismiss(None)
