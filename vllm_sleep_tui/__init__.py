"""A terminal panel for vLLM's sleep mode: several models, one GPU, one key."""

__version__ = "0.1.0"
