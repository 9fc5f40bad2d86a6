"""How the conversation's next questions are asked: each parameter a line, presets by name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, ClassVar

import msgspec
from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Label, Static, TextArea

from vllm_sleep_tui.config.parameters import ParameterError, Parameters, parameters
from vllm_sleep_tui.paths import here
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.tui.screens.dialogs import Choice, Chooser, KeyedBox, Question

_LINES = {
    "temperature": ("temperature", "0 to 100"),
    "top_p": ("top_p", "above 0, up to 1"),
    "max_tokens": ("max tokens", "of the answer"),
    "seed": ("seed", "a whole number"),
    "stop": ("stop", 'a text, or ["one", "two"]'),
    "schema": ("JSON schema", "a file, or {…}; {} is any JSON object"),
    "tools": ("tools", "a file, or […] as OpenAI has them"),
    "logprobs": ("logprobs", "alternatives of each token, 0 to 20"),
}
"""Of each parameter that is one line: its title, and what is written there."""
_KEYS = "esc cancels  ⏎ take  ^o presets  ^s keep as preset  ^g delete it  ^r clear"
_AS_JSON = ("stop", "schema", "tools")


class SystemPrompt(TextArea):
    """Several lines, begun as in the chat's input; ↓ in the last one leaves it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+j,alt+enter,shift+enter", "newline", "new line", show=False)
    ]

    def action_newline(self) -> None:
        """Begin a line."""
        self.replace("\n", *self.selection, maintain_selection_offset=False)

    def action_cursor_down(self, select: bool = False) -> None:
        """A line down, or to the next field."""
        if not select and self.navigator.is_last_wrapped_line(self.cursor_location):
            self.screen.focus_next()
        else:
            super().action_cursor_down(select)


class ParametersScreen(ModalScreen[Parameters | None]):
    """A form; its result is what to ask with from now on. An empty line is the server's to choose."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "cancel", "cancel", show=False),
        Binding("enter", "take", "take", show=False, priority=True),
        Binding("ctrl+o", "choose", "presets", show=False),
        Binding("ctrl+s", "keep", "keep", show=False),
        Binding("ctrl+g", "forget", "delete", show=False),
        Binding("ctrl+r", "clear", "clear", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    def __init__(
        self,
        model: str,
        given: Parameters,
        presets: Callable[[], Future[dict[str, Parameters]]],
        of_config: Mapping[str, Parameters],
        keep: Callable[[str, Parameters], Future[bool]],
        forget: Callable[[str], Future[bool]],
    ) -> None:
        super().__init__()
        self._model = model
        self._given = given
        self._presets = presets
        self._of_config = of_config
        self._keep = keep
        self._forget = forget
        self._filled: dict[str, Any] = {}
        """What stood in the form when it was opened."""

    def compose(self) -> ComposeResult:
        """A line each, and what is wrong with one."""
        with KeyedBox(_KEYS, classes="dialog wide") as box:
            box.border_title = Text(f"How {self._model} is asked in this conversation").markup
            with VerticalScroll(id="parameters", can_focus=False):
                with Horizontal():
                    yield Label("system")
                    yield SystemPrompt(
                        id="system",
                        placeholder="alt+⏎ new line",
                        compact=True,
                        tab_behavior="focus",
                        highlight_cursor_line=False,
                    )
                for name, (title, hint) in _LINES.items():
                    with Horizontal():
                        yield Label(title)
                        yield Input(id=name, placeholder=hint, compact=True, select_on_focus=False)
                with Horizontal():
                    yield Label("preset")
                    yield Input(id="preset", placeholder="a name, to keep these with ^s", compact=True)
            yield Static(id="wrong", markup=False)

    def on_mount(self) -> None:
        """What holds now."""
        self._fill(self._given)
        self._filled = self._written()
        self.query_one(SystemPrompt).focus()

    def _fill(self, given: Parameters) -> None:
        self.query_one(SystemPrompt).text = given.system or ""
        for name in _LINES:
            self.query_one(f"#{name}", Input).value = _as_text(name, getattr(given, name))
        self._tell("")

    def _tell(self, words: str) -> None:
        self.query_one("#wrong", Static).update(words)

    def _written(self) -> dict[str, Any]:
        values: dict[str, Any] = {name: self.query_one(f"#{name}", Input).value for name in _LINES}
        return {**values, "system": self.query_one(SystemPrompt).text.strip()}

    def _read(self) -> Parameters | None:
        """What is written; None after telling what is wrong with it."""
        try:
            return parameters(self._written(), here())
        except ParameterError as error:
            self._tell(f"{error.what}\n{error.cure}")
            self.query_one(f"#{error.name}").focus()
            return None

    def action_take(self) -> None:
        """Take what is written."""
        if (read := self._read()) is not None:
            self.dismiss(read)

    @work
    async def action_cancel(self) -> None:
        """Leave it as it was, after a question where something was written."""
        if self._written() != self._filled:
            words = "The conversation goes on as it was asked before."
            question = Question("Drop what was written here?", words, [Choice("y", "Drop it", "drop")])
            if not await self.app.push_screen_wait(question):
                return
        self.dismiss(None)

    @work
    async def action_choose(self) -> None:
        """Fill in a preset of the config or of the panel."""
        kept = await asyncio.wrap_future(self._presets())
        known = {**kept, **self._of_config}
        if not known:
            self._tell("There is no preset.\nKeep one here: a name in the last line, then ^s.")
            return
        rows = [(name, one_line(preset.words())) for name, preset in known.items()]
        chosen = await self.app.push_screen_wait(Chooser("Presets", rows, "⏎ fills in, esc does not"))
        if chosen is not None:
            self._fill(known[chosen])
            self.query_one("#preset", Input).value = chosen

    @work
    async def action_keep(self) -> None:
        """Keep what is written as a preset."""
        name, read = one_line(self.query_one("#preset", Input).value), self._read()
        if read is None:
            return
        if not name:
            self._tell("The preset has no name.\nWrite one in the last line.")
            self.query_one("#preset").focus()
        elif name in self._of_config:
            self._tell(f"{name} is a preset of the config, which stays as it is.\nWrite another name.")
        elif await asyncio.wrap_future(self._keep(name, read)):
            self._tell(f"Kept as {name}.")
        else:
            self._tell(f"{name} cannot be kept.\nSee whether the state folder is full or broken: doctor.")

    @work
    async def action_forget(self) -> None:
        """Delete the preset of the name in the last line, once the person says so."""
        name = one_line(self.query_one("#preset", Input).value)
        if name in self._of_config:
            self._tell(f"{name} is a preset of the config.\nTake it out of that file.")
            return
        if name not in await asyncio.wrap_future(self._presets()):
            self._tell("No preset of that name was kept here.\nWrite one in the last line: ^o has them.")
            return
        words = "It is gone for good; this conversation and others go on as they are."
        question = Question(f"Delete the preset {name}?", words, [Choice("y", "Delete it", "delete")])
        if not await self.app.push_screen_wait(question):
            return
        deleted = await asyncio.wrap_future(self._forget(name))
        self._tell(f"The preset {name} is deleted." if deleted else f"There was no preset {name} any more.")

    def action_clear(self) -> None:
        """Everything is the server's to choose again."""
        self._fill(Parameters())


def _as_text(name: str, value: Any) -> str:
    if value is None or value == ():
        return ""
    if name == "stop" and len(value) == 1 and not value[0].startswith("[") and value[0].isprintable():
        return str(value[0])
    return msgspec.json.encode(value).decode() if name in _AS_JSON else f"{value}"
