"""Eager autograd of every op: one function, for whose backward the op plans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from llmsys.ops._impl import Impl

if TYPE_CHECKING:
    from llmsys.ops._op import Op

_keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph  # retain_graph=True of the backward under way


class Function(torch.autograd.Function):
    """Ops have subclasses of it of their own names."""

    @staticmethod
    def forward(ctx: Any, op: Op, implementation: Impl, apart: Any, *args: Any) -> Any:
        results = implementation.forward(*args)
        op._save(ctx, args, results)
        ctx.op, ctx.implementation, ctx.apart = op, implementation, apart
        return op._public(results)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        op = ctx.op
        # create_graph=True: only the reference's formula can itself be differentiated.
        implementation = op.implementations["reference"] if torch.is_grad_enabled() else ctx.implementation
        if ctx.apart is not None:
            return None, None, None, *ctx.apart.backward(op, ctx, grads, implementation, ctx.needs_input_grad[3:])
        run = implementation.backward
        if implementation.backward_once is not None and not _keeps_graph():
            run = implementation.backward_once
        return None, None, None, *op.backward(ctx, grads, run, ctx.needs_input_grad[3:])
