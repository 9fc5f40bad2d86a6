"""What of a model is worth copying into another window."""

from __future__ import annotations

from vllm_sleep_tui.tui.state.panel_fleet import PanelFleet

KINDS = ("URL", "pid", "command line", "cause")
"""What there may be, in the order it is offered."""


async def copies_of(fleet: PanelFleet, name: str) -> dict[str, str]:
    """What there is of KINDS for this model now, by kind."""
    model = fleet.snapshot().model(name)
    found: dict[str, str] = {}
    configured = fleet.loaded.config.models.get(name)
    if configured is not None and configured.url is not None:
        found["URL"] = configured.url
    elif model.port is not None:
        found["URL"] = f"http://127.0.0.1:{model.port}/v1"
    if model.pid is not None:
        found["pid"] = str(model.pid)
        held = await fleet.processes()
        for process in held:
            if process.pid == model.pid:
                found["command line"] = process.command
    died = model.last_failure
    reasons = [model.reason, model.cure] if model.reason else [died.reason, died.cure] if died else []
    if reasons:
        found["cause"] = " ".join(filter(None, reasons))
    return found
