"""The core: it owns the models, whoever drives it."""
