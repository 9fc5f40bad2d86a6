cd /srv && uv run --with vllm vllm serve google/gemma-3-4b-it --max-model-len 8k --trust-remote-code && echo done
