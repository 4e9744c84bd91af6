"""AdamW with 8-bit block-wise states, a drop-in for `torch.optim.AdamW` and `bitsandbytes.optim.AdamW8bit`."""

from __future__ import annotations

from typing import Any

import torch

from llmsys.ops.adamw_8bit import adamw_8bit
from llmsys.ops.adamw_8bit.dynamic_map import decode, encode, num_blocks, zero_code
from llmsys.optim.adamw import AdamW

MIN_8BIT_SIZE = 4096
_SIGNED = {"exp_avg": True, "exp_avg_sq": False}


class AdamW8bit(AdamW):
    """AdamW whose moments take a byte each; `llmsys.ops.adamw_8bit` has the formula.

    Takes what `llmsys.optim.AdamW` takes, but for stochastic_rounding. Different from it:

    States     of parameters with at least 4096 elements, exp_avg and exp_avg_sq are uint8 codes, with float32
               exp_avg_scale and exp_avg_sq_scale, one for each 256 elements; of smaller ones and of float64 as in AdamW
    State dict from an AdamW, this library's or torch's, it is encoded; one of 8 bits goes to an AdamW8bit only
    Source     Dettmers et al. 2021, arXiv:2110.02861
    """

    def _start_moments(self, state: dict[str, Any], param: torch.Tensor) -> None:
        if not _in_8_bits(param):
            super()._start_moments(state, param)
            return
        for name, signed in _SIGNED.items():
            state[name] = torch.full(param.shape, zero_code(signed), dtype=torch.uint8, device=param.device)
            state[f"{name}_scale"] = torch.zeros(num_blocks(param.numel()), device=param.device)

    def _call(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict[str, Any]], **settings: Any
    ) -> None:
        if states[0]["exp_avg"].dtype != torch.uint8:
            super()._call(params, grads, states, **settings)
            return
        names = "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"
        m, v, m_scale, v_scale = ([state[name] for state in states] for name in names)
        adamw_8bit(params, grads, m, v, m_scale, v_scale, **settings)

    def _check_settings(self, group: dict[str, Any]) -> None:
        super()._check_settings(group)
        if group["stochastic_rounding"] is not None:
            raise ValueError(
                f"{self._name}: stochastic_rounding is {group['stochastic_rounding']}, expected None; "
                "llmsys.optim.AdamW has it"
            )

    def _load(self, saved: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
        """A parameter's state from one that was saved, in 8 bits or wide: as this parameter is kept."""
        saved = dict(saved)
        scales = {name: saved.pop(f"{name}_scale") for name in _SIGNED if f"{name}_scale" in saved}
        for name, scale in scales.items():
            if scale.shape != (num_blocks(saved[name].numel()),):
                raise ValueError(
                    f"{self._name}.load_state_dict: {name}_scale has shape {tuple(scale.shape)}, "
                    f"expected ({num_blocks(saved[name].numel())},)"
                )
        if not (_in_8_bits(param) and scales):
            for name, scale in scales.items():
                saved[name] = decode(saved[name], scale, _SIGNED[name])
            state = super()._load(saved, param)
            if _in_8_bits(param):
                for name, signed in _SIGNED.items():
                    state[name], state[f"{name}_scale"] = encode(state[name], signed)
            return state
        codes = {name: saved.pop(name) for name in _SIGNED}
        # The rest, and the shapes, are checked as of a wide state.
        state = super()._load({**saved, **{name: codes[name].float() for name in codes}}, param)
        for name in _SIGNED:
            state[name] = codes[name].to(param.device, copy=True).contiguous()
            state[f"{name}_scale"] = scales[name].to(param.device, torch.float32, copy=True).contiguous()
        return state


def _in_8_bits(param: torch.Tensor) -> bool:
    return param.numel() >= MIN_8BIT_SIZE and param.dtype != torch.float64
