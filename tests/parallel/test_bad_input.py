"""A plan, a layout or a batch that does not fit is the same clear error on every rank, at once."""

import time

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, connect, parallelize
from tests.parallel.ranks import run

SIZES = {
    "vocab_size": 32,
    "dim": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 4,
    "hidden_dim": 24,
}
TIMEOUT_S = 60.0  # of collectives: what waits for it is not in time


def batch(length, count=2):
    return list(torch.randint(32, (count, 2, 2, length), generator=torch.Generator().manual_seed(1)))


def attempt(sizes, shape, plan, options, micros):
    """The loss, or the error, and after how many seconds."""
    mesh = connect(**sizes, timeout_s=TIMEOUT_S)
    start = time.monotonic()
    try:
        model = Llama(LlamaConfig(**{**SIZES, **shape}), dtype=torch.float64)
        return parallelize(model, PLAN | plan, mesh, **options).backward(micros).item(), 0.0
    except ValueError as error:
        return str(error), time.monotonic() - start


def tensor(**more):
    return {"tensor": PLAN["tensor"] | more}


# Sizes of the mesh, changes of the model and of its plan, options, tokens of a sequence, what every rank says.
CASES = [
    ({"tp": 2}, {}, tensor(**{"*.wz": "column"}), {}, 8, r"'\*.wz' matches no module of Llama"),
    ({"pp": 2}, {}, tensor(**{"*.wz": "column"}), {}, 8, r"'\*.wz' matches no module of Llama"),
    ({"dp": 2}, {}, tensor(**{"*.wq": "rows"}), {}, 8, r"'\*.wq' is 'rows', expected one of column, "),
    ({"pp": 2}, {}, {"stages": "layers"}, {}, 8, r"blocks 'layers', expected a list of modules of Llama, blocks"),
    ({"dp": 2}, {}, {"recompute": ["*.wz"]}, {"recompute": "selective"}, 8, r"'\*.wz' matches no module of Llama"),
    ({"dp": 2}, {}, {}, {"recompute": "some"}, 8, r"recompute='some', expected one of none, selective, full"),
    ({"tp": 3}, {}, {}, {}, 8, r"embedding.weight of shape \(32, 16\) has 32 tokens, expected a multiple of the 3"),
    # Stages in between hold no vocabulary.
    ({"pp": 3, "tp": 2}, {"vocab_size": 33}, {}, {}, 8, r"has 33 tokens, expected a multiple of the 2 ranks of tp"),
    ({"pp": 2, "tp": 2}, {"hidden_dim": 25}, {}, {}, 8, r"has 25 outputs, expected a multiple of the 2 ranks of tp"),
    ({"pp": 2, "tp": 2}, {}, {}, {"sequence_parallel": True}, 7, r"tokens of shape \(2, 7\), expected sequences whose"),
    (
        {"pp": 2},
        {"max_sequence_length": 8},
        {},
        {},
        9,
        r"a sequence of 9 tokens, expected at most max_sequence_length=8",
    ),
    ({"pp": 2}, {}, {}, {"costs": [1, 2, 3]}, 8, r"3 costs of 4 blocks, expected one for each"),
    ({"pp": 2}, {}, {}, {"costs": [1, 2, 3, 4, 5]}, 8, r"5 costs of 4 blocks, expected one for each"),
    ({"pp": 2}, {}, {}, {"schedule": "zb_v", "chunks_per_stage": 3}, 8, r"3 chunks per stage for zb_v, expected 2"),
    ({"pp": 4}, {}, {}, {"schedule": "zb_v"}, 8, r"4 blocks for 8 stages, expected 1 to 4"),
    ({"dp": 2}, {}, {}, {"zero": 5}, 8, r"stage=5, expected 0, 1, 2 or 3"),
]


@pytest.mark.parametrize("sizes, shape, plan, options, length, message", CASES, ids=lambda value: str(value)[:40])
def test_every_rank_says_what_does_not_fit(sizes, shape, plan, options, length, message):
    for error, seconds in run(Mesh(**sizes).size, attempt, sizes, shape, plan, options, batch(length)):
        with pytest.raises(ValueError, match=rf"^llmsys\.\w+\.\w+: .*{message}"):
            raise ValueError(error)
        assert seconds < TIMEOUT_S / 2


def test_no_microbatches():
    for error, _ in run(2, attempt, {"pp": 2}, {}, {}, {}, []):
        assert "0 microbatches, expected at least 1" in error


@pytest.mark.parametrize("part", ["tensor", "stages"])
def test_a_plan_without_a_part(part):
    plan = {name: value for name, value in PLAN.items() if name != part}
    with pytest.raises(ValueError, match=rf"parallelize: a plan of \w+, recompute, expected one that says '{part}'"):
        parallelize(Llama(LlamaConfig(**SIZES)), plan, Mesh())


def test_a_plan_of_one_stage_alone_fits():
    """A pattern needs to match in the whole model, not in every stage of it."""
    names = {"up": "column", "gate": "column", "down": "row"}
    plan = {"tensor": {f"blocks.0.mlp.{name}": style for name, style in names.items()}}
    plan["recompute"] = ["blocks.3.attention"]
    found = run(4, attempt, {"pp": 2, "tp": 2}, {}, plan, {"recompute": "selective"}, batch(8))
    model = Llama(LlamaConfig(**SIZES), dtype=torch.float64)
    expected = sum(model.loss(*micro).item() for micro in batch(8)) / 2
    assert [loss for loss, _ in found] == pytest.approx([expected] * 4, abs=1e-12)
