"""Changes a few values of the config file and keeps all the rest: comments, quotes, order."""

from __future__ import annotations

import difflib
import io
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.util import load_yaml_guess_indent

from vllm_sleep_tui.config.yaml import Key, parse, spell, typed
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.files import write_private

WIDTH = 4096
"""So that no long line is folded."""


def edited(path: Path, values: Mapping[Key, Any]) -> str:
    """The file's text with these values set; raises RefusedError if anything else would change with them."""
    text = path.read_text(encoding="utf-8-sig")
    writer = YAML(typ="rt", pure=True)
    writer.preserve_quotes = True
    writer.width = WIDTH
    tree, indent, offset = load_yaml_guess_indent(text, yaml=writer)
    for key, value in values.items():
        _set(tree, key, value)
    writer.indent(mapping=_mapping_indent(text), sequence=indent or 2, offset=offset or 0)
    out = io.StringIO()
    writer.dump(tree, out)
    _check(path, out.getvalue(), values)
    return out.getvalue()


def difference(path: Path, text: str) -> str:
    """What would change, as `diff -u` shows it."""
    before = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    name = path.name
    return "".join(difflib.unified_diff(before, text.splitlines(keepends=True), name, name, n=1))


def replace_text(path: Path, text: str) -> None:
    """Replace the file in one step, with the permissions it had; raises OperationError."""
    write_private(path, text.encode(), mode=stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600)


def _set(tree: Any, key: Key, value: Any) -> None:
    for part in key[:-1]:
        if part not in tree:
            tree[part] = CommentedMap()
        tree = tree[part]
    tree[key[-1]] = value


def _mapping_indent(text: str) -> int:
    """How far the first indented line is from the margin."""
    lines = (line for line in text.splitlines() if line.strip() and not line.lstrip().startswith(("#", "-")))
    widths = (len(line) - len(line.lstrip(" ")) for line in lines)
    return next((width for width in widths if width), 2)


def _check(path: Path, text: str, values: Mapping[Key, Any]) -> None:
    """Raises RefusedError if the new text says anything but the old one and these values."""
    wanted = typed(parse(path).values)
    for key, value in values.items():
        _set(wanted, key, value)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        copy.write_text(text, encoding="utf-8")
        content = typed(parse(copy).values)
    if content != wanted:
        names = ", ".join(spell(key) for key in values)
        raise RefusedError(
            f"{path} shares values between its models (& and *), so a change here would change others.",
            f"Set them by hand: {names}.",
        )
