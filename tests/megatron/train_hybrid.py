"""train_gpt.py with a hybrid model, as pretrain_hybrid.py builds it."""

from __future__ import annotations

from megatron.core.transformer.spec_utils import import_module
from megatron.training import argument_utils, get_args
from megatron.training.arguments import core_transformer_config_from_args

from tests.megatron import train_gpt
from tests.megatron.hybrid_upstream import STACK, HybridModel


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **kwargs):
    """What the scripts of 0.17 and 0.18 build themselves."""
    args = get_args()
    return HybridModel(
        config=config or core_transformer_config_from_args(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        hybrid_layer_pattern=args.hybrid_layer_pattern,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        **{STACK: import_module(args.spec)},
        **kwargs,
    )


if __name__ == "__main__":
    train_gpt.model_provider = model_provider
    if hasattr(argument_utils, "gpt_config_from_args"):  # 0.19 and newer
        argument_utils.gpt_config_from_args = argument_utils.hybrid_config_from_args
    train_gpt.run()
