"""Cross-Layer Attention on hybrid stacks: against a GPT's, refusals, accounts, then trainings."""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_plugins import checkpoints
from megatron_plugins.cross_layer_attention import groups, inference, stacks, translate
from tests.megatron import harness
from tests.megatron.cla_hybrid_table import AGAINST_GPT, BETWEEN, INFERENCE, MIXED, RECOMPUTE
from tests.megatron.hybrid_table import PATTERN
from tests.megatron.ladder_table import WORLD
from tests.megatron.test_cross_layer_attention import ONE, PP2, SP, assert_continues
from tests.megatron.test_hybrid import SPEC, TRAIN
from torch_plugins.config import ConfigError, CrossLayerAttention

CASES = Path(__file__).with_name("cla_hybrid_cases.py")
FLAG = "--hybrid-layer-pattern"
TRANSLATES = find_spec("megatron.core.dist_checkpointing.gpt_checkpoint_interop") is not None
"""Megatron loads a GPT's checkpoint into a hybrid model: 0.19 and newer."""


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of cla_hybrid_cases.py over two tensor-parallel processes."""
    return harness.run_cases(CASES, tmp_path_factory.mktemp("cla_hybrid"), WORLD)


@pytest.mark.parametrize("name", AGAINST_GPT)
def test_a_stack_is_the_same_function_as_a_gpt(cases: dict[str, Any], name: str) -> None:
    case = cases[f"gpt {name}"]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["same sharded keys"]
    assert case["translated"] is (True if TRANSLATES else None)


@pytest.mark.parametrize("name", BETWEEN)
def test_layers_of_other_kinds_lie_between(cases: dict[str, Any], name: str) -> None:
    case = cases[f"between {name}"]
    assert case["logits"] <= 1e-6
    assert case["gradients"] <= 2e-6
    assert case["from standard"] >= 1e-2, "this case could not tell sharing from standard"


@pytest.mark.parametrize("name", RECOMPUTE)
def test_recompute_changes_no_bit(cases: dict[str, Any], name: str) -> None:
    """Mamba layers, at which a recomputing stack drops what layers hand on, lie in the groups."""
    assert cases["recomputed"][name] == 0


@pytest.mark.parametrize("kind", ["static", "dynamic"])
@pytest.mark.parametrize("name", INFERENCE)
def test_inference_equals_the_full_forward(cases: dict[str, Any], name: str, kind: str) -> None:
    assert cases[f"{kind} {name}"]["logits"] <= 1e-6


@pytest.mark.parametrize("name", INFERENCE)
def test_caches_are_those_of_producers(cases: dict[str, Any], name: str) -> None:
    feature, _, options = INFERENCE[name]
    own = groups.roles(feature, 0, options.get("pattern", PATTERN))
    producers = [role.index for role in own if not role.consumes]
    assert cases[f"static {name}"]["layers"] == [producer + 1 for producer in producers]
    case, standard = cases[f"dynamic {name}"], cases["dynamic standard"]
    assert case["block bytes"] * MIXED.count("*") == standard["block bytes"] * len(producers)
    assert case["bytes per token"] == 2 * len(producers) * 8 * 4, "one head of eight on each rank"


def test_an_interrupted_forward_leaves_nothing(cases: dict[str, Any]) -> None:
    assert cases["interrupted"] == {"logits": 0, "left": True, "now": False}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown", ["layers 0 to 3 are one stage", "set config.megatron_plugins_pattern"]),
        ("other pattern", ["configuration is *-*-M*M*", "layers 4 to 7", "*-*-: they must agree"]),
        ("split", ["between layers 1 | 2; producers are layers 0, 4", "'*-*|-*-*'"]),
        ("no attention", [f"{FLAG} M-M-: it has no attention layer *"]),
        ("too few", ["--cla-sharing-factor", "only attention layers * are counted", "has 1"]),
        ("latent", ["layer 0 has an attention of another kind, MLASelfAttention"]),
    ],
)
def test_a_stack_refuses_what_it_cannot_be(
    cases: dict[str, Any], name: str, words: list[str]
) -> None:
    for word in words:
        assert word in cases["refused"][name]


def test_a_stage_knows_the_layers_before_it(cases: dict[str, Any]) -> None:
    """Index, producer and last layer of its attention layers, in numbers of the stack."""
    assert cases["refused"]["roles"] == [[4, 4, 7], [7, 4, 7]]


Validated = Callable[..., tuple[Namespace, Any]]


@pytest.fixture
def validated(monkeypatch: pytest.MonkeyPatch) -> Validated:
    return partial(harness.validated, monkeypatch)


FIRST = (*PP2, "--decoder-first-pipeline-num-layers", 5)
FACTOR = ("--cla-sharing-factor", 2)
ROPE = ("--position-embedding-type", "rope", "--no-rope-fusion")


@pytest.mark.parametrize(
    ("flags", "pattern", "split", "remedy"),
    [
        (PP2, "*-|*-*-*-", "layers 1 | 2; producers are layers 0, 4", "'*-*-|*-*-'"),
        (PP2, "M-*-M*", "layers 2 | 3; producers are layers 2", "'M-|*-M*'"),
        (FIRST, PATTERN, "layers 4 | 5", "'*-*-|*-*-' without other layout flags"),
        (PP2, "*-|*-|*-|*-", "layers 1 | 2, 5 | 6", "'*-*|-|*-*|-'"),
        (PP2, "*|*|*|*", "layers 0 | 1, 2 | 3", "into 2 stages at most, and 4 are asked for"),
    ],
    ids=["borders", "evenly", "short first stage", "virtual pipeline", "too many"],
)
def test_a_split_group_is_refused(
    validated: Validated, flags: Any, pattern: str, split: str, remedy: str
) -> None:
    with pytest.raises(ConfigError) as error:
        validated(*flags, *FACTOR, FLAG, pattern, world_size=2)
    assert "--cross-layer-attention: a pipeline stage begins inside a group" in str(error.value)
    assert split in str(error.value)
    assert remedy in str(error.value)


def test_every_pattern_that_is_recommended_fits() -> None:
    generator = random.Random(3)
    for _ in range(300):
        pattern = "".join(generator.choices("*-M", k=generator.randint(4, 12))) + "*"
        layers, stages = len(pattern), generator.randint(2, 4)
        feature = CrossLayerAttention(generator.randint(1, pattern.count("*")))
        heads = groups.undivided(groups.roles(feature, 0, pattern), layers)
        bounds = groups.fitting_bounds(heads, stages)
        assert (bounds is None) == (len(set(heads)) < stages)
        if bounds is None:
            continue
        config = SimpleNamespace(
            num_layers=layers,
            pipeline_model_parallel_size=stages,
            megatron_plugins_pattern=stacks.with_borders(pattern, bounds),
        )
        groups.check_stages(config, feature)
        starts = stacks.first_layers(config, config.megatron_plugins_pattern)
        assert starts == bounds
        assert len(set(starts)) == stages, "an empty stage"


def test_stages_are_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    """First layers of stages as Megatron itself divides patterns."""
    import torch
    from megatron.core.ssm.mamba_hybrid_layer_allocation import select_pipeline_segment

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    names = select_pipeline_segment.__globals__
    monkeypatch.setitem(names, "log_on_each_pipeline_stage", lambda *_, **__: None)
    layouts = (
        ("*-M*-M", None, None),
        ("*-M*-M", 1, 1),
        ("*-M*-M*", None, 3),
        ("*-M*-M*", 2, 3),
        ("*-M|*-M*|-", None, None),
    )
    for pattern, first, last in layouts:
        config = SimpleNamespace(
            pipeline_model_parallel_size=3,
            num_layers_in_first_pipeline_stage=first,
            num_layers_in_last_pipeline_stage=last,
        )
        for rank, start in enumerate(stacks.first_layers(config, pattern)):
            monkeypatch.setattr(torch.distributed, "get_rank", lambda group=None, rank=rank: rank)
            _, upstreams = select_pipeline_segment(pattern, object(), None, first, last)
            assert start == upstreams


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--cla-pattern", "0,0,2,2,4,4,6,6"),
            r"names 8 producers for 4 layers; .* only attention",
        ),
        (("--cla-sharing-factor", 5), "the model has 4 layers; of a hybrid model only attention"),
        ((*FACTOR, *ROPE, FLAG, "*-*-/*-"), "--cross-layer-attention with --mtp-num-layers"),
        ((*FACTOR, FLAG, "M-M-"), f"{FLAG} M-M-: it has no attention layer"),
    ],
    ids=["list", "factor", "prediction", "no attention"],
)
def test_wrong_flags(validated: Validated, flags: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validated(FLAG, PATTERN, *flags)


def test_a_group_with_and_without_rope_is_refused(validated: Validated) -> None:
    """``--no-rope-freq`` numbers layers as the stack does."""
    rope = (*ROPE, "--no-rope-freq")
    with pytest.raises(ConfigError, match=r"--no-rope-freq .*: layers 4 and 6 share keys"):
        validated(*rope, "[0,0,0,0,0,0,1,0]", *FACTOR, FLAG, PATTERN)
    validated(*rope, "[0,1,0,1,1,0,1,0]", *FACTOR, FLAG, PATTERN)


@pytest.mark.parametrize("gqa", [(), ("--group-query-attention", "--num-query-groups", 2)])
def test_operations_of_the_training_log(validated: Validated, gqa: Any) -> None:
    """Without the keys and values of consumers: 1 of 3 attention layers, width 64, heads of 16."""
    from megatron.training.training import num_floating_point_operations

    stock, shared = (
        validated("--swiglu", *gqa, FLAG, "*-M*-E*", "--num-experts", 2, *flags)[0]
        for flags in ((), FACTOR)
    )
    stock.padded_vocab_size = shared.padded_vocab_size = 256
    absent = 2 * 64 * (2 if gqa else 4) * 16  # weights
    tokens = 8 * 32
    operations = [num_floating_point_operations(args, 8) for args in (stock, shared)]
    assert operations[0] - operations[1] == pytest.approx(6 * tokens * absent)


@pytest.mark.parametrize(
    ("rank", "places", "caches"),
    [
        (0, {0: 0, 2: 0}, {0: 0}),
        (1, {0: 0, 2: 1, 1: 0}, {0: 0, 2: 0}),
        (1, {0: 0, 1: 1, 2: 2}, {0: 0, 2: 0}),
        (2, {1: 0, 4: 1, 3: 0}, {1: 0, 4: 1}),
    ],
    ids=["first", "middle", "without Mamba", "last"],
)
def test_dynamic_caches_of_a_pipeline_stage(
    rank: int, places: dict[int, int], caches: dict[int, int]
) -> None:
    """``places``: upstream's, of attention and Mamba layers, or of any; both by number in stage."""

    class Context:
        num_attention_layers: int
        layer_map: dict[int, int]

    def allocate(context: Context, config: Any, options: Any) -> None:
        context.num_attention_layers, context.layer_map = len(places), places

    config = SimpleNamespace(
        num_layers=11,
        pipeline_model_parallel_size=3,
        megatron_plugins_pattern="*-M|*M*|-*-M*",
        megatron_plugins={"cross_layer_attention": CrossLayerAttention(pattern="0,1,1,3,4")},
    )
    stage = SimpleNamespace(pp=SimpleNamespace(rank=lambda: rank))
    options = SimpleNamespace(use_flashinfer_fused_rope=None, pg_collection=stage)
    context = Context()
    inference.build_context(allocate, context, config, options)
    assert context.layer_map == {**places, **caches}
    assert context.num_attention_layers == len(set(caches.values()))


def namespace(pattern: str | None, **values: object) -> Namespace:
    layers = 4 if pattern is None else len(pattern.replace("|", ""))
    on = {"cross_layer_attention": True} if values else {}
    return Namespace(num_layers=layers, hybrid_layer_pattern=pattern, finetune=True, **on, **values)


def test_checkpoints_of_equal_groups_are_equal() -> None:
    factor, listed = {"cla_sharing_factor": 2}, {"cla_pattern": "0,0,2,2"}
    checkpoints.check(namespace(PATTERN, **factor), namespace("*-*-|*-*-", **listed), "/ckpt")


@pytest.mark.parametrize(
    ("run", "saved", "words"),
    [
        ((PATTERN, 4), (PATTERN, 2), "has --cross-layer-attention .*: it has other tensors"),
        ((PATTERN, None), (PATTERN, 2), "has --cross-layer-attention .*: it has other tensors"),
        ((PATTERN, 2), (PATTERN, None), "is a standard one, .* Train from the start"),
        ((PATTERN, 2), (None, 2), "is of a GPT model .* builds a hybrid model: only 0.19"),
        ((None, 2), (PATTERN, 2), "is of a hybrid model .* Build a hybrid model"),
    ],
    ids=["other groups", "off", "standard", "a GPT's", "a hybrid's"],
)
def test_other_tensors_are_refused(run: Any, saved: Any, words: str) -> None:
    args, others = (
        namespace(pattern, **({"cla_sharing_factor": factor} if factor else {}))
        for pattern, factor in (run, saved)
    )
    with pytest.raises(ConfigError, match=words):
        checkpoints.check(args, others, "/ckpt")


ALL = (
    *("--swiglu", "--normalization", "RMSNorm", "--position-embedding-type", "rope"),
    *("--disable-bias-linear", "--untie-embeddings-and-output-weights"),
    *("--group-query-attention", "--num-query-groups", 2, "--init-method-std", 0.2),
    *("--cla-pattern", "0,0,2,2", "--cla-kv-norm", "separate", "--ladder-residual"),
)


def train(pattern: str, *flags: object, processes: int = 1, check: bool = True) -> harness.Run:
    return harness.train(
        *(*ALL, *SPEC, FLAG, pattern, *flags),
        tiny=harness.without("--num-layers"),
        script=TRAIN,
        environment={"PYTHONPATH": str(TRAIN.parents[2])},
        processes=processes,
        check=check,
    )


Trained = tuple[harness.Run, Path]
"""Six iterations, and where the third was saved."""


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("straight")
    return train(PATTERN, "--save", folder, "--save-interval", 3), folder


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("gpt")
    return harness.train(*ALL, "--save", folder, "--save-interval", 3), folder


def test_a_stack_trains_as_a_gpt(straight: Trained, gpt: Trained) -> None:
    """From the same seed, both start with the same weights."""
    run, expected = straight[0], gpt[0]
    line = "cross-layer-attention: 2 of 4 attention layers share keys and values (producers 0, 4)"
    assert f"{line}, kv norm of their own" in run.output
    assert "ladder-residual: 8 of 8 layers" in run.output
    assert run.losses == pytest.approx(expected.losses, rel=1e-6)
    assert run.grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)


def test_a_stack_goes_on_from_a_gpt(gpt: Trained) -> None:
    """With its optimizer's state."""
    run, folder = gpt
    resumed = train(PATTERN, "--load", folder, "--ckpt-step", 3, check=False)
    if TRANSLATES:
        assert_continues(resumed, run, tolerance=0)
    else:
        assert "builds a hybrid model: only 0.19 and newer translate" in resumed.output


def test_translated_objects_have_an_axis() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    key = "decoder.layers.self_attention.linear_qkv._extra_state"
    state = [ShardedObject(key, None, (4,), (2,)), ShardedObject(key, None, (4, 8), (2, 3))]
    translate({"model": state})
    assert {entry.key for entry in state} == {key.replace("self", "2.self")}
    assert [(entry.global_shape, entry.global_offset) for entry in state] == [
        ((1,), (0,)),
        ((8,), (3,)),
    ]


@pytest.mark.parametrize(
    ("pattern", "flags"),
    [(PATTERN, SP), ("*-*|-|*-*|-", (*PP2, *ONE))],
    ids=["sequence parallel", "virtual pipeline, recompute"],
)
def test_resumes_in_other_layouts(
    straight: Trained, pattern: str, flags: tuple[object, ...]
) -> None:
    run, folder = straight
    resumed = train(pattern, "--load", folder, "--ckpt-step", 3, *flags, processes=2)
    assert_continues(resumed, run)
