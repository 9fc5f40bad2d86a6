"""Each theme that we ship can be read: WCAG 2.1 AA, 4.5 to 1 for text, 3 to 1 for bars and swatches."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from rich.style import Style
from textual.color import Color

from vllm_sleep_tui.tui.theme import Palette, ThemeFile, package_folder, read_theme

TEXT, GRAPHICS = 4.5, 3.0
THEMES = sorted(package_folder().glob("*.yaml"))


def luminance(color: Color) -> float:
    """Relative luminance as WCAG 2.1 defines it."""

    def linear(value: int) -> float:
        share = value / 255
        return share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4

    return 0.2126 * linear(color.r) + 0.7152 * linear(color.g) + 0.0722 * linear(color.b)


def contrast(one: Color, other: Color) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colors_of(style: Style) -> tuple[Color, Color]:
    assert style.color is not None
    assert style.bgcolor is not None
    return Color.from_rich_color(style.color), Color.from_rich_color(style.bgcolor)


def read(path: Path) -> tuple[ThemeFile, dict[str, Color]]:
    theme = read_theme(path)
    return theme, {name: Color.parse(value) for name, value in msgspec.structs.asdict(theme.colors).items()}


def test_there_are_enough_to_choose_from() -> None:
    themes = [read_theme(path) for path in THEMES]
    assert len(themes) >= 8
    assert sum(not theme.dark for theme in themes) >= 3
    assert all(len(theme.models) >= 8 for theme in themes)


@pytest.mark.parametrize("path", THEMES, ids=lambda path: path.stem)
def test_text_and_bars_stand_out(path: Path) -> None:
    theme, colors = read(path)
    models = {f"model {number}": Color.parse(value) for number, value in enumerate(theme.models)}
    words = {name: colors[name] for name in ("foreground", "muted", "accent", "good", "warning", "bad")}
    marks = models | {"others": colors["others"]}
    weak = [
        f"{name} on {ground}: {contrast(color, colors[ground]):.2f}"
        for ground in ("background", "surface", "panel")
        for group, least in ((words, TEXT), (marks, GRAPHICS))
        for name, color in group.items()
        if contrast(color, colors[ground]) < least
    ]
    assert weak == []


@pytest.mark.parametrize("path", THEMES, ids=lambda path: path.stem)
def test_names_inside_bars_can_be_read(path: Path) -> None:
    theme, _ = read(path)
    palette = Palette(theme)
    names = [*(f"m{number}" for number in range(len(theme.models))), "others", "warning", "bad"]
    weak = {
        name: round(contrast(*colors_of(palette.style(f"ink-{name} on-{name}"))), 2)
        for name in names
        if contrast(*colors_of(palette.style(f"ink-{name} on-{name}"))) < TEXT
    }
    assert weak == {}
