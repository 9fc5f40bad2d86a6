"""What is copied on its way out: to tmux if the panel runs in it, else to the terminal, which is silent."""

from __future__ import annotations

import asyncio
import contextlib
import os

from vllm_sleep_tui.units import counted

SECONDS = 10.0
"""How long tmux may take for its buffer; nothing but the words about it waits."""


async def to_tmux(text: str) -> bool:
    """Put the text into a buffer of tmux, which hands it to the terminal; False where that did not happen."""
    if not os.environ.get("TMUX"):
        return False
    try:
        process = await asyncio.create_subprocess_exec(
            "tmux",
            "load-buffer",
            "-w",  # on to the terminal's clipboard; from tmux 3.2 on
            "-",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return False
    try:
        async with asyncio.timeout(SECONDS):
            await process.communicate(text.encode(errors="replace"))
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        return False
    return process.returncode == 0


def words(text: str, what: str, *, arrived: bool) -> str:
    """What is known of a copy, for a person."""
    size = counted(len(text), "character")
    if arrived:
        return f"Copied {what}: {size}, in tmux's buffer."
    return f"Sent {what} to the terminal: {size}. Whether its clipboard took them, it does not say."
