#!/bin/bash
# starts two servers
export HF_HOME=/data/hub
MODEL=Qwen/Qwen3-0.6B
PORT=${PORT:-8001}
source ~/venv/bin/activate
CUDA_VISIBLE_DEVICES=0 nohup vllm serve "$MODEL" \
    --port $PORT --max-model-len 4096 \
    --enforce-eager > log.txt 2>&1 &
CUDA_VISIBLE_DEVICES=1 vllm serve meta-llama/Llama-3.1-8B-Instruct --port 8002 --api-key made-up --max-num-seqs 16
