"""The command line over two models, and what the servers' own logs say was asked of them."""

from __future__ import annotations

import re
from pathlib import Path

from command_line import CommandLine

WORDS = {
    "/v1/chat/completions": "answer",
    "/v1/completions": "proof",
    "/collective_rpc": "reload",
    "/sleep?level=1": "sleep 1",
    "/sleep?level=2": "sleep 2",
    "/wake_up": "wake",
    "/wake_up?tags=weights": "wake weights",
    "/wake_up?tags=kv_cache": "wake kv",
}


class Bench(CommandLine):
    """The command line, with the access logs of its servers."""

    @property
    def result(self) -> Path:
        """Where the tests have their run written."""
        return self.config.with_name("run.json")

    def log(self, name: str, launch: int = 0) -> str:
        """What a launch of a model logged: 0 is the last launch, 1 the one before."""
        suffix = f".{launch}" if launch else ""
        return (self.state_home / "vllm-sleep-tui" / "logs" / f"{name}.log{suffix}").read_text()

    def asked(self, name: str, launch: int = 0) -> list[str]:
        """What a launch of a model was asked, in order."""
        paths = re.findall(r'"POST (\S+) HTTP/1.1" 200', self.log(name, launch))
        return [WORDS[path] for path in paths if path in WORDS]

    def states(self) -> dict[str, tuple[str, int | None]]:
        """State and level of each model."""
        return {name: (model["state"], model["level"]) for name, model in self.status().items()}
