"""The one cleaner for text from outside."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.text import Cleaner, clean, one_line


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


def test_of_a_title_that_is_never_closed_only_the_introducer_goes() -> None:
    assert clean("one \x1b]0;evil\ntwo") == "one 0;evil\ntwo"
    assert clean("one \x1b[31\ntwo") == "one 31\ntwo"
    assert clean(f"\x1b]0;{'x' * 5000}\x07") == f"0;{'x' * 5000}"


PIECES = st.lists(st.text(st.sampled_from("\x1b[]\\0;1mPa \x07\n\x9c\u202e<"), max_size=12), max_size=8)


@given(PIECES)
def test_a_text_in_pieces_is_cleaned_as_the_whole_is(pieces: list[str]) -> None:
    cleaner = Cleaner()
    assert "".join([*map(cleaner.feed, pieces), cleaner.end()]) == clean("".join(pieces))


def test_what_is_no_escape_is_held_back_by_nobody() -> None:
    cleaner = Cleaner()
    assert cleaner.feed("a [31m <b>") == "a [31m <b>"
    assert cleaner.feed("c\x1b]0;ti") == "c"
    assert cleaner.feed("tle\x07d") == "d"


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
