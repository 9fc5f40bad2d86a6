"""How likely each token of an answer was, and what else might have stood there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Label, OptionList
from textual.widgets.option_list import Option

from vllm_sleep_tui.fleet.snapshot import TokenChance
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.units import counted

BAR_CELLS = 10
TOKEN_CELLS = 16


class ChancesScreen(ModalScreen[None]):
    """A row for each token, in the order of the answer."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,i", "dismiss", "close", show=False)]

    def __init__(self, model: str, chances: Sequence[TokenChance]) -> None:
        super().__init__()
        self._model = model
        self._chances = chances

    def compose(self) -> ComposeResult:
        """What it comes to, then the rows."""
        logs = [min(0.0, chance.logprob) for chance in self._chances]
        least = min(self._chances, key=lambda chance: chance.logprob)
        average = math.exp(sum(logs) / len(logs))
        words = (
            f"{counted(len(logs), 'token')}, on average {average * 100:.0f} % likely; "
            f"the least likely: {_shown(least.token)} {_percent(least.logprob)}"
        )
        with Vertical(classes="dialog wide") as box:
            box.border_title = Text(f"How likely {self._model} found its words").markup
            box.border_subtitle = "esc closes"
            yield Label(Text(words), classes="words")
            yield OptionList(*(Option(_row(chance)) for chance in self._chances))

    def on_mount(self) -> None:
        """Begin at the first."""
        self.query_one(OptionList).focus()


def _row(chance: TokenChance) -> Text:
    bar = "█" * round(math.exp(min(0.0, chance.logprob)) * BAR_CELLS)
    others = [other for other in chance.top_logprobs if other.token != chance.token]
    return Text.assemble(
        (f"{_shown(chance.token):<{TOKEN_CELLS}.{TOKEN_CELLS}}", "bold"),
        f" {_percent(chance.logprob):>6} {bar:<{BAR_CELLS}}  ",
        ("  ".join(f"{_shown(other.token)} {_percent(other.logprob)}" for other in others), "dim"),
        no_wrap=True,
        overflow="ellipsis",
    )


def _shown(token: str) -> str:
    """A token with its blanks and line ends to be seen."""
    return clean(token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")) or "?"


def _percent(logprob: float) -> str:
    share = math.exp(min(0.0, logprob)) * 100
    return f"{share:.0f} %" if share >= 1 else f"{share:.2f} %"
