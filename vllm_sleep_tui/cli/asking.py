"""The options by which a verb says how a model is asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.config.parameters import Parameters, parameters
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.paths import here

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.conversations import Conversations

Command = TypeVar("Command", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--preset", metavar="NAME", help="A way to ask from the config or the panel."),
    click.option("--system", metavar="TEXT", help="What the model is told before everything else."),
    click.option("--temperature", metavar="NUMBER", help="0 is the likeliest word each time."),
    click.option("--top-p", metavar="NUMBER", help="Only the likeliest words that make up this share."),
    click.option("--max-tokens", metavar="N", help="The longest answer."),
    click.option("--seed", metavar="N", help="The same seed, the same answer, as far as the server can."),
    click.option("--stop", metavar="TEXT", multiple=True, help="What ends the answer; may be repeated."),
    click.option("--schema", metavar="FILE", help="A JSON schema of the answer; {} is any JSON object."),
    click.option("--logprobs", metavar="N", help="With --json, N alternatives of each token."),
)


def asking_options(command: Command) -> Command:
    """Give a verb these options; it takes them as keywords, for `asked_with`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def asked_with(
    loaded: LoadedConfig, store: Conversations, options: Mapping[str, Any], before: Parameters
) -> Parameters:
    """What the options say, in place of what the preset does, or the conversation so far without one.

    Raises UsageError.
    """
    values = dict(options)
    name = values.pop("preset")
    base = before if name is None else _preset(loaded, store, name)
    given = parameters(values | {"stop": list(values["stop"]) or None}, here())
    changed = {field: getattr(given, field) for field in values if values[field] not in (None, ())}
    return msgspec.structs.replace(base, **changed)


def _preset(loaded: LoadedConfig, store: Conversations, name: str) -> Parameters:
    known = {**store.presets().result(), **loaded.config.presets}
    if name not in known:
        there = f"There are: {', '.join(known)}." if known else "Add one to the config, under `presets:`."
        raise UsageError(f"There is no preset {name!r}.", there)
    return known[name]
