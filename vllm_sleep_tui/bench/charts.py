"""The charts of a report, as Vega-Lite: data and what it means, no drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_sleep_tui.bench import figures
from vllm_sleep_tui.bench.figures import Summary
from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.post import Figures
from vllm_sleep_tui.bench.results import Run

Chart = dict[str, Any]
WIDTH = 560
COLOURS = ("#2f6fb2", "#d9822b")
POST_COLOUR = "#777777"
MODES = [mode.words for mode in Mode]
FONT = "DejaVu Sans, Arial, sans-serif"


def switches(run: Run, theirs: Mapping[Mode, Figures], named: str) -> Chart:
    """Every switch as a point, on a log scale, by mode and target; the post's as hollow diamonds."""
    values = [
        {"by": mode.words, "model": name, "seconds": spent, "who": "measured"}
        for mode in figures.modes(run)
        for name in run.plan.pair
        for spent in figures.switches(run, mode, name)
    ]
    values += _of_post(run, theirs, named, "switch_a", "switch_b")
    return _points(run, values, "seconds for a switch", log=True)


def inferences(run: Run, theirs: Mapping[Mode, Figures], named: str) -> Chart:
    """Every inference after a switch as a point."""
    values = [
        {"by": mode.words, "model": name, "seconds": step.inference, "who": "measured"}
        for mode in figures.modes(run)
        for name in run.plan.pair
        for step in figures.steps(run, mode, name)
    ]
    values += _of_post(run, theirs, named, "inference_a", "inference_b")
    return _points(run, values, "seconds for the whole answer", log=False)


def totals(summary: Summary, theirs: Mapping[Mode, Figures], named: str) -> Chart:
    """The initial load and one pass, stacked; the post's totals as diamonds."""
    values: list[dict[str, Any]] = []
    for total in summary.totals:
        if total.protocol is None:
            continue
        parts = {"initial load": total.initial_load, "switches and inferences": total.protocol.median}
        values += [
            {"by": total.mode.words, "part": part, "order": place, "seconds": spent}
            for place, (part, spent) in enumerate(parts.items())
            if spent is not None
        ]
    post = [
        {"by": mode.words, "part": named, "seconds": given.total}
        for mode, given in theirs.items()
        if given.total is not None
    ]
    domain = ["initial load", "switches and inferences", named]
    colour = _colour("part", domain, ["#9db8d2", COLOURS[0], POST_COLOUR])
    x = _seconds("seconds")
    bars = {
        "data": {"values": values},
        "mark": {"type": "bar", "height": 18},
        "encoding": {"x": {**x, "stack": "zero"}, "color": colour, "order": {"field": "order"}},
    }
    theirs_layer = {
        "data": {"values": post},
        "mark": {"type": "point", "shape": "diamond", "size": 90, "strokeWidth": 2},
        "encoding": {"x": x, "color": colour},
    }
    return _chart({"encoding": {"y": _by()}, "layer": [bars, theirs_layer], "height": {"step": 34}})


def phases(run: Run) -> Chart:
    """The medians of the phases, stacked, each mode on a scale of its own."""
    values = [
        {
            "by": mode.words,
            "to": name,
            "phase": phase,
            "order": figures.IN_ORDER.index(phase),
            "seconds": spent,
        }
        for mode in figures.modes(run)
        for name in run.plan.pair
        for phase, spent in figures.phases(run, mode, name).items()
    ]
    colour = {"field": "phase", "type": "nominal", "sort": list(figures.IN_ORDER), "title": None}
    bars = {
        "mark": {"type": "bar", "height": 18},
        "width": WIDTH - 60,
        "height": {"step": 28},
        "encoding": {
            "y": {"field": "to", "type": "nominal", "sort": list(run.plan.pair), "title": None},
            "x": {**_seconds("seconds"), "stack": "zero"},
            "color": {**colour, "scale": {"scheme": "tableau20"}},
            "order": {"field": "order"},
        },
    }
    return _chart(
        {
            "data": {"values": values},
            "facet": {"row": {"field": "by", "type": "nominal", "sort": MODES, "title": None}},
            "spec": bars,
            "resolve": {"scale": {"x": "independent", "y": "independent"}},
        },
        sized=False,
    )


def _of_post(
    run: Run, theirs: Mapping[Mode, Figures], named: str, field_a: str, field_b: str
) -> list[dict[str, Any]]:
    """The post's values of the modes that the run has, in the place of the model that stands for theirs."""
    return [
        {"by": mode.words, "model": name, "seconds": value, "who": named}
        for mode in figures.modes(run)
        for name, field in zip(run.plan.pair, (field_a, field_b), strict=True)
        if mode in theirs and (value := getattr(theirs[mode], field)) is not None
    ]


def _points(run: Run, values: Sequence[dict[str, Any]], title: str, *, log: bool) -> Chart:
    """Points by mode and model, filled where measured, with a tick at each median."""
    x = _seconds(title)
    if log:
        x["scale"] = {"type": "log"}
    who = list(dict.fromkeys(value["who"] for value in values))
    shared = {
        "y": _by(),
        "yOffset": {"field": "model", "type": "nominal", "sort": list(run.plan.pair)},
        "color": _colour("model", list(run.plan.pair), list(COLOURS)),
    }
    points = {
        "mark": {"type": "point", "size": 70, "opacity": 0.75},
        "encoding": {
            "x": x,
            "shape": {
                "field": "who",
                "type": "nominal",
                "title": None,
                "scale": {"domain": who, "range": ["circle", "diamond"][: len(who)]},
            },
        },
    }
    return _chart(
        {
            "data": {"values": list(values)},
            "encoding": shared,
            "layer": [points, _medians(x)],
            "height": {"step": 26},
        }
    )


def _medians(x: Chart) -> Chart:
    """A tick at the median of what was measured, by mode and model."""
    return {
        "transform": [
            {"filter": {"field": "who", "equal": "measured"}},
            {
                "aggregate": [{"op": "median", "field": "seconds", "as": "seconds"}],
                "groupby": ["by", "model"],
            },
        ],
        "mark": {"type": "tick", "thickness": 3, "height": 18},
        "encoding": {"x": x},
    }


def _by() -> Chart:
    return {"field": "by", "type": "nominal", "sort": MODES, "title": None}


def _seconds(title: str) -> Chart:
    return {"field": "seconds", "type": "quantitative", "title": title}


def _colour(field: str, domain: list[str], colours: list[str]) -> Chart:
    return {
        "field": field,
        "type": "nominal",
        "title": None,
        "scale": {"domain": domain, "range": colours},
    }


def _chart(spec: Chart, *, sized: bool = True) -> Chart:
    size = {"width": WIDTH} if sized else {}
    look = {"font": FONT, "view": {"stroke": None}, "axis": {"labelLimit": 260}}
    schema = "https://vega.github.io/schema/vega-lite/v5.json"
    return {"$schema": schema, "config": look, **size, **spec}
