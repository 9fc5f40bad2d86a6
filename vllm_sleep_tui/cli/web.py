"""`web`: the panel in a browser on this machine."""

from __future__ import annotations

import asyncio
import sys

import click

from vllm_sleep_tui.cli.common import WholeNumber, config_option, given_config, load_config, put, say
from vllm_sleep_tui.errors import UsageError


@click.command()
@click.option("--port", type=WholeNumber(0, 65535), default=0, help="On this port.  [default: a free one]")
@click.option("--read-only", is_flag=True, help="Panels that only look: they change no server.")
@config_option
@click.pass_context
def web(ctx: click.Context, port: int, read_only: bool) -> None:
    """Serve the panel to browsers of this machine.

    It prints a link that holds a key: who has it has the panel. Each tab is a panel of its own. Ctrl+C ends
    it and leaves the models running.
    """
    load_config(ctx, only_looks=read_only)  # asks here, where somebody can answer; each panel looks again
    try:
        from vllm_sleep_tui.web.server import PanelServer
    except ModuleNotFoundError as error:
        raise UsageError(
            f"The panel in a browser needs {error.name}, which is not installed.",
            "Install the extra: pip install 'vllm-sleep-tui[web]'",
        ) from None
    config = given_config(ctx)
    arguments = [sys.executable, "-P", "-m", "vllm_sleep_tui"]  # -P: nothing is imported from this folder
    arguments += [] if config is None else ["--config", str(config.absolute())]
    server = PanelServer([*arguments, *(["--read-only"] if read_only else [])], port)
    put(server.link)
    say("Whoever has this link has the panel. Ctrl+C ends it; the models run on.")
    asyncio.run(server.run())
