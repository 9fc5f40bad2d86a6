"""What the panel may ask of each worker: vLLM's own ``--worker-extension-cls`` and ``/collective_rpc``."""

from __future__ import annotations

from typing import Any

from . import plugin
from .mover import NoPool
from .sleeper import Sleeper


class PanelWorker:
    """Mixed into vLLM's worker; the names are ours alone."""

    def panel_sleep_facts(self) -> dict[str, Any]:
        """Whose sleep mode it is, the level it sleeps at, the RAM it holds, what the last step took."""
        if plugin.State.why:
            return {"state": "stock", "why": plugin.State.why}
        return Sleeper.existing().facts()

    def panel_keep_weights(self, keep: bool = True) -> dict[str, Any]:
        """Let the next sleep, whatever its level is called, give up the KV cache alone (level 0), or not."""
        facts = self.panel_sleep_facts()
        if facts["state"] == "own":
            Sleeper.existing().mover.keep_weights(keep)
        return facts

    def panel_sleep_deeper(self, level: int) -> dict[str, Any]:
        """From level 0 to 1 or 2 without a wake, unless it is at another; without RAM `refused` says so."""
        facts = self.panel_sleep_facts()
        if facts.get("level") == 0 and level in (1, 2):
            try:
                self.sleep(level)  # type: ignore[attr-defined]  # vLLM's: it saves the buffers at level 2
            except NoPool as error:  # it sleeps on as it did
                return self.panel_sleep_facts() | {"refused": str(error)}
        return self.panel_sleep_facts()
