"""Hugging Face's cache and words, by the variables and names that its library uses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

GENERATES = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
"""Endings of architectures that answer a chat, as Hugging Face's config.json names them."""


def hub_cache(environ: Mapping[str, str]) -> Path:
    """Hugging Face's cache of models, by the variables that huggingface_hub reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(environ[variable]).expanduser()
    return _hub_home(environ) / "hub"


def has_token(environ: Mapping[str, str]) -> bool:
    """Whether there is a Hugging Face token, in the environment or where `hf auth login` puts it."""
    if environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN"):
        return True
    return Path(environ.get("HF_TOKEN_PATH") or _hub_home(environ) / "token").expanduser().is_file()


def _hub_home(environ: Mapping[str, str]) -> Path:
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser()
    cache = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME", "/")) / ".cache"
    return Path(cache) / "huggingface"
