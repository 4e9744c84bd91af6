"""flash-attn 2's functions on `llmsys.attention`, for code that was written for them: on a CPU too, and in float32.

    from llmsys.integrations.flash_attn import flash_attn_func
    from llmsys.integrations.flash_attn.bert_padding import unpad_input, pad_input

Names, order and defaults of arguments, layouts and results are flash-attn's (2.8). What it refuses for the sake of its
kernels works here: float32 and float64, softcap with dropout, ALiBi slopes in q's dtype, pages of any size. Else:

- A query that sees nothing has a `softmax_lse` of -inf, and there is a gradient through `softmax_lse`.
- Dropout draws a seed from torch's generator of the CPU, so that `torch.manual_seed` repeats it; the masks are those
  of `llmsys.attention`, not flash-attn's.
- `deterministic` changes nothing: gradients have the same bits every time.
- Errors are ValueError and TypeError, where flash-attn's are RuntimeError.
"""

from llmsys.integrations.flash_attn.dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from llmsys.integrations.flash_attn.kvcache import flash_attn_with_kvcache
from llmsys.integrations.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
