"""The estimator: its physics, its sizes, its agreement with the paper, and its command."""

import json
import math
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torch_plugins.ladder_estimate import check, cli, fit, paper, schedule
from torch_plugins.ladder_estimate.collective import Fabric, all_reduce
from torch_plugins.ladder_estimate.constants import DATA_SHEET, FITTED
from torch_plugins.ladder_estimate.estimate import VARIANTS, Work, cluster, estimate
from torch_plugins.ladder_estimate.hardware import GPUS, Link
from torch_plugins.ladder_estimate.roofline import (
    PAPER,
    SERVING,
    Tokens,
    attention_kernels,
    head_kernels,
    linear,
    mlp_kernels,
)
from torch_plugins.ladder_estimate.shapes import MODELS, from_config

SHAPE = MODELS["llama-3.1-70b"]


def seconds(found):
    return {name: found.seconds(name) for name in VARIANTS}


def simulated(compute, reduce, ladder):
    """Start and end of every module and all-reduce: two resources, each one job at a time."""
    computed, reduced = [], []
    for index, module in enumerate(compute):
        early = index // 2 in ladder
        needed = [computed[-1]] if computed else [0.0]
        needed += reduced[: index - 1][-1:] if early else reduced[-1:]
        computed.append(max(needed) + module)
        reduced.append(max([computed[-1], *reduced[-1:]]) + reduce[index])
    return reduced[-1]


def test_ladder_is_a_schedule_of_two_resources():
    draw = random.Random(0)
    for layers in (1, 2, 3, 7):
        times = [[draw.expovariate(1) for _ in range(2 * layers)] for _ in range(2)]
        for chosen in (range(layers), (), {0}, {layers - 1}, set(range(0, layers, 2))):
            expected = simulated(*times, chosen)
            assert schedule.ladder(*times, layers=chosen) == pytest.approx(expected, rel=1e-12)
        assert schedule.ladder(*times, 0.3) == schedule.ladder(*times, 0.3, range(layers))


@pytest.mark.parametrize(("a", "c"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_equal_modules_have_the_ideal_of_the_formula(a, c):
    n = 8
    assert schedule.standard([a] * n, [c] * n) == n * (a + c)
    ideal = a + (n - 1) * max(a, c) + c
    assert schedule.ladder([a] * n, [c] * n) == ideal
    assert schedule.from_measured(n * (a + c), n * a, 0.0, n) == ideal
    contended = ideal + (n - 1) * 0.2 * min(a, c)
    assert schedule.ladder([a] * n, [c] * n, 0.2) == pytest.approx(contended)
    assert schedule.from_measured(a + c, a, 0.2) == pytest.approx(
        a + max(0, c - a) + 0.2 * min(a, c)
    )
    assert schedule.parallel([a] * n, [c] * n) == n * a + n / 2 * c
    assert schedule.desync([a] * n, [c] * n, 4) == n * a + n / 4 * c


def test_limits_of_communication():
    compute = [1.0, 2.0] * 5
    assert schedule.ladder(compute, [0.0] * 10, 0.3) == sum(compute)
    huge = [1e9] * 10
    assert schedule.ladder(compute, huge, 0.3) == pytest.approx(sum(huge), rel=1e-8)
    assert schedule.ladder([], []) == 0
    last = [0.0] * 9 + [5.0]  # nothing hides the last all-reduce
    assert schedule.ladder(compute, last) == sum(compute) + 5
    assert schedule.desync(compute, last, 100) == sum(compute) + 5


@pytest.mark.parametrize("kind", ["nvlink", "pcie", "ib"])
@pytest.mark.parametrize("constants", [FITTED, DATA_SHEET])
def test_order_of_variants(kind, constants):
    for batch in (1, 5, 64):
        for engine in (SERVING, PAPER):
            machine = cluster(GPUS["h100"], 8, kind)
            found = seconds(estimate(SHAPE, machine, Work(batch, engine=engine), constants))
            assert found["no communication"] < found["ladder"] < found["standard"]
            assert found["no communication"] < found["desync"] < found["standard"]
            partial = Work(batch, engine=engine, layers=range(40, 80))
            half = estimate(SHAPE, machine, partial, constants).seconds("ladder")
            assert found["ladder"] < half < found["standard"]
            none = Work(batch, engine=engine, layers=())
            unchanged = estimate(SHAPE, machine, none, constants).speedup("ladder")
            assert unchanged == pytest.approx(1, abs=1e-12)


def test_one_rank_communicates_nothing():
    found = estimate(MODELS["llama-3.1-8b"], cluster(GPUS["h100"], 1, "nvlink"), Work(4))
    assert found.decode.reduce == found.prefill.reduce == 0
    for name in VARIANTS:
        assert found.speedup(name) == pytest.approx(1, abs=1e-12)
        assert found.exposed(name) == pytest.approx(0, abs=1e-12)


def test_faster_links_and_gpus_are_faster():
    def time(variant, bandwidth=1e11, latency=1e-5, gpu=GPUS["h100"]):
        machine = replace(cluster(gpu, 8, "nvlink"), measured=Link(bandwidth, latency, 0.0))
        return estimate(SHAPE, machine, Work(16)).seconds(variant)

    for variant in ("standard", "ladder", "parallel", "desync"):
        by_bandwidth = [time(variant, bandwidth=10.0**n) for n in (9, 10, 11, 12)]
        assert by_bandwidth == sorted(by_bandwidth, reverse=True)
        assert len(set(by_bandwidth)) == 4
        by_latency = [time(variant, latency=10.0**-n) for n in (6, 5, 4, 3)]
        assert by_latency == sorted(by_latency)
        assert len(set(by_latency)) == 4
    assert time("no communication", 1e9) == time("no communication", 1e12)
    assert time("standard", gpu=GPUS["h200"]) < time("standard")


def test_all_reduce_by_hand():
    wire, net = Link(100e9, 1e-6, 1e-6), Link(10e9, 3e-6, 5e-6)
    one = Fabric(8, 1, wire, net, start=7e-6)
    assert all_reduce(0, one) == pytest.approx(7e-6 + 14e-6)
    assert all_reduce(8e9, one) == pytest.approx(21e-6 + 8e9 * 2 * 7 / 8 / 100e9)
    two = replace(one, ranks=16, nodes=2)  # 14 steps inside and one level, or 28 and 2
    assert all_reduce(0, two) == pytest.approx(7e-6 + 14e-6 + 2 * 5e-6)
    ring = 7e-6 + 28e-6 + 2 * 3e-6 + 8e9 * 2 * 15 / 16 / 80e9  # eight adapters of 10 GB/s
    assert all_reduce(8e9, two) == pytest.approx(ring)
    assert all_reduce(8e9, replace(one, ranks=1)) == 0
    far = Fabric(4, 4, wire, net, start=0.0)
    assert all_reduce(8e9, far) == pytest.approx(6 * 3e-6 + 8e9 * 2 * 3 / 4 / 10e9)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name):
    shape = MODELS[name]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=2,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    real = sum(parameter.numel() for parameter in model.parameters())
    assert replace(shape, layers=2).parameters == real
    released = {"1b": 1.236, "3b": 3.213, "8b": 8.03, "70b": 70.6, "405b": 405.9}  # 1e9
    assert shape.parameters / 1e9 == pytest.approx(released[name.split("-")[-1]], rel=2e-3)


def test_flops_and_bytes_are_those_of_the_matrices():
    shape, tokens = MODELS["llama-3.1-8b"], Tokens(3, 1, context=100, held=100)
    for tp in (1, 2, 8):
        linears = attention_kernels(shape, tp, tokens, SERVING) + mlp_kernels(shape, tp, tokens)
        matrices = (shape.attention_parameters + shape.mlp_parameters) / tp
        core = 4 * 3 * 100 * shape.hidden / tp
        assert sum(kernel.flops for kernel in linears) == 2 * 3 * matrices + core
    assert linear(5, 7, 11).bytes == 2 * (7 * 11 + 5 * 7 + 5 * 11)
    cache = 2 * 3 * 100 * 2 * shape.kv_heads * shape.head_dim
    core = attention_kernels(shape, 1, tokens, SERVING)[3]
    assert core.bytes - 2 * 3 * 2 * shape.hidden == cache
    expanded = attention_kernels(shape, 1, tokens, PAPER)[3]
    assert expanded.bytes - 2 * 3 * 2 * shape.hidden == 4 * cache
    copies = attention_kernels(shape, 32, tokens, SERVING)[3]  # more ranks than KV heads
    assert copies.bytes == 2 * (3 * 2 * shape.head_dim + 3 * 100 * 2 * shape.head_dim)
    every = Tokens(3, 9, context=1, held=1)
    assert head_kernels(shape, 8, every, SERVING)[1] == linear(3, shape.hidden, 128256 / 8)
    assert head_kernels(shape, 8, every, PAPER)[1] == linear(27, shape.hidden, 128256)


def test_scores_of_known_numbers():
    assert check.ratio_error([1.1, 2.0], [1.0, 2.0]) == pytest.approx(0.05)
    assert check.gain_error([1.3, 1.5], [1.2, 1.5]) == pytest.approx(0.25)
    assert check.spearman([1, 2, 3, 9], [2, 4, 5, 6]) == pytest.approx(1)
    assert check.spearman([3, 2, 1], [1, 2, 3]) == pytest.approx(-1)
    assert check.spearman([1, 1, 1], [1, 2, 3]) == 0
    assert check.spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.948683, abs=1e-6)
    true = [1.1, 1.3, 1.9]
    best = check.constant_errors(true, true)
    for value in torch.linspace(1.01, 2, 300).tolist():
        errors = check.constant_errors(true, [value])
        assert errors[0] >= best[0] - 1e-12
        assert errors[1] >= best[1] - 1e-12


def test_paper_tables():
    """Ratios that the paper and its repository print."""
    cells = {(cell.table, cell.tp, cell.batch): cell for cell in paper.CELLS}
    assert len(cells) == len(paper.CELLS) == 40
    for key, ratio in {
        ("70B", 8, 1): 1.308,
        ("70B", 8, 64): 1.155,
        ("70B no P2P", 8, 1): 1.599,
        ("70B no P2P", 8, 16): 1.351,
        ("405B", 16, 8): 1.393,
        ("405B no P2P", 16, 4): 1.566,
    }.items():
        assert cells[key].ladder / cells[key].standard == pytest.approx(ratio, abs=5e-4)
    for cell in paper.CELLS:
        assert cell.standard < cell.ladder < cell.bound
        assert cell.standard < cell.parallel < cell.bound


def test_constants_are_what_the_fit_finds():
    cells = [cell for cell in paper.CELLS if cell.table in paper.FITTED_ON]
    assert fit.fit_contention(cells) == FITTED.contention
    best = fit.timing_error(cells, FITTED)
    for name in ("matmul", "memory", "module"):
        for factor in (0.95, 1.05):
            moved = replace(FITTED, **{name: factor * getattr(FITTED, name)})
            assert fit.timing_error(cells, moved) > best
    found = fit.compass([0.0, 5.0], lambda x: (x[0] - 1.25) ** 2 + (x[1] + 3) ** 2)
    assert found == pytest.approx([1.25, -3], abs=0.01)


def test_agreement_with_the_paper():
    """What the command claims: errors on tables that nothing was fitted on."""
    by = {(one.quantity, one.tables, one.form): one for one in check.scores()}
    measured = by["ladder", "held out", "measured times"]
    assert measured.ratio < 0.03
    assert measured.gain < 0.16
    assert measured.rank > 0.9
    fitted = by["ladder", "held out", "data sheet, fitted"]
    constant = by["ladder", "held out", check.HINDSIGHT]
    assert fitted.ratio < 0.6 * constant.ratio
    assert fitted.gain < 0.5 * constant.gain
    bound = by["no communication", "held out", "data sheet, fitted"]
    assert bound.ratio < 0.5 * by["no communication", "held out", check.HINDSIGHT].ratio
    assert by["no communication", "held out: 8B", "data sheet, fitted"].ratio < 0.025
    claims = dict(check.verdicts(list(by.values())))
    assert claims["measured times: ladder's speedup within 6 %"]
    assert claims["held out, data sheet, fitted: ladder beats any constant"]
    assert not claims["held out: 405B, data sheet, fitted: ladder beats any constant"]


def run(capsys, *arguments):
    cli.main(list(arguments))
    return capsys.readouterr().out


def test_estimate_command(capsys):
    told = "estimate --model llama-3.1-70b --tp 8 --link nvlink --batch 1,64".split()
    text = run(capsys, *told)
    assert "80 ladder layers, TP 8 on 1 node of h100, nvlink" in " ".join(text.split())
    assert text.count("no communication") == 2
    report = json.loads(run(capsys, *told, "--json"))
    assert [one["batch"] for one in report["estimates"]] == [1, 64]
    ladder = report["estimates"][0]["variants"]["ladder"]
    standard = report["estimates"][0]["variants"]["standard"]
    assert ladder["speedup"] == pytest.approx(ladder["tokens_per_s"] / standard["tokens_per_s"])
    total = ladder["prefill_s"] + 511 * ladder["token_s"]
    assert ladder["tokens_per_s"] == pytest.approx(512 / total)
    half = json.loads(run(capsys, *told, "--layers", "last:40", "--json"))
    assert 1 < half["estimates"][0]["variants"]["ladder"]["speedup"] < ladder["speedup"]
    slow = json.loads(run(capsys, *told, "--bandwidth", "10", "--latency", "50", "--json"))
    sent = 2 * 8192 * 2 * 7 / 8 / 10e9
    assert slow["estimates"][0]["all_reduce_s"]["token"] == pytest.approx(50e-6 + sent)
    assert "does not fit" in run(capsys, "estimate", "--model", "llama-3.1-405b")
    far = run(capsys, "estimate", "--model", "llama-3.1-405b", "--tp", "16", "--nodes", "2")
    assert "Between nodes nothing is fitted" in far
    assert "Between nodes" not in text


def test_module_is_the_command():
    command = [sys.executable, "-m", "torch_plugins.ladder_residual", "estimate"]
    told = ["--standard-ms", "2", "--no-communication-ms", "1", "--contention", "0"]
    done = subprocess.run([*command, *told], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "2.000x" in done.stdout


def test_estimate_from_measured_times(capsys):
    told = "estimate --standard-ms 12.9 --no-communication-ms 9 --contention 0.2".split()
    ms = json.loads(run(capsys, *told, "--json"))["ms"]
    assert ms["ladder"] == pytest.approx(9 + 0.2 * 3.9)
    named = json.loads(run(capsys, *told, "--model", "llama-3.1-70b", "--json"))
    assert named["modules"] == 160
    assert named["ms"]["ladder"] == pytest.approx(9 + 0.2 * 3.9 * 159 / 160 + 3.9 / 160)
    half = json.loads(run(capsys, *told, "--modules", "160", "--layers", "last:40", "--json"))
    assert half["ms"]["ladder"] == pytest.approx(9 + 3.9 / 160 + 3.9 * (79 + 0.2 * 80) / 160)
    assert "1.319x" in run(capsys, *told)


def test_config_of_a_folder(tmp_path, capsys):
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    shape = from_config(tmp_path)
    assert (shape.hidden, shape.kv_heads, shape.head_dim, shape.layers) == (256, 4, 64, 32)
    assert from_config(tmp_path / "config.json") == shape
    assert "32 ladder layers" in run(capsys, "estimate", "--config", str(tmp_path), "--tp", "4")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "--model: which one?"),
        ("--model llama-3.1-8b --config x", "--model and --config: give one"),
        ("--model llama-9", "invalid choice: 'llama-9'"),
        ("--model llama-3.1-8b --tp 3", "--tp 3: does not divide the model's 32 attention heads"),
        ("--model llama-3.1-8b --tp 8 --nodes 3", "--nodes 3: must divide --tp 8"),
        ("--model llama-3.1-8b --link ib --nodes 2", "--nodes 2: --link ib puts every rank"),
        ("--model llama-3.1-8b --gpu l40s", "--link nvlink: this GPU has none; use --link pcie"),
        ("--model llama-3.1-8b --bandwidth 5", "--latency: --bandwidth and --latency go together"),
        ("--model llama-3.1-8b --bandwidth nan", "--bandwidth: 'nan': use a number above 0"),
        ("--model llama-3.1-8b --batch 1,0", "--batch: '0': use an integer of at least 1"),
        ("--model llama-3.1-8b --batch ,", "--batch: '': use an integer of at least 1"),
        ("--model llama-3.1-8b --layers last:33", "--layers 'last:33': 'last:33' of a model"),
        ("--model llama-3.1-8b --contention 1.5", "--contention: '1.5': use a number from 0 to 1"),
        ("--config nowhere", "--config nowhere: "),
        ("--standard-ms 5", "--no-communication-ms: two times are needed"),
        ("--no-communication-ms 5", "--standard-ms: two times are needed"),
        ("--standard-ms 5 --no-communication-ms 6", "--standard-ms 5: is less than"),
        ("--standard-ms inf --no-communication-ms 6", "--standard-ms: 'inf': use a number above"),
        (
            "--standard-ms 5 --no-communication-ms 4 --layers last:3",
            "--layers last:3: of how many?",
        ),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["estimate", *options.split()])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"num_local_experts": 8}, "with num_local_experts is not estimated"),
        ({"cross_layer_attention": {"sharing_factor": 2}}, "with cross_layer_attention"),
        ({"mlp_gated": False}, "with mlp_gated"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; must be an integer"),
        ({"vocab_size": None}, "vocab_size is None"),
    ],
)
def test_other_models_are_refused(changes, message, tmp_path, capsys):
    config = LlamaConfig().to_dict() | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        cli.main(["estimate", "--config", str(tmp_path)])
    assert message in " ".join(capsys.readouterr().err.split())


def test_check_command(capsys):
    text = run(capsys, "check")
    assert "NO " in text
    assert "give estimate the --standard-ms" in text
    report = json.loads(run(capsys, "check", "--json"))
    assert len(report["cells"]) == 40
    assert all(
        math.isfinite(value)
        for cell in report["cells"]
        for forms in cell["predicted"].values()
        for value in forms.values()
    )
