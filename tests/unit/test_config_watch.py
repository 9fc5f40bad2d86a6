"""The watch over the config: the file itself, and those whose content is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_sleep_tui.config.load import load
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.tui.state.config_watch import ConfigWatch

WRITTEN = """
vllm_command: [vllm]
models:
  far: {url: http://127.0.0.1:9, api_key_file: far.key}
  own: {model: org/own, env_file: own.env, args: {config: own.yaml}}
"""


async def test_a_file_that_the_config_names_is_watched_as_the_config_is(tmp_path: Path) -> None:
    path = tmp_path / "vllm-sleep-tui.yaml"
    for name, text in (
        (path.name, WRITTEN),
        ("far.key", "one"),
        ("own.env", "A=1"),
        ("own.yaml", "seed: 1"),
    ):
        (tmp_path / name).write_text(text)
    watch = ConfigWatch(load(path), lambda _: True)
    assert not watch.has_changed()

    def has_changed() -> bool:
        """What is another has to be the same at two looks."""
        return [watch.has_changed() for _ in range(2)][-1]

    for name, text in (("far.key", "another"), ("own.env", "A=12"), ("own.yaml", "seed: 12")):
        (tmp_path / name).write_text(text)
        assert has_changed(), name
        models = (await watch.read()).config.models
        assert not has_changed()
    assert (models["far"].api_key, models["own"].env["A"]) == ("another", "12")
    assert models["own"].args["seed"] == "12"

    (tmp_path / "far.key").unlink()
    assert has_changed()
    with pytest.raises(UsageError, match="there is no file"):
        await watch.read()
    assert not has_changed()  # it is complained of once
    (tmp_path / "far.key").write_text("third")
    assert has_changed()
    assert (await watch.read()).config.models["far"].api_key == "third"

    path.write_text(WRITTEN.replace("own.env", "new.env"))
    (tmp_path / "new.env").write_text("A=2")
    assert has_changed()
    assert (await watch.read()).config.models["own"].env["A"] == "2"
    (tmp_path / "own.env").write_text("A=3 of what nobody names any more")
    assert not has_changed()
    (tmp_path / "new.env").write_text("A=33")
    assert has_changed()


async def test_a_file_that_is_named_before_it_is_there_is_heeded_once_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vllm-sleep-tui.yaml"
    path.write_text("vllm_command: [vllm]\nmodels: {own: {model: org/own}}\n")
    watch = ConfigWatch(before := load(path), lambda _: True)
    preset = "{schema: answer.json}"
    models = "{own: {model: org/own, env_file: own.env}}"
    path.write_text(f"vllm_command: [vllm]\nmodels: {models}\npresets: {{p: {preset}}}\n")

    def has_changed() -> bool:
        return [watch.has_changed() for _ in range(2)][-1]

    assert has_changed()
    with pytest.raises(UsageError, match=r"answer\.json"):
        await watch.read()
    assert not has_changed()
    (tmp_path / "answer.json").write_text("{}")
    assert has_changed()
    with pytest.raises(UsageError, match=r"there is no file .*own\.env"):
        await watch.read()
    (tmp_path / "own.env").write_text("A=1")
    assert has_changed()
    now = await watch.read()
    assert now.config.models["own"].env["A"] == "1"
    assert now.version() not in (before.version(), before.digest)
    assert not has_changed()
