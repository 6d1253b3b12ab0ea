#!/usr/bin/env bash
# The 3B model of the Cross-Layer Attention paper (arXiv 2405.12981, section 4) on 8 GPUs of one
# node: multi-query attention, and every second layer without keys and values of its own, which
# halves the key-value cache once more.
#
#   MEGATRON_LM=/path/to/Megatron-LM DATA_PATH=/data/slimpajama_text_document \
#   TOKENIZER=EleutherAI/gpt-neox-20b CHECKPOINTS=/ckpt/cla-3b bash pretrain_3b.sh
#
# FACTOR=1 trains the multi-query baseline from the same script. The paper tuned the learning rate
# of each: 2.25e-3 with a sharing factor of 2, 6.75e-4 without; LR=... sets another.
# DRY_RUN=1 prints Megatron's arguments, one a line, and starts nothing.
# Anything given on the command line is appended: bash pretrain_3b.sh --train-iters 100
set -euo pipefail

: "${MEGATRON_LM:?the folder of a Megatron-LM checkout (it holds pretrain_gpt.py)}"
: "${DATA_PATH:?prefix of a preprocessed data set, without .bin and .idx (tools/preprocess_data.py makes one)}"
: "${TOKENIZER:?a Hugging Face tokenizer: a folder or a name on the hub}"
: "${CHECKPOINTS:?folder for checkpoints; training resumes from the newest one there}"
FACTOR=${FACTOR:-2}

GPUS_PER_NODE=8
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 32
  --hidden-size 3072
  --ffn-hidden-size 8192
  --num-attention-heads 24
  --kv-channels 128
  --group-query-attention
  --num-query-groups 1
  --seq-length 2048
  --max-position-embeddings 2048
  --position-embedding-type rope
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --init-method-std 0.01275
)
if [[ $FACTOR != 1 ]]; then
  # Keys and values read a norm of their own, as in the paper. To start from the weights of a
  # standard model, leave it out and convert them: python -m megatron_plugins.convert.
  MODEL+=(--cla-sharing-factor "$FACTOR" --cla-kv-norm separate)
  LR=${LR:-2.25e-3}
fi
LR=${LR:-6.75e-4}

# A pipeline stage must not begin inside a group: with a factor of 2, 16 stages at most.
PARALLEL=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

# 2048 sequences of 2048 tokens an iteration, 100 billion tokens.
TRAINING=(
  --bf16
  --micro-batch-size 4
  --global-batch-size 2048
  --train-iters 23842
  --lr "$LR"
  --min-lr "$(awk "BEGIN { print $LR / 10 }")"
  --lr-decay-style cosine
  --lr-warmup-fraction 0.05
  --weight-decay 0.1
  --adam-beta1 0.9
  --adam-beta2 0.95
  --clip-grad 1.0
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

ARGUMENTS=("${MODEL[@]}" "${PARALLEL[@]}" "${TRAINING[@]}" "${DATA[@]}" "${OUTPUT[@]}" "$@")

if [[ ${DRY_RUN:-0} == 1 ]]; then
  printf '%s\n' "${ARGUMENTS[@]}"
  exit 0
fi

exec torchrun --nproc-per-node "$GPUS_PER_NODE" --standalone \
  "$MEGATRON_LM/pretrain_gpt.py" "${ARGUMENTS[@]}"
