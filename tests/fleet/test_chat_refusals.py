"""A chat with a model that cannot chat: said in a line with what to do, and seen by `doctor` beforehand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import CommandLine, write_config
from tests.fleet.conftest import SIMULATOR

Make = Callable[..., CommandLine]


@pytest.fixture
def panel(tmp_path: Path) -> Iterator[Make]:
    """Makes the command line over one simulated model `m` on the CPU; stops it at the end."""
    made: list[CommandLine] = []

    def make(model: str = "sim/1GiB", faults: str = "", **args: Any) -> CommandLine:
        env = {"VLLM_SIM_TIMES": "instant", "VLLM_SIM_FAULTS": faults}
        settings = {"model": model, "gpus": [], "args": {"max-model-len": 2048, **args}, "env": env}
        config = write_config(tmp_path / "vllm-sleep-tui.yaml", SIMULATOR, {"m": settings})
        made.append(CommandLine(config, tmp_path / "state"))
        return made[-1]

    yield make
    for each in made:
        each.close()


def test_a_chat_without_a_template_is_told_what_to_add(panel: Make) -> None:
    refused = panel(faults="no_chat_template").run("chat", "m", "hello")
    assert refused.returncode == 1
    assert "m does not answer: The model has no chat template" in refused.stderr
    assert "`chat-template: FILE`" in refused.stderr


def test_a_template_in_the_arguments_is_enough(panel: Make) -> None:
    assert panel(faults="no_chat_template", **{"chat-template": "x.jinja"})("chat", "m", "hello").strip()


def test_a_chat_with_an_embedding_model_says_that_it_does_not_chat(panel: Make) -> None:
    refused = panel(runner="pooling").run("chat", "m", "hello")
    assert refused.returncode == 1
    assert "This model does not chat: it embeds, ranks or classifies." in refused.stderr
    assert "/v1/embeddings" in refused.stderr


def made_model(folder: Path, *, template: str | None, architecture: str = "Qwen3ForCausalLM") -> str:
    """A checkpoint's small files; where its template is, if it has one."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    inside = {"chat_template": "{{ messages }}"} if template == "inside" else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(inside))
    if template and template != "inside":
        (folder / template).write_text("{{ messages }}")
    return str(folder)


@pytest.mark.parametrize(
    ("made", "args", "warned"),
    [
        ({"template": None}, {}, True),
        ({"template": "inside"}, {}, False),
        ({"template": "chat_template.jinja"}, {}, False),
        ({"template": "tekken.json"}, {}, False),
        ({"template": None}, {"chat-template": "mine.jinja"}, False),
        ({"template": None}, {"tokenizer": "other"}, False),
        ({"template": None, "architecture": "BertModel"}, {}, False),
        ({"template": None}, {"runner": "pooling"}, False),
    ],
)
def test_doctor_sees_a_missing_chat_template(
    panel: Make, tmp_path: Path, made: dict[str, str | None], args: dict[str, Any], warned: bool
) -> None:
    made_model(tmp_path / "other", template="inside")
    model = made_model(tmp_path / "model", **made)  # type: ignore[arg-type]
    said = json.loads(panel(model=model, **args).run("doctor", "--json").stdout)
    found = [check for check in said["checks"] if check["name"] == "m.chat"]
    assert [check["verdict"] for check in found] == (["warn"] if warned else [])
    assert all("chat-template" in check["cure"] for check in found)
