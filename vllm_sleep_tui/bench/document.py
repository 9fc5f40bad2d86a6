"""A report as sections of text, tables and charts, before it is Markdown or a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells of text under a header."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One heading and what is under it."""

    title: str
    table: Table | None = None
    notes: tuple[str, ...] = ()
    """Paragraphs after the table."""
    chart: dict[str, Any] | None = None
    """A Vega-Lite chart, shown where charts can be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A whole report."""

    title: str
    summary: tuple[str, ...]
    """Paragraphs at its head."""
    sections: tuple[Section, ...] = field(default=())
