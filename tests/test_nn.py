"""The modules through training, saving, copying and compiling; what accelerate replaces."""

import copy
import io

import pytest
import torch
from torch import nn

from prunelm import BlockSparse, accelerate
from prunelm.nn import BlockSparseLinear, LowRankLinear, PackedLowRankLinear


def sparse(N: int = 33, K: int = 50, block=(16, 4), bias: bool = True) -> BlockSparseLinear:
    mask = torch.rand(-(-N // block[0]), -(-K // block[1])) < 0.5
    mask[0, 0] = True
    return BlockSparseLinear.from_linear(nn.Linear(K, N, bias=bias), block, mask)


def low_rank(N: int = 33, K: int = 50, R: int = 6, bias: bool = True) -> LowRankLinear:
    return LowRankLinear(K, N, R, bias=bias)


MODULES = [pytest.param(sparse, id="block-sparse"), pytest.param(low_rank, id="low-rank")]


@pytest.mark.parametrize("make", MODULES)
def test_adam_trains_it(make) -> None:
    module, x, target = make(), torch.randn(40, 50), torch.randn(40, 33)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = (module(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def test_an_update_in_place_is_seen_and_keeps_the_layout() -> None:
    module, x = sparse(), torch.randn(3, 50)
    before, where = module(x), module.values.data_ptr()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(x).sum().backward()
    optimizer.step()
    assert module.values.data_ptr() == where
    assert module.values.transpose(1, 2).is_contiguous()
    assert optimizer.state[module.values]["exp_avg"].stride() == module.values.stride()
    assert (module(x) - before).abs().max() > 0.1


@pytest.mark.parametrize("make", MODULES)
def test_copies_are_equal_and_apart(make) -> None:
    module, x = make(), torch.randn(3, 50)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), module(x))
    for p, q in zip(twin.parameters(), module.parameters(), strict=True):
        assert p.stride() == q.stride() and p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_state_dict_and_back(make, bias) -> None:
    module, x = make(bias=bias), torch.randn(3, 50)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = make(bias=bias)  # with another number of blocks
    held = next(other.parameters())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))
    assert held is next(other.parameters())


def test_loading_adopts_the_number_of_blocks_but_nothing_else() -> None:
    module = sparse()
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        module.load_state_dict(sparse(block=(16, 16)).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for crow"):
        module.load_state_dict(sparse(N=80).state_dict())
    saved = {name: t.contiguous() for name, t in sparse().state_dict().items()}
    x = torch.randn(2, 50)
    module.load_state_dict(saved, assign=True)
    dense = BlockSparse(saved["values"], saved["crow"], saved["col"], (33, 50)).to_dense()
    assert (module(x) - nn.functional.linear(x, dense, saved["bias"])).abs().max() <= 1e-5


@pytest.mark.parametrize("make", MODULES)
def test_compiles_whole_forward_and_backward(make) -> None:
    module, x = make(), torch.randn(3, 50, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    got = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


def test_accelerated_models_compile() -> None:
    fast = accelerate(nn.Sequential(nn.Linear(64, 48), LowRankLinear(48, 32, 4)), dense=True)
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), fast(x))


@pytest.mark.parametrize("make", MODULES)
def test_autocast_and_16_bit_modules(make) -> None:
    module, x = make(), torch.randn(3, 50)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    halved = make().to(torch.bfloat16)
    assert halved(x.bfloat16()).dtype == torch.bfloat16
    assert halved(x).dtype == torch.float32


def test_low_rank_starts_like_a_linear() -> None:
    linear, factored = nn.Linear(400, 300), LowRankLinear(400, 300, 50)
    product = factored.up @ factored.down
    assert float(product.std() / linear.weight.std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 1), "in_features: expected at least 1, got 0"),
        ((3, 0, 1), "out_features: expected at least 1, got 0"),
        ((3, 3, -1), "rank: expected at least 0, got -1"),
    ],
)
def test_bad_sizes_are_refused_by_name(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        LowRankLinear(*arguments)


def pruned_linear(N: int, K: int, block: tuple[int, int], density: float) -> nn.Linear:
    linear = nn.Linear(K, N)
    mask = torch.rand(N // block[0], K // block[1]) < density
    with torch.no_grad():
        linear.weight *= mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return linear


@pytest.mark.parametrize("block", [(16, 4), (16, 16), (32, 32), (64, 64)], ids=str)
def test_accelerate_finds_the_blocks(block) -> None:
    model = nn.Sequential(pruned_linear(512, 512, block, 0.25)).train()
    fast = accelerate(model)
    assert isinstance(fast[0], BlockSparseLinear) and fast[0].weight.block == block
    assert not fast.training and model.training and isinstance(model[0], nn.Linear)
    x = torch.randn(7, 512)
    assert (fast(x) - model(x)).abs().max() <= 1e-5


def test_accelerate_leaves_dense_weights_dense() -> None:
    linear = nn.Linear(512, 512)
    (kept,) = accelerate(nn.Sequential(linear), dense=False)
    assert type(kept) is nn.Linear and torch.equal(kept.weight, linear.weight)
    (panels,) = accelerate(nn.Sequential(linear), dense=True)
    assert panels.weight.sparsity == 0 and panels.weight.block == (16, 512)
    with torch.no_grad():  # a zero for each element leaves no zero block
        linear.weight *= torch.rand(512, 512) < 0.3
    (panels,) = accelerate(nn.Sequential(linear), dense=True)
    assert panels.weight.block == (16, 512)


def test_accelerate_multiplies_factors_out_where_that_is_less() -> None:
    thin, thick = LowRankLinear(256, 256, 16), LowRankLinear(256, 256, 200, activation="relu")
    fast = accelerate(nn.Sequential(thin, thick))
    assert isinstance(fast[0], PackedLowRankLinear) and isinstance(fast[1], BlockSparseLinear)
    x = torch.randn(5, 256)
    assert (fast(x) - thick(thin(x))).abs().max() <= 1e-5
    assert isinstance(accelerate(thin), PackedLowRankLinear)


def test_accelerated_rows_do_not_depend_on_their_neighbours() -> None:
    model = nn.Sequential(
        nn.Linear(100, 300),
        nn.ReLU(),
        pruned_linear(320, 300 // 4 * 4, (16, 4), 0.3),
        LowRankLinear(320, 77, 20),
        LowRankLinear(77, 80, 70),
    )
    fast, x = accelerate(model, dense=True), torch.randn(70, 100)
    whole = fast(x)
    for M in range(1, 71):
        assert torch.equal(fast(x[:M]), whole[:M]), M


def test_accelerate_refuses_no_rows() -> None:
    for rows in ((), (0, 8)):
        with pytest.raises(ValueError, match="rows: expected numbers of at least 1"):
            accelerate(nn.Linear(3, 3), rows)
