#!/usr/bin/env bash
# Llama-3-8B shape on 8 GPUs of one node: tensor parallel 8, every all-reduce of a layer on the
# critical path unless Ladder Residual hides it.
#
#   MEGATRON_LM=/path/to/Megatron-LM DATA_PATH=/data/corpus_text_document \
#   TOKENIZER=/data/llama3-tokenizer CHECKPOINTS=/ckpt/ladder-8b bash pretrain_8b.sh
#
# LADDER=0 trains the standard model from the same script: the one difference is one flag.
# DRY_RUN=1 prints Megatron's arguments, one a line, and starts nothing.
# Anything given on the command line is appended: bash pretrain_8b.sh --train-iters 100
set -euo pipefail

: "${MEGATRON_LM:?the folder of a Megatron-LM checkout (it holds pretrain_gpt.py)}"
: "${DATA_PATH:?prefix of a preprocessed data set, without .bin and .idx (tools/preprocess_data.py makes one)}"
: "${TOKENIZER:?a Hugging Face tokenizer: a folder or a name on the hub}"
: "${CHECKPOINTS:?folder for checkpoints; training resumes from the newest one there}"
LADDER=${LADDER:-1}

GPUS_PER_NODE=8
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 32
  --hidden-size 4096
  --ffn-hidden-size 14336
  --num-attention-heads 32
  --group-query-attention
  --num-query-groups 8
  --seq-length 8192
  --max-position-embeddings 8192
  --position-embedding-type rope
  --rotary-base 500000
  --normalization RMSNorm
  --norm-epsilon 1e-5
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --init-method-std 0.02
  --attention-backend flash
)
if [[ $LADDER == 1 ]]; then
  MODEL+=(--ladder-residual)
fi

# Without --sequence-parallel a module ends in one all-reduce, which the ladder hides whole.
PARALLEL=(
  --tensor-model-parallel-size 8
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

TRAINING=(
  --bf16
  --micro-batch-size 1
  --global-batch-size 128
  --train-iters 100000
  --lr 3e-4
  --min-lr 3e-5
  --lr-decay-style cosine
  --lr-warmup-iters 2000
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
