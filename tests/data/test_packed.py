import json
from itertools import islice

import pytest
import torch

from llmsys.data import PackedBatches, TokenFile

T = 16


def make(token_file, batch_size=8, **options):
    return PackedBatches(token_file, **{"batch_size": batch_size, "sequence_length": T, "seed": 5, **options})


def take(batches, count):
    return list(islice(batches, count))


def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for (input, target), (other_input, other_target) in zip(left, right, strict=True):
        assert torch.equal(input, other_input) and torch.equal(target, other_target)


def rows(token_file, split, count, **options):
    """The first `count` samples of a split, each as a tuple of its tokens."""
    batches = make(token_file, batch_size=1, split=split, **options)
    return [(*input[0].tolist(), int(target[0, -1])) for input, target in islice(batches, count)]


def windows(token_file):
    tokens = token_file.tokens.to(torch.int64).tolist()
    return [tuple(tokens[i : i + T + 1]) for i in range(0, len(tokens) - T, T)]


def test_shapes_and_shift(token_file):
    input, target = next(make(token_file))
    for tensor in (input, target):
        assert tensor.shape == (8, T) and tensor.dtype == torch.int64 and tensor.is_contiguous()
    assert torch.equal(input[:, 1:], target[:, :-1])
    assert all(
        (*row.tolist(), last.item()) in set(windows(token_file)) for row, last in zip(input, target[:, -1], strict=True)
    )


@pytest.mark.parametrize("held_out_every", [2, 7, 20])
def test_splits_part_the_windows(token_file, held_out_every):
    every = windows(token_file)
    held_out = every[held_out_every - 1 :: held_out_every]
    kept = [window for i, window in enumerate(every) if (i + 1) % held_out_every]
    for split, expected in {"train": kept, "validation": held_out, "all": every}.items():
        batches = make(token_file, split=split, held_out_every=held_out_every)
        assert batches.num_windows == len(expected)
        assert batches.batches_per_epoch == -(-len(expected) // 8)
        found = rows(token_file, split, len(expected), held_out_every=held_out_every)
        assert found != expected, "not shuffled"
        assert sorted(found) == sorted(expected)


def test_every_epoch_is_another_order_of_the_same(token_file):
    count = make(token_file).num_windows
    samples = rows(token_file, "train", 3 * count)
    epochs = [samples[i * count : (i + 1) * count] for i in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_seed_gives_the_order(token_file):
    assert_equal(take(make(token_file), 5), take(make(token_file), 5))
    assert not torch.equal(next(make(token_file))[0], next(make(token_file, seed=6))[0])


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_share_the_same_global_batches(token_file, world_size):
    count = 2 * make(token_file).batches_per_epoch + 3
    alone = take(make(token_file), count)
    ranks = [take(make(token_file, rank=rank, world_size=world_size), count) for rank in range(world_size)]
    joined = [tuple(torch.cat(parts) for parts in zip(*shares, strict=True)) for shares in zip(*ranks, strict=True)]
    assert ranks[0][0][0].shape == (8 // world_size, T)
    assert_equal(joined, alone)


@pytest.mark.parametrize("split", ["train", "validation", "all"])
def test_resume_equals_an_uninterrupted_run(token_file, split):
    start = make(token_file, split=split, batch_size=9)
    assert start.num_windows % 9, "an epoch must end within a batch for this test"
    per_epoch = start.batches_per_epoch
    whole = take(start, 3 * per_epoch)
    for position in (0, 1, per_epoch - 1, per_epoch, per_epoch + 1, 2 * per_epoch):
        batches = make(token_file, split=split, batch_size=9)
        take(batches, position)
        state = json.loads(json.dumps(batches.state_dict()))
        resumed = make(TokenFile(token_file.path), split=split, batch_size=9)
        resumed.load_state_dict(state)
        assert_equal(take(resumed, 3 * per_epoch - position), whole[position:])


def test_resume_on_other_ranks_and_batch_size(token_file):
    samples = rows(token_file, "train", 40)
    batches = make(token_file)
    take(batches, 2)
    for batch_size, world_size in [(8, 2), (12, 3), (4, 1)]:
        shares = []
        for rank in range(world_size):
            resumed = make(token_file, batch_size=batch_size, rank=rank, world_size=world_size)
            resumed.load_state_dict(batches.state_dict())
            shares.append(next(resumed))
        found = [
            (*row, last)
            for input, target in shares
            for row, last in zip(input.tolist(), target[:, -1].tolist(), strict=True)
        ]
        assert found == samples[16 : 16 + batch_size]


def test_states_of_other_runs_are_refused(token_file, texts, tokenizer, tmp_path):
    other_file = TokenFile.write(tmp_path / "other.tokens", texts[1:], tokenizer)
    batches = make(token_file)
    for other, key in [
        (make(other_file), "tokens_sha256"),
        (make(token_file, seed=6), "seed"),
        (make(token_file, sequence_length=T + 1), "sequence_length"),
        (make(token_file, split="all"), "split"),
        (make(token_file, held_out_every=19), "held_out_every"),
    ]:
        with pytest.raises(ValueError, match=f"load_state_dict: {key} is .* in the state, expected .*; resume with"):
            batches.load_state_dict(other.state_dict())
    good = batches.state_dict()
    for samples in (-1, 1.0, "3", True, None):
        with pytest.raises(ValueError, match="samples=.*, expected an int >= 0"):
            batches.load_state_dict({**good, "samples": samples})
    for state in ({}, {"samples": 3}, {**good, "extra": 1}):
        with pytest.raises(ValueError, match="load_state_dict: keys .*, expected"):
            batches.load_state_dict(state)
    assert batches.state_dict() == good


def test_bad_settings_are_refused(token_file):
    for options, message in [
        ({"split": "test"}, "split='test', expected one of train, validation, all"),
        ({"sequence_length": 0}, "sequence_length=0, expected at least 1"),
        ({"held_out_every": 1}, "held_out_every=1, expected at least 2"),
        ({"rank": 2, "world_size": 2}, "rank=2 of world_size=2, expected 0 <= rank < world_size"),
        ({"rank": -1}, "rank=-1 of world_size=1"),
        ({"batch_size": 0}, "batch_size=0 for world_size=1, expected a positive multiple"),
        ({"batch_size": 6, "world_size": 4}, "batch_size=6 for world_size=4"),
        ({"sequence_length": len(token_file)}, "0 windows of .*, none for train, expected at least 1; give more text"),
        ({"sequence_length": len(token_file) // 5, "split": "validation"}, "none for validation, expected at least 20"),
    ]:
        with pytest.raises(ValueError, match=f"llmsys.data.PackedBatches: .*{message}"):
            make(token_file, **options)


def test_one_window_is_enough(token_file):
    length = len(token_file) - 1
    input, target = next(make(token_file, batch_size=2, sequence_length=length))
    tokens = token_file.tokens.to(torch.int64)
    assert torch.equal(input, tokens[:-1].expand(2, -1)) and torch.equal(target, tokens[1:].expand(2, -1))
