"""Packed batches: the token stream cut in windows, shuffled, and shared among ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from llmsys.data.permutation import Permutation
from llmsys.data.token_file import TokenFile

SPLITS = ("train", "validation", "all")


class PackedBatches:
    """An endless iterator of `(input, target)`, each int64 (batch_size // world_size, sequence_length).

    Windows     window w is tokens[w·T : w·T + T + 1], so every token but the first is a target once; documents run on
                behind each other, parted by end-of-text; a rest shorter than a window is left out
    Splits      every `held_out_every`-th window is "validation", the others are "train"; "all" holds out nothing.
                The choice depends on no seed, and both splits cover the corpus evenly
    Order       each epoch is a permutation of the split, given by (seed, epoch). Batches run on across the end of an
                epoch, so nothing is dropped
    Ranks       `batch_size` counts the sequences of all `world_size` data-parallel ranks; rank r gets the r-th equal
                slice, so the global batch does not depend on how many share it
    Resume      the position is a number of samples: after `load_state_dict` the batches are those of an uninterrupted
                run, also with another batch_size or world_size
    Errors      ValueError for numbers out of range, and if the split has no window
    """

    def __init__(
        self,
        token_file: TokenFile,
        batch_size: int,
        sequence_length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        split: str = "train",
        held_out_every: int = 20,
    ):
        def check(right: bool, given: str, expected: str):
            if not right:
                raise ValueError(f"llmsys.data.PackedBatches: {given}, expected {expected}")

        check(split in SPLITS, f"split={split!r}", f"one of {', '.join(SPLITS)}")
        check(sequence_length >= 1, f"sequence_length={sequence_length}", "at least 1")
        check(held_out_every >= 2, f"held_out_every={held_out_every}", "at least 2")
        check(0 <= rank < world_size, f"rank={rank} of world_size={world_size}", "0 <= rank < world_size")
        check(
            batch_size >= 1 and batch_size % world_size == 0,
            f"batch_size={batch_size} for world_size={world_size}",
            "a positive multiple of world_size",
        )
        self.token_file = token_file
        self.batch_size = batch_size
        self.sequence_length = sequence_length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.split = split
        self.held_out_every = held_out_every
        self.samples = 0
        num_windows = (len(token_file) - 1) // sequence_length
        num_held_out = num_windows // held_out_every
        self.num_windows = {"train": num_windows - num_held_out, "validation": num_held_out, "all": num_windows}[split]
        check(
            self.num_windows >= 1,
            f"{len(token_file):,} tokens, {num_windows} windows of sequence_length={sequence_length}, none for {split}",
            f"at least {held_out_every if split == 'validation' else 1}; give more text or a shorter sequence_length",
        )

    @property
    def batches_per_epoch(self) -> int:
        """Batches that cover the split once; the last one may reach into the next epoch."""
        return -(-self.num_windows // self.batch_size)

    def __iter__(self) -> PackedBatches:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        share = self.batch_size // self.world_size
        first = self.samples + self.rank * share
        windows = torch.empty(share, self.sequence_length + 1, dtype=torch.int64)
        for row, window in zip(windows, self._windows(first, share), strict=True):
            start = window * self.sequence_length
            row.copy_(self.token_file.tokens[start : start + self.sequence_length + 1])
        self.samples += self.batch_size
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def state_dict(self) -> dict[str, int | str]:
        """The position and what it is a position in: plain values, the same on every rank."""
        return {"samples": self.samples, **self._identity()}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue at the position of `state`. ValueError if it belongs to other data, seed, length or split."""
        name = "llmsys.data.PackedBatches.load_state_dict"
        identity = self._identity()
        if set(state) != {"samples", *identity}:
            raise ValueError(f"{name}: keys {sorted(state)}, expected {sorted(['samples', *identity])}")
        for key, value in identity.items():
            if state[key] != value:
                raise ValueError(
                    f"{name}: {key} is {state[key]!r} in the state, expected {value!r}; "
                    f"resume with the data and settings of the saved run"
                )
        samples = state["samples"]
        if type(samples) is not int or samples < 0:
            raise ValueError(f"{name}: samples={samples!r}, expected an int >= 0")
        self.samples = samples

    def _identity(self) -> dict[str, int | str]:
        return {
            "tokens_sha256": self.token_file.sha256,
            "sequence_length": self.sequence_length,
            "seed": self.seed,
            "split": self.split,
            "held_out_every": self.held_out_every,
        }

    def _windows(self, first: int, count: int) -> Iterator[int]:
        """Window numbers of samples `first` to `first + count`, counted from the start of training."""
        order = None
        for sample in range(first, first + count):
            epoch, position = divmod(sample, self.num_windows)
            if order is None or position == 0:
                order = Permutation(self.num_windows, self.seed, epoch)
            index = order[position]
            if self.split == "validation":
                yield index * self.held_out_every + self.held_out_every - 1
            elif self.split == "train":
                yield index + index // (self.held_out_every - 1)
            else:
                yield index
