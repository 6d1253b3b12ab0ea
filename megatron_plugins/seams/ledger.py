"""Every upstream symbol the plugins touch: where it lives, since when, why, and when it can go.

Data only, standard library only. ``torch_plugins.seams.patch`` installs the rows that have a
handler; ``doctor`` prints them all; ``tests/megatron/test_seams.py`` checks them against the
installed Megatron.
"""

from __future__ import annotations

from torch_plugins.seams.symbol import Symbol

HOOKS: tuple[Symbol, ...] = (
    Symbol(
        id="flags",
        targets=("megatron.training.arguments:add_megatron_arguments",),
        feature="any",
        why="adds the plugins' argument groups to every launcher's parser",
        remove_when="launchers read extra argument providers from installed packages",
        handler="megatron_plugins.arguments:add_flags",
    ),
    Symbol(
        id="validate",
        targets=("megatron.training.arguments:validate_args",),
        feature="any",
        why="refuses combinations that cannot work before anything is built",
        remove_when="upstream offers a validation hook",
        handler="megatron_plugins.arguments:validate",
    ),
    Symbol(
        id="config",
        targets=(
            "megatron.training.argument_utils:core_transformer_config_from_args",
            "megatron.training.arguments:core_transformer_config_from_args",
        ),
        feature="any",
        why="attaches config.megatron_plugins; 0.17 defines it in arguments, 0.18 and later in "
        "argument_utils",
        remove_when="TransformerConfig carries a field for extensions",
        handler="megatron_plugins.arguments:attach",
    ),
    Symbol(
        id="layers",
        targets=("megatron.core.transformer.transformer_block:_get_block_submodules",),
        feature="any",
        why="the one place through which every GPTModel's layer specs pass",
        remove_when="upstream lets a config rewrite layer specs",
        handler="megatron_plugins.seams.doors:block_submodules",
    ),
    Symbol(
        id="carry",
        targets=(
            "megatron.core.tensor_parallel.random:checkpoint",
            "megatron.core.extensions.transformer_engine:te_checkpoint",
        ),
        feature="any",
        why="full recompute takes and returns tensors only; what layers hand on crosses it as such",
        remove_when="recomputed chunks pass on structures of tensors",
        handler="megatron_plugins.seams.doors:checkpoint",
    ),
    Symbol(
        id="activity",
        targets=("megatron.training.training:setup_model_and_optimizer",),
        feature="any",
        why="the last call before training: a feature that no layer uses is an error there",
        remove_when="never: a flag that does nothing must be told",
        handler="megatron_plugins.activity:report",
    ),
    Symbol(
        id="checkpoint-args",
        targets=("megatron.training.checkpointing:load_args_from_checkpoint",),
        feature="any",
        why="--use-checkpoint-args restores the plugins' flags too",
        remove_when="upstream restores arguments it does not know",
        handler="megatron_plugins.checkpoints:restore",
    ),
    Symbol(
        id="checkpoint-check",
        targets=("megatron.training.checkpointing:_load_base_checkpoint",),
        feature="any",
        why="compares the features of run and checkpoint; upstream's check_checkpoint_args is "
        "skipped by --finetune and sees only its own arguments",
        remove_when="upstream offers a check of saved arguments for extensions",
        handler="megatron_plugins.checkpoints:compare",
    ),
    Symbol(
        id="power-lr-rate",
        targets=("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr",),
        feature="power_lr",
        why="the rate of the decay style 'power', ahead of the cut-off at min_lr",
        remove_when="decay styles can be registered",
        handler="megatron_plugins.power_lr:get_lr",
        relies_on=(
            "max_lr",
            "min_lr",
            "init_lr",
            "num_steps",
            "lr_warmup_steps",
            "lr_decay_steps",
            "lr_decay_style",
            "wsd_decay_steps",
        ),
    ),
    Symbol(
        id="power-lr-save",
        targets=("megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.state_dict",),
        feature="power_lr",
        why="a, b, the last phase and the token count belong to the scheduler's state",
        remove_when="decay styles can be registered",
        handler="megatron_plugins.power_lr:state_dict",
        relies_on=("num_steps", "wd_incr_style", "wd_incr_steps"),
    ),
    Symbol(
        id="power-lr-load",
        targets=(
            "megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.load_state_dict",
        ),
        feature="power_lr",
        why="compares them with the run's by upstream's rules",
        remove_when="decay styles can be registered",
        handler="megatron_plugins.power_lr:load_state_dict",
        relies_on=("_check_and_set", "lr_decay_style", "wd_incr_style"),
    ),
    Symbol(
        id="power-lr-batch",
        targets=("megatron.training.training:train_step",),
        feature="power_lr",
        why="only here are the consumed samples and the scheduler's in step: skipped iterations "
        "set them apart, and the batch size follows the consumed ones",
        remove_when="the scheduler is told the batch size",
        handler="megatron_plugins.power_lr:train_step",
        relies_on=("opt_param_scheduler",),
    ),
    Symbol(
        id="mup-groups",
        targets=("megatron.core.optimizer:get_mup_config_overrides",),
        feature="power_mup",
        why="--use-mup also divides Adam's epsilon by the width multiplier, the paper does not; "
        "training.py binds the function as it imports it",
        remove_when="upstream lets --use-mup leave Adam's epsilon alone",
        handler="megatron_plugins.power_mup:keep_epsilon",
    ),
)

USED: tuple[Symbol, ...] = (
    Symbol(
        id="get-args",
        targets=("megatron.training.global_vars:get_args",),
        feature="any",
        why="the arguments of the run, where upstream passes none",
        remove_when="never",
    ),
    Symbol(
        id="layer-offset",
        targets=("megatron.core.transformer.transformer_layer:get_transformer_layer_offset",),
        feature="any",
        why="first layer of a pipeline stage, to know a layer's index in the whole model",
        remove_when="layer specs carry their index",
    ),
    Symbol(
        id="layer",
        targets=("megatron.core.transformer.transformer_layer:TransformerLayer",),
        feature="ladder_residual",
        why="the ladder subclasses whichever layer the spec names, and replaces its two "
        "bias-dropout-adds",
        remove_when="upstream lets a layer's residual be chosen",
        relies_on=(
            "self_attn_bda",
            "mlp_bda",
            "self_attention",
            "mlp",
            "pg_collection",
            "context",
        ),
    ),
    Symbol(
        id="layer-submodules",
        targets=("megatron.core.transformer.transformer_layer:TransformerLayerSubmodules",),
        feature="power_mup",
        why="the residual multiplier replaces the two bias-dropout-adds that a layer's spec names",
        remove_when="upstream has a residual multiplier",
        relies_on=("self_attn_bda", "mlp_bda", "cross_attention"),
    ),
    Symbol(
        id="row-parallel",
        targets=("megatron.core.tensor_parallel.layers:RowParallelLinear",),
        feature="ladder_residual",
        why="its switch for experts leaves the output unreduced; the ladder reduces it later",
        remove_when="RowParallelLinear returns a handle of an asynchronous reduction",
        relies_on=("explicit_expert_comm", "skip_bias_add"),
    ),
    Symbol(
        id="attention",
        targets=("megatron.core.transformer.attention:SelfAttention",),
        feature="cross_layer_attention",
        why="producers keep the keys and values they attend to, consumers have queries only",
        remove_when="upstream's attention takes keys and values from outside",
        relies_on=("linear_qkv", "k_layernorm", "get_query_key_value_tensors"),
    ),
    Symbol(
        id="attention-base",
        targets=("megatron.core.transformer.attention:Attention",),
        feature="cross_layer_attention",
        why="the same; what a consumer reads of it and of its caches",
        remove_when="upstream's attention takes keys and values from outside",
        relies_on=(
            "_adjust_key_value_for_inference",
            "_checkpointed_attention_forward",
            "_get_pp_layer_offset_for_inference",
            "core_attention",
            "checkpoint_core_attention",
            "key_value_memory_dict",
            "key_value_cache",
            "num_query_groups",
        ),
    ),
    Symbol(
        id="attention-layer",
        targets=("megatron.core.transformer.transformer_layer:TransformerLayer",),
        feature="cross_layer_attention",
        why="hands keys and values on, and shows its input to a second norm",
        remove_when="upstream's layers hand tensors on",
        relies_on=(
            "_forward_attention",
            "self_attention",
            "context",
            "sharded_state_dict_keys_map",
        ),
    ),
    Symbol(
        id="identity",
        targets=("megatron.core.transformer.identity_op:IdentityOp",),
        feature="cross_layer_attention",
        why="as input norm of a layer it says that linear_qkv contains the norm",
        remove_when="never",
    ),
    Symbol(
        id="gather-heads",
        targets=(
            "megatron.core.tensor_parallel.mappings:all_gather_last_dim_from_tensor_parallel_region",
        ),
        feature="cross_layer_attention",
        why="fewer key-value heads than tensor-parallel ranks, under a norm of their own",
        remove_when="never",
    ),
    Symbol(
        id="module-spec",
        targets=("megatron.core.transformer.spec_utils:ModuleSpec",),
        feature="any",
        why="layer specs are rewritten, and --spec megatron_plugins.specs is one",
        remove_when="never",
        relies_on=("module", "params", "submodules", "metainfo"),
    ),
    Symbol(
        id="decoder-block-spec",
        targets=("megatron.core.models.gpt.gpt_layer_specs:get_gpt_decoder_block_spec",),
        feature="any",
        why="the stock layers behind --spec megatron_plugins.specs gpt_layer_spec",
        remove_when="never",
    ),
    Symbol(
        id="te-row-parallel",
        targets=("megatron.core.extensions.transformer_engine:TERowParallelLinear",),
        feature="ladder_residual",
        why="it reduces only in parallel_mode 'row', which it reads at each forward; the ladder "
        "clears it",
        remove_when="TERowParallelLinear returns a handle of an asynchronous reduction",
    ),
    Symbol(
        id="batch-size",
        targets=("megatron.core:num_microbatches_calculator",),
        feature="power_lr",
        why="the global batch after a number of samples, by a copy of the run's own calculator",
        remove_when="it answers for a given number of samples",
        relies_on=(
            "_GLOBAL_NUM_MICROBATCHES_CALCULATOR",
            "get_current_running_global_batch_size",
            "def update(self, consumed_samples, consistency_check",
        ),
    ),
    Symbol(
        id="export-model",
        targets=("megatron.core.models.gpt:GPTModel",),
        feature="export",
        why="Megatron's own logits, the reference of an export",
        remove_when="never",
    ),
    Symbol(
        id="export-layer-spec",
        targets=("megatron.core.models.gpt.gpt_layer_specs:get_gpt_layer_local_spec",),
        feature="export",
        why="layers of that model",
        remove_when="never",
    ),
    Symbol(
        id="export-load",
        targets=("megatron.core:dist_checkpointing",),
        feature="export",
        why="loads the checkpoint into it",
        remove_when="never",
    ),
    Symbol(
        id="export-shards",
        targets=("megatron.core.dist_checkpointing.mapping:ShardedObject",),
        feature="export",
        why="tells tensors from the pickled extra states, which are not read",
        remove_when="never",
    ),
    Symbol(
        id="export-parallel",
        targets=("megatron.core:parallel_state",),
        feature="export",
        why="a world of one process for it",
        remove_when="never",
    ),
    Symbol(
        id="export-seed",
        targets=("megatron.core.tensor_parallel.random:model_parallel_cuda_manual_seed",),
        feature="export",
        why="building layers needs a seeded random state",
        remove_when="never",
    ),
)
