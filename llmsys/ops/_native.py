"""What native implementations share: where kernels come from, and how tensors become rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType

import torch  # before _C, so that the process has one OpenMP runtime: torch's

from llmsys import env

try:
    from llmsys import _C
except ImportError as error:
    raise ImportError(
        "llmsys._C, the native kernels, cannot be imported, expected it beside the package; "
        "run `make setup` in a checkout or `pip install .`"
    ) from error

ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")  # csrc/cpu/dispatch.h; _C.cpu.isas() are those of this machine
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/dtype.h

if (_isa := env.forced_cpu_isa()) is not None:
    _C.cpu.select_isa(_isa)


@cache
def matrix_unit(dtype: torch.dtype) -> str | None:
    """The instructions of this CPU that multiply matrices of `dtype` faster than those that llmsys's GEMM uses."""
    return _C.cpu.matrix_unit(DTYPES[dtype]) if dtype in DTYPES else None


@contextmanager
def instruction_set(isa: str) -> Iterator[None]:
    """Inside, CPU kernels run on `isa`; the instruction set in use before comes back after."""
    before = _C.cpu.isa()
    _C.cpu.select_isa(isa)
    try:
        yield
    finally:
        _C.cpu.select_isa(before)


@dataclass(frozen=True)
class Kernels:
    """The native functions for one device: `module.rms_norm_forward(…)` and the stream to run on."""

    name: str
    device: str
    module: ModuleType | None
    missing: str = ""  # why `module` is None

    def launch(self, function: str) -> Callable:
        """The native function of this name, given the stream that torch works on, its first argument."""
        if self.module is None:  # why_not has refused before this is called
            return lambda *args: None
        run = getattr(self.module, function)
        if self.device != "cuda":
            return partial(run, 0)
        return lambda *args: run(torch.cuda.current_stream().cuda_stream, *args)

    def floats(self, *shape: int, like: torch.Tensor) -> torch.Tensor:
        """An uninitialised float32 tensor where `like` is."""
        if self.device == "cpu":  # naming the device costs a microsecond
            return torch.empty(shape, dtype=torch.float32)
        return torch.empty(shape, dtype=torch.float32, device=like.device)

    def why_not(self, tensor: torch.Tensor, *args: object) -> str | None:
        """None when these kernels can read `tensor`, an op's first argument, else why not."""
        if tensor.dtype in DTYPES and self.module is not None:
            return None
        return self.missing if self.module is None else f"no kernel for {tensor.dtype}"


CPU = Kernels("cpu", "cpu", _C.cpu)
CUDA = Kernels("cuda", "cuda", getattr(_C, "cuda", None), "llmsys was built without nvcc")


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`x` and the distance between its rows, in elements; a copy where no one distance fits or rows have gaps.

    Shapes     x (..., D), any strides
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        pitch = _pitch(x)
        if pitch is not None:
            return x, pitch
    return x.contiguous(), x.shape[-1]


def matrix_of(x: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """`x` as a matrix of its last dimension's rows, and the distances between rows and between columns, of which one is
    1; a copy where the strides do not allow it.

    Shapes     x (..., D), any strides
    """
    if x.dim() == 2 and x.stride(0) == 1:
        return x, 1, x.stride(1)
    x, row_stride = rows_of(x)
    return x, row_stride, 1


def grouped_rows(*tensors: torch.Tensor | None) -> tuple:
    """`tensors` as rows at two distances: (inner, (tensor, stride, outer_stride), …). Row r of a tensor starts at
    r // inner · outer_stride + r % inner · stride, as the heads of a fused projection do. A tensor that no two
    distances fit is copied; one that is None lies at (None, 0, 0).

    Shapes     tensors (..., D) of one shape, any strides
    """
    given = [tensor for tensor in tensors if tensor is not None]
    inner = 1
    rows: list[tuple[torch.Tensor, int, int | None]]
    if all(tensor.is_contiguous() for tensor in given):
        rows = [(tensor, 0, tensor.shape[-1]) for tensor in given]
    else:
        given = [tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous() for tensor in given]
        rows = [(tensor, 0, _pitch(tensor)) for tensor in given]
        if any(pitch is None for _, _, pitch in rows):
            inner = given[0].shape[-2]
            given = [tensor if _pitch(tensor[..., 0, :]) is not None else tensor.contiguous() for tensor in given]
            rows = [(tensor, tensor.stride(-2), _pitch(tensor[..., 0, :])) for tensor in given]
    found = iter(rows)
    return inner, *((None, 0, 0) if tensor is None else next(found) for tensor in tensors)


def _pitch(x: torch.Tensor) -> int | None:
    """The one distance between consecutive rows of `x`, or None."""
    pitch, span = None, 0
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if pitch is None:
            pitch, span = stride, stride * size
        elif stride != span:
            return None
        else:
            span = stride * size
    return x.shape[-1] if pitch is None else pitch
