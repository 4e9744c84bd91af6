"""What a rank holds of a model and its optimizer: the formulae of Rajbhandari et al. 2020, section 5."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from llmsys import parallel
from llmsys.models.llama import Llama, LlamaConfig
from llmsys.optim import AdamW
from llmsys.parallel.zero import Zero
from tests.parallel.ranks import run

SHAPE = LlamaConfig(vocab_size=96, dim=48, num_layers=4, num_heads=3, num_kv_heads=1, head_dim=16, hidden_dim=128)
FLOAT32 = torch.float32


def held_bytes(*roots):
    """Of all storages of tensors that these objects lead to, with their gradients."""
    storages, seen, left = {}, set(), list(roots)
    while left:
        x = left.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if isinstance(x, Tensor):
            storages[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            left.append(x.grad if x.is_leaf else None)
        elif isinstance(x, Mapping):
            left += [*x.keys(), *x.values()]
        elif isinstance(x, list | tuple | set | frozenset) or type(x).__name__ == "deque":
            left += x
        elif isinstance(x, nn.Module | torch.optim.Optimizer) or type(x).__module__.startswith("llmsys.parallel"):
            left.append(vars(x))
    return sum(storages.values())


def built(stage, master_dtype, reduce_dtype, **options):
    mesh = parallel.connect(dp=2)
    model = Llama(SHAPE, dtype=torch.bfloat16)
    options |= {"master_dtype": master_dtype, "reduce_dtype": reduce_dtype}
    zero = Zero(model, mesh, stage=stage, units=model.blocks, bucket_bytes=20_000, **options)
    adamw = AdamW(zero.shards())  # which keeps masters of what is not float32
    generator = torch.Generator().manual_seed(2)
    tokens, targets = torch.randint(96, (2, 2, 8), generator=generator)
    return SimpleNamespace(model=model, zero=zero, adamw=adamw, loss=lambda: model.loss(tokens, targets))


def states(stage, master_dtype, reduce_dtype):
    it = built(stage, master_dtype, reduce_dtype)
    for _ in range(2):
        it.loss().backward()
        it.zero.reduce()
        it.adamw.step()
        held = held_bytes(it.model, it.zero, it.adamw)
        it.zero.gather()
    return held


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype, gradient", [(None, 2), (FLOAT32, 4)], ids=["bfloat16 gradients", "float32"])
def test_model_states(stage, dtype, gradient):
    """Bytes a parameter, of N = 2 ranks and K = 12 for Adam: 4 of the master, 8 of its moments.

    With gradients in bfloat16: 4 + K, 4 + K/N, 2 + (2 + K)/N and 16/N. With those and masters of Zero's in float32, 2
    more for each gradient; but stage 3 keeps no bfloat16 weights beside the masters: 16/N again.
    """
    numel, n, k = SHAPE.num_parameters(), 2, 12
    weights = [2, 2, 2, 2 / n if dtype is None else 0][stage]
    gradients = [gradient, gradient, gradient / n, gradient / n][stage]
    optimizer = [k, k / n, k / n, k / n][stage]
    assert stage < 3 or weights + gradients + optimizer == 16 / n
    for held in run(2, states, stage, dtype, dtype):
        assert held == pytest.approx((weights + gradients + optimizer) * numel, rel=0.01)


def peak(master_dtype, reduce_dtype):
    it = built(3, master_dtype, reduce_dtype)
    looks = []

    def look(*_):
        """All that is held, and of that: weights of units that are here, gradients that wait to be reduced."""
        weights = held_bytes([flat.whole for flat in it.zero._flats])
        gradients = held_bytes([flat.gradients for flat in it.zero._flats], [p.grad for p in it.model.parameters()])
        looks.append((held_bytes(it.model, it.zero, it.adamw), weights, gradients))

    for module in it.model.modules():
        module.register_forward_hook(look)
    for parameter in it.model.parameters():
        parameter.register_hook(look)
        parameter.register_post_accumulate_grad_hook(look)
    for _ in range(2):
        looks.clear()
        it.loss().backward()
        it.zero.reduce()
        look()
        it.adamw.step()
        it.zero.gather()
    units = [sum(flat.whole.nbytes for flat in unit.flats) for unit in it.zero._units._units]
    return looks, units, max(parameter.nbytes for parameter in it.model.parameters())


@pytest.mark.parametrize("dtype, width", [(None, 1), (FLOAT32, 2)], ids=["bfloat16 gradients", "float32"])
def test_peak(dtype, width):
    """16Ψ/N, and what is in flight: weights of two units, gradients of one and the last one found, not yet added."""
    for looks, units, largest in run(2, peak, dtype, dtype):
        states = [held - weights - gradients for held, weights, gradients in looks]
        assert max(states) == states[-1] == pytest.approx(16 / 2 * SHAPE.num_parameters(), rel=0.01)
        assert max(weights for _, weights, _ in looks) == max(map(sum, zip(units, units[1:], strict=False)))
        assert width * max(units) <= max(gradients for *_, gradients in looks) <= width * max(units) + largest
