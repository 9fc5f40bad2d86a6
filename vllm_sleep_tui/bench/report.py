"""What a run showed, as a document: switches, inferences, totals, phases, memory, and whether it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from statistics import median

import msgspec

from vllm_sleep_tui.bench import charts, figures, post
from vllm_sleep_tui.bench.document import Document, Section, Table
from vllm_sleep_tui.bench.figures import Spread, Summary, Total
from vllm_sleep_tui.bench.pays import pays
from vllm_sleep_tui.bench.plan import MAX_TOKENS, Mode
from vllm_sleep_tui.bench.post import Figures
from vllm_sleep_tui.bench.progress import left
from vllm_sleep_tui.bench.results import Machine, Run, Step
from vllm_sleep_tui.units import NONE, gib, precise

WHAT_A_SWITCH_IS = (
    "A switch is the leaving model's sleep and the other's wake, or its stop and the other's start, until "
    "the other takes requests. The post's figure is the wake alone. A tick in the chart is a median."
)


def report(run: Run, switches_per_day: float) -> Document:
    """The whole report of a run."""
    published = post.read()
    nearest = post.nearest(published, run.machine)
    summary = figures.summary(run)
    return Document(
        title=f"Switching between {run.plan.a} and {run.plan.b}",
        summary=tuple(_head(run, summary)),
        sections=(
            *_beside_the_post(run, summary, post.variant(nearest, run.plan), f"the post's ({nearest.name})"),
            Section(title="Where the time goes", table=_phases(run), chart=charts.phases(run)),
            Section(title="Memory", table=_memory(run)),
            Section(title="Does it pay?", notes=_pays(run, switches_per_day)),
            Section(title="How it was measured", table=_models(run), notes=tuple(_how(run))),
            Section(
                title="The post's figures",
                notes=(
                    f"Theirs, not measured here: {published.source} (vLLM {published.vllm}, {nearest.name}, "
                    f"A = {published.pair[0]}, B = {published.pair[1]}). "
                    "Other hardware and models: compare ratios.",
                ),
            ),
        ),
    )


def _beside_the_post(
    run: Run, summary: Summary, theirs: Mapping[Mode, Figures], named: str
) -> tuple[Section, ...]:
    """The sections whose figures the post has too."""
    return (
        Section(
            title="Switches",
            table=switches_table(run, theirs, named),
            notes=(WHAT_A_SWITCH_IS,),
            chart=charts.switches(run, theirs, named),
        ),
        Section(
            title="The inference after a switch",
            table=_inferences(run, summary, theirs, named),
            notes=_first_answers(run),
            chart=charts.inferences(run, theirs, named),
        ),
        Section(
            title="Totals",
            table=_totals(summary.totals, theirs, named),
            notes=("A pass is A→B→A→B→A→B, six times awake with six inferences.",),
            chart=charts.totals(summary, theirs, named),
        ),
    )


def switches_table(
    run: Run, theirs: Mapping[Mode, Figures] | None = None, named: str = "the post's"
) -> Table:
    """Switch times by mode and target; with `theirs`, the post's beside them."""
    cold = {name: figures.spread(figures.switches(run, Mode.COLD, name)) for name in run.plan.pair}
    rows = []
    for row in figures.summary(run).rows:
        against = cold[row.target]
        faster = (
            f"{against.median / row.switch.median:.0f} times faster"
            if against and row.switch and row.mode is not Mode.COLD
            else NONE
        )
        cells = [row.mode.words, row.target, *_spread(row.switch), faster]
        if theirs is not None:
            cells.append(_theirs_switch(theirs.get(row.mode), is_a=row.target == run.plan.a))
        rows.append(tuple(cells))
    header = ["by", "switch to", "n", "median", "lowest to highest", "against stop and start"]
    return Table(header=tuple(header + ([named] if theirs is not None else [])), rows=tuple(rows))


def _head(run: Run, summary: Summary) -> list[str]:
    machine = run.machine
    lines = []
    if any(gpu.simulated for gpu in machine.gpus):
        lines.append("**SIMULATED**: these GPUs and servers are a stand-in; nothing here is a measurement.")
    lines.append(_machine(machine))
    rest = left(run)
    if rest.done < rest.steps:
        lines.append(f"Unfinished: {rest.done} of {rest.steps} switches were made.")
    lines += [
        f"{total.mode.words.capitalize()} was refused: {total.refused}"
        for total in summary.totals
        if total.refused
    ]
    return lines


def _machine(machine: Machine) -> str:
    gpus = ", ".join(f"{gpu.name} ({gib(gpu.total_bytes)})" for gpu in machine.gpus) or "no GPU"
    parts = [
        gpus,
        f"{machine.cpu or 'CPU unknown'}, {machine.cores} cores",
        f"{gib(machine.ram_bytes)} of RAM",
        f"driver {machine.driver}" if machine.driver else None,
        f"vLLM {machine.vllm}" if machine.vllm else None,
        f"torch {machine.torch}" if machine.torch else None,
        f"Python {machine.vllm_python or machine.python}",
        f"Linux {machine.kernel}",
    ]
    return "; ".join(part for part in parts if part) + "."


def _inferences(run: Run, summary: Summary, theirs: Mapping[Mode, Figures], named: str) -> Table:
    rows = []
    for row in summary.rows:
        given = theirs.get(row.mode, Figures())
        other = given.inference_a if row.target == run.plan.a else given.inference_b
        count, middle, range_ = _spread(row.inference)
        first = NONE if row.ttft is None else precise(row.ttft.median)
        tokens = NONE if row.tokens is None else f"{row.tokens.median:g}"
        rows.append((row.mode.words, row.target, count, first, middle, range_, tokens, _seconds(other)))
    header = ("after", "model", "n", "first token", "whole answer", "lowest to highest", "tokens", named)
    return Table(header=header, rows=tuple(rows))


def _first_answers(run: Run) -> tuple[str, ...]:
    """What a warm-up takes out of the first inference."""
    answers = [f"{name} {precise(spent)}" for name, spent in figures.first_answers(run).items()]
    if not answers:
        return ()
    how = "as its warm-up, counted in the load" if run.plan.warm_up else "without a warm-up, counted above"
    return (f"The first whole answer after the initial load, {how}: {', '.join(answers)}.",)


def _totals(totals: Sequence[Total], theirs: Mapping[Mode, Figures], named: str) -> Table:
    rows = tuple(
        (
            total.mode.words,
            *_spread(total.protocol),
            _seconds(total.initial_load),
            _seconds(total.whole),
            _seconds(theirs.get(total.mode, Figures()).total),
        )
        for total in totals
    )
    header = ("by", "passes", "median pass", "lowest to highest", "initial load of both", "together", named)
    return Table(header=header, rows=rows)


def _phases(run: Run) -> Table:
    rows = tuple(
        (
            mode.words,
            name,
            " · ".join(f"{phase} {precise(spent)}" for phase, spent in spent_by_phase.items()),
        )
        for mode in figures.modes(run)
        for name in run.plan.pair
        if (spent_by_phase := figures.phases(run, mode, name))
    )
    return Table(header=("by", "switch to", "medians of its phases"), rows=rows)


def _memory(run: Run) -> Table:
    rows = []
    for name in run.plan.pair:
        made = [step for each in run.passes for step in each.steps]
        rows.append((name, "awake", *_held([step for step in made if step.target == name], name)))
        for mode in figures.modes(run):
            left_behind = [step for each in run.of_mode(mode) for step in each.steps if step.leaving == name]
            if left_behind and mode.level is not None:
                rows.append((name, f"asleep, level {mode.level}", *_held(left_behind, name)))
    return Table(header=("model", "state", "VRAM", "RAM"), rows=tuple(rows))


def _held(made: Sequence[Step], name: str) -> tuple[str, str]:
    """The medians of what a model held after these steps: VRAM and RAM."""
    shown = []
    for kind in ("vram", "ram"):
        sizes = [size for step in made if (size := getattr(step.after, kind).get(name)) is not None]
        shown.append(gib(median(sizes)) if sizes else NONE)
    return shown[0], shown[1]


def _pays(run: Run, switches_per_day: float) -> tuple[str, ...]:
    sentences = tuple(each.sentence(switches_per_day) for each in pays(run))
    residues = [
        f"{name} holds {vram} of VRAM and {ram} of RAM {state}"
        for name, state, vram, ram in _memory(run).rows
        if state != "awake"
    ]
    if sentences and residues:
        return *sentences, f"What it takes meanwhile: {'; '.join(residues)}."
    return sentences or (
        "Not known: it takes a sleep level, and a cold pass or an initial load, of both models.",
    )


def _models(run: Run) -> Table:
    rows = tuple(
        (
            letter,
            name,
            str(run.models[name].get("model")),
            str(run.models[name].get("level", "auto")),
            msgspec.json.encode(run.models[name].get("args") or {}).decode(),
        )
        for letter, name in zip("AB", run.plan.pair, strict=True)
    )
    return Table(header=("", "name", "model", "level", "arguments"), rows=rows)


def _how(run: Run) -> list[str]:
    plan = run.plan
    order = ", ".join(f"{key.mode} {key.repeat}" for key in plan.passes)
    warm = (
        "After its initial load each model answered once in full as a warm-up."
        if plan.warm_up
        else "Without warm-up: no request came before the first inference, and wakes were not proven."
    )
    lines = [
        f"Began {datetime.fromtimestamp(run.began, UTC):%Y-%m-%d %H:%M} UTC, vllm-sleep-tui {run.program}. "
        f"One question after each switch, at most {MAX_TOKENS} tokens, temperature 0. Passes in the order "
        f"{order} (modes shuffled with seed {plan.seed}). {warm}",
        "A cold start is what vLLM alone does: no warm-up, no priming. Switches count from the second step "
        "of a pass on, as the first has nobody to put to sleep. Memory was read outside of what is timed.",
    ]
    if plan.overrides:
        lines.append(f"Changed for this run alone: {', '.join(map(str, plan.overrides))}.")
    return lines


def _theirs_switch(given: Figures | None, *, is_a: bool) -> str:
    if given is None:
        return NONE
    if given.switch_either is not None:
        low, high = given.switch_either
        return f"{low:g} to {high:g} s"
    return _seconds(given.switch_a if is_a else given.switch_b)


def _spread(spread: Spread | None) -> tuple[str, str, str]:
    """Count, median, range."""
    if spread is None:
        return "0", NONE, NONE
    return (
        str(spread.count),
        precise(spread.median),
        f"{precise(spread.low)} to {precise(spread.high)}",
    )


def _seconds(value: float | None) -> str:
    return NONE if value is None else precise(value)
