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
