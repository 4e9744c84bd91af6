"""Shards on the host: what the optimizer does there changes nothing, to the bit."""

import pytest
import torch

from llmsys.models.llama import PLAN, Llama, LlamaConfig
from llmsys.optim import AdamW
from llmsys.parallel import Mesh, connect, parallelize
from tests.parallel.ranks import run

SHAPE = LlamaConfig(
    vocab_size=32, dim=16, num_layers=4, num_heads=2, num_kv_heads=1, head_dim=8, hidden_dim=24, tied_head=True
)


def trained(mesh, stage, dtypes, offload, by_bucket):
    model = Llama(SHAPE, dtype=torch.bfloat16)
    it = parallelize(model, PLAN, mesh, zero=stage, bucket_bytes=400, offload=offload, **dtypes)
    adamw = AdamW(it.shards(), lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        tokens, targets = torch.randint(32, (2, 8, 5), generator=generator).chunk(mesh.data.size, 1)[mesh.data.rank]
        micros = (
            1 if mesh.copies.size > 1 else 2
        )  # the host adds what was summed over copies, others sum what was added
        it.backward(list(zip(tokens.chunk(micros), targets.chunk(micros), strict=True)))
        it.clip_grad_norm(0.5)
        if by_bucket:
            it.step(adamw)
        else:
            adamw.step()
            it.gather()
    with it.whole():
        return {name: weight.clone() for name, weight in model.state_dict().items()}, it.zero


def compared(sizes, stage, dtypes):
    mesh = connect(**sizes)
    weights, _ = trained(mesh, stage, dtypes, False, False)
    for offload, by_bucket in [(False, True), (True, False), (True, True)]:
        theirs, zero = trained(mesh, stage, dtypes, offload, by_bucket)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=0, msg=f"{name} {offload} {by_bucket}")
        apart = {shard.untyped_storage().data_ptr() for shard in zero.shards()}
        apart &= {flat.whole.untyped_storage().data_ptr() for flat in zero._flats}
        assert not offload or not apart


@pytest.mark.parametrize("sizes", [{"dp": 2}, {"dp": 4, "shard": 2}, {"pp": 2, "dp": 2}], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_same_bits(sizes, stage):
    wide = {"master_dtype": torch.float32, "reduce_dtype": torch.float32}
    run(Mesh(**sizes).size, compared, sizes, stage, wide if stage % 2 else {})
