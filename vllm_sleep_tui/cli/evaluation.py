"""`chat --prompts FILE NAME…`: the same questions to several models, and the answers as JSON Lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_sleep_tui.bench.evaluation import SUFFIX, Answers, Tally, evaluate, read_prompts
from vllm_sleep_tui.cli.common import put, put_json, say
from vllm_sleep_tui.cli.running import Reporter, with_fleet
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import CancelledByUser, OperationError
from vllm_sleep_tui.paths import absolute
from vllm_sleep_tui.units import milliseconds, took

AGAIN = "The same command asks what is missing, and nothing else."


def ask_all(
    loaded: LoadedConfig,
    names: Sequence[str],
    file: Path,
    out: Path | None,
    *,
    system: str | None,
    params: Mapping[str, Any],
    stays: bool,
    as_json: bool,
) -> None:
    """Ask, and show what came of it; raises OperationError if an answer is missing in the end."""
    names = list(dict.fromkeys(names))
    for name in names:
        loaded.model(name)
    prompts = read_prompts(file)
    path = absolute(out or file.with_name(f"{file.stem}{SUFFIX}"))
    answers = Answers(path)
    try:
        tallies = with_fleet(
            loaded,
            lambda fleet: evaluate(
                fleet,
                names,
                prompts,
                answers,
                system=system,
                params=params,
                stays=stays,
                report=Reporter(),
                tell=say,
            ),
        )
    except CancelledByUser as stopped:
        raise CancelledByUser(f"{stopped.what} What was answered is in {path}.", AGAIN) from None
    finally:
        answers.close()
    if as_json:
        put_json({"version": 1, "file": str(path), "models": tallies})
    else:
        for line in _table(tallies):
            put(line)
        say(f"The answers are in {path}.")
    if missing := sum(tally.missing for tally in tallies):
        raise OperationError(f"{missing} of {len(names) * len(prompts)} answers are missing.", AGAIN)


def _table(tallies: Sequence[Tally]) -> list[str]:
    rows = [("model", "answered", "woke in", "TTFT", "tok/s", "tokens")]
    rows += [
        (
            tally.model,
            f"{tally.answered}/{tally.answered + tally.missing}",
            "–" if tally.switch_seconds is None else took(tally.switch_seconds),
            "–" if tally.ttft is None else milliseconds(tally.ttft),
            "–" if tally.tokens_per_s is None else f"{tally.tokens_per_s:.0f}",
            str(tally.completion_tokens),
        )
        for tally in tallies
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
