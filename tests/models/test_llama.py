import dataclasses
import fnmatch
import math
import re

import pytest
import torch

from llmsys import rope_tables
from llmsys.models import SIZES, Llama, LlamaConfig
from llmsys.models.llama import PLAN, Attention
from llmsys.train.stock import StockAttention

TINY = LlamaConfig(
    vocab_size=31, dim=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, hidden_dim=40, max_sequence_length=16
)


def tokens(*shape, seed=0):
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def by_hand(model: Llama, sequence: list[int]) -> torch.Tensor:
    """Logits of one sequence in float64, one position and one head at a time, rotation by complex numbers."""
    config, w = model.config, {name: weight.detach().double() for name, weight in model.named_parameters()}

    def norm(x, weight):
        return x / torch.sqrt((x * x).mean() + config.norm_eps) * weight

    def heads(x, position, rotated):
        split = x.reshape(-1, config.head_dim)
        if not rotated:
            return split
        half = config.head_dim // 2
        angles = [position * config.rope_theta ** (-2 * i / config.head_dim) for i in range(half)]
        turn = torch.tensor([complex(math.cos(a), math.sin(a)) for a in angles], dtype=torch.complex128)
        turned = torch.complex(split[:, :half], split[:, half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=1)

    stream = [w["embedding.weight"][token] for token in sequence]
    for i in range(config.num_layers):
        layer = {name.removeprefix(f"blocks.{i}."): x for name, x in w.items() if name.startswith(f"blocks.{i}.")}
        normed = [norm(x, layer["attention_norm.weight"]) for x in stream]
        q, k, v = (
            [heads(layer[f"attention.{name}.weight"] @ x, position, name != "wv") for position, x in enumerate(normed)]
            for name in ("wq", "wk", "wv")
        )
        for t in range(len(sequence)):
            out = []
            for head in range(config.num_heads):
                group = head // (config.num_heads // config.num_kv_heads)
                scores = torch.stack([q[t][head] @ k[s][group] / math.sqrt(config.head_dim) for s in range(t + 1)])
                out.append(sum(p * v[s][group] for s, p in enumerate(scores.softmax(0))))
            stream[t] = stream[t] + layer["attention.wo.weight"] @ torch.cat(out)
        for t, x in enumerate(stream):
            y = norm(x, layer["mlp_norm.weight"])
            gate = layer["mlp.gate.weight"] @ y
            stream[t] = x + layer["mlp.down.weight"] @ (gate / (1 + torch.exp(-gate)) * (layer["mlp.up.weight"] @ y))
    head = w["embedding.weight"] if config.tied_head else w["head.weight"]
    return torch.stack([head @ norm(x, w["norm.weight"]) for x in stream])


@pytest.mark.parametrize("tied_head", [False, True])
def test_equals_a_computation_by_hand(tied_head):
    model = Llama(dataclasses.replace(TINY, tied_head=tied_head), seed=1)
    with torch.no_grad():
        for weight in model.parameters():  # far from initialisation, so that every part matters
            weight.mul_(8.0 if weight.dim() > 1 else 0.7)
    sequence = tokens(9)
    expected = by_hand(model, sequence.tolist())
    error = (model(sequence[None])[0].double() - expected).abs().max() / expected.abs().max()
    assert error < 200 * torch.finfo(torch.float32).eps  # about 100 float32 operations in a row on the longest path


def test_is_causal():
    model = Llama(TINY, seed=1)
    a, b = tokens(2, 12), tokens(2, 12)
    b[:, 7] = (b[:, 7] + 1) % TINY.vocab_size
    logits_a, logits_b = model(a), model(b)
    torch.testing.assert_close(logits_a[:, :7], logits_b[:, :7], rtol=0, atol=0)
    assert (logits_a[:, 7:] - logits_b[:, 7:]).abs().amax(dim=(0, 2)).min() > 0


def test_grouped_queries_equal_repeated_heads():
    grouped = Llama(TINY, seed=1)
    full = Llama(dataclasses.replace(TINY, num_kv_heads=TINY.num_heads))
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = state[name].unflatten(0, (-1, TINY.head_dim)).repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens(2, 8)), grouped(tokens(2, 8)))


def test_a_tied_head_is_the_embedding():
    model = Llama(dataclasses.replace(TINY, tied_head=True))
    assert "head.weight" not in model.state_dict()
    model.loss(tokens(1, 8), tokens(1, 8, seed=1)).backward()
    unseen = sorted(set(range(TINY.vocab_size)) - set(tokens(1, 8).flatten().tolist()))
    assert model.embedding.weight.grad[unseen].abs().amax(dim=1).min() > 0  # only the head reaches these rows


def test_loss_is_mean_cross_entropy_and_ignores_minus_100():
    model, x, y = Llama(TINY), tokens(2, 6), tokens(2, 6, seed=1)
    by_token = -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]
    torch.testing.assert_close(model.loss(x, y), by_token.mean())
    y[:, 3:] = -100
    torch.testing.assert_close(model.loss(x, y), by_token[:, :3].mean())


def test_weights_depend_on_seed_and_name_alone():
    one, same, other = Llama(TINY, seed=5), Llama(TINY, seed=5, dtype=torch.bfloat16), Llama(TINY, seed=6)
    with torch.device("meta"):
        late = Llama(TINY)
    assert {weight.device.type for weight in late.parameters()} == {"meta"}
    late.to_empty(device="cpu").initialise(5)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, late.get_parameter(name))
        assert torch.equal(weight.bfloat16(), same.get_parameter(name))
        assert weight.dim() == 1 or not torch.equal(weight, other.get_parameter(name))
    assert one.head.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.blocks[0].attention.wo.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 · 2 layers)


@pytest.mark.parametrize("name", SIZES)
def test_sizes_hold_what_they_are_called(name):
    config = SIZES[name]
    with torch.device("meta"):
        model = Llama(config)
    count = sum(weight.numel() for weight in model.parameters())
    assert count == config.num_parameters()
    if match := re.fullmatch(r"(\d+)([MB])", name):
        assert count / {"M": 1e6, "B": 1e9}[match[2]] == pytest.approx(int(match[1]), rel=0.11)


def test_flops_per_token_counts_what_torch_counts(monkeypatch):
    """In float64, where PyTorch multiplies all matrices and so counts them, and with its own attention."""
    from torch.utils.flop_counter import FlopCounterMode

    x = tokens(1, 16)
    monkeypatch.setattr(Attention, "attend", staticmethod(StockAttention.attend))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        Llama(TINY).double().loss(x, x).backward()
    attention = 6 * TINY.num_layers * TINY.num_heads * TINY.head_dim * 16
    assert counter.get_total_flops() / 16 == TINY.flops_per_token(16) + attention  # torch counts the masked half too


def test_the_plan_names_every_matrix_once():
    model = Llama(TINY)
    modules = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() > 1}
    for module in modules:
        assert [pattern for pattern in PLAN["tensor"] if fnmatch.fnmatch(module, pattern)], module
    for pattern in PLAN["tensor"]:
        assert fnmatch.filter(modules, pattern), pattern
    assert len(model.get_submodule(PLAN["stages"])) == TINY.num_layers


def test_attention_takes_its_heads_from_the_weights():
    """A rank that holds half of the heads computes half of the sum."""
    attention = Llama(TINY).blocks[0].attention
    x = torch.randn(1, 5, TINY.dim, generator=torch.Generator().manual_seed(0))
    cos, sin = rope_tables(5, TINY.head_dim, base=TINY.rope_theta)
    whole = attention(x, cos, sin)
    weights = {name: getattr(attention, name).weight.detach() for name in ("wq", "wk", "wv", "wo")}
    parts = []
    for rank in range(2):
        for name, weight in weights.items():
            shard = weight.chunk(2, dim=1 if name == "wo" else 0)[rank].contiguous()
            getattr(attention, name).weight = torch.nn.Parameter(shard)
        parts.append(attention(x, cos, sin))
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_bad_input():
    with pytest.raises(ValueError, match=r"17 tokens, expected at most max_sequence_length=16"):
        Llama(TINY)(tokens(1, 17))
    with pytest.raises(ValueError, match=r"num_heads=4 with num_kv_heads=3, expected a multiple"):
        dataclasses.replace(TINY, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"head_dim=5, expected an even number"):
        dataclasses.replace(TINY, head_dim=5)
    with pytest.raises(ValueError, match=r"dim=0, expected a number above 0"):
        dataclasses.replace(TINY, dim=0)
