"""Whether a model takes pictures, by what its checkpoint says of itself."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vllm_sleep_tui.config.types import ModelConfig
from vllm_sleep_tui.errors import UsageError
from vllm_sleep_tui.sizing.checkpoint import find_checkpoint
from vllm_sleep_tui.sizing.model_files import read_config

_SEES = ("vision_config", "img_processor", "vision_tower", "visual", "vision_encoder")
"""Keys of a config.json with a part that sees (vLLM 0.32's multimodal models)."""
_MEDIA = re.compile("vision|image|img|visual|audio|video|speech|mm_|multimodal|vlm", re.IGNORECASE)
_TEXT_ALONE = ("ForCausalLM", "LMHeadModel")


def takes_pictures(model: ModelConfig, base: Path) -> bool | None:
    """Whether it sees; None if its files are not here, or leave it open. `base` is the config's folder.

    False is said only of a model for text of whose config no word is about another medium.
    """
    if model.model is None:
        return None
    try:
        folder = find_checkpoint(model.model, base, {**os.environ, **model.env})
        config = None if folder is None else read_config(folder / "config.json")
    except UsageError:
        return None
    if config is None:
        return None
    if any(isinstance(config.get(key), dict | str) for key in _SEES):
        return True
    names = config.get("architectures")
    is_text = isinstance(names, list) and any(str(name).endswith(_TEXT_ALONE) for name in names)
    return False if is_text and not any(_MEDIA.search(key) for key in config) else None
