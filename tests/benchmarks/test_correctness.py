"""The gate: what the reference itself errs, twice, plus one rounding; and nothing hidden in NaN."""

import pytest
import torch

from benchmarks.correctness import convert, fault, tensors

TRUTH = torch.linspace(-3, 3, 101, dtype=torch.float64)
ROUNDED = TRUTH.bfloat16()


def test_the_reference_itself_passes():
    assert fault(ROUNDED, ROUNDED, TRUTH, "forward") is None


def test_error_between_two_and_three_times_passes_backward_only():
    own = (ROUNDED.double() - TRUTH).abs().max()
    got = ROUNDED.clone()
    middle = 50  # the truth is 0 there, so one rounding adds nothing
    got[middle] = 2.5 * own
    assert "allowed" in fault(got, ROUNDED, TRUTH, "forward")
    assert fault(got, ROUNDED, TRUTH, "backward") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_must_be_where_the_reference_has_them(value):
    got = ROUNDED.clone()
    got[7] = value
    assert "NaN or infinity" in fault(got, ROUNDED, TRUTH, "forward")
    truth = TRUTH.clone()
    truth[7] = value
    assert fault(got, got, truth, "forward") is None
    assert "NaN or infinity" in fault(ROUNDED, got, truth, "forward")


def test_shape_and_dtype():
    assert "(50,)" in fault(ROUNDED[:50], ROUNDED, TRUTH, "forward")
    assert "float32" in fault(ROUNDED.float(), ROUNDED, TRUTH, "forward")


def test_a_missing_result_is_not_passed_over():
    with pytest.raises(ValueError):
        fault((ROUNDED,), (ROUNDED, ROUNDED), (TRUTH, TRUTH), "forward")


def test_convert_copies_and_keeps_structure():
    value = (
        [torch.ones(2, dtype=torch.bfloat16)],
        torch.ones(2, requires_grad=True),
        torch.ones(2, dtype=torch.int64),
        3,
    )
    copied = convert(value, torch.float64)
    assert [tensor.dtype for tensor in tensors(copied)] == [torch.float64, torch.float64, torch.int64]
    assert copied[1].requires_grad and copied[1].is_leaf and copied[3] == 3 and isinstance(copied[0], list)
    copied[0][0].zero_()
    assert value[0][0].sum() == 2
