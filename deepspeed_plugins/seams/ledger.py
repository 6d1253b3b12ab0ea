"""Every symbol of DeepSpeed that the plugins touch: where it lives, since when, why, and when it
can go.

Data only, standard library only. ``torch_plugins.seams.patch`` installs the rows that have a
handler; ``doctor`` prints them all; ``tests/deepspeed/test_seams.py`` checks them against the
installed DeepSpeed.
"""

from __future__ import annotations

from functools import partial

from torch_plugins.seams.symbol import Symbol

_Symbol = partial(Symbol, versions="0.18-0.19")
_AuxiliarySymbol = partial(
    _Symbol,
    feature="auxiliary_loss",
    remove_when="an engine tells its layers what it multiplies the loss by",
)

HOOKS: tuple[Symbol, ...] = (
    _Symbol(
        id="ds-config",
        targets=("deepspeed.runtime.config:DeepSpeedConfig.__init__",),
        feature="any",
        why="reads and checks the JSON's sections for the plugins, before anything is built",
        remove_when="DeepSpeed has sections for extensions and refuses unknown ones",
        handler="deepspeed_plugins.host:read_config",
        relies_on=("_param_dict",),
    ),
    _Symbol(
        id="ds-engine",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.__init__",),
        feature="any",
        why="every engine passes here, whoever calls deepspeed.initialize and with what config",
        remove_when="DeepSpeed calls extensions before and after it builds an engine",
        handler="deepspeed_plugins.host:build_engine",
        relies_on=("config_class", "lr_scheduler", "optimizer_name", "model_parameters"),
    ),
    _Symbol(
        id="ds-save",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.save_checkpoint",),
        feature="any",
        why="the decoder's configuration travels with its weights",
        remove_when="never",
        handler="deepspeed_plugins.checkpoints:save",
        relies_on=("client_state",),
    ),
    _Symbol(
        id="ds-load",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.load_checkpoint",),
        feature="any",
        why="weights of one function must not run as another in silence",
        remove_when="never",
        handler="deepspeed_plugins.checkpoints:load",
        relies_on=("load_dir", "load_module_only", "client_states"),
    ),
    _Symbol(
        id="ds-scheduler",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._scheduler_from_config",),
        feature="power_lr",
        why='builds scheduler.type "PowerLR" with the engine\'s batch size',
        remove_when="schedulers of the JSON are given the batch size",
        handler="deepspeed_plugins.power_lr:from_engine",
        relies_on=("scheduler_name", "scheduler_params"),
    ),
    _Symbol(
        id="ds-batch",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.set_train_batch_size",),
        feature="power_lr",
        why="a batch size that ramps up changes the rate at once",
        remove_when="the engine tells its scheduler of a new batch size",
        handler="deepspeed_plugins.power_lr:follow_batch",
    ),
    _Symbol(
        id="ds-micro-batch",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.set_train_micro_batch_size",),
        feature="power_lr",
        why="as ds-batch",
        remove_when="as ds-batch",
        handler="deepspeed_plugins.power_lr:follow_batch",
    ),
    _AuxiliarySymbol(
        id="ds-aux-backward",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.backward",),
        why="a hook on the loss measures what auxiliary losses are to be multiplied by",
        handler="deepspeed_plugins.auxiliary_scale:backward",
    ),
    _AuxiliarySymbol(
        id="ds-aux-scale",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.scale",),
        why="as ds-aux-backward, where the script differentiates, and on pipeline stages",
        handler="deepspeed_plugins.auxiliary_scale:scale",
        relies_on=("scale_if_loss", "_manual_backward_expected"),
    ),
    _AuxiliarySymbol(
        id="ds-aux-outputs",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._backward_prologue",),
        why="tells the outputs of one forward from those of the next",
        handler="deepspeed_plugins.auxiliary_scale:outputs",
        relies_on=("_support_torch_style_backward",),
    ),
    _AuxiliarySymbol(
        id="ds-aux-output",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._backward_prologue_per_tensor",),
        why="divides a backward pass that the script started",
        handler="deepspeed_plugins.auxiliary_scale:output",
        relies_on=("gradient_accumulation_steps",),
    ),
    _AuxiliarySymbol(
        id="ds-aux-pipeline",
        targets=("deepspeed.runtime.pipe.engine:PipelineEngine.train_batch",),
        why="stages without a loss have none to measure",
        handler="deepspeed_plugins.auxiliary_scale:train_batch",
    ),
    _Symbol(
        id="ds-compression-key",
        targets=(
            "deepspeed.runtime.config:_reject_removed_config_keys",
            "deepspeed.runtime.config:get_compression_config",
        ),
        feature="w4a4",
        why="compression_training with W4A4 alone is ours; DeepSpeed refuses it, or before 0.19.7 "
        "reads it for its compression library",
        remove_when="DeepSpeed refuses other sections that nobody reads",
        handler="deepspeed_plugins.features:pass_alias",
        relies_on=("param_dict",),
    ),
    _Symbol(
        id="ds-w4a4-step",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._take_model_step",),
        feature="w4a4",
        why="quantizers follow the steps, and clips are set and given their rate before one",
        remove_when="engines call back around their steps",
        handler="deepspeed_plugins.w4a4_steps:step",
        relies_on=("global_steps", "self.optimizer.step()"),
    ),
    _AuxiliarySymbol(
        id="ds-aux-step",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._take_model_step",),
        why="gives the monitor the values of each optimizer step",
        handler="deepspeed_plugins.auxiliary_loss:step",
    ),
)

REGISTRIES = (
    ("deepspeed.runtime.lr_schedules", "ds-schedules", "deepspeed_plugins.power_lr:register"),
)
"""``(module, id, function of ours called with it)``."""

USED: tuple[Symbol, ...] = (
    _Symbol(
        id="ds-schedules",
        targets=("deepspeed.runtime.lr_schedules:VALID_LR_SCHEDULES",),
        feature="power_lr",
        why="accelerate hands a scheduler to DeepSpeed only if its class is named here",
        remove_when="accelerate hands over every scheduler",
    ),
    _Symbol(
        id="ds-step",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine._take_model_step",),
        feature="power_lr",
        why="steps the scheduler once per optimizer step, not for one that fp16 overflow skipped",
        remove_when="never",
        relies_on=("overflow", "lr_scheduler.step", "TypeError"),
    ),
    _Symbol(
        id="ds-optimizer-flags",
        targets=("deepspeed:set_optimizer_flags",),
        feature="cross_layer_attention",
        why="Muon wants its flags on the parameters that a conversion adds",
        remove_when="the engine sets them after conversions",
        relies_on=("use_muon",),
    ),
    _Symbol(
        id="ds-pipeline",
        targets=("deepspeed.runtime.pipe.module:PipelineModule",),
        feature="any",
        why="is refused by name, it cannot be converted",
        remove_when="never",
    ),
    _Symbol(
        id="ds-tensor-parallel",
        targets=("deepspeed.module_inject.layers:LinearAllreduce.forward",),
        feature="ladder_residual",
        why="its subclass starts the all-reduce of AutoTP and leaves the wait to the ladder",
        remove_when="AutoTP can leave the wait to the caller",
        relies_on=("RowParallel.apply(self.mp_group", "self.weight", "self.bias"),
    ),
    _Symbol(
        id="ds-all-reduce",
        targets=("deepspeed.comm.comm:all_reduce",),
        feature="ladder_residual",
        why="with async_op, starts the all-reduce that a ladder overlaps",
        remove_when="never",
    ),
    _Symbol(
        id="torch-saved-tensors",
        targets=("torch._C:_autograd._top_saved_tensors_default_hooks",),
        feature="ladder_residual",
        why="tells that what checkpointing saves may be copied before its all-reduce has arrived",
        remove_when="torch has a public name for it",
        versions="torch 2.4-2.14",
    ),
    _Symbol(
        id="ds-tensor-parallel-size",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.autotp_size",),
        feature="ladder_residual",
        why="whether AutoTP has sharded the engine's model, by the decoder's base_model_tp_plan",
        remove_when="never",
    ),
    *(
        _Symbol(
            id=f"ds-{name}",
            targets=(f"deepspeed.utils.tensor_fragment:{name}",),
            feature="w4a4",
            why="writes a clip into the fp32 copy of the optimizer",
            remove_when="never",
        )
        for name in ("safe_set_full_fp32_param", "safe_set_local_fp32_param")
    ),
    *(
        _Symbol(
            id=f"ds-{name}",
            targets=(f"deepspeed.runtime.fp16.{name}:{optimizer}",),
            feature="w4a4",
            why="as safe_set_full_fp32_param, which does nothing for 16 bits without ZeRO",
            remove_when="safe_set_full_fp32_param does",
        )
        for name, optimizer in (
            ("fused_optimizer", "FP16_Optimizer"),
            ("unfused_optimizer", "FP16_UnfusedOptimizer"),
        )
    ),
    _Symbol(
        id="ds-zero",
        targets=("deepspeed.runtime.zero.partition_parameters:GatheredParameters",),
        feature="cross_layer_attention",
        why="reads a weight that zero.Init has partitioned; ds_shape is its shape",
        remove_when="never",
    ),
    _Symbol(
        id="ds-leaf-modules",
        targets=("deepspeed.utils.z3_leaf_module:set_z3_leaf_modules",),
        feature="dense_moe",
        why="ZeRO 3 gathers the weights of a layer's experts together, whichever a rank computes",
        remove_when="never",
        relies_on=("raise_if_not_found",),
    ),
    _Symbol(
        id="ds-consolidate",
        targets=("deepspeed.utils.zero_to_fp32:get_fp32_state_dict_from_zero_checkpoint",),
        feature="any",
        why="whole weights of a checkpoint, for export_hf",
        remove_when="never",
        relies_on=("lazy_mode",),
    ),
    *(
        _Symbol(
            id=f"ds-pickled-{name}",
            targets=(f"deepspeed.{module}:{name}",),
            feature="any",
            why="checkpoints may name it; export_hf refuses all but tensors, numbers and these",
            remove_when="checkpoints hold tensors and numbers only",
        )
        for module, name in (
            ("runtime.fp16.loss_scaler", "LossScaler"),
            ("runtime.fp16.loss_scaler", "DynamicLossScaler"),
            ("runtime.zero.config", "ZeroStageEnum"),
            ("utils.tensor_fragment", "fragment_address"),
        )
    ),
    _AuxiliarySymbol(
        id="ds-monitor",
        targets=("deepspeed.monitor.monitor:MonitorMaster.write_events",),
        why="is given the values of auxiliary losses",
    ),
    _AuxiliarySymbol(
        id="ds-stages",
        targets=("deepspeed.runtime.pipe.topology:PipelineParallelGrid.get_pipe_parallel_group",),
        why="sums auxiliary losses over stages",
    ),
    _Symbol(
        id="ds-batch-size",
        targets=("deepspeed.runtime.engine:DeepSpeedEngine.train_batch_size",),
        feature="power_lr",
        why="sequences of the global batch",
        remove_when="never",
    ),
)
