"""The recurrence against three forms written independently, with every gradient, in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_plugins.config import parse_layers
from torch_plugins.ladder_residual import apply_layer, initial_streams


class Modules:
    """2L different nonlinear modules with weights, as a stand-in for attention and MLP."""

    def __init__(self, num_layers: int, width: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [
            torch.randn(width, width, generator=generator, dtype=torch.float64, requires_grad=True)
            for _ in range(2 * num_layers)
        ]

    def __call__(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weights[index]) / (1 + x.pow(2).mean(-1, keepdim=True))

    def gradients(self, out: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
        return list(torch.autograd.grad(out, [x, *self.weights], upstream))


def ours(modules, x, num_layers, ladder):
    streams = initial_streams(x)
    for layer in range(num_layers):
        streams = apply_layer(
            streams,
            attention=lambda y, i=2 * layer: modules(i, y),
            mlp=lambda y, i=2 * layer + 1: modules(i, y),
            ladder=layer in ladder,
        )
    return streams.hidden_states


def dense(modules, x, num_layers):
    for layer in range(num_layers):
        x = x + modules(2 * layer, x)
        x = x + modules(2 * layer + 1, x)
    return x


def form_a_pending(modules, x, num_layers, ladder):
    """Residual r and two module outputs not added yet."""
    r, a, m = x, 0, 0
    for layer in range(num_layers):
        if layer in ladder:
            r = r + a
            a = modules(2 * layer, r)
            r = r + m
            m = modules(2 * layer + 1, r)
        else:
            r = r + a + m
            a = modules(2 * layer, r)
            m = modules(2 * layer + 1, r + a)
    return r + a + m


def form_b_two_streams(modules, x, num_layers, ladder):
    """The stream after attention and the stream after the MLP."""
    prev, h = x, x
    for layer in range(num_layers):
        a = h + modules(2 * layer, prev if layer in ladder else h)
        m = a + modules(2 * layer + 1, h if layer in ladder else a)
        prev, h = a, m
    return h


def form_c_paper(modules, x, num_layers, ladder):
    """x_{i+1} = x_i + h_{i+1}(x_{i-1}), or h_{i+1}(x_i) in a standard layer; x_{-1} = x_0."""
    xs = {-1: x, 0: x}
    for i in range(2 * num_layers):
        source = xs[i - 1] if i // 2 in ladder else xs[i]
        xs[i + 1] = xs[i] + modules(i, source)
    return xs[2 * num_layers]


FORMS = [form_a_pending, form_b_two_streams, form_c_paper]
SPECS = ["all", "none", "0", "last:1", "2-3", "0,2,4"]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_naive_form_with_all_gradients(form, spec):
    modules, ladder = Modules(5, 7), parse_layers(spec, 5)
    x = torch.randn(3, 5, 7, dtype=torch.float64, requires_grad=True)
    out, expected = ours(modules, x, 5, ladder), form(modules, x, 5, ladder)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(modules.gradients(out, x), modules.gradients(expected, x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(),
    num_layers=st.integers(1, 6),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    width=st.integers(1, 9),
)
def test_any_shape_and_any_subset_of_layers(data, num_layers, shape, width):
    ladder = data.draw(st.sets(st.integers(0, num_layers - 1)))
    modules = Modules(num_layers, width)
    x = torch.randn(*shape, width, dtype=torch.float64)
    for form in FORMS:
        torch.testing.assert_close(
            ours(modules, x, num_layers, ladder), form(modules, x, num_layers, ladder)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_ladder_layer_is_bitwise_dense(dtype):
    modules = Modules(4, 16)
    modules.weights = [w.detach().to(dtype).requires_grad_() for w in modules.weights]
    x = torch.randn(2, 3, 16, dtype=dtype, requires_grad=True)
    out, expected = ours(modules, x, 4, ()), dense(modules, x, 4)
    assert torch.equal(out, expected)
    for got, want in zip(modules.gradients(out, x), modules.gradients(expected, x), strict=True):
        assert torch.equal(got, want)


def test_first_attention_and_first_mlp_read_the_embedding():
    read = []

    def module(x):
        read.append(x)
        return torch.ones_like(x)

    x = torch.zeros(2)
    apply_layer(initial_streams(x), module, module, ladder=True)
    assert read[0] is x
    assert read[1] is x


@pytest.mark.parametrize("spec", SPECS[2:])
def test_ladder_is_another_function(spec):
    modules = Modules(5, 7)
    x = torch.randn(3, 7, dtype=torch.float64)
    out = ours(modules, x, 5, parse_layers(spec, 5))
    assert not torch.allclose(out, dense(modules, x, 5), rtol=1e-3)
