"""Every upstream symbol the plugins touch: where it lives, since when, why, and when it can go.

Data only, standard library only. ``torch_plugins.seams.patch`` installs the rows that have a
handler; ``doctor`` prints them all; ``tests/megatron/test_seams.py`` checks them against the
installed Megatron.
"""

from __future__ import annotations

from megatron_plugins.seams.used import USED
from torch_plugins.seams.symbol import Symbol

__all__ = ["HOOKS", "USED"]

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
        id="hybrid-layers",
        targets=(
            "megatron.core.models.hybrid.hybrid_block:HybridStack.__init__",
            "megatron.core.ssm.mamba_block:MambaStack.__init__",
        ),
        feature="any",
        why="the one place through which every hybrid model's layer specs pass; 0.17 has the "
        "second only, which is the first in later ones",
        remove_when="upstream lets a config rewrite layer specs",
        handler="megatron_plugins.seams.doors:build_stack",
        relies_on=(
            "config",
            "submodules",
            "layer_type_list",
            "pp_layer_offset",
            "post_process",
            "is_mtp_layer",
            "layer_number",
            "attention_layer",
            "mlp_layer",
            "moe_layer",
            "mamba_layer",
            "gdn_layer",
        ),
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
        id="flops",
        targets=("megatron.training.training:num_floating_point_operations",),
        feature="cross_layer_attention",
        why="it counts projections of keys and values in every layer",
        remove_when="upstream counts the model's own parameters",
        handler="megatron_plugins.seams.doors:count",
        relies_on=("args.num_query_groups", "args.group_query_attention"),
    ),
    Symbol(
        id="memory",
        targets=("megatron.training.theoretical_memory_usage:compute_weight_and_optimizer_memory",),
        feature="cross_layer_attention",
        why="it counts weights of keys and values in every layer",
        remove_when="upstream counts the model's own parameters",
        handler="megatron_plugins.seams.doors:count",
        relies_on=("args.num_query_groups", "args.group_query_attention"),
    ),
    Symbol(
        id="dynamic-context",
        targets=(
            "megatron.core.inference.contexts.dynamic_context:DynamicInferenceContext.__init__",
        ),
        feature="cross_layer_attention",
        why="it allocates a cache for every layer",
        remove_when="a configuration maps layers to caches",
        handler="megatron_plugins.seams.doors:build_context",
        relies_on=(
            "self.num_attention_layers",
            "self.layer_map",
            "use_flashinfer_fused_rope",
            "pg_collection",
        ),
    ),
    Symbol(
        id="static-engine",
        targets=("megatron.core.inference.engines.static_engine:StaticInferenceEngine.__init__",),
        feature="cross_layer_attention",
        why="it answers a failure of the dynamic engine with a warning and another engine",
        remove_when="it raises",
        handler="megatron_plugins.seams.doors:build_engine",
        relies_on=("Error initializing dynamic engine",),
    ),
    Symbol(
        id="loss-scale",
        targets=("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",),
        feature="dense_moe",
        why="sets the scale of auxiliary losses, which upstream does for stock MoE layers only",
        remove_when="upstream scales the losses of any layer",
        handler="megatron_plugins.seams.doors:loss_scale",
        relies_on=("grad_scale_func", "calculate_per_token_loss", "num_microbatches"),
    ),
    Symbol(
        id="training-log",
        targets=("megatron.training.training:training_log",),
        feature="dense_moe",
        why="prints and records what else is in loss_dict: the statistics of the routers",
        remove_when="layers can add to the log",
        handler="megatron_plugins.seams.doors:log",
        relies_on=("loss_dict",),
    ),
    Symbol(
        id="w4a4-step",
        targets=("megatron.training.training:train_step",),
        feature="w4a4",
        why="quantizers start by iteration, and are calibrated after the step that they observe",
        remove_when="upstream has callbacks around a step",
        handler="megatron_plugins.seams.doors:step",
        relies_on=("model", "optimizer"),
    ),
    Symbol(
        id="optimizer-groups",
        targets=("megatron.core.optimizer:get_standard_config_overrides",),
        feature="w4a4",
        why="clips may have a learning rate of their own; training.py binds the function as it "
        "imports it",
        remove_when="parameters can name a multiple of the learning rate",
        handler="megatron_plugins.seams.doors:optimizer_groups",
        relies_on=("config",),
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
