"""What is typed or pasted as a name of a file, and is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sleep_tui.config.parameters import ParameterError, parameters
from vllm_sleep_tui.fleet.pictures import dropped, pictures_in


@pytest.mark.parametrize("text", ["~nobody-of-that-name/a.png", "file://[/a.png", "/tmp/\0.png", "~\0/a.png"])
def test_what_is_pasted_and_is_no_picture_is_text(text: str) -> None:
    assert dropped(text) is None


@pytest.mark.parametrize("name", ["schema", "tools"])
@pytest.mark.parametrize("text", ["~nobody-of-that-name/a.json", "~x", "a\0b", "~\0/a"])
def test_a_parameter_that_names_no_file_is_told(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ParameterError, match=r"cannot be read|is no name of a file"):
        parameters({name: text}, tmp_path)


def test_a_long_row_of_dots_is_looked_through_once() -> None:
    # The square of that would take days: the limit of every test would end it.
    assert pictures_in("@" + "." * 1_000_000 + "x and @" + "." * 1_000_000) == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [("system", "\udcff"), ("stop", "\udcff"), ("schema", {"a": "\udcff"}), ("tools", [{"a": "\udcff"}])],
)
def test_a_parameter_that_no_request_can_hold_is_told(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ParameterError, match="not UTF-8"):
        parameters({name: value}, tmp_path)
