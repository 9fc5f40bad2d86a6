"""Parts of the panel that need no screen: bars, words, themes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from textual.color import Color

from vllm_sleep_tui.tui.drawing.bars import HATCHED, MARK, SOLID, Part, cells_of, large, phase_bar, stacked
from vllm_sleep_tui.tui.drawing.paint import cut, line_width, spread, wrap
from vllm_sleep_tui.tui.keys import KEYS
from vllm_sleep_tui.tui.theme import DEFAULT_THEME, Palette, load_themes, package_folder, read_theme
from vllm_sleep_tui.units import clock, gib_number, took

GOOD = (package_folder() / "night.yaml").read_text(encoding="utf-8")


def luminance(color: str) -> float:
    """As WCAG 2 defines it."""
    parts = [value / 255 for value in Color.parse(color).rgb]
    red, green, blue = (x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@given(st.lists(st.floats(0, 100), max_size=6), st.floats(0.1, 200), st.integers(0, 120))
def test_a_bar_never_takes_more_cells_than_it_has(sizes: list[float], total: float, width: int) -> None:
    assert sum(cells_of(sizes, total, width)) <= width
    line = stacked([Part("x", size, "m0", SOLID) for size in sizes], total, width, mark=total / 2)
    assert line_width(line) == width


def test_a_small_share_is_still_seen_and_a_big_one_carries_its_name() -> None:
    line = stacked([Part("big 69", 69, "m0", SOLID), Part("small 1", 0.2, "m1", HATCHED)], 80, 80)
    text = "".join(part for part, _ in line)
    assert "big 69" in text
    assert text.count(HATCHED) == 1


def test_the_mark_stands_where_the_value_is() -> None:
    text = "".join(part for part, _ in stacked([Part("", 20, "m0", SOLID)], 100, 100, mark=70))
    assert text.index(MARK) == 70


@pytest.mark.parametrize("width", [30, 62, 120])
def test_the_phases_fill_one_bar_each_as_long_as_it_took_and_none_is_lost(width: int) -> None:
    line = phase_bar([("drain", 0.001), ("sleep", 1.0), ("wake", 2.0), ("prove", 0.02)], width, "m0")
    assert line_width(line) == width
    lengths = [len(text) for text, _ in line]
    assert lengths[0] == lengths[3] == 1
    assert abs(lengths[2] - 2 * lengths[1]) <= 3
    assert "sleep" in line[1][0]
    assert "wake" in line[2][0]


def test_a_time_is_drawn_three_lines_high() -> None:
    lines = large("0.46 s", "accent")
    assert len(lines) == 3
    assert len({line_width(line) for line in lines}) == 1


def test_texts_are_cut_and_wrapped_by_cells_not_by_letters() -> None:
    assert cut("日本語", 4) == "日…"
    assert wrap("one two  three", 8) == ["one two ", "three"]
    assert wrap("x" * 20, 8) == ["x" * 8, "x" * 8, "x" * 4]
    assert line_width(spread([("a", "")], [("b", "")], 10)) == 10


def test_times_and_sizes_are_short() -> None:
    assert [took(value) for value in (0.0261, 0.0999, 0.478, 12.31, 88.4)] == [
        "26 ms", "0.10 s", "0.48 s", "12.3 s", "88 s",
    ]  # fmt: skip
    assert [clock(value) for value in (3.9, 252, 3900, 200_000)] == ["0:03", "4:12", "1:05 h", "2 d"]
    assert gib_number(None) == "?"
    assert gib_number(0) == "0.0"


def test_every_shipped_theme_is_sound_and_the_default_is_there() -> None:
    themes, complaints = load_themes([package_folder()])
    assert complaints == []
    assert DEFAULT_THEME in themes
    assert len(themes) >= 4
    for theme in themes.values():
        style = Palette(theme).style("ink-m3 on-m3 bold")
        assert style.color is not None
        assert style.bgcolor is not None
        assert len(set(theme.models)) == len(theme.models)


@pytest.mark.parametrize("name", sorted(load_themes([package_folder()])[0]))
def test_text_and_models_can_be_read_on_the_ground_of_every_theme(name: str) -> None:
    theme = load_themes([package_folder()])[0][name]
    for color in (theme.colors.foreground, theme.colors.muted, theme.colors.bad, *theme.models):
        assert contrast(theme.colors.background, color) >= 3.5, color


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("#14161d", "#zz"), ["background", "'#zz'"]),
        (("dark: true", "dark: maybe"), ["dark"]),
        (("  accent:", "  acent:"), ["acent"]),
        (("models: [", "models: ['not a colour', "), ["models[0]"]),
        (("name: night", "name: [night"), []),
    ],
)
def test_a_bad_theme_is_named_in_one_line_and_skipped(
    tmp_path: Path, change: tuple[str, str], words: list[str]
) -> None:
    assert change[0] in GOOD
    (tmp_path / "mine.yaml").write_text(GOOD.replace(*change), encoding="utf-8")
    themes, complaints = load_themes([tmp_path])
    assert themes == {}
    assert len(complaints) == 1
    assert "\n" not in complaints[0]
    assert all(word in complaints[0] for word in ["mine.yaml", *words])


def test_a_theme_of_the_user_replaces_ours_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "night.yaml").write_text(GOOD.replace("#14161d", "#000001"), encoding="utf-8")
    themes, _ = load_themes([package_folder(), tmp_path])
    assert themes["night"].colors.background == "#000001"
    assert read_theme(package_folder() / "night.yaml").colors.background == "#14161d"


def test_no_key_is_given_twice() -> None:
    keys = [key.key for key in KEYS]
    assert len(keys) == len(set(keys))
    assert {"enter", "s", "1", "2", "w", "u", "x", "r", "c", "l", "t", "question_mark", "q", "escape"} <= set(
        keys
    )
