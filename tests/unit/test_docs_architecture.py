"""The page for whoever changes the code: its table is the code's, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import vllm_sleep_tui
from vllm_sleep_tui.cli.app import VERBS
from vllm_sleep_tui.fleet.states import TRANSITIONS, Event, State

PACKAGE = Path(vllm_sleep_tui.__file__).parent
PAGE = Path(__file__).parents[2] / "docs/architecture.md"
FOLDERS = (
    "",
    "fleet",
    "fleet/operations",
    "fleet/observe",
    "fleet/supervision",
    "fleet/store",
    "fleet/attached",
)


def table() -> str:
    """The states and what each event makes of them, as Markdown."""
    events = [event for event in Event if any(found is event for _, found in TRANSITIONS)]
    rows = ["| | " + " | ".join(events) + " |", "|---" * (len(events) + 1) + "|"]
    for state in State:
        cells = [str(TRANSITIONS.get((state, event), "")) for event in events]
        rows.append(f"| **{state}** | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def test_the_table_of_states_is_the_codes() -> None:
    shown = re.search(r"<!-- states:[^\n]*-->\n(.*?)\n?<!-- /states -->", PAGE.read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] == table(), f"put this into {PAGE.name}:\n{table()}"


def test_every_file_that_it_names_is_there() -> None:
    named = set(re.findall(r"`(?:vllm_sleep_tui/)?((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE.read_text()))
    assert len(named) > 30
    root = PAGE.parents[1]
    missing = {
        name
        for name in named
        if not (root / name).exists() and not any((PACKAGE / folder / name).exists() for folder in FOLDERS)
    }
    assert not missing


def test_the_readme_names_it_and_every_verb() -> None:
    readme = (PAGE.parents[1] / "README.md").read_text()
    assert "docs/architecture.md" in readme
    docs = readme + "".join(path.read_text() for path in PAGE.parent.glob("*.md"))
    assert not [verb for verb in VERBS if not re.search(rf"(`|vllm-sleep-tui ){verb}\b", docs)]
