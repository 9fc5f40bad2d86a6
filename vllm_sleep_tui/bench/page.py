"""A report as one HTML page that needs nothing else: no script, no network, charts as SVG inside it."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from vllm_sleep_tui.bench.document import Document, Section, Table
from vllm_sleep_tui.errors import UsageError

VEGA_LITE = "5.20"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1c1c1c; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; }
th, td { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #eee; }
svg { max-width: 100%; height: auto; }
"""


def render(document: Document) -> str:
    """The whole page; raises UsageError if the charts cannot be drawn here."""
    body = [f"<h1>{escape(document.title)}</h1>", *(_paragraph(text) for text in document.summary)]
    for place, section in enumerate(document.sections):
        body.append(_section(section, place))
    title = escape(document.title)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{chr(10).join(body)}\n</body>\n</html>\n"
    )


def _section(section: Section, place: int) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    if section.chart is not None:
        parts.append(f"<figure>{svg(section.chart, f's{place}')}</figure>")
    if section.table is not None:
        parts.append(_table(section.table))
    return "\n".join([*parts, *(_paragraph(note) for note in section.notes)])


def _paragraph(text: str) -> str:
    bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return f"<p>{bold}</p>"


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in table.header)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"


def svg(chart: dict[str, Any], prefix: str) -> str:
    """A chart drawn without a browser, its ids unique in the page; raises UsageError without the extra."""
    try:
        import vl_convert
    except ImportError:
        raise UsageError(
            "The charts of --html need vl-convert-python, which is not installed.",
            "pip install 'vllm-sleep-tui[report]', or use --md, which needs nothing.",
        ) from None
    drawn: str = vl_convert.vegalite_to_svg(chart, vl_version=VEGA_LITE)
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)
