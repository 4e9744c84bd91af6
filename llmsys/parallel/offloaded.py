"""A bucket whose shard lives on the host: there the optimizer updates it, and keeps its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llmsys.memory.offload import Copy, Ferry
from llmsys.parallel import collectives
from llmsys.parallel.collectives import Pending
from llmsys.parallel.flat import Flat


class OffloadedFlat(Flat):
    """As `Flat`; `shard`, its gradient and `total` are the host's, the device keeps its part of the parameters.

    Gradients go to the host as they are reduced, during backward, over all copies of the shard before. With several
    backwards a step the host adds them up.
    """

    def __init__(self, *args: Any, ferry: Ferry, **options: Any):
        self._ferry = ferry
        self._landings: list[Tensor] = []  # where gradients come to: the first one of a step, and each that is added
        self._landing: Copy | None = None
        self._returning: Copy | None = None
        super().__init__(*args, **options)

    def _new_shard(self, part: Tensor, dtype: torch.dtype, *, apart: bool) -> Tensor:
        self._part = part.clone() if apart else part
        # What returns is rounded first: less to copy.
        self._rounded = None if dtype == part.dtype else self._ferry.empty(part.numel(), part.dtype)
        return self._ferry.empty(part.numel(), dtype).copy_(part)

    # ---- parameters ----

    def send_back(self) -> None:
        if self._returning is not None:
            self._returning.wait_on_host()
        updated = self.shard.detach() if self._rounded is None else self._rounded.copy_(self.shard.detach())
        self._returning = self._ferry.copy(self._part, updated)

    def _own_part(self) -> Tensor:
        if self._returning is not None:
            self._returning.wait_on_device()
        return self._part

    def take_written(self) -> None:
        super().take_written()
        self._part.copy_(self.part_of(self.whole))

    # ---- gradients ----

    def finish_reduce(self) -> None:
        if self._reducing is None:
            return
        found, self._reducing = self._reducing.wait(), None
        if not self._whole_at_once:
            collectives.all_reduce(found, self.copies)
        self._land()
        place = 0 if self.total is None else 1
        if place == len(self._landings):
            self._landings.append(self._ferry.empty(found.numel(), found.dtype))
        self._landing = self._ferry.copy(self._landings[place], found)

    def _land(self) -> None:
        """What is on its way to the host is there, and added."""
        if self._landing is not None:
            self._landing.wait_on_host()
            self._landing = None
            self.total = self._landings[0] if self.total is None else self.total.add_(self._landings[1])

    def start_copies(self) -> Pending:
        self._land()
        if self.total is None:
            self.total = torch.zeros(self.shard.shape, dtype=self.gradient_dtype)
        total = self.total
        return Pending("all_reduce", self.copies, None, lambda: total)

    def begin(self) -> None:
        super().begin()
        self._land()
        self.total = None
