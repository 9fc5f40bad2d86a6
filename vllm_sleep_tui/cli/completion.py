"""`completion`: what a shell needs to complete verbs, options and the names of models."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from vllm_sleep_tui.cli.common import draw

SHELLS = ("bash", "zsh", "fish")
ASKED_BY = "_VLLM_SLEEP_TUI_COMPLETE"
"""The variable by which a shell asks; click makes its name from the command's."""


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    bash and zsh: put `eval "$(vllm-sleep-tui completion bash)"` (or zsh) into ~/.bashrc (or ~/.zshrc). fish:
    `vllm-sleep-tui completion fish > ~/.config/fish/completions/vllm-sleep-tui.fish`.
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = ctx.find_root()
    draw(kind(root.command, {}, root.info_name or "vllm-sleep-tui", ASKED_BY).source() + "\n")
