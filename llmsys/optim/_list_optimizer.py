"""What the optimizers on ops over lists share: which parameters go together, masters, rounding, state dicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch

from llmsys.ops._philox import LOW, philox

_HALVES = (torch.bfloat16, torch.float16)
# How torch runs its steps has no meaning here; what would change their result is checked.
_TORCHS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}


class ListOptimizer(torch.optim.Optimizer):
    """An optimizer whose step is one call of an op for all parameters of a group that go together.

    A subclass names its `states`, tensors shaped like their parameter and at least float32, of which a state dict must
    have those in `required`, and defines `_check_settings` and `_update`.
    """

    states: tuple[str, ...]
    required: frozenset[str]

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own settings, as `torch.optim.Optimizer.add_param_group` does, checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_all_settings(group)
            self._check_parameters(group["params"])
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
                    f"{self._name}.step: closure and grad_scale given, expected one; "
                    "the closure makes the gradients that grad_scale was computed from anew"
                )
            with torch.enable_grad():
                loss = closure()
        place = 0
        for group in self.param_groups:
            self._step_group(group, place, grad_scale)
            place += len(group["params"])
        return loss

    def _step_group(self, group: dict[str, Any], place: int, grad_scale: torch.Tensor | None) -> None:
        # One call takes tensors of one device, one dtype each and one step count: nearly always, all of the group.
        batches: dict[tuple, list[tuple]] = {}
        for i, param in enumerate(group["params"], place):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                raise ValueError(
                    f"{self._name}.step: the gradient of a parameter of shape {tuple(param.shape)} is {grad.layout}, "
                    "expected a dense one; torch.optim.SparseAdam takes sparse ones"
                )
            state = self.state[param]
            stochastic = group["stochastic_rounding"] is not None and param.dtype == torch.bfloat16
            if group["master_weights"] and param.dtype in _HALVES and not stochastic:
                if "master" not in state:
                    state["master"] = param.detach().float()
            else:
                state.pop("master", None)
            key = (param.device, param.dtype, grad.dtype, *self._start(group, state, param))
            batches.setdefault(key, []).append((i, param, grad, state))
        for (device, dtype, _, *together), batch in batches.items():
            places, params, grads, states = (list(column) for column in zip(*batch, strict=True))
            settings = {
                "masters": [state["master"] for state in states if "master" in state],
                "lr": float(group["lr"]),
                "weight_decay": group["weight_decay"],
                "grad_scale": None if grad_scale is None else grad_scale.to(device),
                "maximize": group["maximize"],
            }
            if group["stochastic_rounding"] is not None and dtype == torch.bfloat16:
                steps = states[0].get("step", 0)
                settings["stochastic_rounding"] = seed_of(group["stochastic_rounding"], steps, places[0])
                for state in states:
                    state["step"] = state.get("step", 0)
            self._update(group, params, grads, states, *together, **settings)
            for state in states:
                if "step" in state:
                    state["step"] += 1

    # ---- what a subclass defines ----

    def _start(self, group: dict[str, Any], state: dict[str, Any], param: torch.Tensor) -> tuple:
        """Make the states that are missing. What must be equal in parameters that go together."""
        raise NotImplementedError

    def _update(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        grads: list[torch.Tensor],
        states: list[dict[str, Any]],
        *together: Any,
        **settings: Any,
    ) -> None:
        """One call of the op on tensors that go together, for which `_start` gave `together`."""
        raise NotImplementedError

    def _check_settings(self, group: dict[str, Any]) -> None:
        raise NotImplementedError

    # ---- checks ----

    @property
    def _name(self) -> str:
        return f"llmsys.optim.{type(self).__name__}"

    def _check_all_settings(self, group: dict[str, Any]) -> None:
        self._check_at_least_zero(group, "lr", "weight_decay")
        seed = group["stochastic_rounding"]
        if seed is not None and not -(2**63) <= seed < 2**64:
            raise ValueError(
                f"{self._name}: stochastic_rounding is {seed}, expected a seed in [-2**63, 2**64), or None"
            )
        self._check_settings(group)

    def _check_at_least_zero(self, group: dict[str, Any], *names: str) -> None:
        for name in names:
            if not float(group[name]) >= 0:
                raise ValueError(f"{self._name}: {name} is {group[name]}, expected a number >= 0")

    def _check_betas(self, group: dict[str, Any]) -> None:
        betas = tuple(group["betas"])
        if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
            raise ValueError(f"{self._name}: betas are {betas}, expected two numbers from 0 to below 1")

    def _check_false(self, group: dict[str, Any], **instead: str) -> None:
        for name, advice in instead.items():
            if group[name]:
                raise ValueError(f"{self._name}: {name} is {group[name]}, expected False; {advice}")

    def _check_parameters(self, params: list[torch.Tensor]) -> None:
        for i, param in enumerate(params):
            if not param.is_floating_point():
                raise TypeError(f"{self._name}: parameter {i} of a group is {param.dtype}, expected a float dtype")
        if len({id(param) for param in params}) < len(params):
            raise ValueError(
                f"{self._name}: a group has {len(params)} parameters, of which some are the same tensor, "
                "expected each once"
            )

    # ---- state dicts: as those of torch's optimizer of the same name, with "master" beside its states ----

    def state_dict(self) -> dict[str, Any]:
        """The state and the settings; "step" is a tensor there, as torch's optimizers have it."""
        saved = super().state_dict()
        saved["state"] = {
            key: {**state, "step": torch.tensor(float(state["step"]))} if "step" in state else state
            for key, state in saved["state"].items()
        }
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of another optimizer of this kind, this library's or torch's.

        Errors     ValueError if groups, their sizes or shapes differ from this optimizer's, or a setting that it
                   refuses is set
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
        """A parameter's state from one that was saved, by this optimizer or by torch's."""
        missing = self.required - saved.keys()
        if missing:
            raise ValueError(
                f"{self._name}.load_state_dict: a parameter's state has {sorted(saved)}, "
                f"expected {sorted(missing)} too; give the state_dict of {type(self).__name__}"
            )
        state: dict[str, Any] = {"step": int(saved["step"])} if "step" in saved else {}
        wide = torch.promote_types(param.dtype, torch.float32)
        for name in (*self.states, "master"):
            tensor = saved.get(name)
            # A master that is not wide has been through torch's optimizer, which casts it and then lets it fall behind.
            if tensor is None or (name == "master" and tensor.dtype != wide):
                continue
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{self._name}.load_state_dict: {name} is {tensor.dtype}, expected a float dtype; "
                    "llmsys.optim.AdamW8bit takes 8-bit states"
                )
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{self._name}.load_state_dict: {name} has shape {tuple(tensor.shape)}, "
                    f"expected {tuple(param.shape)}, its parameter's"
                )
            state[name] = tensor.to(device=param.device, dtype=wide)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.update({name: value for name, value in _TORCHS.items() if name in self.defaults})
            group.pop("decoupled_weight_decay", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            self._check_all_settings(group)


def zeros_like(param: torch.Tensor) -> torch.Tensor:
    """A state of zeros, at least float32."""
    wide = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros_like(param, dtype=wide, memory_format=torch.preserve_format)


def seed_of(seed: int, step: int, place: int) -> int:
    """The seed of one call's words: another at each step, and for each parameter that the call may begin with."""
    low, high, *_ = philox((place, step, 0, 0), (seed & LOW, seed >> 32 & LOW))
    return low | high << 32
