#!/usr/bin/env bash
# A model of 1.2 billion parameters, embeddings excepted, for four-bit weights and activations (arXiv
# 2404.03605) on 8 GPUs of one node: inputs of linear layers are quantized to 4 bits between learned
# clips, and the kurtosis of their outputs is penalized, for 20 billion tokens, as in the paper.
#
#   MEGATRON_LM=/path/to/Megatron-LM DATA_PATH=/data/slimpajama_text_document \
#   TOKENIZER=EleutherAI/gpt-neox-20b CHECKPOINTS=/ckpt/w4a4-1b bash pretrain_megatron.sh
#
# ARM=baseline trains without both, ARM=inputs and ARM=outputs with one of the two: the paper's
# control arms, from the same script. Give each its own CHECKPOINTS.
# DRY_RUN=1 prints Megatron's arguments, one a line, and starts nothing.
# Anything given on the command line is appended: bash pretrain_megatron.sh --train-iters 100
set -euo pipefail

: "${MEGATRON_LM:?the folder of a Megatron-LM checkout (it holds pretrain_gpt.py)}"
: "${DATA_PATH:?prefix of a preprocessed data set, without .bin and .idx (tools/preprocess_data.py makes one)}"
: "${TOKENIZER:?a Hugging Face tokenizer: a folder or a name on the hub}"
: "${CHECKPOINTS:?folder for checkpoints; training resumes from the newest one there}"
ARM=${ARM:-both}

GPUS_PER_NODE=8
export CUDA_DEVICE_MAX_CONNECTIONS=1

MODEL=(
  --num-layers 24
  --hidden-size 2048
  --ffn-hidden-size 5632
  --num-attention-heads 16
  --seq-length 2048
  --max-position-embeddings 2048
  --position-embedding-type rope
  --normalization RMSNorm
  --swiglu
  --disable-bias-linear
  --untie-embeddings-and-output-weights
  --attention-dropout 0.0
  --hidden-dropout 0.0
  --init-method-std 0.02
)
# Clips start at the 99.9th percentile of the inputs of one iteration, after the warm-up.
LEARNED=(--w4a4-activation-bits 4 --w4a4-start-iteration 1000)
KURTOSIS=(--w4a4-kurtosis-weight 1e-5)
case $ARM in
  baseline) ;;
  inputs) MODEL+=(--w4a4 "${LEARNED[@]}" --w4a4-kurtosis-weight 0) ;;
  outputs) MODEL+=(--w4a4 --w4a4-activation-bits 0 "${KURTOSIS[@]}") ;;
  both) MODEL+=(--w4a4 "${LEARNED[@]}" "${KURTOSIS[@]}") ;;
  *) echo "ARM=$ARM: must be baseline, inputs, outputs or both" >&2; exit 1 ;;
esac

PARALLEL=(
  --tensor-model-parallel-size 1
  --pipeline-model-parallel-size 1
  --use-distributed-optimizer
  --overlap-grad-reduce
  --overlap-param-gather
)

# 512 sequences of 2048 tokens an iteration.
TRAINING=(
  --bf16
  --micro-batch-size 4
  --global-batch-size 512
  --train-iters 19074
  --lr 3e-4
  --min-lr 3e-5
  --lr-decay-style cosine
  --lr-warmup-iters 1000
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
