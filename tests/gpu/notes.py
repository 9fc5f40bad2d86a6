"""What a measuring script knows so far, in one JSON file that is replaced whole after every step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Notes:
    """The file and its content; whoever changes `known` saves it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def save(self) -> None:
        """Replace the file in one step."""
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(self.known, indent=1))
        draft.replace(self.path)
