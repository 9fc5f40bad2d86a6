"""Answers on their way to the screen: whatever they are and however they are cut, every word is shown."""

from __future__ import annotations

import re
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.answers import ANSWERS
from vllm_sleep_tui.text import clean
from vllm_sleep_tui.tui.drawing.document import Document
from vllm_sleep_tui.tui.drawing.flow import Growing, breaks
from vllm_sleep_tui.tui.drawing.paint import line_width
from vllm_sleep_tui.tui.drawing.turns import Answer, Question


def letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)


def shown(answer: Answer, width: int) -> list[str]:
    height = answer.lay(width)
    rows = [answer.row(number) for number in range(1, height)]
    assert all(line_width(row.spans()) <= width for row in rows)
    return ["".join(text for text, _ in row.spans()) for row in rows]


def fed(text: str, step: int, *, ends: bool = True) -> Answer:
    answer = Answer("m", "m0")
    for start in range(0, len(text), step):
        answer.add(text[start : start + step])
        answer.flush()
    if ends:
        answer.end()
    return answer


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_every_word_of_an_answer_is_shown_whole_or_in_pieces(number: int) -> None:
    source = ANSWERS[number]
    wide = shown(fed(source, 4000), 4000)
    assert letters("".join(wide)) == letters(clean(source))
    for step in (1, 3, 7):
        assert shown(fed(source, step), 4000) == wide
    narrow = "".join(shown(fed(source, 5), 40))
    assert sorted(letters(narrow)) == sorted(letters(clean(source)))


@pytest.mark.parametrize(
    "source",
    [
        "| "
        + " | ".join(f"title{at}" for at in range(600))
        + " |\n|"
        + "---|" * 600
        + "\n"
        + ("| " + " | ".join(f"cell{at}" for at in range(600)) + " |\n") * 20,
        "many *marks* and `code` " * 4000,
    ],
    ids=["a table of 600 columns", "a paragraph of 16,000 marks"],
)
def test_a_block_that_would_hold_up_the_keys_is_shown_as_it_was_written(source: str) -> None:
    rows = shown(fed(source, 4000), 80)
    assert letters("".join(rows)) == letters(source)
    assert source[:60] in "".join(rows)


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_it_is_shown_while_it_streams_too(number: int) -> None:
    source = ANSWERS[number]
    half = source[: len(source) // 2]
    assert sorted(letters("".join(shown(fed(half, 3, ends=False), 60)))) in (
        sorted(letters(clean(half))),
        sorted(letters(clean(half.rpartition("\x1b")[0]))),  # an escape under way is held back
    )


@pytest.mark.parametrize(
    "text",
    [
        "<div>",
        "List<String> names = new ArrayList<>();",
        "std::vector<int> and Option<Box<dyn Error>>",
        "Press <Enter>, then <Ctrl+C>.",
        "&lt;div&gt; &amp; &nbsp;",
        "a < b && c > d || e <= f",
        "5*3*2 = 30 and 2**10 and a*b*c",
        "snake_case_name and __init__.py",
        "\\(x_1\\) and \\[ \\frac{a}{b} \\]",
        "The tag <think> marks what a model thinks, </think> ends it.",
        "<!-- a comment --> and text",
        "[1]: http://c.example 'Title'",
        "http://a.example/__x__/a*b*c",
    ],
)
def test_what_is_no_mark_is_shown_as_it_was_written(text: str) -> None:
    assert shown(fed(text, 3), 80) == [text]


def test_the_address_of_a_link_is_shown_beside_its_words() -> None:
    assert shown(fed("[x](http://a.example/__y__/1*2*3)", 3), 80) == ["x (http://a.example/__y__/1*2*3)"]


def test_html_keeps_its_lines_and_their_indents() -> None:
    page = '<ul class="x">\n  <li>one</li>\n</ul>'
    assert shown(fed(page, 4), 80) == page.split("\n")


def test_marks_become_looks() -> None:
    text = "# Title\n\nSome **bold** and `code`.\n\n- one\n  - two\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    lines = [line.rstrip() for line in shown(fed(text, 2), 40)]
    assert lines == [
        "Title",
        "",
        "Some bold and code.",
        "",
        "• one",
        "  • two",
        "",
        "a │ b",
        "──┼──",
        "1 │ 2",
    ]


def test_a_table_too_wide_for_columns_becomes_lists() -> None:
    text = "| first column | second column | third column |\n|---|---|---|\n| aaa bbb | ccc ddd | eee fff |\n"
    lines = "\n".join(shown(fed(text, 9), 16))
    for words in ("first", "aaa", "second", "ccc", "third", "eee"):
        assert words in lines


def test_code_keeps_its_lines_blanks_and_indents() -> None:
    answer = fed("```py\ndef f():\n\n    return 1\n```\n", 3)
    lines = [line.rstrip() for line in shown(answer, 40)]
    assert lines == ["py", " def f():", "", "     return 1"]
    code = answer.code_near(99)
    assert code is not None
    assert code.text == "def f():\n\n    return 1"


def test_code_is_coloured_bit_by_bit_and_its_words_stay() -> None:
    source = "def f():\n    '''doc\n    more'''\n    return 1\n" * 50
    answer = fed(f"```python\n{source}```\n", 50)
    before = shown(answer, 60)
    code = answer.code_near(0 + 999)
    assert code is not None
    plain = code.spans(0)
    while code.color(0.0):
        pass
    assert code.spans(0) != plain
    assert shown(answer, 60) == before


def test_of_two_blocks_of_code_the_one_in_sight_is_found() -> None:
    answer = fed("```\none\n```\n\nwords\n\n```\ntwo\n```\n- a\n  ```\n  three\n  ```\n", 4)
    height = answer.lay(40)
    rows = ["".join(text for text, _ in answer.row(number).spans()).strip() for number in range(height)]
    for words in ("one", "two", "three"):
        code = answer.code_near(rows.index(words))
        assert code is not None
        assert code.text == words


@given(st.text(alphabet="ab `~\n-*_<>|#1.[]()\\&;", max_size=80), st.integers(1, 9))
def test_no_letter_is_lost_however_the_text_is_cut(text: str, step: int) -> None:
    wide = shown(fed(text, 200), 500)
    assert letters("".join(wide)) == letters(text)
    assert shown(fed(text, step), 500) == wide


@given(st.text(alphabet="ab\u65e5 \U0001f44d\u0301", max_size=60), st.integers(2, 12), st.booleans())
def test_a_row_is_never_wider_than_the_pane_and_loses_blanks_alone(
    text: str, width: int, anywhere: bool
) -> None:
    rows = [text[start:end] for start, end in breaks(text, width, anywhere=anywhere)]
    assert "".join(rows).replace(" ", "") == text.replace(" ", "")
    assert all(line_width(((row, ""),)) <= width for row in rows)


@given(st.lists(st.text(alphabet="ab \n\u65e5", max_size=12), max_size=12), st.integers(2, 12))
def test_text_that_grows_is_broken_as_the_whole_is(pieces: list[str], width: int) -> None:
    grown, whole = Growing("text"), Growing("text")
    grown.lay(width)
    for piece in pieces:
        grown.feed(piece)
    whole.feed("".join(pieces))
    whole.lay(width)
    assert grown.rows == whole.rows


def test_a_question_is_shown_as_it_was_typed() -> None:
    question = Question("<b>\n  **x**\x1b[31m")
    height = question.lay(40)
    rows = ["".join(text for text, _ in question.row(number).spans()) for number in range(1, height)]
    assert rows == ["<b>", "  **x**"]


def test_a_long_list_is_laid_out_while_it_streams() -> None:
    document = Document()
    document.lay(60)
    text = "".join(f"{number}. item {number} with some words\n" for number in range(1, 2001))
    for start in range(0, len(text), 400):
        document.feed(text[start : start + 400])
    assert len(document.tail) < 400
    document.end()
    rows = ["".join(part for part, _ in row.spans()) for row in document.rows]
    assert rows == [f"{number}. item {number} with some words" for number in range(1, 2001)]


def test_rows_that_were_let_go_are_made_again_as_they_were() -> None:
    source = "".join(
        f"Paragraph {number}.\n\n- one\n- two\n\n```python\nx = {number}\n```\n\n" for number in range(50)
    )
    answer = fed(source + "```\n" + "one line\n" * 20, 7, ends=False)
    downwards = shown(answer, 60)
    height = answer.lay(60)
    upwards = [answer.row(number) for number in reversed(range(1, height))]
    assert ["".join(text for text, _ in row.spans()) for row in reversed(upwards)] == downwards
    answer.add("a line of the block that is still open\nand one that has not ended")
    answer.flush()
    added = ["a line of the block that is still open", "and one that has not ended"]
    assert [row.strip() for row in shown(answer, 60)] == [row.strip() for row in downwards] + added


def test_a_long_answer_takes_some_times_the_memory_of_its_words() -> None:
    shown(fed("A *first* one\n\nloads the parser.\n\n", 7), 60)
    answer = Answer("m", "m0")
    answer.lay(60)
    tracemalloc.start()
    try:
        for number in range(10_000):
            answer.add(f"w{number} " if number % 50 else f"w{number}\n\n")
            if number % 100 == 0:
                answer.flush()
                answer.lay(60)
        answer.end()
        answer.lay(60)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 6 * len(answer.text)
