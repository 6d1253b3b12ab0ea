#!/usr/bin/env bash
# The 1B model of the DS-MoE paper (arXiv 2404.05567, table 1) on 8 GPUs of one node: 32 MLP experts
# of width 256 and 16 attention experts of 2 heads in each of 24 layers, all trained on every token.
#
#   MEGATRON_LM=/path/to/Megatron-LM DATA_PATH=/data/pile_text_document \
#   TOKENIZER=Salesforce/codegen-350M-mono CHECKPOINTS=/ckpt/dsmoe-1b bash pretrain_1b.sh
#
# DENSE=1 trains the dense twin from the same script: the same widths, no routers; give it another
# CHECKPOINTS.
# DRY_RUN=1 prints Megatron's arguments, one a line, and starts nothing.
# Anything given on the command line is appended: bash pretrain_1b.sh --train-iters 100
set -euo pipefail

: "${MEGATRON_LM:?the folder of a Megatron-LM checkout (it holds pretrain_gpt.py)}"
: "${DATA_PATH:?prefix of a preprocessed data set, without .bin and .idx (tools/preprocess_data.py makes one)}"
: "${TOKENIZER:?a Hugging Face tokenizer: a folder or a name on the hub}"
: "${CHECKPOINTS:?folder for checkpoints; training resumes from the newest one there}"
DENSE=${DENSE:-0}

GPUS_PER_NODE=8
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 24
  --hidden-size 2048
  --ffn-hidden-size 8192
  --num-attention-heads 32
  --kv-channels 64
  --group-query-attention
  --num-query-groups 2
  --seq-length 2048
  --max-position-embeddings 2048
  --position-embedding-type rope
  --normalization RMSNorm
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --init-method-std 0.02
)
if [[ $DENSE != 1 ]]; then
  # Sizes, routers of width 512 and the weights of both losses, 6.3e-4 and 3.5e-4. In evaluation
  # experts with N S > 0.48: the paper's choice; --dsmoe-inference dense computes all.
  MODEL+=(--dsmoe-preset 1b --dsmoe-inference threshold)
fi

# Tensor parallelism divides the 32 experts; neither needs a dispatcher.
PARALLEL=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

# 256 sequences of 2048 tokens an iteration, 30 billion tokens, warm-up over one billion.
TRAINING=(
  --bf16
  --micro-batch-size 4
  --global-batch-size 256
  --train-iters 57221
  --lr 3e-4
  --min-lr 3e-5
  --lr-decay-style cosine
  --lr-warmup-iters 1908
  --weight-decay 0.01
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
