"""What Cross-Layer Attention refuses and counts before anything is built."""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_plugins import checkpoints
from megatron_plugins.cross_layer_attention import REFUSED, attention, groups, inference, transform
from megatron_plugins.refusals import refuse
from tests.megatron import harness
from torch_plugins.config import ConfigError, CrossLayerAttention

FLAG = "--cross-layer-attention"
TYPED = {
    "--multi-latent-attention": ("--multi-latent-attention",),
    "--experimental-attention-variant": ("--experimental-attention-variant", "gated_delta_net"),
    "--heterogeneous-layers-config-path": ("--heterogeneous-layers-config-path", "layers.json"),
    "--attention-output-gate": ("--attention-output-gate",),
    "--qk-clip": ("--qk-clip",),
    "--optimizer muon": ("--optimizer", "muon"),
    "--test-mode": ("--test-mode", "--qk-layernorm"),
    "--mtp-num-layers": ("--mtp-num-layers", "1"),
    "--cuda-graph-impl": ("--cuda-graph-impl", "local"),
    "--overlap-moe-expert-parallel-comm": ("--overlap-moe-expert-parallel-comm",),
    "--cpu-offloading-num-layers": ("--cpu-offloading-num-layers", "1"),
    "--fine-grained-activation-offloading": ("--fine-grained-activation-offloading",),
    "--use-megatron-fsdp": ("--use-megatron-fsdp",),
    "--use-torch-fsdp2": ("--use-torch-fsdp2",),
    "--tp-comm-overlap": ("--tp-comm-overlap", "--cla-kv-norm", "separate"),
    "--flash-decode": ("--flash-decode",),
    "--transformer-impl inference_optimized": ("--transformer-impl", "inference_optimized"),
}


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    from megatron.training.arguments import add_megatron_arguments

    return add_megatron_arguments(ArgumentParser(allow_abbrev=False))


def test_the_table_is_covered() -> None:
    assert {row.flag for row in REFUSED} == TYPED.keys()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer", "muon", "--muon-no-split-qkv"),
        ("--tp-comm-overlap",),
        ("--test-mode",),
    ],
    ids=["plain", "muon", "userbuffers", "test mode"],
)
def test_not_refused(parser: ArgumentParser, flags: tuple[str, ...]) -> None:
    if any(flag.startswith("--") and flag not in parser.format_help() for flag in flags):
        pytest.skip(f"this Megatron does not know {flags}")
    refuse(parser.parse_args([FLAG, *flags]), FLAG, REFUSED)


@pytest.mark.parametrize("flag", TYPED)
def test_refused(parser: ArgumentParser, flag: str) -> None:
    if TYPED[flag][0] not in parser.format_help():
        pytest.skip(f"this Megatron has no {TYPED[flag][0]}")
    with pytest.raises(ConfigError) as error:
        refuse(parser.parse_args([FLAG, *TYPED[flag]]), FLAG, REFUSED)
    assert f"{FLAG} with {flag}: " in str(error.value)
    assert str(error.value).count(f"{FLAG} with") == 1


Validated = Callable[..., tuple[Namespace, Any]]


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Validated:
    return partial(harness.validated, monkeypatch)


PP2 = ("--pipeline-model-parallel-size", 2)
VPP = (*PP2, "--num-layers-per-virtual-pipeline-stage", 1)
FIRST = (*PP2, "--decoder-first-pipeline-num-layers", 1)
LAYOUT = (*PP2, "--pipeline-model-parallel-layout")


@pytest.mark.parametrize(
    ("flags", "pattern", "split", "remedy"),
    [
        (PP2, "0,1,1,1", "layers 1 | 2; producers are layers 0, 1", "'Et|t*3L'"),
        (VPP, "0,0,2,2", "layers 0 | 1, 2 | 3; ", "2 groups for 4 stages: use at most 2 stages"),
        (FIRST, "0,0,2,2", "layers 0 | 1; ", "'Et*2|t*2L'"),
        ((*LAYOUT, "Et*3|tL"), "0,0,2,2", "layers 2 | 3; ", "'Et*2|t*2L'"),
        ((*LAYOUT, "Et|t|t|tL"), "0,0,0,0", "layers 0 | 1, 1 | 2, 2 | 3; ", "at most 1 stages"),
    ],
    ids=["pipeline", "virtual pipeline", "short first stage", "layout", "virtual layout"],
)
def test_a_split_group_is_refused(
    validated: Validated, flags: tuple[object, ...], pattern: str, split: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validated(*flags, "--cla-pattern", pattern, world_size=2)
    for part in (f"{FLAG}: a pipeline stage begins inside a group", split, remedy):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("flags", "pattern"),
    [
        (PP2, "0,0,2,2"),
        ((*LAYOUT, "Et|t*3L"), "0,1,1,1"),
        ((*LAYOUT, "E|t*2||t*2L"), "0,0,2,2"),
        (VPP, "0,1,2,3"),
    ],
    ids=["pipeline", "the layout of the message", "empty stages", "groups of one"],
)
def test_whole_groups_are_accepted(
    validated: Validated, flags: tuple[object, ...], pattern: str
) -> None:
    _, config = validated(*flags, "--cla-pattern", pattern, world_size=2)
    assert config.hetereogenous_dist_checkpoint


def test_every_fitting_layout_fits() -> None:
    """Read back by Megatron's own parser, for random groups and stages."""
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    generator = random.Random(0)
    for _ in range(200):
        layers, stages = generator.randint(2, 24), generator.randint(2, 6)
        producers = [0]
        for layer in range(1, layers):
            producers.append(generator.choice([layer, producers[-1]]))
        pattern = CrossLayerAttention(pattern=",".join(map(str, producers)))
        layout = groups.fitting_layout(producers, stages)
        assert (layout is None) == (len(set(producers)) < stages)
        if layout is None:
            continue
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=stages,
            pipeline_model_parallel_layout=PipelineParallelLayerLayout(layout, stages),
        )
        config.pipeline_model_parallel_layout.validate_layer_layout(layers, None)
        groups.check_stages(config, pattern)
        assert len(set(groups.first_layers(config))) == stages, "an empty stage"


@pytest.mark.parametrize(("freq", "pattern"), [("2", "0,0,2,2"), ("[0,1,1,1]", "0,0,2,2")])
def test_a_group_with_and_without_rope_is_refused(
    validated: Validated, freq: str, pattern: str
) -> None:
    rope = ("--position-embedding-type", "rope", "--no-rope-fusion", "--no-rope-freq", freq)
    with pytest.raises(ConfigError, match=r"--no-rope-freq .*: layers 0 and 1 share keys"):
        validated(*rope, "--cla-pattern", pattern)
    validated(*rope, "--cla-pattern", "0,1,2,2" if freq != "2" else "0,1,2,3")


@pytest.mark.parametrize("gqa", [(), ("--group-query-attention", "--num-query-groups", 2)])
def test_operations_and_memory_of_the_training_log(validated: Validated, gqa: Any) -> None:
    """Without the keys and values of consumers: 2 of 4 layers, width 64, heads of 16."""
    from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
    from megatron.training.training import num_floating_point_operations

    stock, shared = (
        validated("--swiglu", "--untie-embeddings-and-output-weights", *gqa, *flags)[0]
        for flags in ((), ("--cla-sharing-factor", 2))
    )
    stock.padded_vocab_size = shared.padded_vocab_size = 256
    absent = 2 * 64 * 2 * (2 if gqa else 4) * 16  # weights
    tokens = 8 * 32
    groups_before = shared.num_query_groups
    operations = [num_floating_point_operations(args, 8) for args in (stock, shared)]
    assert operations[0] - operations[1] == 6 * tokens * absent
    memory = [compute_weight_and_optimizer_memory(args) for args in (stock, shared)]
    assert memory[0] - memory[1] == pytest.approx(18 * absent)
    assert shared.num_query_groups == groups_before


def namespace(**values: object) -> Namespace:
    on = {"cross_layer_attention": True} if values else {}
    return Namespace(num_layers=4, finetune=True, **on, **values)


@pytest.mark.parametrize(
    ("run", "saved"),
    [
        ({}, {"cla_sharing_factor": 2}),
        ({"cla_sharing_factor": 4}, {"cla_sharing_factor": 2}),
        ({"cla_sharing_factor": 2, "cla_kv_norm": "separate"}, {"cla_sharing_factor": 2}),
    ],
    ids=["off", "other groups", "other norm"],
)
def test_other_tensors_are_no_start_for_finetuning(run: Any, saved: Any) -> None:
    with pytest.raises(ConfigError, match=r"has --cross-layer-attention .*: it has other tensors"):
        checkpoints.check(namespace(**run), namespace(**saved), "/ckpt")


def test_checkpoints_of_equal_groups_are_equal() -> None:
    factor, pattern = {"cla_sharing_factor": 2}, {"cla_pattern": "0,0,2,2"}
    checkpoints.check(namespace(**factor), namespace(**pattern), "/ckpt")


def test_a_standard_checkpoint_is_converted_first() -> None:
    command = "megatron_plugins.convert --load /ckpt --save NEW --cross-layer-attention"
    with pytest.raises(ConfigError, match=f"{command} --cla-sharing-factor 3 --cla-kv-norm shared"):
        checkpoints.check(namespace(cla_sharing_factor=3), namespace(), "/ckpt")


def test_specs_with_roles_are_left_alone() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = SimpleNamespace(num_layers=4, pipeline_model_parallel_size=1)
    feature = CrossLayerAttention(pattern="0,0,2,3")
    stock = [get_gpt_layer_local_spec()] * 4
    once = transform(stock, config, feature, 0)
    assert [new is old for new, old in zip(once, stock, strict=True)] == [False, False, True, True]
    assert transform(once, config, feature, 0) is once


def test_an_attention_of_another_kind_is_refused() -> None:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = SimpleNamespace(num_layers=2, pipeline_model_parallel_size=1)
    latent = [get_gpt_layer_local_spec(multi_latent_attention=True)] * 2
    with pytest.raises(ConfigError, match="layer 0 has an attention of another kind, MLASelf"):
        transform(latent, config, CrossLayerAttention(2), 0)


@pytest.mark.parametrize(("ranks", "heads"), [(4, 2), (8, 2), (2, 1)])
def test_the_head_that_a_rank_attends_to(
    monkeypatch: pytest.MonkeyPatch, ranks: int, heads: int
) -> None:
    """Fewer key-value heads than ranks: consecutive ranks have the same one."""
    from megatron.core.tensor_parallel import mappings

    whole = torch.arange(float(heads)).repeat_interleave(6)[None, None]
    name = "all_gather_last_dim_from_tensor_parallel_region"
    monkeypatch.setattr(mappings, name, lambda part, group: whole)
    for rank in range(ranks):
        group = SimpleNamespace(rank=lambda rank=rank: rank, size=lambda: ranks)
        own = attention._group_of_rank(whole, heads, group)
        assert own.tolist() == [[[float(rank // (ranks // heads))] * 6]]


def test_caches_of_a_pipeline_stage() -> None:
    """Layers 3 to 7 of eight, as a dynamic context counts them: from zero."""

    class Context:
        num_attention_layers: int
        layer_map: dict[int, int]

        def allocate(self) -> None:
            self.num_attention_layers = 5
            self.layer_map = {i: i for i in range(5)}

    context = inference.shared_context_class(Context)()
    context.producers, context.first_layer = (0, 0, 0, 3, 3, 5, 6, 6), 3
    context.allocate()
    assert context.layer_map == {0: 0, 1: 0, 2: 1, 3: 2, 4: 2}
    assert context.num_attention_layers == 3
