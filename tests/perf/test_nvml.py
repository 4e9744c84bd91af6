import pytest

from llmsys.perf import nvml

REASON = nvml.why_not()


@pytest.mark.skipif(REASON is None, reason="this machine has an NVIDIA driver and nvidia-ml-py")
def test_without_nvml_the_reason_is_said():
    with pytest.raises(RuntimeError, match="expected an NVIDIA GPU") as raised:
        nvml.gpu()
    assert REASON in str(raised.value)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(nvml.env, "has", lambda package: False)
    assert nvml.why_not() == "nvidia-ml-py is not installed"


@pytest.mark.skipif(REASON is not None, reason=REASON or "")
def test_gpu_state():
    state = nvml.gpu(0)
    assert state.name and 0 < state.sm_clock_hz <= state.sm_clock_max_hz
    with pytest.raises(ValueError, match="index=1000"):
        nvml.gpu(1000)
