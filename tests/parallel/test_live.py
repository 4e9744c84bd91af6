"""What a stage holds while it runs is what the verifier counts: seen by the memory that autograd saved."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.parallel import connect, parallelize
from llmsys.parallel.schedule import SCHEDULES, orders
from llmsys.parallel.verify import verify
from tests.parallel.ranks import run

SIZES = {"vocab_size": 32, "dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "hidden_dim": 24}


class Watch:
    """After each run of a chunk's blocks, of how many runs something that was saved for backward is still in memory."""

    def __init__(self, model):
        self.saved, self.held, self.lasting = [], [], []
        self.run, model.run = model.run, self

    def __call__(self, *args):
        saved = []

        def pack(x):
            saved.append(StorageWeakRef(x.untyped_storage()))
            return x.detach()

        with saved_tensors_hooks(pack, lambda x: x):
            y = self.run(*args)
        self.saved.append(saved)
        lasting = {reference.cdata for reference in self.lasting}
        self.held.append(sum(any(not x.expired() and x.cdata not in lasting for x in each) for each in self.saved))
        return y

    def forget(self):
        """What is there still, between two steps, is no activation: weights, tables of positions."""
        self.lasting = [x for each in self.saved for x in each if not x.expired()]
        self.saved, self.held = [], []


def held(schedule, stages, micros, chunks_per_stage):
    mesh = connect(pp=stages)
    model = Llama(LlamaConfig(num_layers=stages * chunks_per_stage, **SIZES))
    free = SCHEDULES[schedule].chunks_per_stage is None
    parallel = parallelize(model, PLAN, mesh, schedule=schedule, chunks_per_stage=chunks_per_stage if free else None)
    watch = Watch(model)
    batch = [tuple(torch.randint(32, (2, 1, 4))) for _ in range(micros)]
    for _ in range(2):
        watch.forget()
        parallel.backward(batch)
        parallel.gather()
    return watch.held


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("stages, micros", [(2, 5), (4, 8)])
def test_a_stage_holds_what_the_verifier_counts(schedule, stages, micros):
    v = SCHEDULES[schedule].chunks_per_stage or 2
    actions = orders(schedule, stages, micros, v)
    report = verify(actions, micros=micros, chunks=stages * v, split=SCHEDULES[schedule].split)
    for row, live, found in zip(actions, report.live, run(stages, held, schedule, stages, micros, v), strict=True):
        assert found == [count for action, count in zip(row, live, strict=True) if action.kind == "F"]


def test_the_watch_sees_what_is_held():
    """Two runs whose activations are kept, then one after their backward."""
    model = Llama(LlamaConfig(num_layers=1, **SIZES))
    tokens, targets = torch.randint(32, (2, 1, 4))
    watch = Watch(model)
    losses = [model.loss(tokens, targets) for _ in range(2)]
    assert watch.held == [1, 2]
    sum(losses).backward()
    watch.forget()
    model.loss(tokens, targets)
    assert watch.held == [1]
