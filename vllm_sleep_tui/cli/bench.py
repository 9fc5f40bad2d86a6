"""`bench`: the post's experiments on the person's own two models, their report, and the difference of two."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from vllm_sleep_tui.bench import compare, figures, markdown, page, report
from vllm_sleep_tui.bench.plan import PassKey, Plan, order, parse_modes, parse_overrides
from vllm_sleep_tui.bench.progress import left, line
from vllm_sleep_tui.bench.results import Run, Step, new_file, read
from vllm_sleep_tui.cli.common import (
    Number,
    WholeNumber,
    complete_model,
    config_option,
    given_config,
    json_option,
    load_config,
    put,
    put_done,
    put_json,
    say,
)
from vllm_sleep_tui.cli.running import Reporter, with_fleet
from vllm_sleep_tui.config.load import LoadedConfig
from vllm_sleep_tui.errors import CancelledByUser, PanelError, UsageError
from vllm_sleep_tui.files import write_atomically
from vllm_sleep_tui.fleet.snapshot import WAITING, Progress
from vllm_sleep_tui.fleet.states import StartPhase
from vllm_sleep_tui.paths import absolute, state_dir

if TYPE_CHECKING:
    from vllm_sleep_tui.fleet.fleet import Fleet

NEW_RUN_ONLY = ("modes", "repeats", "seed", "no_warmup", "changes", "out")
file_argument = click.argument("file", type=click.Path(path_type=Path, dir_okay=False))


@click.group()
def bench() -> None:
    """Measure switches between two models, as vLLM's post on sleep mode did."""


@bench.command("run")
@click.argument("names", metavar="[A B]", nargs=-1, shell_complete=complete_model)
@click.option("--modes", default="level1,level2,cold", show_default=True, help="cold:1 is cold, one repeat.")
@click.option("--repeats", type=WholeNumber(1, 99), default=3, show_default=True, help="Passes a mode.")
@click.option("--seed", type=WholeNumber(), default=0, show_default=True, help="Shuffles the modes' order.")
@click.option("--no-warmup", is_flag=True, help="No warm-up after the initial loads.")
@click.option(
    "--set", "changes", metavar="NAME.args.FLAG=VALUE", multiple=True, help="For this run alone; * is both."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The result; else it is named.")
@click.option("--resume", type=click.Path(path_type=Path, dir_okay=False), help="Go on with this result.")
@click.option("--limit", type=Number(min=1), metavar="SECONDS", help="Stop then; see --resume.")
@json_option
@config_option
@click.pass_context
def run_verb(
    ctx: click.Context,
    /,
    names: tuple[str, ...],
    out: Path | None,
    resume: Path | None,
    limit: float | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Measure A→B→A→B→A→B, an answer after each switch; the models end as they were found."""
    loaded = load_config(ctx)
    before = None if resume is None else read(resume)
    if before is None:
        plan = _plan(loaded, names, **given)
    else:
        _check_resumed(ctx, before, names)
        plan = before.plan
    path = absolute(resume) if resume else _new_path(out, plan)
    again = _again(ctx, path)

    async def measure(fleet: Fleet) -> Run:
        from vllm_sleep_tui.bench import run as experiment  # which reports do without

        try:
            return await experiment.run(
                fleet, plan, _tell, out=path, resume=before, limit=limit, report=_starts_only(Reporter())
            )
        except experiment.LimitReached as error:
            raise CancelledByUser(f"{error.what} {_how_far(path)}", again) from error
        except (CancelledByUser, asyncio.CancelledError) as error:
            raise CancelledByUser(f"Interrupted. {_how_far(path)}", again) from error
        except PanelError:
            if path.exists():
                say(f"What was measured is in {path}.")
            raise

    _put_result(with_fleet(loaded, measure), path, as_json)


@bench.command("report")
@file_argument
@click.option(
    "--html", type=click.Path(path_type=Path, dir_okay=False), help="A page with charts, by itself."
)
@click.option("--md", type=click.Path(path_type=Path, dir_okay=False), help="Markdown, else on stdout.")
@click.option("--switches-per-day", type=Number(min=0), default=50.0, show_default=True)
def report_verb(file: Path, html: Path | None, md: Path | None, switches_per_day: float) -> None:
    """Show a result beside the post's figures, and whether sleeping pays."""
    document = report.report(read(file), switches_per_day)
    if html is not None:
        _write(html, page.render(document))
    if md is not None:
        _write(md, markdown.render(document))
    if html is None and md is None:
        put(markdown.render(document), nl=False)


@bench.command("compare")
@click.argument("first", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("second", type=click.Path(path_type=Path, dir_okay=False))
@json_option
def compare_verb(first: Path, second: Path, as_json: bool) -> None:
    """Compare two results: medians, ratio, and whether the difference is more than the spread."""
    rows = compare.compare(read(first), read(second))
    if as_json:
        put_json({"version": 1, "rows": msgspec.to_builtins(rows)})
    else:
        put(markdown.table(compare.table(rows, first.stem, second.stem)), nl=False)


def _plan(
    loaded: LoadedConfig,
    names: tuple[str, ...],
    *,
    modes: str,
    repeats: int,
    seed: int,
    no_warmup: bool,
    changes: tuple[str, ...],
) -> Plan:
    if len(names) != 2:
        raise UsageError("bench run takes two models.", f"Name two of: {', '.join(loaded.config.models)}.")
    for name in names:
        loaded.model(name)
    return Plan(
        a=names[0],
        b=names[1],
        passes=order(parse_modes(modes, repeats), seed),
        seed=seed,
        warm_up=not no_warmup,
        overrides=parse_overrides(changes, (names[0], names[1])),
    )


def _check_resumed(ctx: click.Context, before: Run, names: tuple[str, ...]) -> None:
    """Raises UsageError if something is asked that the resumed run has decided already."""
    source = click.core.ParameterSource.COMMANDLINE
    decided = [name for name in NEW_RUN_ONLY if ctx.get_parameter_source(name) is source]
    if decided or (names and names != before.plan.pair):
        raise UsageError(
            "A run that is resumed keeps its models and options.", "Leave everything but --limit out."
        )


def _new_path(out: Path | None, plan: Plan) -> Path:
    """Where a new result goes; raises UsageError if it cannot go where the person wants it."""
    if out is not None:
        path = absolute(out)
        if path.exists():
            raise UsageError(f"{path} is there already.", "Name another --out, or go on with it: --resume.")
        if not path.parent.is_dir():
            raise UsageError(f"The folder {path.parent} is not there.", "Make it, or name another --out.")
        return path
    return new_file(state_dir(), plan)


def _again(ctx: click.Context, path: Path) -> str:
    config = given_config(ctx)
    return f"Go on: vllm-sleep-tui bench run {f'--config {config} ' if config else ''}--resume {path}"


def _how_far(path: Path) -> str:
    if not path.exists():
        return "Nothing was measured yet."
    rest = left(read(path))
    return f"{rest.done} of {rest.steps} switches are in {path}."


def _starts_only(report: Reporter) -> Callable[[Progress], None]:
    """The progress of starts and stops; a switch by sleep is told as a whole, when it is measured."""
    shown = {*StartPhase, "stopping", WAITING}
    return lambda progress: report(progress) if progress.phase in shown else None


def _tell(run: Run, key: PassKey, step: Step) -> None:
    say(line(run, key, step))


def _put_result(run: Run, path: Path, as_json: bool) -> None:
    if as_json:
        shown = msgspec.to_builtins(figures.summary(run))
        put_json({"version": 1, "file": str(path), "finished": run.is_done, "summary": shown})
    else:
        put(markdown.table(report.switches_table(run)), nl=False)
        put(f"\n{path}")
        say(f"Next: vllm-sleep-tui bench report {path}")


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Name another file.") from None
    put_done(str(path))
