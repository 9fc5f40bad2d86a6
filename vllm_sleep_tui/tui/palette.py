"""The palette: every key, and every action on every model by its name, each in one line with its key."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.content import Content
from textual.types import IgnoreReturnCallbackType

from vllm_sleep_tui.tui.keys import keys_of
from vllm_sleep_tui.tui.screens.dashboard import Dashboard
from vllm_sleep_tui.tui.state.copies import KINDS


class _Command(NamedTuple):
    words: str
    beside: str
    """The key, or where the model comes from."""
    does: IgnoreReturnCallbackType
    is_offered: bool = True
    """Whether it is there before anything is typed: models times actions are too many."""


class Commands(Provider):
    """What the dashboard's keys do; other screens have few keys, and show them all."""

    async def discover(self) -> Hits:
        """The keys in the order of the help, then a switch to each model."""
        for command in self._commands():
            if command.is_offered:
                words = _line(Content(command.words), command.beside)
                yield DiscoveryHit(words, command.does, text=command.words)

    async def search(self, query: str) -> Hits:
        """What has the letters of the query, in their order."""
        matcher = self.matcher(query)
        for command in self._commands():
            if (score := matcher.match(command.words)) > 0:
                words = _line(matcher.highlight(command.words), command.beside)
                yield Hit(score, words, command.does, text=command.words)

    def _commands(self) -> Iterator[_Command]:
        dashboard = self.screen
        if not isinstance(dashboard, Dashboard):
            return
        snapshot = dashboard.fleet.snapshot()
        keys = keys_of(read_only=snapshot.read_only)
        for key in keys:
            yield _Command(key.help, key.cap, partial(dashboard.run_action, key.action))
        for model in snapshot.models:
            for key in filter(lambda key: key.named, keys):
                words, does = key.named.replace("{}", model.name), partial(dashboard.act_on, model.name)
                yield _Command(words, model.source, partial(does, key.action), key.action == "switch")
            for kind in KINDS:
                does = partial(dashboard.act_on, model.name, f"copy_of('{kind}')")
                yield _Command(f"Copy the {kind} of {model.name}", model.source, does, is_offered=False)


def _line(words: Content, beside: str) -> Content:
    return Content.assemble(words, "  ", (beside, "not bold $quiet"))
