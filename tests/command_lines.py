"""The command lines of tests/data/command_lines.yaml: as written, and as this program says them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ruamel.yaml import YAML

from vllm_sleep_tui.config.flags import FlagTable
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.argv import ServeSpec, serve_argv

LINES = Path(__file__).parent / "data/command_lines.yaml"
PARSED = LINES.with_name("parsed_lines.json")
"""By version of vLLM, for each line ours and what its parser said: null (the same), or its complaint."""


@dataclass(frozen=True)
class Line:
    """One published command line, and its `args:` as a person would write them."""

    words: tuple[str, ...]
    """After `vllm serve`."""
    args: str

    def config(self, folder: Path) -> ModelConfig:
        """The model of a config file that says the same."""
        path = folder / "line.yaml"
        indented = "".join(f"      {line}\n" for line in (self.args or "{}").splitlines())
        path.write_text(
            f"models:\n  it:\n    model: {self.words[0]}\n    gpus: {list(range(8))}\n    args:\n{indented}"
        )
        return load(path).config.models["it"]

    def ours(self, folder: Path, flags: FlagTable) -> list[str]:
        """The words after `vllm serve` that this program starts it with, for a vLLM with these flags."""
        model = self.config(folder)
        spec = ServeSpec(
            command=("vllm",),
            model=model.model or "",
            served_name="it",
            port=8001,
            args=model.args,
            env={},
            gpus=model.gpus,
            utilization=None,
            guard_dir=folder,
            tmp_dir=folder,
            socket=folder,
            launch_id="",
            sleep_mode=False,
            flags=flags,
        )
        return serve_argv(spec)[2:]


def lines() -> Iterator[Line]:
    """Every line of the file that a config can say."""
    for entry in YAML(typ="safe", pure=True).load(LINES):
        if "refused" not in entry:
            yield Line(tuple(shlex.split(entry["line"])[2:]), entry.get("args", ""))
