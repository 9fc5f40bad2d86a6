"""Reports, comparisons and files of runs, without a server."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest
from made_run import made_run

from vllm_sleep_tui.bench import compare, figures, markdown, page, post, progress, report
from vllm_sleep_tui.bench.pays import pays
from vllm_sleep_tui.bench.plan import Mode, Override, order, parse_modes, parse_overrides
from vllm_sleep_tui.bench.results import Gpu, read, write
from vllm_sleep_tui.errors import UsageError

GOLDEN = Path(__file__).with_name("golden_report.md")
ALL = {Mode.LEVEL1: 2, Mode.LEVEL2: 2, Mode.COLD: 1}
GIB = 2**30


def test_the_report_of_a_run_is_the_golden_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write(path, made_run(ALL))
    shown = subprocess.run(
        [sys.executable, "-m", "vllm_sleep_tui", "bench", "report", str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert shown.stdout == GOLDEN.read_text()


def test_the_page_holds_every_table_and_chart_and_asks_nobody_for_anything() -> None:
    document = report.report(made_run(ALL), 50)
    text = page.render(document)

    drawn = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawn) == 4
    for each in drawn:
        ElementTree.fromstring(each)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', text)
    assert not re.findall(r"@import|url\((?!#)", text)
    for section in document.sections:
        for row in section.table.rows if section.table else ():
            assert all(cell.replace('"', "&quot;") in text for cell in row)
    assert "the post's (A100)" in text.replace("&#x27;", "'")


def test_text_of_a_config_is_never_markup_on_the_page() -> None:
    run = made_run({Mode.LEVEL1: 1})
    evil = "<img src=x>"
    run = msgspec.structs.replace(run, models={**run.models, "qwen": {"model": evil}})

    assert evil not in page.render(report.report(run, 50))


def test_a_page_without_the_charts_library_names_the_extra(tmp_path: Path) -> None:
    write(tmp_path / "run.json", made_run({Mode.LEVEL1: 1}))
    (tmp_path / "vl_convert.py").write_text("raise ImportError")
    ended = subprocess.run(
        [sys.executable, "-m", "vllm_sleep_tui", "bench", "report", "run.json", "--html", "run.html"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "pip install 'vllm-sleep-tui[report]'" in ended.stderr
    assert not (tmp_path / "run.html").exists()


def test_figures_leave_out_the_step_that_puts_nobody_to_sleep() -> None:
    run = made_run({Mode.LEVEL1: 2})
    assert len(figures.switches(run, Mode.LEVEL1, "qwen")) == 4
    assert len(figures.switches(run, Mode.LEVEL1, "phi")) == 6
    row = figures.row(run, Mode.LEVEL1, "qwen")
    assert row.inference is not None
    assert row.inference.count == 6


def test_the_first_answer_is_the_warm_ups_or_without_one_the_first_of_all() -> None:
    warm = made_run({Mode.LEVEL1: 2})
    assert figures.first_answers(warm) == {"phi": 0.5, "qwen": 0.5}
    bare = tuple(
        msgspec.structs.replace(load, phases={"loading": 40.0}, began=load.began - 60) for load in warm.loads
    )
    slow = tuple(
        msgspec.structs.replace(s, inference=6.6 if s.number < 2 else 0.4) for s in warm.passes[0].steps
    )
    passes = (msgspec.structs.replace(warm.passes[0], steps=slow),)
    assert figures.first_answers(msgspec.structs.replace(warm, loads=bare, passes=passes)) == {
        "phi": 6.6,
        "qwen": 6.6,
    }


def test_the_parts_of_a_level_2_wake_stand_in_for_its_whole() -> None:
    found = figures.phases(made_run({Mode.LEVEL2: 1}), Mode.LEVEL2, "phi")
    assert list(found) == ["sleep", "weights", "reload", "kv_cache", "prove"]


def test_sleeping_pays_by_the_switch_that_earns_its_cost_back() -> None:
    level1, level2 = pays(made_run(ALL))
    assert (level1.mode, level2.mode) == (Mode.LEVEL1, Mode.LEVEL2)
    assert not level1.is_estimate
    assert level1.once == pytest.approx(9.0)  # (1 + 3 + 0.5) for each of two models
    assert level1.saved == pytest.approx(50.0, rel=0.03)
    assert level1.pays_after == 1
    dear = msgspec.structs.replace(level1, once=3.5 * level1.saved)
    assert dear.pays_after == 4
    assert "At 100 switches a day that is 84 min a day" in level1.sentence(100)


def test_without_a_cold_pass_the_initial_loads_stand_in_and_are_called_an_estimate() -> None:
    (level1,) = pays(made_run({Mode.LEVEL1: 1}))
    assert level1.is_estimate
    assert level1.cold == pytest.approx(48.0)
    assert "stop and start about 48.0 s" in level1.sentence(50)


def test_sleeping_that_is_slower_than_a_start_does_not_pay() -> None:
    (level1,) = pays(made_run({Mode.LEVEL1: 1}, slower=1000))
    assert level1.pays_after is None
    assert "does not pay" in level1.sentence(50)


@pytest.mark.parametrize(
    ("first", "second"),
    [([1, 2, 3], [4, 5, 6]), ([1, 4, 5], [2, 3, 6, 7]), ([1, 1, 2], [1, 2, 2]), ([3], [1, 2])],
)
def test_the_chance_of_a_difference_is_that_of_all_divisions(first: list[float], second: list[float]) -> None:
    everything = first + second

    def apart(mine: list[float]) -> float:
        rank = {v: sum(w < v for w in everything) + (everything.count(v) + 1) / 2 for v in everything}
        return abs(sum(rank[v] for v in mine) - len(mine) * (len(everything) + 1) / 2)

    divisions = list(itertools.combinations(everything, len(first)))
    extreme = sum(apart(list(each)) >= apart(first) - 1e-9 for each in divisions)
    assert compare.chance_of(first, second) == pytest.approx(extreme / len(divisions))


def test_a_comparison_tells_a_difference_from_the_spread_and_from_too_few() -> None:
    first, same, slower = (made_run({Mode.LEVEL1: 3}, slower=factor) for factor in (1.0, 1.001, 1.5))

    def verdicts(other: object) -> dict[str, str]:
        return {each.what: each.verdict for each in compare.compare(first, other)}  # type: ignore[arg-type]

    assert verdicts(same)["level1: switch to phi"] == "within the spread"
    assert verdicts(slower)["level1: switch to phi"] == "slower, beyond the spread"
    assert verdicts(slower)["level1: inference of phi"] == "within the spread"
    assert verdicts(slower)["level1: whole pass"] == "too few to tell"
    (switch,) = (each for each in compare.compare(slower, first) if each.what == "level1: switch to phi")
    assert switch.verdict == "faster, beyond the spread"
    assert switch.ratio == pytest.approx(1 / 1.5)


def test_compare_reads_two_files_and_answers_in_json(tmp_path: Path) -> None:
    for name, factor in (("a", 1.0), ("b", 2.0)):
        write(tmp_path / f"{name}.json", made_run({Mode.LEVEL1: 2}, slower=factor))
    shown = subprocess.run(
        [sys.executable, "-m", "vllm_sleep_tui", "bench", "compare", "a.json", "b.json", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    rows = {row["what"]: row for row in json.loads(shown.stdout)["rows"]}
    assert rows["level1: switch to phi"]["ratio"] == pytest.approx(2.0)
    assert "beyond the spread" in rows["level1: switch to phi"]["verdict"]


def test_the_posts_figures_are_those_of_the_nearest_machine_and_ablation() -> None:
    known, run = post.read(), made_run({Mode.LEVEL1: 1})
    small = (Gpu(index=0, name="RTX 4060", total_bytes=16 * GIB, simulated=False),)
    assert post.nearest(known, run.machine).name == "A100"
    assert post.nearest(known, msgspec.structs.replace(run.machine, gpus=small)).name == "A4000"
    a100 = known.machines[-1]
    fp8 = (Override(model="*", argument="quantization", value="fp8"),)
    assert post.variant(a100, run.plan)[Mode.LEVEL1].total == 112.6
    assert post.variant(a100, msgspec.structs.replace(run.plan, overrides=fp8))[Mode.LEVEL1].total == 113.6
    assert post.variant(a100, msgspec.structs.replace(run.plan, warm_up=False))[Mode.LEVEL1].total == 119.0


def test_modes_are_shuffled_by_the_seed_and_repeats_stay_together() -> None:
    counts = parse_modes("level1,level2:1,cold", 2)
    orders = {tuple(key.mode for key in order(counts, seed)) for seed in range(30)}
    assert len(orders) == 6
    assert order(counts, 7) == order(counts, 7)
    for each in orders:
        assert [len(list(group)) for _, group in itertools.groupby(each)] == [
            counts[m] for m in dict.fromkeys(each)
        ]


def test_changes_are_read_as_the_config_would_read_them() -> None:
    found = parse_overrides(
        [
            "*.args.enforce-eager=true",
            "a.b.args.kv-cache-memory-bytes=2147483648",
            "c.level=none",
            "c.args.x=null",
        ],
        ("a.b", "c"),
    )
    assert [(each.model, each.argument, each.value) for each in found] == [
        ("*", "enforce-eager", True),
        ("a.b", "kv-cache-memory-bytes", 2147483648),
        ("c", None, "none"),
        ("c", "x", None),
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "is no result"),
        ("[1]", "is no result"),
        ('{"kind": "other"}', "is no result"),
        ('{"kind": "vllm-sleep-tui bench", "schema": 99}', "has schema 99"),
        ('{"kind": "vllm-sleep-tui bench", "schema": 1}', "is damaged"),
    ],
)
def test_a_file_that_is_no_run_is_refused(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=complaint):
        read(path)


def test_the_time_left_is_a_lower_limit_until_every_mode_was_measured() -> None:
    run = made_run({Mode.LEVEL1: 2, Mode.LEVEL2: 1})
    assert progress.left(run).seconds == 0
    level1 = [each for each in run.passes if each.key.mode is Mode.LEVEL1]
    begun = msgspec.structs.replace(run, passes=tuple(level1[:1]))
    rest = progress.left(begun)
    assert (rest.done, rest.steps, rest.is_all) == (6, 18, False)
    assert rest.seconds == pytest.approx(level1[0].total, rel=0.01)


def test_a_bar_in_a_name_does_not_break_a_markdown_table() -> None:
    from vllm_sleep_tui.bench.document import Table

    text = markdown.table(Table(header=("a", "b"), rows=(("x|y", "z"),)))
    assert text.splitlines()[2] == "| x\\|y | z |"
