"""`attn_implementation="llmsys"`: transformers' attention on `llmsys.attention`. Importing this file registers it.

    import llmsys.integrations.transformers.attention
    AutoModelForCausalLM.from_pretrained(..., attn_implementation="llmsys")

Memory stays O(T): a mask is a `Mask`, which says what is seen without listing it. Causal order and sliding windows are
the op's, packed sequences (positions that start anew) its `cu_seqlens`, keys after the end of a static cache are cut
off, and a padding mask is a bias (B, 1, 1, S), so that it costs no copies of keys and values. Any other mask (blocks of
image tokens, chunks, a 4D tensor), and every mask under torch.compile, is a bias of its whole size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers.utils.import_utils import is_tracing

from llmsys.nn.dropout import drawn_seed
from llmsys.ops.attention import attention

NAME = "llmsys"


class Seen(NamedTuple):
    """What queries see: of the first `num_keys` keys those of `window` around their own place; both end together."""

    num_keys: int
    window: tuple[int, int]
    keys: Tensor | None  # (B, num_keys) bool, False for padding
    cu_seqlens: Tensor | None  # of the packed sequences in the B · T tokens


class Mask(Tensor):
    """(B, 1, T, S) bool, True where a query sees a key: `seen` says so; whatever else reads it gets the numbers."""

    seen: Seen
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, seen: Seen, make: Callable[[], Tensor], shape: tuple[int, ...], device: torch.device) -> Mask:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)  # type: ignore[attr-defined]
        made.seen, made.make = seen, make
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = torch.utils._pytree.tree_map_only(Mask, lambda mask: mask.make(), (args, kwargs or {}))
        return function(*args, **kwargs)


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **more: Any,
) -> Tensor | None:
    """The mask of a model's layers, from what transformers asks of a mask interface: a `Mask`, or what sdpa gets."""
    dense: Any = masking_utils.sdpa_mask
    make = partial(
        dense,
        *(batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask),
        **{**more, "device": device},
    )
    if is_tracing(attention_mask):
        return make()
    seen = _seen(q_length, kv_length, int(q_offset) - kv_offset, mask_function)
    if seen is None:
        return make()
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + seen.num_keys].to(torch.bool)
        seen = seen._replace(keys=None if bool(padding.all()) else padding)
    whole = partial(make, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return Mask.of(seen, whole, (batch_size, 1, q_length, kv_length), torch.device(device))


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    output_attentions: bool = False,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, as transformers calls it.

    Shapes     query (B, H, T, D), key and value (B, K, S, ·); attention_mask a `Mask`, or bool or float (B or 1, H or
               1, T or 1, S); position_bias (B or 1, H or 1, T, S); s_aux (H,), the sinks → (B, T, H, ·)
    Gradient   dquery, dkey, dvalue, dposition_bias, ds_aux
    Errors     ValueError if attention weights are asked for, which are never made
    """
    if output_attentions:
        raise ValueError(
            f"llmsys.integrations.transformers.attention: output_attentions is True, expected False with "
            f'attn_implementation="{NAME}", which makes no attention weights; "eager" does'
        )
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window, cu_seqlens_q, cu_seqlens_k = (-1, -1), cu_seq_lens_q, cu_seq_lens_k
    visible: Tensor | None = None
    if isinstance(attention_mask, Mask) and not (
        position_bias is not None and attention_mask.seen.cu_seqlens is not None
    ):
        seen = attention_mask.seen
        k, v, window = k[:, : seen.num_keys], v[:, : seen.num_keys], seen.window
        visible = None if seen.keys is None else seen.keys[:, None, None, :]
        if seen.cu_seqlens is not None:
            cu_seqlens_q = cu_seqlens_k = seen.cu_seqlens
    elif attention_mask is not None:
        cu_seqlens_q = cu_seqlens_k = None  # a mask of two dimensions tells them
        if attention_mask.dtype == torch.bool:
            visible = attention_mask
        else:
            position_bias = attention_mask if position_bias is None else position_bias + attention_mask
    elif q.shape[1] > 1 and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # As with sdpa: no mask and more keys than queries is a static cache that was empty before.
        k, v, window = k[:, : q.shape[1]], v[:, : q.shape[1]], (-1, 0)
    if position_bias is not None:
        position_bias = position_bias[..., : k.shape[1]]
    if visible is not None:
        base = q.new_zeros(()) if position_bias is None else position_bias
        position_bias = torch.where(visible[..., : k.shape[1]], base, -torch.inf)
    y = _attend(
        *(q, k, v),
        cu_seqlens_q,
        cu_seqlens_k,
        scale=scaling,
        window=window,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.to(q.dtype),
        bias=None if position_bias is None else position_bias.to(q.dtype),
        dropout_p=dropout,
        seed=drawn_seed() if dropout > 0 else None,
    )
    return y, None


def _attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, **options: Any) -> Tensor:
    """`attention`, of packed sequences where cu_seqlens are given, in the batch's own shape."""
    if cu_q is None or cu_k is None:
        return cast(Tensor, attention(q, k, v, **options))
    packed = (x.flatten(0, 1) for x in (q, k, v))
    y = cast(Tensor, attention(*packed, cu_seqlens_q=cu_q.int(), cu_seqlens_k=cu_k.int(), **options))
    return y.unflatten(0, q.shape[:2])


def _seen(num_queries: int, num_keys: int, offset: int, function: Callable) -> Seen | None:
    """What `function` says is seen, with query t beside key t + offset; None if it is not of the known kinds."""
    left = right = -1
    sequences = None
    remapped = False
    for kind, value in _parts(function):
        if kind == "unknown":
            return None
        if kind == "causal":
            right = 0
        elif kind == "left":
            left = value - 1
        elif kind == "both":
            left = right = value
        elif kind == "packed":
            sequences = value
        elif kind == "remapped":  # to positions within the packed sequences, where distances are the same
            remapped = True
    end = offset + num_queries
    if (left, right) == (-1, -1):
        end = num_keys
    if remapped != (sequences is not None) or not num_queries <= end <= num_keys or (right > 0 and end < num_keys):
        return None
    if sequences is None:
        return Seen(end, (left, right), None, None)
    starts = torch.ones_like(sequences, dtype=torch.bool)
    starts[:, 1:] = sequences.diff(dim=1) != 0
    first = starts.flatten().nonzero().flatten()
    return Seen(end, (left, right), None, nn.functional.pad(first, (0, 1), value=sequences.numel()).int())


def _parts(function: Callable) -> Iterator[tuple[str, Any]]:
    """What transformers made a mask function of: parts are known by their code, values are in their closures."""
    code: Any = getattr(function, "__code__", None)
    cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True)) if code else {}
    values = {name: cell.cell_contents for name, cell in cells.items()}
    if function is masking_utils.causal_mask_function:
        yield "causal", None
    elif function is masking_utils.bidirectional_mask_function:
        return
    elif code is _AND and "mask_functions" in values:
        for part in values["mask_functions"]:
            yield from _parts(part)
    elif code is _REMAPPED and "mask_function" in values:
        yield "remapped", None
        yield from _parts(values["mask_function"])
    elif code in _VALUES and _VALUES[code][1] in values:
        kind, name = _VALUES[code]
        yield kind, values[name]
    else:
        yield "unknown", function


def _code(function: Any) -> Any:
    return function.__code__


_AND = _code(masking_utils.and_masks(masking_utils.causal_mask_function))
_REMAPPED = _code(masking_utils.remap_positions_for_packed_sequence(masking_utils.causal_mask_function, torch.empty(0)))
_VALUES = {
    _code(masking_utils.sliding_window_overlay(1)): ("left", "sliding_window"),
    _code(masking_utils.sliding_window_bidirectional_overlay(1)): ("both", "sliding_window"),
    _code(masking_utils.packed_sequence_mask_function(torch.empty(0))): ("packed", "packed_sequence_mask"),
}

AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, mask)
