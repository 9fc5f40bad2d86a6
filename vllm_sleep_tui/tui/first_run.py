"""The one screen of somebody who has no config yet: what is on this machine, and which of it to use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from vllm_sleep_tui.fleet.survey import CachedModel, Surroundings, VllmEnvironment, vllm_version
from vllm_sleep_tui.tui.theme import DEFAULT_THEME, Palette, package_folder, read_theme, textual_theme
from vllm_sleep_tui.tui.widgets.bands import KeyLine
from vllm_sleep_tui.units import GIB, MIB, counted, gib

_KEYS = "⏎ write it and start  space choose  tab next part  d demo  q quit"
_TYPING = "⏎ write the config and start   esc leave the input"


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """A model that may be taken into the config."""

    model: CachedModel
    is_chosen: bool
    """Whether it is taken unless the person says otherwise."""
    note: str = ""
    """What speaks against it, or what taking it costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the person chose; a demo has neither."""

    environment: VllmEnvironment | None = None
    models: tuple[CachedModel, ...] = ()
    is_demo: bool = False


class _Choices(OptionList):
    """Enter is for the whole screen; what stands under the cursor is chosen otherwise."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "app.write", show=False)]


class FirstRun(App[Wish]):
    """Its result is a wish, or None of somebody who left."""

    TITLE = "vllm-sleep-tui"
    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: $background; }
    #head, #keys { height: 1; padding: 0 1; background: $panel; }
    #head { dock: top; text-style: bold; }
    #foot { dock: bottom; height: auto; }
    #keys { color: $quiet; }
    #parts { padding: 0 1; }
    .part { border: round $line; border-title-color: $quiet; height: auto; max-height: 14; padding: 0 1;
      background: $background; }
    .part:focus { border: round $accent; border-title-color: $accent; }
    #words { color: $quiet; height: auto; margin: 1 1 0 1; }
    #wrong { color: $error; height: auto; margin: 0 1; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "write", show=False),
        Binding("space", "choose", show=False),
        Binding("d", "demo", show=False),
        Binding("q", "leave", show=False),
        Binding("escape", "leave_input", show=False),
    ]

    def __init__(self, machine: Surroundings, offers: Sequence[Offer], target: Path) -> None:
        super().__init__()
        self._machine = machine
        self._offers = offers
        self._target = target
        self._taken = {number for number, offer in enumerate(offers) if offer.is_chosen}
        self._doubted: Path | None = None
        """The program that was said to be none of vLLM's."""
        theme = read_theme(package_folder() / f"{DEFAULT_THEME}.yaml")
        self.register_theme(textual_theme(theme))
        self.theme = theme.name
        self.palette = Palette(theme)

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """The names of ours that the styles use, before a theme is chosen."""
        return {"line": "#444444", "quiet": "#888888"}

    def compose(self) -> ComposeResult:
        """The vLLMs, the GPUs, the models, and what will be done."""
        yield Static("vllm-sleep-tui   no config yet: this was found here", id="head")
        with VerticalScroll(id="parts", can_focus=False):
            found = [
                Option(Text(f"{one.version or 'version unknown':<16}{one.command}  ({one.place})"))
                for one in self._machine.environments
            ]
            if found:
                environments = _Choices(*found, id="environments", classes="part")
                environments.border_title = "vLLM: the one to use"
                yield environments
            else:
                binary = Input(placeholder="/home/me/vllm/bin/vllm", id="binary", classes="part")
                binary.border_title = "vLLM: none was found; where is its binary?"
                yield binary
            gpus = [f"{gpu.index}  {gpu.name}  {gib(gpu.total_bytes)}" for gpu in self._machine.gpus]
            none = self._machine.gpu_note or "Sleeping frees memory on a GPU only."
            cards = Static("\n".join(gpus) or none, markup=False, classes="part")
            cards.border_title = counted(len(gpus), "GPU") if gpus else "No GPU"
            yield cards
            models = _Choices(*map(self._row, range(len(self._offers))), id="models", classes="part")
            models.border_title = "Models: those to switch between"
            yield models
            yield Static("", markup=False, id="words")
        with Vertical(id="foot"):
            yield Static("", markup=False, id="wrong")
            yield KeyLine(_KEYS, id="keys")

    def on_mount(self) -> None:
        """Begin where something is to be chosen."""
        if self._machine.environments:
            best = self._machine.environments.index(self._machine.best_environment or self._environments[0])
            self.query_one("#environments", OptionList).highlighted = best
            models = self.query_one("#models", OptionList)
            models.highlighted = 0
            models.focus()
        self._say()

    @property
    def _environments(self) -> tuple[VllmEnvironment, ...]:
        return self._machine.environments

    def _row(self, number: int) -> Text:
        offer = self._offers[number]
        size = offer.model.bytes
        words = f"  {gib(size) if size >= GIB / 10 else f'{size / MIB:.0f} MiB'}" if size else ""
        mark = "●" if number in self._taken else "○"
        return Text(f"{mark} {offer.model.name}{words}{f'  {offer.note}' if offer.note else ''}")

    def _say(self) -> None:
        """What enter would do."""
        chosen = self._chosen()
        smallest = min(chosen, key=lambda model: model.bytes, default=None)
        words = f"Starts {smallest.name}" if smallest else ""
        words += "; the others wait for u or ⏎." if len(chosen) > 1 else "."
        words += f"\nWrites {counted(len(chosen), 'model')} to {self._target}"
        self.query_one("#words", Static).update(words if chosen else "Choose at least one model (space).")

    def on_descendant_focus(self) -> None:
        """Letters are text in an input."""
        self.query_one(KeyLine).say(_TYPING if isinstance(self.focused, Input) else _KEYS)

    def _chosen(self) -> tuple[CachedModel, ...]:
        return tuple(self._offers[number].model for number in sorted(self._taken))

    def on_option_list_option_selected(self) -> None:
        """A click does what the space bar does."""
        self.action_choose()

    def on_input_submitted(self) -> None:
        """Enter in the input, which comes in its turn: after the letters before it."""
        self.action_write()

    def on_input_changed(self) -> None:
        """What was wrong with the last words is not wrong with these."""
        self._complain("")

    def action_choose(self) -> None:
        """Take the model under the cursor, or leave it."""
        models = self.query_one("#models", OptionList)
        if self.focused is models and (number := models.highlighted) is not None:
            self._taken ^= {number}
            models.replace_option_prompt_at_index(number, self._row(number))
            self._say()

    def action_write(self) -> None:
        """Take what is chosen."""
        environment, models = self._environment(), self._chosen()
        if environment is None:
            self._complain(self._why_none())
        elif not models:
            self._complain("Choose at least one model with the space bar.")
        elif _is_doubtful(environment) and environment.command != self._doubted:
            self._doubted = environment.command
            self._complain(
                f"No vLLM is found beside {environment.command}; ⏎ once more takes it all the same."
            )
        else:
            self.exit(Wish(environment=environment, models=models))

    def _why_none(self) -> str:
        typed = self.query_one("#binary", Input).value.strip()
        if not typed:
            return "Name the vllm binary of the environment that holds vLLM."
        is_folder = Path(os.path.expanduser(typed)).is_dir()
        return (
            f"{typed} is a folder: name the binary." if is_folder else f"There is no such program: {typed}."
        )

    def _environment(self) -> VllmEnvironment | None:
        if self._environments:
            return self._environments[self.query_one("#environments", OptionList).highlighted or 0]
        # A path in a config counts from the config's folder; what is typed, from the current one.
        typed = Path(os.path.abspath(os.path.expanduser(self.query_one("#binary", Input).value.strip())))
        if not typed.is_file():
            return None
        return VllmEnvironment(command=typed, version=vllm_version(typed), place="named")

    def _complain(self, words: str) -> None:
        self.query_one("#wrong", Static).update(words)

    def action_demo(self) -> None:
        """Look at the demo instead."""
        self.exit(Wish(is_demo=True))

    def action_leave(self) -> None:
        """Leave, nothing written."""
        self.exit(None)

    def action_leave_input(self) -> None:
        """Letters are keys again."""
        self.query_one("#models").focus()


def _is_doubtful(environment: VllmEnvironment) -> bool:
    """Whether nothing says that it is vLLM; a script around it is called vllm as a rule."""
    return environment.version is None and environment.command.name != "vllm"
