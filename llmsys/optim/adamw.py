"""AdamW, a drop-in for `torch.optim.AdamW`, on the fused op."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

from llmsys.ops.adamw import adamw

_HALVES = (torch.bfloat16, torch.float16)
_STATES = ("exp_avg", "exp_avg_sq", "master")


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay; `llmsys.ops.adamw` has the formula.

    Takes what `torch.optim.AdamW` takes, and state dicts go both ways. Different from it:

    States     exp_avg and exp_avg_sq are float32 (float64 for float64 parameters) whatever the parameter's dtype
    Masters    master_weights=True keeps float32 weights beside each bfloat16 or float16 parameter: updates add up in
               them, the parameter is their rounding. They are taken from the parameter at its first step: load weights
               before that, or delete the parameter's "master" from `state`. torch.optim.AdamW ignores them, and what it
               saves makes new ones
    Steps      every step is one fused pass: foreach and fused are accepted and change nothing.
               step(grad_scale=…) scales the gradients on the way (see `clip_grad_norm`)
    Errors     ValueError for a value out of range, amsgrad, capturable, differentiable or a sparse gradient; TypeError
               for parameters that are not floating point
    Source     Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "master_weights": master_weights,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings, as `torch.optim.Optimizer.add_param_group` does, checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_settings(group)
            _check_parameters(group["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: torch.Tensor | None = None) -> Any:
        """Update every parameter that has a gradient, once; with a closure, evaluate it first and return its result.

        Shapes     grad_scale () float32: every gradient is multiplied by it
        Errors     ValueError for grad_scale with a closure, whose gradients it cannot know, or a sparse gradient
        """
        loss = None
        if closure is not None:
            if grad_scale is not None:
                raise ValueError(
                    "llmsys.optim.AdamW.step: closure and grad_scale given, expected one; "
                    "the closure makes the gradients that grad_scale was computed from anew"
                )
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group, grad_scale)
        return loss

    def _step_group(self, group: dict[str, Any], grad_scale: torch.Tensor | None) -> None:
        # One call takes tensors of one device, one dtype each and one step count: nearly always, all of the group.
        batches: dict[tuple, list[tuple]] = {}
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise ValueError(
                    f"llmsys.optim.AdamW.step: the gradient of a parameter of shape {tuple(param.shape)} is "
                    f"{grad.layout}, expected a dense one; torch.optim.SparseAdam takes sparse ones"
                )
            state = self.state[param]
            if "exp_avg" not in state:
                state["step"] = 0
                self._start(state, param)
            if group["master_weights"] and param.dtype in _HALVES:
                if "master" not in state:
                    state["master"] = param.detach().float()
            else:
                state.pop("master", None)
            key = (param.device, param.dtype, grad.dtype, state["step"], state["exp_avg"].dtype)
            batches.setdefault(key, []).append((param, grad, state))
        beta1, beta2 = group["betas"]
        for (device, _, _, step, _), batch in batches.items():
            params, grads, states = (list(column) for column in zip(*batch, strict=True))
            self._update(
                params,
                grads,
                states,
                lr=float(group["lr"]),
                beta1=float(beta1),
                beta2=float(beta2),
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=step + 1,
                grad_scale=None if grad_scale is None else grad_scale.to(device),
                maximize=group["maximize"],
            )
            for state in states:
                state["step"] = step + 1

    def _start(self, state: dict[str, Any], param: torch.Tensor) -> None:
        """Moments of zero."""
        wide = torch.promote_types(param.dtype, torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)

    def _update(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict[str, Any]], **settings: Any
    ) -> None:
        """One call of the op on tensors that go together."""
        m, v = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        adamw(params, grads, m, v, [state["master"] for state in states if "master" in state], **settings)

    # ---- state dicts: as torch.optim.AdamW's, with "master" beside "exp_avg" ----

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings; "step" is a tensor there, as in torch.optim.AdamW's."""
        saved = super().state_dict()
        saved["state"] = {
            key: {**state, "step": torch.tensor(float(state["step"]))} if "step" in state else state
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another AdamW, this one or torch's.

        Errors     ValueError if groups, their sizes or shapes differ from this optimizer's, or amsgrad is set
        """
        given: dict[str, Any] = {}
        # Last among the hooks: it sees what the others made of the dict.
        handle = self.register_load_state_dict_pre_hook(lambda _, final: given.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        # torch has cast the states to their parameter's dtype; take them once more, in full.
        keys = chain.from_iterable(group["params"] for group in given["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(keys, params, strict=True):
            if key in given["state"]:
                self.state[param] = self._load(given["state"][key], param)

    def _load(self, saved: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        return load(type(self).__name__, saved, param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # How torch runs its steps has no meaning here; what changes their result is checked.
            group.update(foreach=None, fused=None, capturable=False, differentiable=False)
            group.pop("decoupled_weight_decay", None)
            for name in ("amsgrad", "maximize", "master_weights"):
                group.setdefault(name, self.defaults[name])
            _check_settings(group)


def load(optimizer: str, saved: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """A parameter's wide state from one that was saved, by this optimizer or by torch's."""
    missing = {"step", "exp_avg", "exp_avg_sq"} - saved.keys()
    if missing:
        raise ValueError(
            f"llmsys.optim.{optimizer}.load_state_dict: a parameter's state has {sorted(saved)}, "
            f"expected {sorted(missing)} too; give the state_dict of an AdamW"
        )
    state: dict[str, Any] = {"step": int(saved["step"])}
    wide = torch.promote_types(param.dtype, torch.float32)
    for name in _STATES:
        tensor = saved.get(name)
        # A master that is not wide has been through torch.optim.AdamW, which casts it and then lets it fall behind.
        if tensor is None or (name == "master" and tensor.dtype != wide):
            continue
        if not tensor.is_floating_point():
            raise ValueError(
                f"llmsys.optim.{optimizer}.load_state_dict: {name} is {tensor.dtype}, expected a float dtype; "
                "llmsys.optim.AdamW8bit takes 8-bit states"
            )
        if tensor.shape != param.shape:
            raise ValueError(
                f"llmsys.optim.{optimizer}.load_state_dict: {name} has shape {tuple(tensor.shape)}, "
                f"expected {tuple(param.shape)}, its parameter's"
            )
        state[name] = tensor.to(device=param.device, dtype=wide)
    return state


def _check_settings(group: dict[str, Any]) -> None:
    for name in ("lr", "eps", "weight_decay"):
        if not float(group[name]) >= 0:
            raise ValueError(f"llmsys.optim.AdamW: {name} is {group[name]}, expected a number >= 0")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"llmsys.optim.AdamW: betas are {betas}, expected two numbers from 0 to below 1")
    for name, instead in (
        ("amsgrad", "; torch.optim.AdamW has it"),
        ("capturable", "; the step count is kept on the host"),
        ("differentiable", "; torch.optim.AdamW has it"),
    ):
        if group[name]:
            raise ValueError(f"llmsys.optim.AdamW: {name} is {group[name]}, expected False{instead}")


def _check_parameters(params: list[torch.Tensor]) -> None:
    for i, param in enumerate(params):
        if not param.is_floating_point():
            raise TypeError(f"llmsys.optim.AdamW: parameter {i} of a group is {param.dtype}, expected a float dtype")
    if len({id(param) for param in params}) < len(params):
        raise ValueError(
            f"llmsys.optim.AdamW: a group has {len(params)} parameters, of which some are the same tensor, "
            "expected each once"
        )
