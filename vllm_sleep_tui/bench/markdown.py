"""A report as Markdown."""

from __future__ import annotations

from vllm_sleep_tui.bench.document import Document, Section, Table


def render(document: Document) -> str:
    """The whole report."""
    parts = [f"# {document.title}\n", *(f"{text}\n" for text in document.summary)]
    parts += [_section(section) for section in document.sections]
    return "\n".join(parts)


def table(shown: Table) -> str:
    """One table, its columns padded so that it reads as plain text too."""
    rows = [tuple(cell.replace("|", "\\|") for cell in row) for row in (shown.header, *shown.rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(shown.header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines) + "\n"


def _section(section: Section) -> str:
    parts = [f"## {section.title}\n"]
    if section.table is not None:
        parts.append(table(section.table))
    return "\n".join([*parts, *(f"{note}\n" for note in section.notes)])
