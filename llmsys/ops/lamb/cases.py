"""LAMB: inputs, sizes, cost."""

from __future__ import annotations

from llmsys.ops.adamw.cases import LARGE, SMALL, VARIANTS, inputs, traffic as one_pass

__all__ = ["LARGE", "SMALL", "VARIANTS", "flops", "inputs", "traffic"]


def traffic(direction: str, params: list, grads: list, exp_avgs: list, exp_avg_sqs: list, masters: list, *_) -> int:
    """Bytes that must move: AdamW's, and moments and p in again, once the lengths are known."""
    again = [*exp_avgs, *exp_avg_sqs, *(masters or params)]
    return one_pass(direction, params, grads, exp_avgs, exp_avg_sqs, masters) + sum(tensor.nbytes for tensor in again)


def flops(direction: str, params: list, *_: object) -> int:
    """A scale; three for m, four for v; six for the direction, twice; four for the lengths, two for the weight."""
    return 26 * sum(param.numel() for param in params)
