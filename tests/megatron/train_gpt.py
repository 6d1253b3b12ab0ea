"""A small GPT through the installed Megatron's own training loop, as a user's script starts it.

Wheels ship no pretrain_gpt.py; this covers the three ways in which those of the supported
versions call ``pretrain``. Every rank reads its own copy of the batch. With
``TRAIN_GPT_RECORD=path`` the last rank also writes each iteration's loss and gradient norm there,
and the learning rate of the next, exactly, as JSON lines.
"""

from __future__ import annotations

import gc

gc.disable()  # until all is imported: a quarter of the time that a short training takes

import functools
import inspect
import json
import os
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
)
from megatron.core.transformer.spec_utils import import_module
from megatron.training import get_args, get_tokenizer, pretrain, training
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.utils import get_blend_and_blend_per_split

gc.freeze()
gc.enable()

BATCH = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **kwargs):
    """The local-spec GPT that 0.17 and 0.18 scripts build themselves."""
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.spec is not None:
        spec = import_module(args.spec)
    elif args.num_experts:
        spec = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=False,
            normalization=args.normalization,
            qk_l2_norm=args.qk_l2_norm,
            vp_stage=vp_stage,
        )
    else:
        spec = get_gpt_layer_local_spec(
            qk_layernorm=args.qk_layernorm, normalization=args.normalization
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        **kwargs,
    )


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(dataset, num_samples, lambda: True, config).build()


datasets_provider.is_distributed = True


def loss_func(loss_mask, output_tensor):
    """Sum over the tokens, their count, and both for the log."""
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output_tensor.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.cat([loss.detach().view(1), num_tokens.view(1)])
    return loss, num_tokens, {"lm loss": report}


def forward_step(data_iterator, model):
    batch = next(data_iterator)
    tokens, labels, loss_mask, attention_mask, position_ids = (
        None if batch.get(key) is None else batch[key].cuda(non_blocking=True) for key in BATCH
    )
    output = model(tokens, position_ids, attention_mask, labels=labels, loss_mask=loss_mask)
    return output, functools.partial(loss_func, loss_mask)


def record(path: str) -> None:
    """Write what every call of ``training_log`` is given, on the rank that knows the loss."""
    upstream = training.training_log
    signature = inspect.signature(upstream)

    @functools.wraps(upstream)
    def training_log(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            line = {name: values[name] for name in ("iteration", "grad_norm", "learning_rate")}
            line.update(values["loss_dict"])
            line = {name: None if value is None else float(value) for name, value in line.items()}
            with Path(path).open("a") as lines:
                lines.write(json.dumps(line) + "\n")
        return upstream(*args, **kwargs)

    training.training_log = training_log


def main() -> None:
    if path := os.environ.get("TRAIN_GPT_RECORD"):
        record(path)
    model_type = ModelType.encoder_or_decoder
    if "cfg_container" not in inspect.signature(pretrain).parameters:  # 0.17
        pretrain(datasets_provider, model_provider, model_type, forward_step)
        return

    from megatron.training import argument_utils
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args()
    if hasattr(argument_utils, "gpt_config_from_args"):  # 0.19 and newer
        model_config = argument_utils.gpt_config_from_args(args)
        container = argument_utils.pretrain_cfg_container_from_args(args, model_config)
        pretrain(container, datasets_provider, model_type, forward_step)
    else:  # 0.18
        container = argument_utils.pretrain_cfg_container_from_args(args)
        pretrain(container, datasets_provider, model_provider, model_type, forward_step)


def run() -> None:
    """Train, and leave Megatron."""
    try:
        main()
    except SystemExit as stop:  # how Megatron leaves at --exit-interval
        if stop.code:
            raise
    if torch.distributed.is_initialized():  # gloo's threads must not outlive the interpreter
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run()
