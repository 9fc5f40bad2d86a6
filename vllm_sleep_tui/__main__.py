"""``python -m vllm_sleep_tui`` is the ``vllm-sleep-tui`` command."""

from vllm_sleep_tui.cli import main

main()
