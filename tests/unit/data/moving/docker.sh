docker run --runtime nvidia --gpus all -v ~/.cache/huggingface:/cache/huggingface \
  --env "VLLM_LOGGING_LEVEL=DEBUG" -p 8000:8000 --ipc=host \
  vllm/vllm-openai:latest --model Qwen/Qwen3-4B --max-model-len 32768 --kv-cache-dtype fp8
