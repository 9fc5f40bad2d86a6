"""The security page names its tests; each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_test_that_the_page_names_is_there() -> None:
    page = (ROOT / "docs/security.md").read_text()
    files = {path.name: path for path in (ROOT / "tests").rglob("test_*.py")}
    defined = {name for path in files.values() for name in re.findall(r"def (test_\w+)", path.read_text())}
    named = set(re.findall(r"`(?:tests/\w+/)?(test_\w+(?:\.py)?)`", page))
    assert len(named) > 30
    assert named - defined - set(files) == set()
    scripts = set(re.findall(r"`((?:benchmarks|tests)/[\w/]+\.py)`", page))
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
