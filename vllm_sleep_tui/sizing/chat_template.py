"""Whether a model's files bring a chat template, without which vLLM refuses every chat."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.engine.chat import TEMPLATE_CURE as TEMPLATE_CURE
from vllm_sleep_tui.engine.serve_args import ServeArgs
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.checkpoint import find_checkpoint
from vllm_sleep_tui.sizing.hub import GENERATES
from vllm_sleep_tui.sizing.model_files import read_config, with_home

FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
OWN_FORMATS = ("tekken.json", "tokenizer.model.v3")
"""Mistral's tokenizers, which lay a chat out themselves."""
MAX_BYTES = 64 * 2**20
"""Of a tokenizer's config, which may list every added token."""


def lacks_template(model: ModelConfig, base: Path, environ: Mapping[str, str]) -> bool:
    """Whether the model answers chats by its kind and has no template for them; False if it is not here.

    `base` is the config's folder.
    """
    args = ServeArgs(model.args)
    if not model.model or args.lays_out_chats or args.is_pooling:
        return False
    environ = {**environ, **model.env}
    folder = find_checkpoint(model.model, base, environ)
    if folder is None or not _generates(folder):
        return False
    tokenizer = args.tokenizer or model.model
    words = find_tokenizer(tokenizer, base, environ) if tokenizer != model.model else folder
    return words is not None and not _has_template(words)


def find_tokenizer(name: str, base: Path, environ: Mapping[str, str]) -> Path | None:
    """The folder of a tokenizer that is not the model's; None if it is not here."""
    local = base / with_home(name)
    is_here = os.path.isfile(local / "tokenizer_config.json")
    return local if is_here else find_checkpoint(name, base, environ)


def _generates(folder: Path) -> bool:
    architectures = _read(folder / "config.json").get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return any(isinstance(name, str) and name.endswith(GENERATES) for name in names)


def _has_template(folder: Path) -> bool:
    if any(os.path.exists(folder / name) for name in (*FILES, *OWN_FORMATS)):
        return True
    config = folder / "tokenizer_config.json"
    # Without a tokenizer beside it nothing can be said.
    return not os.path.isfile(config) or bool(_read(config).get("chat_template"))


def _read(path: Path) -> Mapping[str, object]:
    """A stranger's JSON object; empty if it is none."""
    try:
        return read_config(path, MAX_BYTES)
    except UsageError:
        return {}
