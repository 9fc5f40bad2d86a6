"""`bench run` on simulated servers: what it asks of them, in which order, and how it leaves them."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from bench_pair import Bench
from command_line import wait_until

from vllm_sleep_tui.bench.plan import Mode
from vllm_sleep_tui.bench.results import Run, read, write

MakePair = Callable[..., Bench]
STARTED = ["proof", "proof", "sleep 1", "wake", "proof"]
"""A start: warm-up, reference, and the priming sleep and wake with its proof."""
STEP_1 = ["wake", "proof", "answer", "sleep 1"]
STEP_2 = ["wake weights", "reload", "wake kv", "proof", "answer", "sleep 2"]


def steps_in(path_run: Run) -> list[tuple[str, int, str | None, str]]:
    """Mode, number, leaving and target of every step kept."""
    return [
        (each.key.mode, step.number, step.leaving, step.target)
        for each in path_run.passes
        for step in each.steps
    ]


def wait_for_steps(bench: Bench, count: int) -> None:
    """Until the run's file holds that many steps."""
    wait_until(
        lambda: bench.result.exists() and len(steps_in(read(bench.result))) >= count,
        seconds=200,
        what=f"{count} steps in the file",
        every=0.005,
    )


def test_level_1_asks_each_server_for_exactly_the_protocol(pair: MakePair) -> None:
    bench = pair()
    bench("bench", "run", "small", "large", "--modes", "level1", "--repeats", "2", "--out", str(bench.result))

    assert bench.asked("small") == [*STARTED, "answer", "sleep 1", *STEP_1 * 6]
    # The last of the second pass is awake at its end, and was found stopped.
    assert bench.asked("large") == [*STARTED, "answer", "sleep 1", *STEP_1 * 6][:-1]
    assert bench.states() == {"small": ("stopped", None), "large": ("stopped", None)}


def test_level_2_reloads_at_every_wake(pair: MakePair) -> None:
    bench = pair()
    bench("bench", "run", "small", "large", "--modes", "level2", "--repeats", "1", "--out", str(bench.result))

    assert bench.asked("small") == [*STARTED, "answer", "sleep 2", *STEP_2 * 3]


def test_cold_starts_have_no_warm_up_and_one_answer_each(pair: MakePair) -> None:
    bench = pair()
    bench("bench", "run", "small", "large", "--modes", "cold:1", "--out", str(bench.result))

    for name in ("small", "large"):
        assert [bench.asked(name, launch) for launch in range(3)] == [["answer"]] * 3
    first, *later = read(bench.result).passes[0].steps
    assert "stop" not in first.phases
    assert all(step.phases["stop"] > 0 and step.phases["loading"] > 0 for step in later)


def test_each_step_is_kept_whole(pair: MakePair) -> None:
    bench = pair()
    answer = bench(
        *("bench", "run", "small", "large", "--repeats", "1", "--modes", "level1,level2", "--json"),
        *("--out", str(bench.result)),
    )

    run = read(bench.result)
    expected = [(None, "small"), *[("small", "large"), ("large", "small")] * 2, ("small", "large")]
    for mode in (Mode.LEVEL1, Mode.LEVEL2):
        (only,) = run.of_mode(mode)
        assert [(step.leaving, step.target) for step in only.steps] == expected
        assert len({step.question for step in only.steps}) == 6
        for step in only.steps:
            assert 0 < sum(v for k, v in step.phases.items() if k in ("sleep", "wake")) <= step.switch
            assert step.ttft is not None
            assert 0 < step.ttft <= step.inference
            assert 0 < (step.tokens or 0) <= 100
            assert (step.after.vram[step.target] or 0) > 10 * (step.before.vram[step.target] or 0)
            assert (step.after.ram["large"] or 0) > 4 << 30
        assert only.total == pytest.approx(sum(step.switch + step.inference for step in only.steps))
    assert [load.model for load in run.loads] == ["small", "large"]
    assert all({"loading", "priming", "first answer"} <= set(load.phases) for load in run.loads)
    assert run.machine.vllm == "0.32.0"
    assert run.machine.gpus[0].simulated
    shown = json.loads(answer)
    assert shown["finished"]
    assert [row["switch"]["count"] for row in shown["summary"]["rows"]] == [2, 3, 2, 3]


def test_the_environments_of_both_models_are_kept(pair: MakePair, tmp_path: Path) -> None:
    commands = {}
    for name, version, torch in (("small", "0.32.0", "2.13.0"), ("large", "0.31.0", "2.12.0")):
        site = tmp_path / name / "lib/python3.12/site-packages"
        (site / f"torch-{torch}.dist-info").mkdir(parents=True)
        vllm = tmp_path / name / "bin/vllm"
        vllm.parent.mkdir()
        vllm.write_text(
            f'#!/bin/sh\nVLLM_SIM_VERSION={version} exec {sys.executable} -m vllm_sleep_tui.simulator "$@"\n'
        )
        vllm.chmod(0o755)
        commands[name] = {"vllm_command": [str(vllm)]}
    bench = pair(**commands)
    bench("bench", "run", "small", "large", "--modes", "cold:1", "--out", str(bench.result))
    found = read(bench.result).machine
    assert (found.vllm, found.torch) == ("0.32.0 and 0.31.0", "2.13.0 and 2.12.0")
    assert found.vllm_python == "3.12"


def test_models_end_as_they_were_found_bystanders_too(pair: MakePair) -> None:
    broken = {"model": "sim/2GiB", "env": {"VLLM_SIM_FAULTS": "cuda_oom"}}
    bench = pair(other={"model": "sim/2GiB"}, broken=broken)
    bench("start", "small", "large", "other")
    assert bench.run("start", "broken").returncode != 0
    bench("switch", "other")
    found = bench.states()
    assert found == {
        "small": ("asleep", 1),
        "large": ("asleep", 1),
        "other": ("awake", None),
        "broken": ("failed", None),
    }
    bench(
        "bench",
        "run",
        "small",
        "large",
        "--modes",
        "level2,cold",
        "--repeats",
        "1",
        "--out",
        str(bench.result),
    )

    assert bench.states() == found
    assert read(bench.result).restored


def test_after_a_kill_it_resumes_at_the_unfinished_pass_and_puts_the_models_back(pair: MakePair) -> None:
    bench = pair(speed=20)
    bench("start", "small")
    arguments = ("--modes", "level1,cold:1", "--repeats", "2", "--out", str(bench.result))
    process = bench.begin("bench", "run", "small", "large", *arguments)
    # The shuffle of seed 0 puts cold first; the kill hits the second pass of level 1.
    wait_for_steps(bench, 13)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = read(bench.result)
    assert not killed.restored
    done = [each for each in killed.passes if each.is_done]
    assert len(done) == 2

    bench("bench", "run", "--resume", str(bench.result))

    run = read(bench.result)
    assert run.is_done
    assert [each for each in run.passes if each.key in {one.key for one in done}] == done
    assert len(steps_in(run)) == 18
    assert run.loads == killed.loads  # the servers outlived the kill and were not loaded again
    assert bench.states() == {"small": ("awake", None), "large": ("stopped", None)}


@pytest.mark.parametrize("killed_in", ["start", "switch"])
def test_a_kill_in_a_cold_pass_costs_the_switch_under_way_and_no_more(pair: MakePair, killed_in: str) -> None:
    bench = pair(speed=20)
    process = bench.begin("bench", "run", "small", "large", "--modes", "cold:1", "--out", str(bench.result))
    wait_for_steps(bench, 3)  # small is awake and about to be stopped for large
    if killed_in == "start":
        wait_until(lambda: bench.look("large").state == "starting", seconds=60, what="large starts")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (killed,) = read(bench.result).passes

    bench("bench", "run", "--resume", str(bench.result))

    (whole,) = read(bench.result).passes
    assert whole.steps[:3] == killed.steps[:3]
    assert [(step.leaving, step.target) for step in whole.steps[2:]] == [
        ("large", "small"),
        ("small", "large"),
        ("large", "small"),
        ("small", "large"),
    ]
    assert all(step.phases["stop"] > 0 and step.phases["loading"] > 0 for step in whole.steps[1:])
    assert bench.states() == {"small": ("stopped", None), "large": ("stopped", None)}


def test_an_interrupted_run_puts_the_models_back_and_says_how_to_go_on(pair: MakePair) -> None:
    bench = pair(speed=20)
    bench("start", "large")
    process = bench.begin(
        "bench", "run", "small", "large", "--modes", "cold", "--repeats", "2", "--out", str(bench.result)
    )
    wait_for_steps(bench, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=200)

    assert process.returncode == 130
    assert f"--resume {bench.result}" in err
    assert bench.states() == {"small": ("stopped", None), "large": ("awake", None)}
    assert read(bench.result).restored


def test_an_interruption_does_not_keep_the_models_from_being_put_back(pair: MakePair) -> None:
    bench = pair(speed=20)
    bench("start", "large")
    process = bench.begin(
        *("bench", "run", "small", "large", "--modes", "level1:1", "--out", str(bench.result)),
        *("--set", "*.args.enforce-eager=true"),
    )
    wait_for_steps(bench, 6)
    wait_until(lambda: bench.look("large").state == "starting", seconds=60, what="large is put back")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=200)

    assert process.returncode == 130
    assert bench.states() == {"small": ("stopped", None), "large": ("awake", None)}
    assert read(bench.result).is_done


def test_the_limit_ends_a_run_like_an_interruption(pair: MakePair) -> None:
    bench = pair(speed=10)
    ended = bench.run(
        *("bench", "run", "small", "large", "--modes", "cold", "--limit", "3", "--out", str(bench.result))
    )

    assert ended.returncode == 130
    assert "The limit of 3 s was reached" in ended.stderr
    assert set(bench.states().values()) == {("stopped", None)}
    assert not read(bench.result).is_done


def test_changes_hold_for_the_run_alone(pair: MakePair) -> None:
    bench = pair()
    bench("start", "small")
    before = bench.config.read_text()
    bench(
        *("bench", "run", "small", "large", "--modes", "level1", "--repeats", "1", "--no-warmup"),
        *("--set", "*.args.enforce-eager=true", "--set", "small.args.max-model-len=1024"),
        *("--out", str(bench.result)),
    )

    run = read(bench.result)
    assert run.models["small"]["args"] == {"max-model-len": 1024, "enforce-eager": True}
    assert run.models["large"]["args"] == {"max-model-len": 2048, "enforce-eager": True}
    assert "enforce_eager=True" in bench.log("large")
    # No warm-up, no reference, so no proof either; the priming remains.
    assert bench.asked("large")[:6] == ["sleep 1", "wake", "sleep 1", "wake", "answer", "sleep 1"]
    assert all("warming" not in load.phases for load in run.loads)
    assert bench.config.read_text() == before
    assert list(bench.config.parent.glob(".*.yaml")) == []
    assert bench.states() == {"small": ("awake", None), "large": ("stopped", None)}
    assert "enforce_eager=False" in bench.log("small")


def test_a_mode_that_a_model_cannot_have_is_noted_and_the_others_are_measured(pair: MakePair) -> None:
    bench = pair(small={"level": "none"})
    bench(
        "bench",
        "run",
        "small",
        "large",
        "--modes",
        "level1,cold",
        "--repeats",
        "1",
        "--out",
        str(bench.result),
    )

    run = read(bench.result)
    assert run.is_done
    (refused,) = run.of_mode(Mode.LEVEL1)
    assert "small has `level: none`" in (refused.refused or "")
    assert len(run.of_mode(Mode.COLD)[0].steps) == 6
    assert "Sleep level 1 was refused" in bench("bench", "report", str(bench.result))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["small"], "takes two models"),
        (["small", "small"], "named twice"),
        (["small", "larg"], "Did you mean large?"),
        (["small", "large", "--modes", "level3"], "'level3' is not a mode"),
        (["small", "large", "--modes", "cold,cold"], "'cold' is there twice"),
        (["small", "large", "--set", "other.args.a=1"], "the pair is small and large"),
        (["small", "large", "--set", "small.a=1"], "is no change of a model"),
        (["small", "large", "--set", "small.args.port=1"], "reserved"),
        (["--resume", "nothing.json"], "No such file"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_starts(
    pair: MakePair, arguments: list[str], complaint: str
) -> None:
    bench = pair()
    ended = bench.run("bench", "run", *arguments)

    assert ended.returncode == 2, ended.stderr
    assert complaint in ended.stderr
    assert set(bench.states().values()) == {("stopped", None)}
    assert list(bench.config.parent.glob(".*.yaml")) == []


def test_a_killed_run_with_changes_finds_its_own_servers_again(pair: MakePair) -> None:
    bench = pair(speed=20)
    bench("start", "large")
    process = bench.begin(
        *("bench", "run", "small", "large", "--modes", "level1", "--repeats", "2"),
        *("--set", "*.args.enforce-eager=true", "--out", str(bench.result)),
    )
    wait_for_steps(bench, 7)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = read(bench.result)

    bench("bench", "run", "--resume", str(bench.result))

    run = read(bench.result)
    assert run.is_done
    assert run.loads == killed.loads
    assert list(bench.config.parent.glob(".*.yaml")) == []
    assert bench.states() == {"small": ("stopped", None), "large": ("awake", None)}


def test_a_resumed_run_keeps_its_options_and_its_config(pair: MakePair) -> None:
    bench = pair()
    bench("bench", "run", "small", "large", "--modes", "level1:1", "--out", str(bench.result))
    finished = bench.result.read_bytes()
    launch = bench.log("small")
    bench("bench", "run", "--resume", str(bench.result))
    assert bench.log("small") == launch  # nothing is left to do, so nothing was started

    other = bench.run("bench", "run", "--resume", str(bench.result), "--repeats", "5")
    assert (other.returncode, "keeps its models and options" in other.stderr) == (2, True)
    again = bench.run("bench", "run", "small", "large", "--out", str(bench.result))
    assert (again.returncode, "is there already" in again.stderr) == (2, True)
    assert bench.result.read_bytes() == finished

    write(bench.result, msgspec.structs.replace(read(bench.result), passes=()))
    bench.config.write_text(bench.config.read_text().replace("4GiB", "3GiB"))
    changed = bench.run("bench", "run", "--resume", str(bench.result))
    assert (changed.returncode, "has changed since this run began" in changed.stderr) == (2, True)
    assert read(bench.result).passes == ()


def test_values_of_env_are_in_no_result_and_a_change_of_one_is_seen(pair: MakePair) -> None:
    bench = pair(small={"env": {"VLLM_SIM_SPEED": "200", "HF_TOKEN": "hf_written_out"}})
    bench("bench", "run", "small", "large", "--modes", "level1:1", "--out", str(bench.result))
    assert "hf_written_out" not in bench.result.read_text()
    assert set(read(bench.result).models["small"]["env"]) == {"VLLM_SIM_SPEED", "HF_TOKEN"}

    bench("bench", "run", "--resume", str(bench.result))
    write(bench.result, msgspec.structs.replace(read(bench.result), passes=()))
    bench.config.write_text(bench.config.read_text().replace("hf_written_out", "hf_another"))
    changed = bench.run("bench", "run", "--resume", str(bench.result))
    assert (changed.returncode, "has changed since this run began" in changed.stderr) == (2, True)
