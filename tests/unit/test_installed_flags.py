"""The flags of an installed vLLM, asked of programs that answer in pieces, and kept in files that are odd."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vllm_sleep_tui.engine.installed_flags import Installed, ask_flags, kept_flags


def a_vllm(folder: Path, script: str) -> Installed:
    program = folder / "python3"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return Installed(program, program, "0.32.0")


HELP = Path(__file__).with_name("data") / "serve-help-0.32.txt"


async def test_an_answer_in_pieces_is_read_whole(tmp_path: Path) -> None:
    flags = [{"names": [f"--flag-{number}"]} for number in range(5000)]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"version": "0.32.9", "flags": flags}))
    vllm = a_vllm(tmp_path, f"head -c 1000 {table}; sleep 0.2; tail -c +1001 {table}")
    found = await ask_flags(vllm, tmp_path, os.environ)
    assert (found.is_asked, found.version, len(found.flags)) == (True, "0.32.9", 5000)
    assert kept_flags(vllm, tmp_path).is_asked


async def test_an_answer_without_an_end_is_none(tmp_path: Path) -> None:
    found = await ask_flags(a_vllm(tmp_path, "exec cat /dev/zero"), tmp_path, os.environ)
    assert not found.is_asked


def test_a_kept_answer_that_is_no_file_or_no_text_is_none(tmp_path: Path) -> None:
    vllm = a_vllm(tmp_path, "")
    path = tmp_path / "flags" / f"{vllm.key}.json"
    path.parent.mkdir()
    os.mkfifo(path)
    assert not kept_flags(vllm, tmp_path).is_asked
    for content in (b"[" * 60_000, b'{"version": "\xff"}'):
        path.unlink()
        path.write_bytes(content)
        assert not kept_flags(vllm, tmp_path).is_asked


def wrapped(folder: Path, shown: str, version: str | None) -> Installed:
    (folder / "help").write_text(shown)
    program = folder / "wrap"
    program.write_text(f'#!/bin/sh\n[ "$2" = --help=all ] && cat {folder}/help\n')
    program.chmod(0o755)
    return Installed(program, None, version)


async def test_a_help_tells_spellings_choices_and_what_a_near_table_knows_of_them(tmp_path: Path) -> None:
    shown = HELP.read_text()
    shown += "\n  --quite-new {a,b,None}  For a test. It is new.\n  --as-new, --no-as-new\n"
    shown += "                        For a test too.\n  --newest [N ...]  More\n"
    found = await ask_flags(wrapped(tmp_path, shown, None), tmp_path, os.environ)
    assert found.is_asked
    flags = {flag.name: flag for flag in found.flags}
    assert len(flags) == shown.count("\n  -") - 1  # without the help itself
    assert (flags["max-model-len"].type, flags["enforce-eager"].type) == ("size", "switch")
    assert flags["enforce-eager"].off == ("--no-enforce-eager",)
    assert flags["tensor-parallel-size"].names == ("--tensor-parallel-size", "-tp")
    assert flags["tensor-parallel-size"].help == "Number of tensor parallel groups."
    assert flags["gdn-prefill-backend"].choices == ("flashinfer", "triton", "cutedsl", "aiter_flydsl")
    assert not flags["tool-call-parser"].choices  # the help goes on: "or name registered in …"
    assert flags["lora-modules"].takes_list
    assert (flags["quite-new"].choices, flags["quite-new"].help) == (("a", "b"), "For a test.")
    assert (flags["as-new"].type, flags["as-new"].off) == ("switch", ("--no-as-new",))
    assert flags["newest"].nargs == "*"


async def test_what_a_help_hides_is_known_of_the_same_release(tmp_path: Path) -> None:
    found = await ask_flags(wrapped(tmp_path, HELP.read_text(), "0.32.1"), tmp_path, os.environ)
    assert found.find("max-num-seqs") is not None
    assert found.find("max-modle-len") is None


async def test_what_is_no_help_of_vllm_is_no_table(tmp_path: Path) -> None:
    for shown in ("", "usage: other [options]\n  --force  Do it\n", "usage: vllm serve\n", "\x00\n" * 9):
        assert not (await ask_flags(wrapped(tmp_path, shown, None), tmp_path, os.environ)).is_asked
