"""Every symbol of transformers and accelerate that is hooked: Power LR in their Trainer, the
decoder in their Auto classes, and W4A4 among their quantizers.

Data only, standard library only; laid out as the ledgers of the other hosts.
"""

from __future__ import annotations

from functools import partial

from torch_plugins.seams.symbol import Symbol

_Symbol = partial(Symbol, versions="transformers 5.5-5.24")

HOOKS: tuple[Symbol, ...] = (
    _Symbol(
        id="hf-arguments",
        targets=("transformers.training_args:TrainingArguments.__post_init__",),
        feature="power_lr",
        why='checks lr_scheduler_kwargs of "power" before a model is built',
        remove_when="schedulers can be registered with their own checks",
        handler="torch_plugins.trainer:check_arguments",
        relies_on=("lr_scheduler_type",),
    ),
    _Symbol(
        id="hf-scheduler",
        targets=("transformers.trainer:Trainer.create_scheduler",),
        feature="power_lr",
        why='gives "power" the global batch size, which only Trainer knows',
        remove_when="schedulers are given the batch size",
        handler="torch_plugins.trainer:create_scheduler",
        relies_on=("lr_scheduler_kwargs", "get_scheduler", "self.lr_scheduler"),
    ),
    _Symbol(
        id="hf-accelerated-scheduler",
        targets=("accelerate.scheduler:AcceleratedScheduler.__init__",),
        feature="power_lr",
        why="one step per optimizer step, where a prepared scheduler steps num_processes times",
        remove_when="accelerate lets a scheduler say so itself",
        handler="torch_plugins.trainer:step_once",
        versions="accelerate 1.10-1.15",
        relies_on=("split_batches",),
    ),
    _Symbol(
        id="hf-auto-classes",
        targets=("transformers.models.auto.configuration_auto:_LazyConfigMapping.__contains__",),
        feature="any",
        why="registers the decoder with the Auto classes when its model_type is first asked for",
        remove_when="transformers finds model types of installed packages",
        handler="torch_plugins.seams.doors:knows_model_type",
    ),
    _Symbol(
        id="hf-quant-method",
        targets=("transformers.quantizers.auto:AutoHfQuantizer.supports_quant_method",),
        feature="w4a4",
        why="registers the quantizer when a folder has its marker, which stops transformers else",
        remove_when="transformers refuses a quant_method that it does not know",
        handler="torch_plugins.seams.doors:reads_quantization",
        relies_on=("load_in_4bit", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
    ),
    _Symbol(
        id="hf-quant-config",
        targets=("transformers.quantizers.auto:AutoQuantizationConfig.from_dict",),
        feature="w4a4",
        why="as hf-quant-method",
        remove_when="as hf-quant-method",
        handler="torch_plugins.seams.doors:reads_quantization",
        relies_on=("load_in_4bit", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
    ),
)

REGISTRIES = (
    ("transformers.trainer_utils", "hf-type", "torch_plugins.trainer:add_scheduler_type"),
    ("transformers.optimization", "hf-function", "torch_plugins.trainer:add_scheduler_function"),
)
"""``(module, id, function of ours called with it)``."""
