"""Somebody without a config: what the first screen finds, what it writes, and that it starts the model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from pty_terminal import Terminal
from screen_text import text_of, until, until_seen
from textual.widgets import Input

from vllm_sleep_tui.cli.first_run import offers_of, write_wish
from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.fleet.survey import CachedModel, GpuReading, Surroundings, VllmEnvironment
from vllm_sleep_tui.tui.first_run import FirstRun, Wish

GIB = 2**30


def gpu(index: int) -> GpuReading:
    return GpuReading(index=index, uuid=f"GPU-{index}", name="Card", used_bytes=0, total_bytes=24 * GIB)


def surroundings(*environments: VllmEnvironment) -> Surroundings:
    models = {"a/small": 2, "a/large": 300, "a/usual": 14}
    return Surroundings(
        environments=environments,
        gpus=(gpu(0), gpu(1)),
        gpu_note=None,
        models=tuple(CachedModel(name=n, bytes=s * GIB, generates=True) for n, s in models.items()),
        token=False,
    )


async def test_what_fits_is_chosen_already_and_what_was_chosen_is_the_result(tmp_path: Path) -> None:
    old = VllmEnvironment(command=Path("/old/vllm"), version="0.9.0", place="PATH")
    new = VllmEnvironment(command=Path("/new/vllm"), version="0.32.0", place="conda, new")
    machine = surroundings(old, new)
    app = FirstRun(machine, offers_of(machine), tmp_path / "config.yaml")
    async with app.run_test(size=(100, 30)) as pilot:
        await until_seen(pilot, "0.9.0", "conda, new", "2 GPUs", "a/large  300.0 GiB  too large")
        await until_seen(pilot, "Writes 2 models to", "Starts a/small", "● a/usual", "○ a/large")
        await pilot.press("space")  # the smallest comes first
        await until_seen(pilot, "Writes 1 model to", "Starts a/usual.", "○ a/small")
        await pilot.click("#models", offset=(6, 2))  # a click chooses and writes nothing
        await until_seen(pilot, "Choose at least one model", "○ a/usual")
        await pilot.click("#models", offset=(6, 2))
        await until_seen(pilot, "Starts a/usual.")
        await pilot.press("enter")
        await until(pilot, lambda: app.return_value is not None, "the choice")
    assert app.return_value is not None
    assert app.return_value.environment == new  # the one that can sleep
    assert [model.name for model in app.return_value.models] == ["a/usual"]


async def test_in_60_columns_the_first_line_is_whole_and_no_full_stop_hangs_on_the_path(
    tmp_path: Path,
) -> None:
    machine = surroundings()
    app = FirstRun(
        machine, offers_of(machine), Path("/home/person/.config/vllm-sleep-tui/vllm-sleep-tui.yaml")
    )
    async with app.run_test(size=(60, 20)) as pilot:
        await until_seen(pilot, "vllm-sleep-tui   no config yet: this was found here")
        await until_seen(pilot, "vllm-sleep-tui.yaml")
        assert not re.search(r"\n +\.\n|yaml\.", text_of(app))


async def test_without_a_vllm_it_asks_for_the_binary_and_takes_no_other_file(tmp_path: Path) -> None:
    machine = surroundings()
    app = FirstRun(machine, offers_of(machine), tmp_path / "config.yaml")
    async with app.run_test(size=(60, 20)) as pilot:
        await until_seen(pilot, "none was found; where is its binary?")
        await pilot.press(*"/nowhere/vllm", "enter")
        await until_seen(pilot, "There is no such program: /nowhere/vllm.")
        app.query_one("#binary", Input).value = "~nobody-of-that-name/vllm"
        await until(pilot, lambda: "no such program" not in text_of(app), "the complaint's end")
        await pilot.press("enter")
        await until_seen(pilot, "There is no such program: ~nobody-of-that-name/vllm.")
        app.query_one("#binary", Input).value = str(tmp_path)
        await pilot.press("enter")
        await until_seen(pilot, "is a folder: name the binary.")
        await pilot.press("escape", "q")
    assert app.return_value is None


async def test_a_binary_named_from_here_is_the_one_that_the_config_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").touch(mode=0o755)
    monkeypatch.chdir(tmp_path)
    machine = surroundings()
    app = FirstRun(machine, offers_of(machine), tmp_path / "config.yaml")
    async with app.run_test(size=(60, 20)) as pilot:
        await until_seen(pilot, "none was found; where is its binary?")
        await pilot.press(*"./vllm", "enter")
        await until(pilot, lambda: app.return_value is not None, "the choice")
    assert app.return_value is not None
    assert app.return_value.environment is not None
    assert app.return_value.environment.command == tmp_path / "vllm"


async def test_a_program_that_nothing_says_is_vllm_is_taken_at_the_second_time(tmp_path: Path) -> None:
    (tmp_path / "serve.sh").touch(mode=0o755)
    machine = surroundings()
    app = FirstRun(machine, offers_of(machine), tmp_path / "config.yaml")
    async with app.run_test(size=(80, 24)) as pilot:
        await until_seen(pilot, "none was found; where is its binary?")
        app.query_one("#binary", Input).value = str(tmp_path / "serve.sh")
        await pilot.press("enter")
        await until_seen(pilot, "No vLLM is found beside", "once more takes it all the same")
        assert app.return_value is None
        await pilot.press("enter")
        await until(pilot, lambda: app.return_value is not None, "the choice")


def test_a_config_that_came_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = tmp_path / "vllm-sleep-tui/vllm-sleep-tui.yaml"
    path.parent.mkdir(mode=0o700)
    path.write_text("models: {}\n")
    with pytest.raises(RefusedError, match="is there by now"):
        write_wish(Wish(models=surroundings().models))
    assert path.read_text() == "models: {}\n"


def test_all_that_was_chosen_is_in_the_config_whatever_speaks_against_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    embeds = CachedModel(name="a/embeds", bytes=GIB, generates=False)
    others = tuple(CachedModel(name=f"a/m{n}", bytes=(n + 2) * GIB, generates=True) for n in range(12))
    written = write_wish(Wish(models=(*others, embeds)))
    assert list(written.config.models) == ["embeds", *(f"m{n}" for n in range(12))]


def test_from_an_empty_home_enter_writes_the_config_and_starts_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm, cache = tmp_path / "some/where/bin/vllm", tmp_path / "hf/hub/models--a--tiny"
    vllm.parent.mkdir(parents=True)
    vllm.write_text("#!/bin/sh\necho No server today. >&2\nexit 3\n")
    vllm.chmod(0o755)
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "snapshots/abc/config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    (cache / "snapshots/abc/model.safetensors").write_bytes(bytes(4096))
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "TERM": "xterm-256color",
    }
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    terminal = Terminal([sys.executable, "-m", "vllm_sleep_tui"], environment, 80, 24)
    try:
        terminal.wait_for("a/tiny", "Writes 1 model")
        terminal.press("~/some/where/bin/vllm\r")  # at once, as a paste arrives or what was typed ahead
        terminal.wait_for("failed")  # that vllm does not serve, which is told as of any other
        written = load(tmp_path / "config/vllm-sleep-tui/vllm-sleep-tui.yaml").config
        assert written.vllm_command == (str(vllm),)
        assert [model.model for model in written.models.values()] == ["a/tiny"]
    finally:
        terminal.close()
