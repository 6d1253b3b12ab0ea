"""The Power schedule in closed form: the paper's values, its properties, and a naive reference."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_plugins.config import DECAY_STYLES, ConfigError
from torch_plugins.config import PowerLR as Power
from torch_plugins.power_lr import SHAPES, Schedule

BATCH = 1024 * 4096
"""Tokens of the paper's global batch."""
BILLION = 10**9
DECAYING = Schedule(Power(decay_tokens=250 * BILLION), 0.02, BILLION, 1250 * BILLION)


def rate(schedule, tokens, batch_tokens=BATCH, **keywords):
    return float(schedule.rate(tokens, batch_tokens, **keywords))


def naive(schedule, n, batch_tokens, ratio=1.0):
    """Equations 5 to 8 of arXiv 2408.13359, a group's ratio and a minimum, in plain Python."""
    power, floor, warmup = schedule.power, ratio * schedule.min_lr, schedule.warmup_tokens

    def eta_power(n):
        if n == 0:
            eta = schedule.max_lr if power.b < 0 else batch_tokens / 4096 * power.a
        else:
            eta = batch_tokens / 4096 * power.a * n**power.b
        return max(floor, ratio * min(schedule.max_lr, eta))

    if n < warmup:
        first = ratio * schedule.init_lr
        return first + (eta_power(warmup) - first) * n / warmup
    if not power.decay_tokens or n <= schedule.total_tokens - power.decay_tokens:
        return eta_power(n)
    start = schedule.total_tokens - power.decay_tokens
    r = min(1, (n - start) / power.decay_tokens)
    f = {
        "exponential": (math.e ** (1 - r) - 1) / (math.e - 1),
        "megatron-exponential": 2 * 0.5**r - 1,
        "linear": 1 - r,
        "cosine": (1 + math.cos(math.pi * r)) / 2,
    }[power.decay_style]
    return floor + f * (eta_power(start) - floor)


@st.composite
def schedules(draw):
    max_lr = draw(st.floats(1e-5, 1))
    warmup, middle = (draw(st.integers(0, 10**e)) for e in (10, 12))
    decay = draw(st.integers(0, 10**11))
    power = Power(
        a=draw(st.floats(1e-3, 1e3)),
        b=draw(st.floats(-1, 0)),
        decay_tokens=decay,
        decay_style=draw(st.sampled_from(DECAY_STYLES)),
    )
    return Schedule(
        power,
        max_lr,
        warmup,
        warmup + middle + decay if decay else draw(st.none() | st.just(1)),
        min_lr=max_lr * draw(st.floats(0, 1)),
        init_lr=max_lr * draw(st.floats(0, 1)),
    )


@settings(max_examples=300, deadline=None)
@given(
    schedule=schedules(),
    data=st.data(),
    batch_tokens=st.integers(1, 10**8),
    ratio=st.floats(0, 4),
)
def test_equals_the_naive_reference_everywhere(schedule, data, batch_tokens, ratio):
    end = schedule.total_tokens or 10**12
    corners = [0, schedule.warmup_tokens, max(0, end - schedule.power.decay_tokens), end]
    n = data.draw(st.one_of(st.integers(0, 2 * end), st.sampled_from(corners)))
    expected = naive(schedule, n, batch_tokens, ratio)
    assert rate(schedule, n, batch_tokens, ratio=ratio) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(1e11, 1.00545e-2), (1e12, 3.10713e-3), (1.25e12, 2.77291e-3), (2.5e12, 1.94720e-3)],
)
def test_the_papers_rates(tokens, expected):
    assert f"{rate(Schedule(), tokens):.5e}" == f"{expected:.5e}"


@pytest.mark.parametrize(
    ("batch_size", "billions"), [(1024, "25.964"), (512, "6.670"), (256, "1.713"), (128, "0.440")]
)
def test_where_the_clip_ends(batch_size, billions):
    schedule, batch = Schedule(), batch_size * 4096
    crossover = schedule.crossover(batch)
    assert f"{crossover / 1e9:.3f}" == billions
    assert rate(schedule, crossover * 0.999, batch) == 0.02
    assert 0.0199 < rate(schedule, crossover * 1.001, batch) < 0.02


def test_flat_power_is_clipped_always_or_never():
    assert Schedule(Power(a=1.0, b=0.0)).crossover(4096) == math.inf
    assert Schedule(Power(a=0.01, b=0.0)).crossover(4096) == 0


def test_optimum_of_the_papers_search():
    """Its fit has a = 4.6: batch 1024 over 10T tokens gives 0.0011."""
    assert rate(Schedule(Power(a=4.6)), 1e13) == pytest.approx(0.001104, abs=5e-7)


@pytest.mark.parametrize("style", DECAY_STYLES)
def test_phases_join_without_a_step(style):
    schedule = replace(DECAYING, power=Power(decay_tokens=250 * BILLION, decay_style=style))
    for joint in (BILLION, 1000 * BILLION):
        before, at, after = schedule.rate(torch.tensor([joint - 1, joint, joint + 1]), BATCH)
        assert before == pytest.approx(float(at), rel=1e-8)
        assert after == pytest.approx(float(at), rel=1e-8)
    assert rate(schedule, 1000 * BILLION) == rate(Schedule(), 1000 * BILLION)
    assert rate(schedule, 1250 * BILLION) == rate(schedule, 2000 * BILLION) == 0


@pytest.mark.parametrize("style", DECAY_STYLES)
def test_shapes_fall_from_one_to_zero(style):
    values = SHAPES[style](torch.linspace(0, 1, 101, dtype=torch.float64))
    assert values[[0, -1]].tolist() == pytest.approx([1, 0], abs=1e-15)
    assert (values.diff() < 0).all()


@pytest.mark.parametrize(
    ("style", "half"),
    [
        ("exponential", 0.377541),
        ("megatron-exponential", 0.414214),
        ("linear", 0.5),
        ("cosine", 0.5),
    ],
)
def test_half_way_down(style, half):
    schedule = replace(DECAYING, power=Power(decay_tokens=250 * BILLION, decay_style=style))
    ratio = rate(schedule, 1125 * BILLION) / rate(schedule, 1000 * BILLION)
    assert ratio == pytest.approx(half, abs=5e-7)


def test_horizon_plays_no_part_before_the_last_phase():
    tokens = torch.linspace(0, 1e12, 1001)
    endless = Schedule(warmup_tokens=BILLION).rate(tokens, BATCH)
    for total in (1250, 1251, 9000):
        schedule = replace(DECAYING, total_tokens=total * BILLION)
        assert torch.equal(schedule.rate(tokens, BATCH), endless)


def test_doubling_the_batch_doubles_the_rate_below_the_clip():
    tokens = torch.logspace(10.5, 13, 50)
    ones, twos = (Schedule().rate(tokens, batch) for batch in (BATCH, 2 * BATCH))
    below = twos < 0.02
    assert 10 < below.sum() < 50
    torch.testing.assert_close(twos[below], 2 * ones[below], rtol=1e-14, atol=0)
    assert (twos[~below] == 0.02).all()


def test_groups_keep_their_proportions_while_clipped_and_in_every_phase():
    schedule = replace(DECAYING, min_lr=1e-3, init_lr=1e-4)
    tokens = torch.tensor([0, 0.5e9, 1e9, 2e9, 2.6e10, 1e11, 1e12, 1.1e12, 1.25e12])
    whole, sixth = (schedule.rate(tokens, BATCH, ratio=ratio) for ratio in (1, 1 / 6))
    assert whole[2] == 0.02  # clipped
    torch.testing.assert_close(whole, 6 * sixth, rtol=1e-13, atol=0)


def test_minimum_bounds_power_and_ends_the_last_phase():
    schedule = replace(DECAYING, min_lr=5e-3)
    assert rate(schedule, 9e11) == 5e-3  # eta_power would be 3.3e-3
    assert rate(schedule, 1.2e12) == rate(schedule, 1.25e12) == 5e-3
    low = replace(DECAYING, min_lr=1e-3)
    peak = rate(low, 1e12)
    halfway = 1e-3 + 0.377541 * (peak - 1e-3)
    assert rate(low, 1.125e12) == pytest.approx(halfway, rel=1e-6)
    assert rate(low, 1.25e12) == 1e-3
    assert rate(low, 1e12, ratio=0.5, min_lr=0.004) == 0.004  # a group's own


def test_first_token():
    assert rate(Schedule(), 0) == 0.02  # the clip stands before 0 ** b
    assert rate(Schedule(warmup_tokens=BILLION), 0) == 0
    assert rate(Schedule(warmup_tokens=BILLION, init_lr=1e-4), 0) == 1e-4
    assert rate(Schedule(Power(b=0.0), max_lr=1.0), 0, 512) == pytest.approx(0.5)


def test_warmup_rises_to_the_rate_at_its_end_not_to_the_clip():
    schedule = Schedule(warmup_tokens=BILLION)
    small = 64 * 4096  # eta_power(1e9) is 6.6e-3, below the clip
    top = 64 * 4 * 1e9**-0.51
    assert rate(schedule, BILLION, small) == pytest.approx(top)
    assert rate(schedule, BILLION // 4, small) == pytest.approx(top / 4)


def test_other_sequence_lengths_count_by_their_tokens():
    assert rate(Schedule(), 1e11, 2048 * 2048) == rate(Schedule(), 1e11, 1024 * 4096)


def test_vectors_equal_numbers():
    tokens = torch.linspace(0, 1.4e12, 57)
    batches = torch.linspace(1e5, 1e7, 5)[:, None]
    grid = DECAYING.rate(tokens, batches)
    assert (grid.shape, grid.dtype) == ((5, 57), torch.float64)
    for row, batch in zip(grid, batches.flatten().tolist(), strict=True):
        alone = [rate(DECAYING, n, batch) for n in tokens.tolist()]
        assert row.tolist() == pytest.approx(alone, rel=1e-14)  # SIMD's pow differs in the last bit
    assert DECAYING.rate(0, BATCH).shape == ()


def test_rates_are_numbers_under_any_default_device():
    with torch.device("meta"):
        assert rate(Schedule(), 1e11) == pytest.approx(1.00545e-2, rel=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_lr": 0.0}, "max_lr 0.0: must be positive"),
        ({"max_lr": "0.02"}, "max_lr '0.02': must be a finite number"),
        ({"warmup_tokens": None}, "warmup_tokens None: must be a finite number"),
        ({"total_tokens": math.inf}, "total_tokens inf: must be a finite number"),
        ({"warmup_tokens": -1}, "warmup_tokens -1: must not be negative; 0 for no warm-up"),
        ({"min_lr": 0.03}, "min_lr 0.03: must lie between 0 and max_lr 0.02"),
        ({"init_lr": -0.1}, "init_lr -0.1: must lie between 0 and max_lr 0.02"),
        ({"power": Power(decay_tokens=5)}, "decay_tokens 5: the last phase .* give total_tokens"),
        (
            {"power": Power(decay_tokens=6), "warmup_tokens": 5, "total_tokens": 10},
            "warmup_tokens 5 and decay_tokens 6 do not fit into total_tokens 10: shorten one",
        ),
    ],
)
def test_wrong_settings(keywords, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        Schedule(**keywords)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"a": "4"}, r"power_lr.a \(--power-lr-a\) '4': must be a number"),
        ({"a": 0}, r"power_lr.a \(--power-lr-a\) 0: must be positive; the paper uses 4"),
        ({"b": 0.51}, r"power_lr.b \(--power-lr-b\) 0.51: must not be positive; .* -0.51"),
        ({"decay_tokens": -1}, r"power_lr.decay_tokens .* -1: must not be negative"),
        ({"decay_style": "linaer"}, "power_lr.decay_style .* did you mean 'linear'"),
    ],
)
def test_wrong_configuration(keywords, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        Power(**keywords)


def test_wrong_positions():
    with pytest.raises(ConfigError, match=r"^tokens -1: must not be negative"):
        rate(Schedule(), -1)
    with pytest.raises(ConfigError, match=r"^batch_tokens 0: must be positive"):
        rate(Schedule(), 1, 0)
    with pytest.raises(ConfigError, match=r"^tokens nan: must not be negative"):
        rate(Schedule(), math.nan)
