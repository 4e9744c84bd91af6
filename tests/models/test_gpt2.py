import dataclasses
import fnmatch

import pytest
import torch

from llmsys.models import GPT2, GPT2Config, load_weights, save_weights
from llmsys.models.gpt2 import PLAN, SIZES

TINY = GPT2Config(vocab_size=31, dim=24, num_layers=2, num_heads=4, max_sequence_length=16)
# Names in a block: ours, Hugging Face's.
NAMES = {
    "attention_norm": "ln_1",
    "attention.wqkv": "attn.c_attn",
    "attention.wo": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def tokens(*shape, seed=0):
    return torch.randint(0, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def far_from_the_start(model):
    """Every weight and bias counts."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype) * 0.2)
    return model


def stock(model):
    """Hugging Face's model of the same weights, on PyTorch's own functions."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_embd=c.dim,
        n_layer=c.num_layers,
        n_head=c.num_heads,
        n_positions=c.max_sequence_length,
        layer_norm_epsilon=c.norm_eps,
        attn_implementation="eager",
    )
    theirs = transformers.GPT2LMHeadModel(config).to(model.norm.weight.dtype).eval()
    ours = model.state_dict()
    state = {"wte.weight": ours["embedding.weight"], "wpe.weight": ours["positions.weight"]}
    state |= {f"ln_f.{kind}": ours[f"norm.{kind}"] for kind in ("weight", "bias")}
    for i in range(c.num_layers):
        for our_name, their_name in NAMES.items():
            for kind in ("weight", "bias"):
                weight = ours[f"blocks.{i}.{our_name}.{kind}"]
                state[f"h.{i}.{their_name}.{kind}"] = weight.T if weight.dim() > 1 else weight  # Conv1D: (in, out)
    theirs.transformer.load_state_dict(state)
    return theirs


def test_equals_hugging_face():
    model = far_from_the_start(GPT2(TINY, seed=1, dtype=torch.float64))
    theirs, x, y = stock(model), tokens(2, 16), tokens(2, 16, seed=1)
    logits = theirs(x).logits
    torch.testing.assert_close(model(x), logits, rtol=0, atol=1e-12)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    found = model.loss(x, y)
    found.backward()
    torch.testing.assert_close(found, loss, rtol=0, atol=1e-12)
    for ours, name in ((model.embedding, "wte"), (model.positions, "wpe")):
        expected = getattr(theirs.transformer, name).weight.grad
        torch.testing.assert_close(ours.weight.grad, expected, rtol=0, atol=1e-12)
    for i, block in enumerate(model.blocks):
        for our_name, their_name in NAMES.items():
            layer = theirs.transformer.h[i].get_submodule(their_name)
            ours = block.get_submodule(our_name)
            expected = layer.weight.grad.T if ours.weight.dim() > 1 else layer.weight.grad
            torch.testing.assert_close(ours.weight.grad, expected, rtol=0, atol=1e-12)
            torch.testing.assert_close(ours.bias.grad, layer.bias.grad, rtol=0, atol=1e-12)


def test_weights_depend_on_seed_and_name_alone(tmp_path):
    one, other = GPT2(TINY, seed=5), GPT2(TINY, seed=6)
    with torch.device("meta"):
        late = GPT2(TINY)
    assert {weight.device.type for weight in late.parameters()} == {"meta"}
    late.to_empty(device="cpu").initialise(5)
    for name, weight in one.named_parameters():
        assert torch.equal(weight, late.get_parameter(name))
        assert weight.dim() == 1 or not torch.equal(weight, other.get_parameter(name))
        if weight.dim() == 1:
            assert (weight == (0 if name.endswith("bias") else 1)).all()
    assert one.embedding.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert one.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.01, rel=0.1)  # 0.02 / sqrt(2 · 2 layers)
    save_weights(one, tmp_path / "weights")
    load_weights(other, tmp_path / "weights")
    assert torch.equal(one(tokens(2, 5)), other(tokens(2, 5)))


@pytest.mark.parametrize("name", SIZES)
def test_sizes_hold_what_they_are_called(name):
    with torch.device("meta"):
        model = GPT2(SIZES[name])
    count = sum(weight.numel() for weight in model.parameters())
    assert count == SIZES[name].num_parameters()
    assert round(count / 1e6) == int(name[:-1])


def test_flops_per_token_counts_every_product():
    """6 for each weight that is multiplied, the head's too, and half of what attention's two products take."""
    products = sum(w.numel() for name, w in GPT2(TINY).named_parameters() if w.dim() > 1 and name != "positions.weight")
    assert TINY.flops_per_token(16) == 6 * products + 6 * 2 * 24 * 16


def test_the_plan_names_every_matrix_once():
    model = GPT2(TINY)
    modules = {name.removesuffix(".weight") for name, weight in model.named_parameters() if weight.dim() > 1}
    for module in modules:
        assert len([pattern for pattern in PLAN["tensor"] if fnmatch.fnmatch(module, pattern)]) == 1, module
    for pattern in PLAN["tensor"]:
        assert fnmatch.filter(modules, pattern), pattern


def test_dropout_draws_from_seed_step_micro_and_place():
    shape = dataclasses.replace(TINY, dropout=0.5)
    x, y = tokens(2, 8), tokens(2, 8, seed=1)

    def loss(model, *place):
        model.at(*place)
        return model.loss(x, y).item()

    model = GPT2(shape, seed=3)
    first = loss(model, 0, 0)
    assert first == loss(model, 0, 0) == loss(GPT2(shape, seed=3), 0, 0)
    other = GPT2(shape, seed=3)
    other.seed = 4
    assert len({first, loss(model, 1, 0), loss(model, 0, 1), loss(other, 0, 0)}) == 4
    without = GPT2(TINY, seed=3)
    assert model.eval().loss(x, y).item() == without.loss(x, y).item() != first


def test_dropout_is_of_the_embedding_and_of_both_branches():
    """With nearly all dropped, nothing is left of them."""
    model = far_from_the_start(GPT2(dataclasses.replace(TINY, dropout=1 - 1e-9), dtype=torch.float64))
    model.at(0)
    torch.testing.assert_close(model.hidden(tokens(1, 8)), model.norm.bias.expand(1, 8, -1))


def test_each_head_drops_its_own():
    attention = GPT2(dataclasses.replace(TINY, dropout=0.5)).blocks[0].attention
    q = torch.ones(1, 8, 1, 6).expand(1, 8, 4, 6)
    y = attention.attend(q, q, q, 5)
    assert len({tuple(head.flatten().tolist()) for head in y.unbind(2)}) == 4
    attention.first_head = 2
    assert torch.equal(attention.attend(q[:, :, :2], q[:, :, :2], q[:, :, :2], 5), y[:, :, 2:])


def test_bad_input():
    with pytest.raises(
        RuntimeError, match=r"a forward with dropout=0.1 in training, expected `at\(step, micro\)` before"
    ):
        GPT2(dataclasses.replace(TINY, dropout=0.1)).loss(tokens(1, 4), tokens(1, 4))
    with pytest.raises(ValueError, match=r"dropout=1.0, expected a probability below 1"):
        dataclasses.replace(TINY, dropout=1.0)
    with pytest.raises(ValueError, match=r"llmsys.models.GPT2: a sequence of 17 tokens, expected at most .*=16"):
        GPT2(TINY)(tokens(1, 17))
    with pytest.raises(ValueError, match=r"dim=24 with num_heads=5, expected a multiple of num_heads"):
        dataclasses.replace(TINY, num_heads=5)
    with pytest.raises(ValueError, match=r"GPT2Config: num_layers=0, expected a number above 0"):
        dataclasses.replace(TINY, num_layers=0)
