import dataclasses

import pytest
import torch

from llmsys.data import Corpus, PackedBatches, TokenFile, Tokenizer
from llmsys.models import LlamaConfig
from llmsys.train.config import DataConfig, OptimizerConfig, TrainConfig
from llmsys.train.trainer import Trainer, fused

TINY = TrainConfig(
    name="tiny",
    model=LlamaConfig(
        vocab_size=300, dim=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, hidden_dim=48,
        max_sequence_length=32, tied_head=True,
    ),
    data=DataConfig(sequence_length=32, batch_size=4),
    optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2),
    steps=10,
    precision="float32",
    tensorboard=False,
    validation_batches=2,
    generated_tokens=8,
)  # fmt: skip

TEXT = [
    f"Once there were {i} ducks and {i * i % 97} geese on pond number {i * 7 % 31}; they swam to {i * 3}.\n"
    for i in range(400)
]


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """These tensors are too small to share; on a busy machine threads would wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    corpus = Corpus("ducks and geese", lambda: TEXT)
    TokenFile.write(folder / "tokens", corpus, Tokenizer.train(corpus, TINY.model.vocab_size))
    return TokenFile(folder / "tokens")


@pytest.fixture
def make_trainer(tokens):
    """A trainer of the tiny config with `changes`, made by `engine` in `dtype`."""

    def make(dtype=None, engine=fused, **changes):
        config = dataclasses.replace(TINY, **changes)
        batches = [
            PackedBatches(tokens, config.data.batch_size, config.data.sequence_length, seed=config.seed, split=split)
            for split in ("train", "validation")
        ]
        return Trainer(config, engine(config, dtype or torch.float32), *batches)

    return make
