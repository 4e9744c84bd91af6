"""Bytes that each rank of a whole model sends in a step, by axis, are those of the formulas.

Of Ψ bytes of parameters that a rank's stage and part have, N ranks on the axis, activations of A bytes, m microbatches:

    data, shard    2·(N − 1)/N·Ψ under ZeRO 0 and 1; (1 + m)·(N − 1)/N·Ψ under 2, where each of several chunks is sent
                   by itself, and an embedding, to which no W comes, once; 3m·(N − 1)/N·Ψ under 3, less what is used
                   again at once
    copies         2·(M − 1)/M of this rank's shard, M the copies of each
    tp             2·(N − 1)/N·A·m forward and backward at each region, the embedding and the head; sequences the same
    pp             A·m for each chunk whose next, or last, is on another stage: once in 1F1B, v times interleaved
"""

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import Mesh, connect, counted, parallelize
from llmsys.parallel.schedule import SCHEDULES
from tests.parallel.ranks import run

SHAPE = LlamaConfig(vocab_size=128, dim=64, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=16, hidden_dim=64)
ROWS, LENGTH = 4, 64  # of a microbatch
ACTIVATIONS = ROWS * LENGTH * SHAPE.dim * 4

# Sizes of the mesh, options of `parallelize`, microbatches.
CASES = [
    ({"dp": 3}, {}, 1),
    ({"dp": 4}, {"zero": 1}, 2),
    ({"dp": 2}, {"zero": 2}, 1),
    ({"dp": 2}, {"zero": 2}, 3),
    ({"dp": 2}, {"zero": 3}, 1),
    ({"dp": 4}, {"zero": 3}, 3),
    ({"dp": 4, "shard": 2}, {"zero": 1}, 1),
    ({"dp": 4, "shard": 2}, {"zero": 2}, 2),
    ({"tp": 2}, {}, 1),
    ({"tp": 2}, {"sequence_parallel": True}, 1),
    ({"tp": 4}, {}, 2),
    ({"tp": 4}, {"sequence_parallel": True}, 2),
    ({"tp": 2}, {"sequence_parallel": True, "overlap_chunks": 2}, 1),
    ({"tp": 2}, {"overlap_chunks": 2}, 1),
    ({"pp": 2}, {}, 4),
    ({"pp": 4}, {"schedule": "gpipe"}, 2),
    ({"pp": 2}, {"schedule": "interleaved_1f1b", "chunks_per_stage": 2}, 4),
    ({"pp": 2}, {"schedule": "zb_h2"}, 4),
    ({"pp": 2}, {"schedule": "zb_v"}, 4),
    ({"pp": 2, "dp": 2}, {"zero": 1, "schedule": "interleaved_1f1b", "chunks_per_stage": 2}, 2),
    ({"pp": 2, "dp": 2}, {"zero": 2, "schedule": "interleaved_1f1b", "chunks_per_stage": 2}, 4),
    ({"pp": 2, "tp": 2, "dp": 2}, {"zero": 1}, 4),
    ({"pp": 2, "tp": 2, "dp": 2}, {"zero": 2, "sequence_parallel": True, "schedule": "zb_v"}, 2),
]


def sent(sizes, options, micros):
    """In a step that is not the first, by axis; and how many bytes of parameters are whole on this rank."""
    mesh = connect(**sizes)
    model = Llama(SHAPE)
    parallel = parallelize(model, PLAN, mesh, **options)
    batch = list(torch.randint(SHAPE.vocab_size, (micros, 2, ROWS, LENGTH)))
    for _ in range(2):
        with counted() as counter:
            parallel.backward(batch)
            parallel.gather()
    with parallel.whole():
        return dict(counter), {name: p.nbytes for name, p in model.named_parameters()}


def expected(mesh, options, micros, parameters):
    total, zero = sum(parameters.values()), options.get("zero", 0)
    found = dict.fromkeys(("data", "shard", "copies", "tp", "pp"), 0.0)
    schedule = SCHEDULES[options.get("schedule", "1f1b")]
    v = schedule.chunks_per_stage or options["chunks_per_stage"]
    if zero == 0:
        found["data"] = 2 * others(mesh.data) * total
    else:
        # The gradients, and the parameters after the step. Under 3 these before each forward and each backward; the
        # backward of the last unit follows its forward, and the embedding's reads none of it.
        passes = {1: 2, 2: micros + 1, 3: 3 * micros}[zero]
        kept = (parameters["embedding.weight"] + parameters["head.weight"]) * micros if zero == 3 else 0
        if zero == 2 and schedule.split and v > 1:
            kept = parameters.get("embedding.weight", 0) * (micros - 1)
        found["shard"] = others(mesh.shard) * (passes * total - kept)
        found["copies"] = 2 * others(mesh.copies) * total / mesh.shard.size

    num_chunks = mesh.pp.size * v
    stages = [schedule.stage_of(chunk, mesh.pp.size) for chunk in range(num_chunks)]
    here = [chunk for chunk, stage in enumerate(stages) if stage == mesh.pp.rank]
    blocks = SHAPE.num_layers // num_chunks * len(here)
    exchanges = 4 * blocks + (0 in here) + (num_chunks - 1 in here)
    found["tp"] = exchanges * 2 * others(mesh.tp) * ACTIVATIONS * micros

    beside = [other for chunk in here for other in (chunk - 1, chunk + 1)]
    hops = sum(0 <= other < num_chunks and other not in here for other in beside)
    part = mesh.tp.size if options.get("sequence_parallel") else 1
    found["pp"] = hops * ACTIVATIONS / part * micros
    return {name: num_bytes for name, num_bytes in found.items() if num_bytes}


def others(axis):
    return (axis.size - 1) / axis.size


@pytest.mark.parametrize("sizes, options, micros", CASES, ids=str)
def test_bytes_are_those_of_the_formulas(sizes, options, micros):
    for rank, (found, parameters) in enumerate(run(Mesh(**sizes).size, sent, sizes, options, micros)):
        assert found == pytest.approx(expected(Mesh(**sizes, rank=rank), options, micros, parameters), rel=0.01)


def test_sequences_send_what_tensors_do():
    """But for the gradients of norms, of which each rank has seen a part of the tokens."""
    tensors, sequences = (run(2, sent, {"tp": 2}, {"sequence_parallel": way}, 1)[0][0]["tp"] for way in (False, True))
    norms = (2 * SHAPE.num_layers + 1) * SHAPE.dim * 4
    assert sequences == tensors + norms
