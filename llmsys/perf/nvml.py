"""What the NVIDIA driver says about a GPU, through the optional package `nvidia-ml-py`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from llmsys import env


@dataclass(frozen=True)
class GPU:
    """A GPU's name and its clocks at this moment."""

    name: str
    driver: str
    sm_clock_hz: float
    sm_clock_max_hz: float
    memory_clock_hz: float
    memory_total_bytes: int
    power_w: float
    temperature_c: int


def why_not() -> str | None:
    """None when the driver can be asked, else one short reason."""
    if not env.has("pynvml"):
        return "nvidia-ml-py is not installed"
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"the NVIDIA driver does not answer: {error}"
    pynvml.nvmlShutdown()
    return None


def gpu(index: int = 0) -> GPU:
    """The GPU number `index` as the driver counts them.

    Errors     RuntimeError if nvidia-ml-py or the driver is missing; ValueError if there is no such GPU
    """
    reason = why_not()
    if reason:
        raise RuntimeError(f"llmsys.perf.nvml.gpu: {reason}, expected an NVIDIA GPU and `pip install nvidia-ml-py`")
    with _session() as nvml:
        count = nvml.nvmlDeviceGetCount()
        if not 0 <= index < count:
            raise ValueError(f"llmsys.perf.nvml.gpu: index={index}, expected 0 to {count - 1}")
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        return GPU(
            name=nvml.nvmlDeviceGetName(handle),
            driver=nvml.nvmlSystemGetDriverVersion(),
            sm_clock_hz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            sm_clock_max_hz=nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM) * 1e6,
            memory_clock_hz=nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM) * 1e6,
            memory_total_bytes=nvml.nvmlDeviceGetMemoryInfo(handle).total,
            power_w=nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            temperature_c=nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        )


@contextmanager
def _session() -> Iterator[ModuleType]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()
