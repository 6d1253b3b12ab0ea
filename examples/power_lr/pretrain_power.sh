#!/usr/bin/env bash
# PowerLM-3B (arXiv 2408.13359, table 4): 3.5 B parameters, 1.25 T tokens, Power LR with muP, on the 8
# GPUs of one node or, with NNODES and MASTER_ADDR, of several. Not run on GPUs so far: the arguments
# are checked by Megatron's own parser and validation.
#
#   MEGATRON_LM=/path/to/Megatron-LM DATA_PATH=/data/corpus_text_document \
#   TOKENIZER=/data/starcoder-tokenizer CHECKPOINTS=/ckpt/powerlm-3b bash pretrain_power.sh
#
# Before the last phase no rate depends on the length of the run. To decide it later, train first
# with --power-lr-decay-tokens 0, as long as you like, and then go on from any checkpoint with the
# last phase and the new end:
#
#   bash pretrain_power.sh --train-samples N --override-opt-param-scheduler
#
# DRY_RUN=1 prints Megatron's arguments, one a line, and starts nothing.
# Anything given on the command line is appended: bash pretrain_power.sh --micro-batch-size 4
set -euo pipefail

: "${MEGATRON_LM:?the folder of a Megatron-LM checkout (it holds pretrain_gpt.py)}"
: "${DATA_PATH:?prefix of a preprocessed data set, without .bin and .idx (tools/preprocess_data.py makes one)}"
: "${TOKENIZER:?a Hugging Face tokenizer: a folder or a name on the hub}"
: "${CHECKPOINTS:?folder for checkpoints; training resumes from the newest one there}"

GPUS_PER_NODE=8
NNODES=${NNODES:-1}
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 40
  --hidden-size 2304
  --ffn-hidden-size 9216
  --num-attention-heads 36
  --seq-length 4096
  --max-position-embeddings 4096
  --position-embedding-type rope
  --rotary-base 10000
  --normalization RMSNorm
  --norm-epsilon 1e-5
  --swiglu
  --disable-bias-linear
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --attention-backend flash
  --power-mup-preset powerlm-3b
)

# eta(n) = min(0.02, 1024 * 4 * n^-0.51); warm-up over 1 B tokens, 250 B of 1.25 T in the last phase.
SCHEDULE=(
  --lr-decay-style power
  --lr 0.02
  --train-samples 305175781
  --lr-warmup-samples 244140
  --power-lr-decay-tokens 250_000_000_000
)

TRAINING=(
  --bf16
  --micro-batch-size 2
  --global-batch-size 1024
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --adam-eps 1e-10
  --clip-grad 1.0
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

DATA=(
  --data-path "$DATA_PATH"
  --split 99,1,0
  --tokenizer-type HuggingFaceTokenizer
  --tokenizer-model "$TOKENIZER"
  --num-workers 2
  --no-create-attention-mask-in-dataloader
)

OUTPUT=(
  --save "$CHECKPOINTS"
  --load "$CHECKPOINTS"
  --ckpt-format torch_dist
  --save-interval 1000
  --eval-interval 1000
  --eval-iters 32
  --log-interval 10
  --log-throughput
)

ARGUMENTS=("${MODEL[@]}" "${SCHEDULE[@]}" "${TRAINING[@]}" "${DATA[@]}" "${OUTPUT[@]}" "$@")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%s\n' "${ARGUMENTS[@]}"
  exit 0
fi

NODES=(--standalone)
if [[ $NNODES != 1 ]]; then
  : "${MASTER_ADDR:?host name or address of the first node}"
  NODE_RANK=${NODE_RANK:-${SLURM_NODEID:?rank of this node, 0 to $((NNODES - 1)): set NODE_RANK}}
  NODES=(--nnodes "$NNODES" --node-rank "$NODE_RANK")
  NODES+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi

exec torchrun --nproc-per-node "$GPUS_PER_NODE" "${NODES[@]}" \
  "$MEGATRON_LM/pretrain_gpt.py" "${ARGUMENTS[@]}"
