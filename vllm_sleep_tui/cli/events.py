"""`events`: what happened to the models, whoever did it."""

from __future__ import annotations

import time
from itertools import chain

import click

from vllm_sleep_tui.cli.common import (
    WholeNumber,
    config_option,
    json_option,
    json_text,
    load_config,
    put,
    put_json,
)
from vllm_sleep_tui.fleet.events import FleetEvent
from vllm_sleep_tui.fleet.survey import coming_events, latest_events
from vllm_sleep_tui.paths import state_dir
from vllm_sleep_tui.text import one_line
from vllm_sleep_tui.units import time_of_day


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on with what happens from now on, until Ctrl-C.")
@click.option("-n", "count", type=WholeNumber(0), default=50, show_default=True, help="How many.")
@json_option
@config_option
@click.pass_context
def events(ctx: click.Context, follow: bool, count: int, as_json: bool) -> None:
    """Show the last events: states, failures with their reasons, and how operations ended.

    With --follow and --json each event is a line of its own.
    """
    loaded, begun = load_config(ctx, only_looks=True), time.time()
    past = latest_events(loaded, state_dir(), count)
    if as_json and not follow:
        put_json({"version": 1, "events": past})
        return
    coming = coming_events(loaded, state_dir(), past[-1] if past else None, begun) if follow else ()
    for event in chain(past, coming):
        put(json_text(event) if as_json else line(event))


def line(event: FleetEvent) -> str:
    """An event as a person reads it."""
    moment = time_of_day(event.time, time.time())
    return "  ".join(filter(None, [moment, event.model, one_line(event.sentence())]))
