"""Phases and figures from recorded starts; following a file that grows, is cut or is replaced."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

import pytest

from vllm_sleep_tui.engine.logs import MAX_LINE, LogTail, Phase, PhaseReader, sleepers_in
from vllm_sleep_tui.units import GIB

DATA = Path(__file__).parent / "data"


def read(recording: str) -> tuple[list[Phase], PhaseReader]:
    reader = PhaseReader()
    lines = (DATA / recording).read_text().splitlines()
    return [phase for line in lines if (phase := reader.feed(line))], reader


@pytest.mark.parametrize(
    ("recording", "names"),
    [
        ("start-gpu.txt", ["loading", "compiling", "capturing", "warming"]),
        ("start-tp2.txt", ["loading", "compiling", "capturing", "warming"]),
        ("start-cpu.txt", ["loading", "compiling", "warming"]),
    ],
)
def test_a_recorded_start_goes_through_its_phases_once_each(recording: str, names: list[str]) -> None:
    phases, _ = read(recording)

    assert [name for name, _ in groupby(phase.name for phase in phases)] == names


def test_progress_bars_give_fractions() -> None:
    phases, _ = read("start-gpu.txt")

    loading = [phase.fraction for phase in phases if phase.name == "loading"]
    capturing = [phase.fraction for phase in phases if phase.name == "capturing"]
    assert loading[0] == 0.0
    assert 1.0 in loading
    assert capturing[:3] == [0.0, 0.06, 0.47]


def test_a_bar_redrawn_within_a_line_counts_with_its_newest_state() -> None:
    line = (
        "Capturing CUDA graphs (decode, FULL):   0%|   | 0/51 [00:00]Capturing CUDA graphs:  37%|█▎  | 19/51"
    )

    phase = PhaseReader().feed(line)

    assert phase is not None
    assert phase.fraction == 0.37


def test_a_hub_that_does_not_answer_is_told_until_the_start_goes_on() -> None:
    reader = PhaseReader()
    said = reader.feed(
        "'[Errno -2] Name or service not known' thrown while requesting GET https://huggingface.co/api/models/a/b"
    )
    assert said is not None
    assert (said.name, "HF_HUB_OFFLINE=1" in said.detail) == ("loading", True)
    assert reader.feed("Retrying in 1s [Retry 1/5].") is None
    after = reader.feed("INFO [gpu_model_runner.py:1] Starting to load model a/b")
    assert after is not None
    assert after.detail == "reading weights"


def test_a_slower_worker_does_not_turn_the_phase_back() -> None:
    reader = PhaseReader()
    reader.feed("(Worker_TP0 pid=1) INFO 11-23 07:58:12 [b.py:1] Dynamo bytecode transform time: 9.45 s")

    assert reader.feed("(Worker_TP1 pid=2) INFO 11-23 07:58:13 [m.py:1] Model loading took 0.57 GiB") is None


def test_the_same_line_twice_is_news_once() -> None:
    reader = PhaseReader()

    assert reader.feed("Starting to load model x...") is not None
    assert reader.feed("Starting to load model x...") is None


def test_the_weights_of_one_gpu_are_read_in_bytes() -> None:
    facts = read("start-gpu.txt")[1].facts

    assert facts.weights_bytes == round(7.31 * GIB)


def test_the_weights_of_two_workers_add_up() -> None:
    facts = read("start-tp2.txt")[1].facts

    assert facts.weights_bytes == 2 * round(0.57 * GIB)


def test_what_no_line_told_is_unknown_and_not_zero() -> None:
    facts = read("start-cpu.txt")[1].facts

    assert facts.weights_bytes is None


@pytest.mark.parametrize(
    ("recording", "sleepers"), [("start-gpu.txt", 1), ("start-tp2.txt", 6), ("start-cpu.txt", 0)]
)
def test_each_worker_whose_sleep_gave_memory_back_counts(recording: str, sleepers: int) -> None:
    lines = (DATA / recording).read_text().splitlines()
    nothing = [line.replace("30.91 GiB memory in total", "0.00 GiB memory in total") for line in lines]

    assert sleepers_in(lines) == sleepers
    assert recording != "start-tp2.txt" or sleepers_in(nothing) == 0


def test_only_complete_lines_come_and_each_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    assert tail.read_new() == []

    log.write_bytes(b"one\ntwo\r\nthr")
    assert tail.read_new() == ["one", "two"]
    assert tail.read_new() == []
    with log.open("ab") as file:
        file.write("ee é\n\nfour".encode()[:-4])
    assert tail.read_new() == ["three é", ""]


def test_a_character_split_between_two_reads_stays_whole(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    whole = "café\n".encode()
    log.write_bytes(whole[:4])
    assert tail.read_new() == []
    log.write_bytes(whole)

    assert tail.read_new() == ["café"]


def test_of_a_bar_only_the_newest_state_is_kept_and_shown_before_the_line_ends(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"\r 10%\r 20%\r 30%")
    assert tail.read_new() == [" 20%"]
    with log.open("ab") as file:
        file.write(b"\r 90%\r100%\nnext\n")

    assert tail.read_new() == ["100%", "next"]


def test_a_line_end_of_two_bytes_may_be_split_between_two_reads(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"one\r")
    first = tail.read_new()
    log.write_bytes(b"one\r\ntwo\r\n")

    assert first + tail.read_new() == ["one", "two"]


def test_a_file_that_was_cut_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"a long first line\nunfinished")
    tail.read_new()
    log.write_bytes(b"new\n")

    assert tail.read_new() == ["new"]


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"old\nunfinished")
    tail.read_new()
    log.rename(tmp_path / "log.1")
    log.write_bytes(b"fresh one\nfresh two is longer\n")

    assert tail.read_new() == ["fresh one", "fresh two is longer"]


def test_bytes_that_are_no_text_and_lines_without_end_do_no_harm(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"bad \xff byte\n" + b"x" * (3 * MAX_LINE) + b"\n")

    lines = tail.read_new()

    assert lines[0] == "bad \ufffd byte"
    assert len(lines[1]) == MAX_LINE


def test_a_line_that_never_ends_is_not_kept_in_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    tail = LogTail(log)
    log.write_bytes(b"x" * (2 * MAX_LINE))

    assert [len(line) for line in tail.read_new()] == [MAX_LINE]
    with log.open("ab") as file:
        file.write(b"end\n")
    assert tail.read_new() == ["end"]
