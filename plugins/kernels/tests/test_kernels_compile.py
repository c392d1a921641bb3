"""Every op inside a function that torch.compile's own backend turns into C++: one graph, and the eager result."""

import shutil

import pytest
import torch
from torch import Tensor

from eff_kernels.adamp_step import adamp_step_
from eff_kernels.bench import ops
from eff_kernels.codebook_matmul import codebook_matmul, pack_codes
from eff_kernels.depthwise_conv import depthwise_conv
from eff_kernels.fake_quant import fake_quant
from eff_kernels.int_matmul import dyadic, int_matmul, scaled_int_matmul
from eff_kernels.kv_quant import kv_attention, kv_quantize
from eff_kernels.mutual_score import mutual_score
from eff_kernels.nearest_code import nearest_code
from eff_kernels.packing import pack_rows
from eff_kernels.partial_linear import partial_linear
from eff_kernels.rotate_keys import rotate_keys
from eff_kernels.sparsify import densify, sparsify
from eff_kernels.weight_only_matmul import weight_only_matmul


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, dtype=torch.int64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def step(gradient: Tensor) -> Tensor:
    weight, first, second = torch.ones_like(gradient), torch.zeros_like(gradient), torch.zeros_like(gradient)
    adamp_step_([weight], [gradient * 2], [first], [second], [1], lr=torch.tensor(0.1))
    return weight + 1


M, E = dyadic(torch.full((6,), 0.003))
W = integers(-128, 128, 6, 16, dtype=torch.int8)


def products(x: Tensor) -> Tensor:
    levels = int_matmul(x + 1, W, M, E, q_min=-128, q_max=127)
    return levels * 2 + scaled_int_matmul(x, W, torch.full((6,), 0.1)).relu()


def cases():
    """Yield op, function, arguments of it; gradients are compared for arguments that ask for them."""
    scale = torch.tensor(0.1, requires_grad=True)
    yield "fake_quant", lambda x, s: fake_quant(x.sin(), s, -8, 7) * 2, (random(4, 6).requires_grad_(), scale)
    yield "adamp_step", step, (random(5, 7),)
    yield "mutual_score", lambda z: mutual_score(z * 2) + 1, (random(4, 9, 5),)
    words = random(7, 3, seed=1)
    yield "nearest_code", lambda x: nearest_code(x * 2, words) + 1, (random(20, 3),)
    weight, index = random(6, 8), torch.tensor([1, 5])
    p = weight[:, index].clone().requires_grad_()
    yield "partial_linear", lambda x, p: partial_linear(x.sin(), weight, p, index).cos(), (random(3, 8), p)
    frequencies = torch.tensor([1.0, 0.1])
    yield "rotate_keys", lambda k: rotate_keys(k * 2, 3, frequencies) + 1, (random(1, 2, 5, 4).requires_grad_(),)
    yield "int_matmul", products, (integers(-100, 100, 3, 16, dtype=torch.int8),)
    packed, steps = pack_rows(integers(0, 16, 6, 32), 4), random(6, 2).abs()
    product = lambda x: weight_only_matmul(x.sin(), packed, steps, bits=4).relu()  # noqa: E731
    yield "weight_only_matmul", product, (random(3, 32).requires_grad_(),)
    codes = pack_codes(integers(0, 16, 6, 8), 4)
    coded = lambda x, entries: codebook_matmul(x.sin(), codes, entries, bits=4).relu()  # noqa: E731
    yield "codebook_matmul", coded, (random(3, 32).requires_grad_(), random(16, 4, seed=1).requires_grad_())
    yield "sparsify", lambda v: densify(*sparsify(v * 2, 0.01), (3000,)) + 1, (random(3000),)
    cache = kv_quantize(random(2, 3, 20, 8), random(2, 3, 20, 8, seed=1), torch.arange(5).expand(2, 3, 5))
    yield "kv_quant", lambda q: kv_attention(q * 2, cache) + 1, (random(2, 6, 1, 8),)
    kernels = random(3, 1, 5, 5, seed=1).requires_grad_()
    yield (
        "depthwise_conv",
        lambda x, w: depthwise_conv(x.sin(), w).relu(),
        (random(2, 3, 9, 9).requires_grad_(), kernels),
    )


CASES = {name: (function, arguments) for name, function, arguments in cases()}


def test_every_op_is_compiled():
    assert sorted(CASES) == ops()


@pytest.mark.slow
@pytest.mark.parametrize("op", CASES)
def test_inductor_makes_one_graph_with_the_eager_result(op):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("torch.compile needs a C++ compiler, and none is found")
    function, arguments = CASES[op]
    trained = [argument for argument in arguments if argument.requires_grad]
    torch._dynamo.reset()
    found, expected = torch.compile(function, fullgraph=True)(*arguments), function(*arguments)
    torch.testing.assert_close(found, expected)
    if trained:
        ones = torch.ones_like(expected)
        gradients = (torch.autograd.grad(result, trained, ones) for result in (found, expected))
        for own, other in zip(*gradients, strict=True):
            torch.testing.assert_close(own, other)
