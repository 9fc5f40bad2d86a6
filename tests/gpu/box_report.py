"""The tables of a box's results, from its files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure_bench
import measure_estimates
import measure_memory

from vllm_sleep_tui.bench.results import read
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.engine.proof import TOLERANCE

BENCHES = ("pair", "fp8", "no-warmup")
BEFORE = 369
"""Wakes measured on H100s before, none called wrong (docs/measurements.md)."""


def write(results: Path) -> str:
    """Write tables.md, and of each run of the benchmark NAME.md and NAME.html; the tables."""
    parts = list(sections(results))
    text = "\n".join(f"## {title}\n\n{body}" for title, body in parts)
    (results / "tables.md").write_text(text, encoding="utf-8")
    for name in BENCHES:
        if (results / f"{name}.json").exists():
            verb("report", results / f"{name}.json", "--md", results / f"{name}.md")
            verb("report", results / f"{name}.json", "--html", results / f"{name}.html")
    return text


def verb(*words: str | Path) -> str:
    """What `bench` says; on an error its words, which name what is missing."""
    command = [sys.executable, "-m", "vllm_sleep_tui", "bench", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout or done.stderr


def sections(results: Path) -> Iterator[tuple[str, str]]:
    """Title and Markdown of what there is."""
    proofs = results / "proof.json"
    if proofs.exists():
        yield "The proof", proof_table(json.loads(proofs.read_text()))
    if (results / "memory.jsonl").exists():
        yield "Memory beside NVML and /proc", measure_memory.table(results / "memory.jsonl")
    by_hand = results / "pair-by-hand.json"
    if by_hand.exists():
        rows = measure_bench.beside_by_hand(read(results / "pair.json"), json.loads(by_hand.read_text()))
        yield "The panel beside calls by hand", measure_bench.hand_table(rows)
    for name in BENCHES[1:]:
        if (results / f"{name}.json").exists() and (results / "pair.json").exists():
            yield f"pair beside {name}", verb("compare", results / "pair.json", results / f"{name}.json")
    if (results / "footprints.json").exists() and (results / "machine.json").exists():
        loaded = load(results / "box.yaml")
        rows = measure_estimates.rows(loaded, results, results / "checkpoints")
        yield "Estimates before a launch", measure_estimates.table(rows)


def proof_table(found: dict[str, dict[str, list[float]]]) -> str:
    """Distances by model and state, and how many wakes would have been called wrong."""
    states = list(dict.fromkeys(state for each in found.values() for state in each))
    lines = [f"| model | {' | '.join(states)} |", "|---" * (len(states) + 1) + "|"]
    for name, each in found.items():
        lines.append(f"| {name} | {' | '.join(distances(each.get(state, [])) for state in states)} |")
    wakes = [d for each in found.values() for level in ("level 1", "level 2") for d in each.get(level, [])]
    false = sum(distance > TOLERANCE for distance in wakes)
    garbage = [distance for each in found.values() for distance in each.get("garbage", [])]
    missed = sum(distance <= TOLERANCE for distance in garbage)
    lines += ["", f"{len(wakes)} wakes, {BEFORE + len(wakes)} with those before; {false} called wrong."]
    lines.append(f"{len(garbage)} times garbage, {missed} of them not found.")
    return "\n".join(lines) + "\n"


def distances(values: list[Any]) -> str:
    """The largest of them, the least as well where they differ, and how many."""
    if not values:
        return "–"
    low, high = min(values), max(values)
    span = f"{high:.5f}" if low == high else f"{low:.5f} to {high:.5f}"
    return f"{span} ({len(values)})"
