#!/bin/bash
# vLLM's server on this machine alone, in the environment that `make vllm` makes, from the repository's folder:
#   tools/vllm.sh MODEL PORT [NAME=ADAPTER ...]        a request for an adapter has its name as the model
# On a GPU with vLLM's own defaults; on a CPU in fp32, without compilation, with half a gigabyte of keys and values.
set -euo pipefail
model=$1
port=$2
shift 2
for adapter in "$@"; do    # one that starts with a dash would be an option of vLLM's, such as --host=0.0.0.0
    [[ $adapter == [!-]*=* ]] || { echo "got the adapter $adapter, wanted NAME=FOLDER" >&2; exit 2; }
done
options=()
if ! command -v nvidia-smi > /dev/null; then
    options+=(--dtype float32 --enforce-eager --kv-cache-memory-bytes 512M)
fi
if (($# > 0)); then    # --max-loras: how many may meet in one batch; by default one, and the others wait
    options+=(--enable-lora --max-loras "$#" --max-lora-rank 16 --lora-modules "$@")
fi
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
exec .venv-vllm/bin/python -m vllm.entrypoints.openai.api_server --model "$model" --host 127.0.0.1 --port "$port" \
    --max-model-len 2048 --served-model-name model ${options[@]+"${options[@]}"}
