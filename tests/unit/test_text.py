"""The one cleaner for text from outside."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.text import clean, one_line


def test_escapes_and_control_characters_go_and_text_stays() -> None:
    text = "\x1b[1;31mred\x1b[0m \x1b]0;title\x07a\tb\nc \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\ \x9b1mé\x00"

    assert clean(text) == "red a\tb\nc link 1mé"


@given(st.text(st.characters(exclude_categories=())))
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    left = clean(text)

    assert not {char for char in left if unicodedata.category(char) in ("Cc", "Cs") and char not in "\t\n"}
    assert not {char for char in left if unicodedata.bidirectional(char) in BIDI}
    left.encode()
    assert one_line(text) == one_line(left) or "\n" not in one_line(text)


BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize("mark", "\u061c\u200e\u200f\u202a\u202e\u2066\u2069")
def test_what_turns_the_reading_direction_goes(mark: str) -> None:
    assert clean(f"a{mark}b") == "ab"


def test_a_title_that_is_never_closed_hides_its_line_and_no_other() -> None:
    assert clean("one \x1b]0;evil\ntwo") == "one \ntwo"


def test_an_escape_cut_in_two_leaves_nothing_to_obey() -> None:
    whole = "a\x1b]52;c;ZXZpbA==\x07b\x1b[31mc"
    for cut in range(len(whole)):
        assert "\x1b" not in clean(whole[:cut]) + clean(whole[cut:])
        assert "\x07" not in clean(whole[:cut]) + clean(whole[cut:])


def test_bytes_that_are_no_text_are_made_visible() -> None:
    assert clean(b"caf\xe9".decode("utf-8", "surrogateescape")) == "caf\\xe9"
    assert clean("half \ud83d") == "half \N{REPLACEMENT CHARACTER}"


def test_one_line_is_one_line() -> None:
    assert one_line("a\r\nb\u2028c \x0b d\te\n") == "a b c d e"


def test_an_error_is_fit_to_be_shown_whoever_it_quotes() -> None:
    error = UsageError("no \x1b[2Jfile\n", "see \u202efoo")
    assert (error.what, error.cure, str(error)) == ("no file", "see foo", "no file")
