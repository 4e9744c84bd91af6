"""One op = one contract and an ordered list of implementations.

The contract is a pair of schemas in the notation of `torch.library`:

    forward    (Tensor x, Tensor weight, float eps=1e-6) -> (Tensor y, Tensor rstd)
    backward   (Tensor dy, Tensor x, Tensor weight, Tensor rstd, float eps) -> (Tensor dx, Tensor dweight)

Everything else follows from the names. `y` is public because the backward takes its gradient `dy`; `rstd` is not: it is
kept for the backward. What the backward asks for is saved; `dx` and `dweight` go to `x` and `weight`. A `Tensor?` may
be None, and has a gradient where it is not. A backward that takes `bool needs_dx` is told whether anyone waits for
`dx`; where nobody does, what it returns there is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from operator import itemgetter
from typing import Any

import torch

from llmsys import env
from llmsys.ops._apart import set_apart
from llmsys.ops._function import Function
from llmsys.ops._impl import Explanation, Impl, first_tensor, triton
from llmsys.ops._schema import Schema

__all__ = [
    "Explanation",
    "Impl",
    "InPlaceOp",
    "ListOp",
    "Op",
    "check_forced",
    "explain",
    "get",
    "names",
    "triton",
    "use",
]

_library = torch.library.Library("llmsys", "FRAGMENT")
_ops: dict[str, Op] = {}
_forced: ContextVar[dict[str, str]] = ContextVar("llmsys_forced")
_from_environment = env.forced_implementations()
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_compiling, _is_recording = torch.compiler.is_compiling, torch.is_grad_enabled
_in_functorch = torch._C._are_functorch_transforms_active  # as torch.autograd.Function.apply asks it
_EXPLAIN = env.explain_choices()


class _Candidates(dict):
    """Device type → the implementations for it, in order; made at first use of each device."""

    def __init__(self, implementations: list[Impl]) -> None:
        self.implementations = implementations

    def __missing__(self, device: str) -> list[Impl]:
        self[device] = [i for i in self.implementations if i.devices is None or device in i.devices]
        return self[device]


class Op:
    """The contract of one op: calling it picks an implementation, runs it, and records its gradient.

    Inside `torch.func` transforms, and for gradients of gradients (`create_graph=True`), the reference runs: only its
    formula can be differentiated further.
    """

    def __init__(
        self,
        name: str,
        forward: str,
        backward: str | None,
        implementations: list[Impl],
        # {"residual": "dx"}: dx is residual's gradient as well; {"residual": "dy"}: it is what arrives at y
        shared_gradients: dict[str, str] | None = None,
        # The weights whose gradients can wait, or go to a sink (llmsys.ops.deferred, .sink); tensors alone come before
        # them in the schemas
        deferrable: tuple[str, ...] = (),
    ) -> None:
        self.name = name
        self.implementations = {implementation.name: implementation for implementation in implementations}
        self.forward_schema = Schema(forward)
        self.backward_schema = Schema(backward) if backward else None
        self._candidates = _Candidates(implementations)
        self._explained: set[str] = set()
        arguments = self.forward_schema.arguments
        self.written = [i for i, argument in enumerate(arguments) if argument.written]
        self.tensors = [i for i, argument in enumerate(arguments) if argument.type in ("Tensor", "Tensor?")]
        self._starts_with_tensor = arguments[0].type == "Tensor"
        self.differentiable: list[int] = []  # the arguments that get a gradient
        self.deferrable = [self.forward_schema.names.index(name) for name in deferrable]
        _ops[name] = self
        self._define_node()
        if self.backward_schema:
            self._plan_backward(self.backward_schema, shared_gradients or {})

    # ---- selection ----

    def select(self, *args: Any) -> Impl:
        """The first implementation that can run on these arguments, or the forced one."""
        forced = _forced.get(_from_environment)
        if forced and self.name in forced:
            return self._forced_implementation(forced[self.name], args)
        first = args[0] if self._starts_with_tensor else first_tensor(args)
        for implementation in self._candidates["cpu" if first.is_cpu else first.device.type]:
            if implementation.why_not(*args) is None and implementation.slower(args) is None:
                if _EXPLAIN and implementation.name not in self._explained:
                    self._explained.add(implementation.name)
                    print(self.explain(*args))
                return implementation
        raise RuntimeError(f"llmsys.{self.name}: no implementation can run\n{self.explain(*args)}")

    def explain(self, *args: Any) -> Explanation:
        """Which implementation these arguments would get, without running it."""
        args = self.forward_schema.complete(self.name, args)
        device = first_tensor(args).device.type
        forced = _forced.get(_from_environment).get(self.name)
        reasons = {
            name: implementation.reason(device, args) or (forced is None and implementation.slower(args)) or None
            for name, implementation in self.implementations.items()
        }
        can_run = (name for name, reason in reasons.items() if reason is None and forced in (None, name))
        return Explanation(self.name, next(can_run, None), reasons)

    def _forced_implementation(self, name: str, args: tuple) -> Impl:
        if name not in self.implementations:
            raise ValueError(f"llmsys.{self.name}: forced to {name!r}, expected one of {list(self.implementations)}")
        reason = self.implementations[name].reason(first_tensor(args).device.type, args)
        if reason is not None:
            raise RuntimeError(f"llmsys.{self.name}: forced to {name!r}, which cannot run: {reason}")
        return self.implementations[name]

    # ---- calling ----

    def __call__(self, *args: Any, out: Any = None) -> Any:
        """Run on `args`, which the public function has checked: every argument of the schema, in order."""
        needs_grad, plain = False, not _is_compiling()
        for i in self.tensors:
            tensor = args[i]
            if tensor is not None:
                needs_grad = needs_grad or tensor.requires_grad
                plain = plain and type(tensor) in _PLAIN and not tensor.is_neg()
        if not plain:  # a graph that is traced, a subclass, a view of minus what is in memory: PyTorch takes a node
            if out is not None:
                raise ValueError(
                    f"llmsys.{self.name}: out= given under torch.compile, for a subclass of torch.Tensor or for a "
                    "negated view (tensor.is_neg()), expected none"
                )
            return self._public(self.node(*args))
        if args[0].is_cuda and args[0].device.index != torch.cuda.current_device():
            with torch.cuda.device(args[0].device):  # kernels launch on the current device
                return self(*args, out=out)
        if _in_functorch():  # torch.func transforms what is plain PyTorch, and nothing else
            return self._public(self.implementations["reference"].forward(*args, out=out))
        implementation = self.select(*args)
        if needs_grad and self.backward_schema and _is_recording():
            if out is not None:
                raise ValueError(
                    f"llmsys.{self.name}: out= given while a gradient is recorded, expected none; "
                    "use torch.no_grad() or tensors without requires_grad"
                )
            apart = None
            if self.deferrable:
                args, apart = set_apart(self, args)
            return self._record(self, implementation, apart, *args)
        if implementation.infer is not None:
            return implementation.infer(*args, out=out)
        return self._public(implementation.forward(*args, out=out))

    def _public(self, results: Any) -> Any:
        """The public ones among the forward's results."""
        if not isinstance(results, (tuple, list)):
            return results
        return results[0] if self.num_public == 1 else tuple(results[: self.num_public])

    # ---- gradient: one autograd.Function in eager code, the same two steps for the node ----

    def _plan_backward(self, backward: Schema, shared_gradients: dict[str, str]) -> None:
        forward = self.forward_schema
        self.num_public = sum(f"d{name}" in backward.names for name in forward.results)
        sources = {name: i for i, name in enumerate((*forward.names, *forward.results))}
        gradients = {f"d{name}": i for i, name in enumerate(forward.results)}
        # For each argument of the backward: the gradient of a result, a saved tensor, a constant, or whether a gradient
        # is needed.
        self._backward_plan: list[tuple[str, int]] = []
        saved: list[int] = []
        constants: list[int] = []
        for argument in backward.arguments:
            if argument.name in gradients:
                self._backward_plan.append(
                    ("optional" if argument.type == "Tensor?" else "grad", gradients[argument.name])
                )
            elif argument.type in ("Tensor", "Tensor?"):
                self._backward_plan.append(("saved", len(saved)))
                saved.append(sources[argument.name])
            elif argument.name.startswith("needs_d"):
                self._backward_plan.append(("needed", sources[argument.name.removeprefix("needs_d")]))
            else:
                self._backward_plan.append(("constant", len(constants)))
                constants.append(sources[argument.name])
        self._pick_saved, self._pick_constants = _picker(saved), _picker(constants)
        # For each argument of the forward: which is its gradient, of the backward's results and then those that arrive.
        received = {name: i for i, name in enumerate((*backward.results, *gradients))}
        self._gradient_of = [received.get(shared_gradients.get(name, f"d{name}")) for name in forward.names]
        self.differentiable = [i for i, gradient in enumerate(self._gradient_of) if gradient is not None]
        # Past Function.apply's own wrapper, a third of its cost: that is for functorch, which __call__ has ruled out.
        function = type(self.name, (Function,), {})
        self._record = super(torch.autograd.Function, function).apply  # type: ignore[misc]
        torch.library.register_autograd(
            f"llmsys::{self.name}",
            lambda ctx, *grads: self.backward(ctx, grads, self.backward_node, ctx.needs_input_grad),
            setup_context=lambda ctx, inputs, output: self._save(ctx, inputs, output),
            lib=_library,
        )

    def _save(self, ctx: Any, inputs: tuple, results: Any) -> None:
        if not isinstance(results, (tuple, list)):
            results = (results,)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*self._pick_saved((*inputs, *results)))
        ctx.constants = self._pick_constants(inputs)
        if self.num_public > 1:  # a result that nothing reads gets no gradient: remember the zeros that it stands for
            ctx.likes = [(result.shape, result.dtype, result.device) for result in results[: self.num_public]]

    def backward(self, ctx: Any, grads: tuple, run: Callable, needed: tuple[bool, ...]) -> tuple:
        if all(grad is None for grad in grads):
            return (None,) * len(self._gradient_of)
        results = run(*self.arguments(ctx, ctx.saved_tensors, grads, needed))
        return self.gradients(results, grads, needed)

    def arguments(self, ctx: Any, saved: tuple, grads: tuple, needed: tuple[bool, ...]) -> list:
        """Those of the implementation's backward."""
        args = []
        for kind, i in self._backward_plan:
            if kind == "saved":
                args.append(saved[i])
            elif kind == "constant":
                args.append(ctx.constants[i])
            elif kind == "needed":
                args.append(needed[i])
            elif kind == "grad" and grads[i] is None:
                shape, dtype, device = ctx.likes[i]
                args.append(torch.zeros(shape, dtype=dtype, device=device))
            else:
                args.append(None if grads[i] is None else grads[i].resolve_neg())
        return args

    def gradients(self, results: Any, grads: tuple, needed: tuple[bool, ...]) -> tuple:
        """Of each argument of the forward, where it is needed."""
        results = (*results, *grads) if isinstance(results, (tuple, list)) else (results, *grads)
        return tuple(
            results[i] if i is not None and need else None for i, need in zip(self._gradient_of, needed, strict=True)
        )

    # ---- torch.library node ----

    def _define_node(self) -> None:
        self.num_public = len(self.forward_schema.results)
        self.node = self._define(
            self.name, self.forward_schema, lambda *args: self.select(*args).forward(*args), "forward"
        )
        if self.backward_schema:
            self.backward_node = self._define(
                f"{self.name}_backward", self.backward_schema, self._run_backward_node, "backward"
            )

    def _define(self, name: str, schema: Schema, run: Callable, direction: str) -> Any:
        _library.define(name + schema.text, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, run, "CompositeExplicitAutograd")
        # The reference, run on tensors without data, tells the shapes.
        torch.library.register_fake(
            f"llmsys::{name}", getattr(self.implementations["reference"], direction), lib=_library
        )
        return getattr(torch.ops.llmsys, name).default

    def _run_backward_node(self, *args: Any) -> Any:
        # Selection asks about forward arguments; one that the backward does not keep is stood in for by the first
        # gradient, which has its shape, dtype and device.
        assert self.backward_schema is not None
        known = dict(zip(self.backward_schema.names, args, strict=True))
        first = first_tensor(args)
        backward = self.select(*[known.get(name, first) for name in self.forward_schema.names]).backward
        assert backward is not None
        return backward(*args)


class InPlaceOp(Op):
    """An op that writes tensors that it is given, or works over lists of them: no gradient and no `out=`."""

    def __call__(self, *args: Any, out: None = None) -> Any:
        """Run on `args`, which the public function has checked: every argument of the schema, in order."""
        if torch.compiler.is_compiling() or not all(
            type(tensor) in _PLAIN and not tensor.is_neg() for tensor in _tensors(args)
        ):
            return self.node(*args)
        if _in_functorch():
            return self.implementations["reference"].forward(*args)
        result = self.select(*args).forward(*args)
        torch.autograd.graph.increment_version(_tensors([args[i] for i in self.written]))
        return result


class ListOp(InPlaceOp):
    """An op over lists of tensors, in place or into a new tensor."""


def _tensors(args: Iterable[Any]) -> list[torch.Tensor]:
    """Those among `args` and in the lists among them."""
    found = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, list):
            found += arg
    return found


def _picker(indices: list[int]) -> Callable[[tuple], tuple]:
    """values → the tuple of those at `indices`."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return (lambda values: (values[indices[0]],)) if indices else (lambda values: ())


def get(op: str) -> Op:
    """The op of this name."""
    if op not in _ops:
        raise ValueError(f"llmsys.ops.get: {op!r}, expected one of {sorted(_ops)}")
    return _ops[op]


def names() -> list[str]:
    """Every op's name, sorted."""
    return sorted(_ops)


def explain(op: str, *args: Any) -> Explanation:
    """Which implementation of `op` these arguments would get, and why not the others; nothing is run.

    Errors     ValueError if there is no such op, or an argument without a default is missing
    """
    return get(op).explain(*args)


@contextmanager
def use(**implementations: str) -> Iterator[None]:
    """Force implementations inside a `with` block: `with llmsys.use(rms_norm="triton"): …`

    Errors     ValueError for an op or an implementation that does not exist; RuntimeError at the call if it cannot run
    """
    check_forced(implementations)
    token = _forced.set({**_forced.get(_from_environment), **implementations})
    try:
        yield
    finally:
        _forced.reset(token)


def check_forced(implementations: dict[str, str]) -> None:
    """Raise ValueError unless every name is of an op and of one of its implementations."""
    for op, implementation in implementations.items():
        if implementation not in get(op).implementations:
            raise ValueError(f"llmsys.use: {op}={implementation!r}, expected one of {list(get(op).implementations)}")
