"""`logs`: what a server said."""

from __future__ import annotations

import asyncio
import time

import click

from vllm_sleep_tui.cli.common import WholeNumber, complete_model, config_option, load_config, put
from vllm_sleep_tui.errors import OperationError
from vllm_sleep_tui.fleet.survey import log_of
from vllm_sleep_tui.paths import state_dir

POLL_SECONDS = 0.2


@click.command()
@click.argument("name", shell_complete=complete_model)
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said from now on, until Ctrl-C.")
@click.option("-n", "count", type=WholeNumber(0), default=100, show_default=True, help="How many lines.")
@config_option
@click.pass_context
def logs(ctx: click.Context, name: str, follow: bool, count: int) -> None:
    """Show the last lines of a model's log.

    If its server died and was started again, the last lines of the one that died come first, once.
    """
    loaded = load_config(ctx, only_looks=True)
    loaded.model(name)
    log = log_of(loaded, state_dir(), name)
    if not log.path.exists() and not follow:
        raise OperationError(f"{name} has no log yet.", f"Start it: vllm-sleep-tui start {name}")
    try:
        lines = [*log.last_words(count), *log.last(count)]
        asyncio.run(log.seen())
        while True:
            if lines:
                put("\n".join(lines))
            if not follow:
                return
            time.sleep(POLL_SECONDS)
            lines = log.read_new()
    except OSError as error:
        raise OperationError(
            f"The log {log.path} cannot be read: {error.strerror}.",
            "Put away what has its name; the next start begins a new one.",
        ) from None
