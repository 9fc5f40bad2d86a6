"""Below the table: what went wrong, what is under way, what enter would do, and what the last switch took."""

from __future__ import annotations

from collections.abc import Iterable

from rich.cells import cell_len
from textual.geometry import Size

from vllm_sleep_tui.fleet.past import Past
from vllm_sleep_tui.fleet.snapshot import ModelSnapshot, Prediction
from vllm_sleep_tui.fleet.states import SETTLED, StartPhase, State
from vllm_sleep_tui.tui.drawing.bars import large, phase_bar, progress
from vllm_sleep_tui.tui.drawing.paint import (
    Line,
    Shown,
    Span,
    beside,
    cut,
    cut_line,
    line_width,
    middle,
    rule,
    wrap,
)
from vllm_sleep_tui.tui.state.operations import Running
from vllm_sleep_tui.tui.state.view import View
from vllm_sleep_tui.tui.words import DOING, PARTS_OF_WAKE, expected_time, phases_of
from vllm_sleep_tui.units import clock, counted, time_sum, took

_INDENT = "  "
_START = [phase.value for phase in StartPhase]
_THAN_A_START = " than a start"
_RULE_WIDTH = 3
"""Of a rule beside its title."""
NOTED_SHARE = 0.05
"""Time of a switch that belongs to no phase is shown when it is more than this share of it."""
AIRY_HEIGHT, TALL_WIDTH = 36, 48
"""So high a terminal has room for blank lines between sections, so wide a box for large digits."""


def _wrapped(text: str, width: int, paint: str) -> list[Line]:
    """A text below a rule; it ends a cell before the edge, where the scrollbar may be."""
    return [((_INDENT, ""), (line, paint)) for line in wrap(text, width - len(_INDENT) - 1)]


def _facts(words: Iterable[str], width: int, paint: str) -> list[Line]:
    return _wrapped(beside(words), width, paint)


def failure_lines(model: ModelSnapshot, width: int) -> list[Line]:
    """The reason and the cure of a model that failed, or of which something else is wrong, in full."""
    if model.state is not State.FAILED and not model.reason:
        return death_lines(model, width)
    failed = model.state is State.FAILED
    title = f"why {model.name} failed" if failed else f"what is wrong with {model.name}"
    lines = [rule([(title, "bad bold")], width)]
    lines += _wrapped(model.reason or "No reason is known; the log (l) may tell.", width, "text")
    lines += _wrapped(model.cure, width, "accent") if model.cure else []
    return lines + death_lines(model, width)


def death_lines(model: ModelSnapshot, width: int) -> list[Line]:
    """Why the server before this one died, until the person has looked at its log."""
    died = model.last_failure
    if died is None:
        return []
    lines = [rule([(f"{model.name} died at {died.clock} and was started again", "bad bold")], width)]
    lines += _wrapped(died.reason or "No reason is known.", width, "text")
    return lines + _wrapped("Its last words: key l, which also lets this go.", width, "accent")


def trouble_lines(view: View, model: ModelSnapshot, width: int) -> list[Line]:
    """The last refusal or failed operation of this panel, unless the model's own reason says the same."""
    trouble = view.troubles.get(model.name)
    if trouble is None or (model.reason and model.reason in trouble.what):
        return []
    lines = [rule([(f"{trouble.doing} did not work", "bad bold")], width)]
    lines += _wrapped(trouble.what, width, "text")
    return lines + (_wrapped(trouble.cure, width, "accent") if trouble.cure else [])


def running_lines(view: View, model: ModelSnapshot, width: int) -> list[Line]:
    """Every operation under way: this panel's, and what others do to the selected model."""
    lines: list[Line] = []
    for running in view.running.values():
        lines += _running(view, running, width)
    operation = model.operation
    if operation is not None and not view.running:
        elapsed = view.snapshot.time - operation.since
        fraction = min(0.99, elapsed / operation.eta) if operation.eta else None
        words = DOING.get(operation.name, f"{operation.name} {{}}")
        title = [*_doing(words, view, model.name), (f"  {_times(elapsed, operation.eta)}", "muted")]
        lines.append(rule(title, width))
        lines += _step(str(model.phase or ""), model.progress or "", fraction, width)
    return lines


def _running(view: View, running: Running, width: int) -> list[Line]:
    model = view.snapshot.model(running.model)
    latest = running.progress
    acting = view.snapshot.model(latest.model) if latest is not None and _knows(view, latest.model) else model
    eta = model.operation.eta if model.operation else None
    elapsed = view.snapshot.time - running.since
    title: list[Span] = [
        *_doing(running.verb + running.and_others, view, running.model),
        (f"  {_times(elapsed, eta)}", "muted"),
    ]
    if running.cancelled:
        title.append(("  stops at the next safe point", "warning"))
    phase = latest.phase if latest else str(acting.phase or "")
    if acting is not model and phase:
        phase = f"{acting.name}: {phase}"
    detail = (latest.detail if latest else "") or acting.progress or ""
    fraction = latest.fraction if latest else None
    if fraction is None and eta:
        fraction = min(0.99, elapsed / eta)
    return [rule(title, width), *_step(phase, detail, fraction, width)]


def _doing(words: str, view: View, name: str) -> list[Span]:
    before, _, after = words.partition("{}")
    return [(before, "warning bold"), (name, f"{view.colors[name]} bold"), (after, "warning bold")]


def _knows(view: View, name: str) -> bool:
    return any(model.name == name for model in view.snapshot.models)


def _times(elapsed: float, eta: float | None) -> str:
    return clock(elapsed) if eta is None else f"{clock(elapsed)} of about {clock(eta + 0.5)}"


def _step(phase: str, detail: str, fraction: float | None, width: int) -> list[Line]:
    if (fraction is None or fraction >= 1) and phase in _START:
        # A first start is of unknown length, but its phases are known; and one that is over is not the start.
        lines: list[Line] = [((_INDENT, ""), *_track(phase, width - len(_INDENT)))]
        return [*lines, ((_INDENT, ""), (cut(detail, width - len(_INDENT)), "text"))] if detail else lines
    per_cent = "" if fraction is None else f" {fraction * 100:3.0f} %"
    bar = progress(fraction, width - len(_INDENT) - len(per_cent) - 1)
    words = cut(f"{phase}  {detail}".strip() or "working", width - len(_INDENT))
    return [((_INDENT, ""), (words, "text")), ((_INDENT, ""), *bar, (per_cent, "muted"))]


def _track(phase: str, width: int) -> Line:
    """The phases of a start, those that are over and the one under way marked."""
    at = _START.index(phase)
    between = " › " if len(" › ".join(_START)) <= width else "›"
    spans: list[Span] = []
    for number, name in enumerate(_START):
        paint = "warning bold" if number == at else "text" if number < at else "muted"
        spans += [(between, "muted")] if spans else []
        spans.append((name, paint))
    return cut_line(spans, width)


def enter_lines(view: View, prediction: Prediction, width: int) -> list[Line]:
    """What enter would do, with its numbers."""
    color = view.colors.get(prediction.target, "text")
    title: list[Span] = [("enter → ", "accent bold"), (prediction.target, f"{color} bold")]
    if prediction.action == "nothing":
        return [rule([*title, ("  is awake already", "muted")], width)]
    if prediction.action != "refused":
        about = expected_time(prediction)
        title.append((f"  ≈ {about}", "text bold") if about else ("  not timed yet", "muted"))
    paint = "warning" if prediction.action == "refused" else "text"
    lines = [rule(title, width), *_wrapped(prediction.sentence, width, paint)]
    if view.waits is not None and prediction.action != "refused":
        lines += _wrapped(f"First it {view.waits}.", width, "warning")
    return lines


def last_switch_lines(view: View, model: ModelSnapshot, width: int, *, is_tall: bool = False) -> list[Line]:
    """The last switch to the model: its time, large where there is room, against a start, and its phases."""
    times = model.last_switch
    if times is None:
        return []
    was_start = not times.is_wake
    color, gain = view.colors[model.name], _gain(view.past, model)
    title: list[Span] = [
        ("last start of " if was_start else "last switch to ", "muted"),
        (model.name, "text bold"),
    ]
    figure = took(times.total)
    if is_tall:
        said = (
            (_path(view.past, model), "text bold"),
            (gain, "good"),
            (saved_words(view.past, model), "muted"),
        )
        lines = [rule(title, width)]
        for row, (words, paint) in zip(large(figure, "accent bold"), said, strict=True):
            start: Line = ((_INDENT, ""), *row, ("   ", ""))
            lines.append((*start, (_shortened(words, width - line_width(start)), paint)))
    else:
        title += [(f"  {figure}", "accent bold"), ("  " if gain else "", "")]
        lines = [rule([*title, (_shortened(gain, width - line_width(title) - _RULE_WIDTH), "good")], width)]
    phases = [phase for phase in phases_of(times) if phase[0] not in PARTS_OF_WAKE]
    if phases:
        rest = times.total - sum(seconds for _, seconds in phases)
        if rest > times.total * NOTED_SHARE:
            phases.append(("start" if was_start else "rest", rest))
        lines.append(((_INDENT, ""), *phase_bar(phases, width - len(_INDENT) - 1, color)))
        lines += _facts(_phase_words(phases, phases_of(times)), width, "muted")
    if not is_tall and (saved := saved_words(view.past, model)):
        lines += _wrapped(saved, width, "muted")
    return lines


def _phase_words(phases: list[tuple[str, float]], all_phases: list[tuple[str, float]]) -> list[str]:
    """Each phase with its time, what a wake consists of in brackets."""
    parts = " · ".join(f"{name} {took(seconds)}" for name, seconds in all_phases if name in PARTS_OF_WAKE)
    return [
        f"{name} {took(seconds)}" + (f" ({parts})" if name == "wake" and parts else "")
        for name, seconds in phases
    ]


def _shortened(words: str, width: int) -> str:
    """Of `words` what fits into `width` cells and says something by itself: all, or without its end."""
    for shorter in (words, words.removesuffix(_THAN_A_START), words.partition(" · ")[0]):
        if cell_len(shorter) <= width:
            return shorter
    return middle(words, width)


def _gain(past: Past, model: ModelSnapshot) -> str:
    """How the last switch compares with a start of the model, where both are known."""
    cold, last = past.cold_starts.get(model.name), model.last_switch
    if cold is None or last is None or not last.is_wake or cold < 2 * last.total:
        return ""
    return f"{cold / last.total:.0f} × faster{_THAN_A_START}"


def _path(past: Past, model: ModelSnapshot) -> str:
    """Who made room for whom."""
    switch = next((one for one in reversed(past.switches) if one.model == model.name), None)
    is_last = switch is not None and switch.times == model.last_switch
    return (
        f"{', '.join(switch.left)} → {model.name}" if switch is not None and is_last and switch.left else ""
    )


def saved_words(past: Past, model: ModelSnapshot) -> str:
    """What the last switch saved, and what the day's did."""
    cold, last = past.cold_starts.get(model.name), model.last_switch
    words = []
    if cold is not None and last is not None and last.is_wake and cold > last.total:
        words.append(f"{took(cold - last.total)} saved")
    if words and past.switches_today == 1:
        words.append("today 1 switch")  # whose saving stands before it
    elif past.switches_today:
        words.append(_today(past))
    return " · ".join(words)


def usual_lines(past: Past, model: ModelSnapshot, width: int) -> list[Line]:
    """What switches to the model take as a rule."""
    level = {"0": 0, "1": 1, "2": 2}.get(model.resolved_level or "")
    usual = None if level is None else past.percentiles.get(model.name, {}).get(level)
    if usual is None or usual.count < 2:
        return []
    words = f"p50 {took(usual.p50)} · p95 {took(usual.p95)} over {_switches(usual.count)} at level {level}"
    return _wrapped(words, width, "muted")


def _today(past: Past) -> str:
    seconds = past.saved_today.seconds
    return f"today {_switches(past.switches_today)}" + (f", {time_sum(seconds)} saved" if seconds > 0 else "")


def _switches(count: int) -> str:
    return counted(count, "switch", "switches")


def serving_lines(model: ModelSnapshot, width: int) -> list[Line]:
    """How an awake model serves, as far as it is known; what is nothing now is left out."""
    serving = model.serving
    if serving is None:
        return []
    words = [f"{serving.running} running"] if serving.running else []
    if serving.waiting:
        words.append(f"{serving.waiting} waiting")
    if serving.kv_use and serving.kv_use >= 0.005:
        words.append(f"KV {serving.kv_use * 100:.0f} %")
    if serving.generation_tokens_per_s and serving.generation_tokens_per_s >= 0.5:
        words.append(f"{serving.generation_tokens_per_s:.0f} tok/s")
    if serving.ttft_p50 is not None and serving.ttft_p95 is not None:
        words.append(f"TTFT p50 {took(serving.ttft_p50)}, p95 {took(serving.ttft_p95)}")
    if serving.inter_token_p50 is not None and serving.inter_token_p95 is not None:
        p50, p95 = took(serving.inter_token_p50), took(serving.inter_token_p95)
        words.append(f"between tokens p50 {p50}, p95 {p95}")
    if serving.prefix_hit_share and serving.prefix_hit_share >= 0.005:
        words.append(f"prefix hits {serving.prefix_hit_share * 100:.0f} %")
    if serving.cached_tokens:
        words.append(f"{counted(serving.cached_tokens, 'token')} cached")
    return _facts(words, width, "text") if words else []


def facts_line(model: ModelSnapshot, width: int) -> list[Line]:
    """One quiet line: where the model comes from, its level, its process, its proof."""
    level = model.configured_level
    if level == "auto" and model.resolved_level is not None:
        level = f"auto ({model.resolved_level})"
    words = [model.source, f"level {level}"]
    if model.sleep_backend == "own":
        words.append("fast sleep mode")
    if model.kv_cache is not None:
        words.append(f"KV cache of {model.kv_cache} or more")
    if model.gpus:
        words.append(f"GPU {', '.join(map(str, model.gpus))}")
    if model.port is not None:
        words.append(f"port {model.port}")
    if model.pid is not None:
        words.append(f"pid {model.pid}")
    if model.proof:
        words.append(model.proof)
    if not model.frees_memory:
        words.append("sleeping frees no memory here")
    return _facts(filter(None, words), width, "muted")


class Detail(Shown):
    """All that is to be said about the selected model."""

    def draw(self, view: View, size: Size) -> list[Line]:
        """The sections that have something to say, the most pressing first."""
        if view.model is None:
            return []
        model, width = view.model, size.width
        sections = [failure_lines(model, width), trouble_lines(view, model, width)]
        sections.append(running_lines(view, model, width))
        # While the model is on its way, what happens now is the answer to what enter would do.
        prediction = view.prediction
        is_told = model.state in SETTLED and model.name not in view.running
        if prediction is not None and is_told and prediction.action != "nothing":
            sections.append(enter_lines(view, prediction, width))
        airy = self.app.size.height >= AIRY_HEIGHT
        is_tall = airy and width >= TALL_WIDTH
        last = last_switch_lines(view, model, width, is_tall=is_tall)
        sections.append([*last, *usual_lines(view.past, model, width)])
        sections.append([*serving_lines(model, width), *facts_line(model, width)])
        lines: list[Line] = []
        for section in filter(None, sections):
            lines += [((" ", ""),)] if airy and lines else []
            lines += section
        return lines
