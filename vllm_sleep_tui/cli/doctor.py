"""`doctor`: is everything there that the config needs?"""

from __future__ import annotations

from pathlib import Path

import click

from vllm_sleep_tui.cli.common import config_option, given_config, is_agreed, json_option, put, put_json
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import PanelError
from vllm_sleep_tui.fleet.doctor import Check, Verdict, examine
from vllm_sleep_tui.paths import find_config, here


@click.command()
@json_option
@config_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Check config and machine; exit 1 if a check fails.

    It looks at the config, vLLM, GPUs, ports, folders and other people's servers, and changes nothing.
    """
    checks = _checks(given_config(ctx))
    failed = any(check.verdict is Verdict.FAIL for check in checks)
    if as_json:
        put_json({"version": 1, "ok": not failed, "checks": checks})
    else:
        for check in checks:
            put(f"{check.verdict:<4}  {check.name}: {check.what}")
            if check.cure:
                put(f"        {check.cure}")
    ctx.exit(1 if failed else 0)


def _checks(given: Path | None) -> list[Check]:
    """All checks, as far as the config allows them."""
    try:
        loaded = load(find_config(given))
    except PanelError as error:
        broken = Check("config", Verdict.FAIL, error.what, error.cure)
        return [broken, *examine(None, here(), may_ask=False)]
    return examine(loaded, here(), may_ask=given is not None or is_agreed(loaded))
