"""A file of prompts over several models: each woken once, what is there not asked again."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.fleet.test_chat_verb import COMMAND, shell
from tests.tui.talker import talker
from vllm_sleep_tui.bench.evaluation import Answers, Prompt, read_prompts
from vllm_sleep_tui.cli.demo import write_demo
from vllm_sleep_tui.errors import RefusedError


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandLine]:
    """The demo with one model awake, and beside it a model whose answers never end."""
    folder = tmp_path_factory.mktemp("evaluation")
    config = write_demo(folder, 1000)
    with talker() as url:
        config.write_text(f"{config.read_text()}  far:\n    url: '{url}'\n")
        made = CommandLine(config, folder / "state")
        made("start", "qwen")
        yield made
        made.close()


def answers_in(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_what_was_killed_in_the_middle_goes_on_and_each_model_is_woken_once(
    line: CommandLine, tmp_path: Path
) -> None:
    prompts = tmp_path / "few.jsonl"
    prompts.write_text(
        '{"prompt": "One?", "id": "a"}\n\n{"prompt": "Two\\nlines?", "system": "Be brief."}\n'
        '{"prompt": "One?", "id": "a"}\n'
    )
    out = tmp_path / "few.answers.jsonl"
    first = subprocess.Popen(
        [*COMMAND, "--config", str(line.config), "chat", "far", "--prompts", str(prompts)],
        env=line.environment | {"XDG_STATE_HOME": str(line.state_home)},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert first.stderr is not None
    try:
        said = []
        for words in first.stderr:
            said.append(words)
            if words.startswith("far: 2 of 2 to ask"):
                break
        assert said[-1].startswith("far"), said
        beside = shell(line, "chat", "qwen", "--prompts", str(prompts))
        assert beside.returncode == 1
        assert beside.stderr.startswith(f"Another process is writing {out}.\n")
    finally:
        first.kill()
        first.wait()
        first.stderr.close()
    assert out.stat().st_mode & 0o777 == 0o600
    done = shell(line, "chat", "qwen", "--prompts", str(prompts), "--max-tokens", "5")
    assert done.returncode == 0, done.stderr
    with out.open("a") as file:
        file.write('{"model":"phi","prompt":"On')  # killed in the middle of a line
    done = shell(line, "chat", "phi", "qwen", "--prompts", str(prompts), "--max-tokens", "5", "--json")
    assert done.returncode == 0, done.stderr
    assert "qwen: 0 of 2 to ask" in done.stderr
    assert "phi: 2 of 2 to ask" in done.stderr
    tallies = json.loads(done.stdout)["models"]
    assert [(tally["model"], tally["answered"], tally["missing"]) for tally in tallies] == [
        ("phi", 2, 0),
        ("qwen", 2, 0),
    ]
    found = answers_in(out)
    assert [(answer["model"], answer["prompt"]) for answer in found] == [
        ("qwen", "One?"),
        ("qwen", "Two\nlines?"),
        ("phi", "One?"),
        ("phi", "Two\nlines?"),
    ]
    assert [answer.get("id") for answer in found] == ["a", None, "a", None]
    assert [answer.get("system") for answer in found] == [None, "Be brief.", None, "Be brief."]
    assert ["switch_seconds" in answer for answer in found] == [False, False, True, False]
    assert {answer["finish_reason"] for answer in found} == {"length"}
    # Other parameters are another question.
    done = shell(line, "chat", "phi", "--prompts", str(prompts), "--max-tokens", "6")
    assert "phi: 2 of 2 to ask" in done.stderr
    assert done.stdout.splitlines()[1].split()[:2] == ["phi", "2/2"]


def test_what_is_missing_in_the_end_is_a_failure_and_others_are_asked(
    line: CommandLine, tmp_path: Path
) -> None:
    prompts = tmp_path / "one.txt"
    prompts.write_text("Hello\n")
    awake = next(name for name, model in line.status().items() if model["state"] == "awake" and name != "far")
    done = shell(line, "chat", "big", awake, "--prompts", str(prompts), "--no-switch")
    assert done.returncode == 1
    assert "big, 1/1: big is stopped, and --no-switch leaves it so." in done.stderr
    assert done.stderr.splitlines()[-2:] == [
        "1 of 2 answers are missing.",
        "The same command asks what is missing, and nothing else.",
    ]
    assert [answer["model"] for answer in answers_in(tmp_path / "one.answers.jsonl")] == [awake]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("qwen", "Why", "is"), "More than one word follows the name.\nQuote the prompt"),
        (("qwen", "--prompts", "none.txt"), "none.txt cannot be read: No such file or directory."),
        (("qwen", "--prompts", "bad.jsonl"), "bad.jsonl, line 1: JSON is malformed"),
        (("qwen", "--prompts", "empty.txt"), "empty.txt has no prompt."),
        (("qwen", "nobody", "--prompts", "bad.jsonl"), "No model is called 'nobody'"),
    ],
)
def test_mistakes_are_told(line: CommandLine, tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "bad.jsonl").write_text("Why?\n")
    (tmp_path / "empty.txt").write_text("\n")
    named = [str(tmp_path / each) if each.endswith(("txt", "jsonl")) else each for each in arguments]
    done = shell(line, "chat", *named)
    assert done.returncode == 2
    assert words in done.stderr


@pytest.mark.parametrize("kept", [b'{"mine": 1}', b'{"mine": 1}\n', b"\x89PNG", b'{"model":"\xff"}\n'])
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "mine").write_bytes(kept)
    with pytest.raises(RefusedError, match="no answer"):
        Answers(tmp_path / "mine")
    assert (tmp_path / "mine").read_bytes() == kept


def test_only_a_regular_file_takes_answers(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(RefusedError, match="is no regular file"):
            Answers(path)


@pytest.mark.parametrize("cut", [b"{", b'{"model":"a', b'{"model":"a","prompt":"b"'])
def test_an_answer_that_was_cut_off_is_dropped(tmp_path: Path, cut: bytes) -> None:
    (tmp_path / "cut").write_bytes(cut)
    Answers(tmp_path / "cut").close()
    assert (tmp_path / "cut").read_bytes() == b""


def test_prompts_have_marks_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "one\u2028two"}\r\n'.encode())
    assert read_prompts(tmp_path / "a.jsonl") == [Prompt(prompt="one\u2028two")]
