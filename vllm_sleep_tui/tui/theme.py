"""Themes: one YAML file each, checked colour by colour before the screen may use it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache
from pathlib import Path
from typing import Protocol, cast

import msgspec
from rich.style import Style
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from textual.color import Color, ColorParseError
from textual.message_pump import MessagePump
from textual.theme import Theme

DEFAULT_THEME = "night"
_PACKAGE = Path(__file__).resolve().parent.parent


class ThemeColors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The colours of a theme; any form that CSS knows."""

    background: str
    surface: str
    panel: str
    border: str
    foreground: str
    muted: str
    faint: str
    accent: str
    good: str
    warning: str
    bad: str
    others: str
    """Memory held by somebody else."""


class ThemeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole theme file; the colours under `models` follow a model through bar, table and chat."""

    name: str
    dark: bool
    colors: ThemeColors
    models: tuple[str, ...]


class Palette:
    """Turns the names of paints into Rich styles.

    A paint is words: a colour (`text`, `muted`, `good`, `m0` for the first model …), `on-` and a colour for
    the background, `ink-` and a colour for what can be read on it, and `bold`, `italic`, `underline`,
    `strike`.
    """

    def __init__(self, theme: ThemeFile) -> None:
        colors = msgspec.structs.asdict(theme.colors)
        colors["text"] = colors.pop("foreground")
        self._colors = {name: Color.parse(value) for name, value in colors.items()}
        self._models = tuple(Color.parse(value) for value in theme.models)
        self.style = cache(self._style)

    def _color(self, name: str) -> Color:
        if name[0] == "m" and name[1:].isdigit():
            return self._models[int(name[1:]) % len(self._models)]
        if name[0] == "#":  # a picture's own
            return Color.parse(name)
        return self._colors[name]

    def _style(self, paint: str) -> Style:
        foreground = background = None
        for word in paint.split():
            if word in {"bold", "italic", "underline", "strike"}:
                continue
            if word.startswith("on-"):
                background = self._color(word[3:]).hex
            elif word.startswith("ink-"):
                foreground = _readable_on(self._color(word[4:])).hex
            else:
                foreground = self._color(word).hex
        return Style(
            color=foreground,
            bgcolor=background,
            bold="bold" in paint or None,
            italic="italic" in paint or None,
            underline="underline" in paint or None,
            strike="strike" in paint or None,
        )


class Themed(Protocol):
    """What widgets ask of the app: `PanelApp` is one."""

    palette: Palette


def palette_of(widget: MessagePump) -> Palette:
    """The colours of the theme in use, for a widget or a screen of the panel."""
    return cast(Themed, widget.app).palette


def _readable_on(color: Color) -> Color:
    # The luminance of WCAG 2.1 at which black and white stand out alike, 4.6 to 1: no ground is worse.
    red, green, blue = (
        share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in color.normalized
    )
    is_light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179
    return Color(0, 0, 0) if is_light else Color(255, 255, 255)


def textual_theme(theme: ThemeFile) -> Theme:
    """The same theme for Textual's own widgets and the stylesheet."""
    colors = theme.colors
    return Theme(
        name=theme.name,
        dark=theme.dark,
        primary=colors.accent,
        secondary=colors.accent,
        accent=colors.accent,
        foreground=colors.foreground,
        background=colors.background,
        surface=colors.surface,
        panel=colors.panel,
        success=colors.good,
        warning=colors.warning,
        error=colors.bad,
        variables={
            "line": colors.border,
            "quiet": colors.muted,
            "block-cursor-background": colors.accent,
            "border": colors.accent,
            "scrollbar": colors.panel,
            "scrollbar-background": colors.surface,
            "scrollbar-corner-color": colors.surface,
        },
    )


def read_theme(path: Path) -> ThemeFile:
    """Read and check one file; raises ValueError with one line on what is wrong and where."""
    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
        theme = msgspec.convert(raw, ThemeFile)
    except (OSError, UnicodeDecodeError, YAMLError, msgspec.ValidationError) as error:
        raise ValueError(f"{path.name}: {' '.join(str(error).split())}") from None
    colors = msgspec.structs.asdict(theme.colors)
    colors |= {f"models[{index}]": value for index, value in enumerate(theme.models)}
    for key, value in colors.items():
        try:
            Color.parse(value)
        except ColorParseError:
            raise ValueError(f"{path.name}: {key}: {value!r} is no colour") from None
    if len(theme.models) < 4:
        raise ValueError(f"{path.name}: models: at least 4 colours are needed, {len(theme.models)} are there")
    return theme


def package_folder() -> Path:
    """The folder of the themes we ship: inside a wheel, beside the package in an editable install."""
    inside = _PACKAGE / "themes"
    return inside if inside.is_dir() else _PACKAGE.parent / "themes"


def load_themes(
    folders: Iterable[Path], ours: Collection[str] | None = None
) -> tuple[dict[str, ThemeFile], list[str]]:
    """All good themes by name, a later folder winning, and one line for each file that was skipped.

    Of the themes that we ship, whose files are called like them, only `ours` if given: each takes 5 ms.
    """
    themes: dict[str, ThemeFile] = {}
    complaints: list[str] = []
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            if ours is not None and folder == package_folder() and path.stem not in ours:
                continue
            try:
                theme = read_theme(path)
            except ValueError as error:
                complaints.append(f"Theme skipped: {error}")
                continue
            themes[theme.name] = theme
    return themes, complaints
