"""A stand-in for `vllm serve` and the simulated GPUs it runs on."""
