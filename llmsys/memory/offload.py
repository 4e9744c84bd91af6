"""Tensors that the host keeps for a device, and copies between the two beside what the device computes."""

from __future__ import annotations

import torch
from torch import Tensor


class Ferry:
    """Copies between `device` and the host, one after another on a stream of their own; on a CPU they are done at once.

    ferry = Ferry(x.device)
    kept = ferry.empty(x.numel(), x.dtype)
    copy = ferry.copy(kept, x)       # and compute meanwhile
    copy.wait_on_host()
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Memory of the host, page-locked where a device is to copy from and to it by itself."""
        return torch.empty(numel, dtype=dtype, device="cpu", pin_memory=self._stream is not None)

    def copy(self, out: Tensor, x: Tensor) -> Copy:
        """`x` into `out`, of which one is the device's, after all that the device was asked for so far.

        Neither may be changed before the wait, nor memory of the host be freed.
        """
        if self._stream is None:
            out.copy_(x)
            return Copy(self.device, None)
        self._stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self._stream:
            out.copy_(x, non_blocking=True)
            event = self._stream.record_event()
        on_device = out if x.device.type == "cpu" else x
        on_device.record_stream(self._stream)
        return Copy(self.device, event)


class Copy:
    """A copy on its way."""

    def __init__(self, device: torch.device, event: torch.Event | None):
        self._device, self._event = device, event

    def wait_on_host(self) -> None:
        """Return when it is done."""
        if self._event is not None:
            self._event.synchronize()

    def wait_on_device(self) -> None:
        """Have what the device is asked for from here on run after it."""
        if self._event is not None:
            torch.accelerator.current_stream(self._device).wait_event(self._event)
