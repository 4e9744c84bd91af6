"""The loss without logits: what it gives, who may still read logits, and when the model's own code runs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import llmsys
from benchmarks.families import VOCABULARY, batch, build
from llmsys.integrations.transformers.logits import Logits
from tests.harness import same_bits


def pair(family="Llama 2", **changes):
    """The same model untouched, and with its loss swapped."""
    same = build(family, **changes)
    ours = copy.deepcopy(same)
    (line,) = llmsys.accelerate(ours, only=["loss"]).swapped
    assert line.what == "linear_cross_entropy"
    return same, ours


def agree(ours, same, **inputs):
    """The loss and the gradient of the head, up to float32's rounding."""
    results = []
    for model in (ours, same):
        model.zero_grad()
        outputs = model(**inputs)
        outputs.loss.backward()
        results.append((outputs.loss, model.get_output_embeddings().weight.grad))
    torch.testing.assert_close(*results)


def test_a_training_step_makes_no_logits():
    same, ours = pair()
    outputs = ours(**batch())
    assert isinstance(outputs.logits, Logits)
    outputs.loss.backward()
    assert outputs.logits.shape == (2, 24, VOCABULARY) and outputs.logits.dtype is torch.float32
    assert not outputs.logits.made
    expected = same(**batch())
    assert same_bits(outputs.logits + 0, expected.logits) and outputs.logits.made


def test_peak_memory_of_a_step_holds_no_logits():
    _, ours = pair(vocab_size=50_000)
    x = batch()["input_ids"].repeat(8, 4)  # logits of 16 x 96 x 50,000 in float32: 307 MB
    from llmsys.train.peak_memory import PeakMemory

    peak = PeakMemory()
    ours(input_ids=x, labels=x).loss.backward()
    assert peak.extra_bytes() < x.numel() * 50_000 * 4 / 2


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 7},
        {"shift_labels": batch(1)["labels"]},
        {"logits_to_keep": 24},
        {"ignore_index": 5},
    ],
    ids=str,
)
def test_arguments_of_the_loss(options):
    given = batch() | options
    if "ignore_index" in options:
        given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 5)
    same, ours = pair()
    agree(ours, same, **given)


@pytest.mark.parametrize("family", ["Gemma 2", "Cohere", "GPT-2", "Mixtral"])
def test_steps_between_head_and_loss(family):
    same, ours = pair(family)
    agree(ours, same, **batch())
    if family == "Gemma 2":  # softcapped
        assert not ours(**batch()).logits.made


def test_labels_that_all_count_for_nothing():
    same, ours = pair()
    given = batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    for model in (same, ours):
        loss = model(**given).loss
        loss.backward()
        assert loss.isnan()
    for name, parameter in ours.named_parameters():
        expected = same.get_parameter(name).grad
        assert torch.equal(parameter.grad.isnan(), expected.isnan()), name


def test_logits_are_a_tensor_to_whoever_reads_them():
    same, ours = pair()
    expected = same(**batch()).logits
    read = {
        "slice": lambda t: t[:, -1, :],
        "argmax": lambda t: t.argmax(-1),
        "numpy": lambda t: torch.from_numpy(t.detach().numpy()),
        "pickle": lambda t: pickle.loads(pickle.dumps(t.detach())),
        "deepcopy": lambda t: copy.deepcopy(t.detach()),
        "cat": lambda t: torch.cat([t, t]),
        "by name": lambda t: torch.cat(tensors=[t, t]),
        "in place": lambda t: t.detach().mul_(2),
        "softmax": lambda t: F.softmax(t, dim=-1),
        "op": lambda t: llmsys.softmax(t),
        "step, then read": lambda t: (t / 2).tanh() + 1,
        "a Function": lambda t: Squares.apply(t),
        "module": lambda t: nn.Linear(VOCABULARY, 3).requires_grad_(False).apply(_ones)(t),
    }
    for name, reader in read.items():
        with torch.set_grad_enabled(name == "cat"):
            outputs = ours(**batch())
            assert same_bits(reader(outputs.logits), reader(expected.clone())), name
    assert repr(ours(**batch()).logits) == repr(expected)


def _ones(module):
    for parameter in module.parameters():
        nn.init.ones_(parameter)


class Squares(torch.autograd.Function):
    """Code that is handed the object itself, past every override of what a tensor's methods do."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits * logits

    @staticmethod
    def backward(ctx, dy):
        (logits,) = ctx.saved_tensors
        return 2 * dy * logits


@pytest.mark.parametrize("family", ["Llama 2", "Gemma 2"])
def test_gradient_of_a_function_of_logits(family):
    same, ours = pair(family)
    for model in (same, ours):
        Squares.apply(model(**batch()).logits).mean().backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, same.get_parameter(name).grad)


def test_gradients_through_logits_and_loss_add_up():
    same, ours = pair()
    for model in (same, ours):
        outputs = model(**batch())
        with torch.no_grad():
            outputs.logits.argmax(-1)  # who reads first decides nothing
        (outputs.loss + outputs.logits.square().mean()).backward()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, same.get_parameter(name).grad)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD, llmsys.optim.AdamW])
def test_logits_of_weights_that_are_gone(optimizer):
    _, ours = pair()
    step = optimizer(ours.parameters(), lr=0.1)
    outputs, read = ours(**batch()), ours(**batch())
    read.logits.sum()
    outputs.loss.backward()
    step.step()
    with pytest.raises(RuntimeError, match="read them before optimizer.step"):
        outputs.logits.argmax(-1)
    read.logits.argmax(-1)
    with torch.inference_mode():
        ours(**batch()).logits.argmax(-1)


def test_without_labels_the_head_computes():
    _, ours = pair()
    tokens = batch()["input_ids"]
    assert type(ours(input_ids=tokens).logits) is torch.Tensor
    assert isinstance(ours(tokens, labels=tokens).logits, Logits)
    assert isinstance(ours(tokens, None, None, None, None, tokens).logits, Logits)  # labels by position


def test_a_hook_on_the_head_gets_numbers():
    same, ours = pair()
    seen = []
    ours.lm_head.register_forward_hook(lambda module, args, result: seen.append(type(result)))
    agree(ours, same, **batch())
    assert seen == [torch.Tensor]


def test_a_loss_of_the_users_own():
    same, ours = pair()
    for model in (same, ours):
        model.loss_function = lambda logits, labels, vocab_size, **options: logits.square().mean()
    agree(ours, same, **batch())
    del same._loss_function, ours._loss_function
    agree(ours, same, **batch())


def test_autocast_gives_what_it_gave():
    same, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = same(**batch()), ours(**batch())
    assert isinstance(actual.logits, Logits) and actual.logits.dtype is expected.logits.dtype is torch.bfloat16
    torch.testing.assert_close(actual.loss, expected.loss, atol=0, rtol=2**-8)
    assert same_bits(actual.logits + 0, expected.logits)


def test_what_is_left_says_why():
    def reason(model):
        (line,) = llmsys.accelerate(model, only=["loss"]).left
        return line.what

    assert "does not call its loss_function" in reason(build("BERT"))
    model = build("Llama 2")
    model.loss_function = lambda logits, labels, vocab_size, **options: logits.float().mean()
    assert "no cross entropy of each token's logits with the next token" in reason(model)
    model = build("Llama 2")
    model.lm_head = nn.Sequential(model.lm_head)
    assert "its head is a Sequential" in reason(model)
    assert not llmsys.accelerate(build("Llama 2").model, only=["loss"]).left  # a body without a head
