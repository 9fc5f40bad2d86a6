"""Published command lines: a config that says the same gives words that mean the same to vLLM's parser.

What vLLM's parsers of four versions said of the lines and of our words was written down by
tests/real/make_flags.py; here our words must be those very ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command_lines import PARSED, lines
from vllm_sleep_tui.config.flags import shipped_tables
from vllm_sleep_tui.engine.argv import check_args

TABLES = {".".join(table.version.split(".")[:2]): table for table in shipped_tables()}
SAID: dict[str, list[dict[str, Any]]] = json.loads(PARSED.read_text())
LINES = list(lines())


@pytest.mark.parametrize("version", TABLES)
def test_our_words_are_those_that_vllm_read_as_the_original(tmp_path: Path, version: str) -> None:
    assert len(LINES) >= 40
    for line, said in zip(LINES, SAID[version], strict=True):
        assert line.ours(tmp_path, TABLES[version]) == said["ours"]


@pytest.mark.parametrize("version", TABLES)
def test_a_line_that_a_version_cannot_read_is_named_before_its_start(tmp_path: Path, version: str) -> None:
    read = 0
    for line, said in zip(LINES, SAID[version], strict=True):
        complaints = [name for name, _, _ in check_args(line.config(tmp_path).args, TABLES[version])]
        if said["said"] is None:
            assert not complaints, line
            read += 1
        elif said["said"].startswith("unrecognized arguments: "):
            flag = said["said"].split()[2].lstrip("-")
            # Of what was renamed the new name is used, which this version reads.
            assert complaints == [flag] or flag == "disable-log-requests"
        else:  # a value inside JSON, which only vLLM itself can judge
            assert "validation error" in said["said"]
    assert read >= 39
