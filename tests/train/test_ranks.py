"""A job of ranks has the losses of one process, and each goes on from the other's checkpoints, in any layout."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmsys.data import PackedBatches, TokenFile
from llmsys.models import LlamaConfig
from llmsys.parallel import Mesh, connect
from llmsys.train.checkpoint import latest_checkpoint
from llmsys.train.config import ParallelConfig
from llmsys.train.ranks import engine, in_parts
from llmsys.train.trainer import Trainer, fused
from tests.parallel.ranks import run

from .conftest import TINY

CONFIG = dataclasses.replace(
    TINY,
    model=LlamaConfig(
        vocab_size=300, dim=32, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8, hidden_dim=48,
        max_sequence_length=32, tied_head=True,
    ),
    accumulation=2,
)  # fmt: skip
LAYOUTS = [
    ParallelConfig(dp=4),
    ParallelConfig(tp=4, sequence_parallel=True, overlap_chunks=2),
    ParallelConfig(pp=4, recompute="full"),
    ParallelConfig(pp=2, dp=2, zero=2, schedule="interleaved_1f1b", chunks_per_stage=2),
    ParallelConfig(dp=2, tp=2, zero=1, micro_batches=2, recompute="selective", offload=True),
    ParallelConfig(pp=2, tp=2, zero=1, schedule="zb_v", sequence_parallel=True),
    ParallelConfig(pp=2, dp=2, zero=3, schedule="zb_h1"),
]
NEAR = {"rtol": 0, "atol": 1e-10}


def trainer_of(folder, config, mesh=None):
    rank, size = (mesh.data.rank, mesh.data.size) if mesh else (0, 1)
    batches = [
        PackedBatches(
            *(TokenFile(folder / "tokens"), config.data.batch_size, config.data.sequence_length),
            seed=config.seed,
            rank=rank,
            world_size=size,
            split=split,
        )
        for split in ("train", "validation")
    ]
    trains = engine(config, torch.float64, mesh) if mesh else fused(config, torch.float64)
    return Trainer(config, trains, *batches)


def curve(trainer, folder, save_after=2, steps=4):
    """Losses, norms and the validation loss of `steps` steps; a checkpoint after `save_after`."""
    numbers = []
    while trainer.steps_done < steps:
        record = trainer.step()
        numbers += [record.loss, record.grad_norm]
        if trainer.steps_done == save_after:
            trainer.save(folder)
    return numbers + [trainer.validate()]


def in_layouts(folder, alone):
    """Of each layout: its curve, its checkpoint's steps gone on from in it, and one process's."""
    found = []
    for number, layout in enumerate(LAYOUTS):
        config = dataclasses.replace(CONFIG, parallel=layout)
        mesh = connect(pp=layout.pp, dp=layout.dp, tp=layout.tp)
        own = folder / f"layout-{number}"
        first = trainer_of(folder, config, mesh)
        found.append([curve(first, own)])
        for checkpoint in (latest_checkpoint(own), alone):
            second = trainer_of(folder, config, mesh)
            second.restore(checkpoint)
            found[-1].append(curve(second, own, save_after=None))
        found[-1].append(first.engine.sent({"pp": 1, "copies": 2, "tp": 3, "model": 4}))
    return found


def test_any_layout_trains_as_one_process(tokens, tmp_path):
    for path in Path(tokens.path).parent.glob("tokens*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    trainer = trainer_of(tmp_path, CONFIG)
    expected = torch.tensor(curve(trainer, tmp_path / "alone"), dtype=torch.float64)
    alone = latest_checkpoint(tmp_path / "alone")
    for theirs in run(4, in_layouts, tmp_path, alone):
        for layout, (whole, from_own, from_alone, sent) in zip(LAYOUTS, theirs, strict=True):
            said = {"msg": lambda text, layout=layout: f"{layout}: {text}"}
            torch.testing.assert_close(torch.tensor(whole, dtype=torch.float64), expected, **NEAR, **said)
            assert from_own == whole[4:], layout  # bit for bit
            torch.testing.assert_close(torch.tensor(from_alone, dtype=torch.float64), expected[4:], **NEAR, **said)
            assert sent == {"pp": 4, "dp": 8, "tp": 12, "other": 16}
    for number, layout in enumerate(LAYOUTS):
        checkpoint = latest_checkpoint(tmp_path / f"layout-{number}")
        for name in ("model", "optimizer"):
            ours, theirs = (load_file(path / f"{name}.safetensors") for path in (alone, checkpoint))
            torch.testing.assert_close(theirs, ours, **NEAR, msg=lambda text, layout=layout: f"{layout}: {text}")
        second = trainer_of(tmp_path, CONFIG)
        second.restore(checkpoint)
        again = curve(second, tmp_path, save_after=None)
        torch.testing.assert_close(torch.tensor(again, dtype=torch.float64), expected[4:], **NEAR)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tp": 3}, r"has 4 heads, expected a multiple of the 3 ranks of tp"),
        ({"tp": 8}, r"has 300 tokens, expected a multiple of the 8 ranks|has 4 heads"),
        ({"pp": 8}, r"4 blocks for 8 stages, expected 1 to 4"),
        ({"pp": 2, "schedule": "1f2b"}, r"schedule '1f2b', expected one of gpipe"),
        ({"dp": 2, "zero": 7}, r"stage=7, expected 0"),
        ({"recompute": "some"}, r"recompute.*'some', expected"),
    ],
)
def test_a_layout_that_the_model_cannot_be_cut_by(layout, message):
    parallel = ParallelConfig(**layout, micro_batches=1)
    config = dataclasses.replace(CONFIG, parallel=parallel)
    with pytest.raises(ValueError, match=message):
        in_parts(config, torch.float32, Mesh(pp=parallel.pp, dp=parallel.dp, tp=parallel.tp), "cpu")
