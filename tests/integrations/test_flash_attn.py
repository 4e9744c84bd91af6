"""flash-attn's documented contract, against a formula of its documentation in float64.

What is allowed, of the largest element: twice (gradients three times) what the formula itself loses in the dtype, and
one rounding. Over 400 lines, because each function of the package has the same formula to answer to.
"""

import inspect
import itertools
import math

import pytest
import torch

from llmsys.integrations import flash_attn
from llmsys.integrations.flash_attn.bert_padding import index_first_axis, pad_input, unpad_input
from tests.harness import same_bits

SIGNATURES = {
    "flash_attn_func": "(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    "flash_attn_kvpacked_func": "(q, kv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    "flash_attn_qkvpacked_func": "(qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), "
    "softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False)",
    "flash_attn_varlen_func": "(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False, block_table=None)",
    "flash_attn_varlen_kvpacked_func": "(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False)",
    "flash_attn_varlen_qkvpacked_func": "(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, "
    "causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, "
    "return_attn_probs=False)",
    "flash_attn_with_kvcache": "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
    "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, "
    "window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0, "
    "return_softmax_lse=False)",
}
FUNCTIONS = [name for name in SIGNATURES if name != "flash_attn_with_kvcache"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256]
LENGTHS = {  # of queries and keys
    "dense": [[(17, 17)] * 2, [(9, 31)] * 2, [(31, 9)] * 2],
    "varlen": [[(5, 5), (0, 0), (23, 23), (1, 1)], [(4, 19), (0, 6), (7, 0), (21, 3)]],
}


def draw(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(q, k, v, causal=False, window_size=(-1, -1), softcap=0.0, slopes=None, scale=None, kept=1.0):
    """One sequence: q (T, H, D), k and v (S, K, D) → out (T, H, D), lse (H, T)."""
    (queries, heads, dim), keys = q.shape, k.shape[0]
    k, v = (x.repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * (dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    distance = torch.arange(queries).unsqueeze(1) + keys - queries - torch.arange(keys)
    if slopes is not None:
        scores = scores - slopes.to(q.dtype).view(-1, 1, 1) * distance.abs()
    left, right = window_size
    hidden = torch.zeros(queries, keys, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= distance < -right
    if causal:
        hidden |= distance < 0
    blind = hidden.all(1)
    scores = scores.masked_fill(hidden & ~blind.unsqueeze(1), -math.inf)
    lse = scores.logsumexp(-1).masked_fill(blind, -math.inf)
    p = (scores - lse.detach().masked_fill(blind, 0).unsqueeze(-1)).exp().masked_fill(hidden, 0)
    total = p.sum(-1).masked_fill(blind, 1).t().unsqueeze(-1)  # 1, but for rounding; here for its gradient
    return torch.einsum("hts,shd->thd", p * kept, v) / (total / total.detach()), lse


class Given:
    """Random arguments of one of the functions, whole and by sequence."""

    def __init__(self, name, lengths, dim, heads=4, kv_heads=4, dtype=torch.float32):
        self.name, self.lengths = name, lengths
        self.packed, self.dense = name.split("_")[-2], "varlen" not in name
        if self.packed == "qkvpacked":
            lengths, kv_heads = [(q, q) for q, _ in lengths], heads
            self.lengths = lengths
        shapes = {
            "qkvpacked": [(0, (3, heads, dim))],
            "kvpacked": [(0, (heads, dim)), (1, (2, kv_heads, dim))],
        }.get(self.packed, [(0, (heads, dim)), (1, (kv_heads, dim)), (1, (kv_heads, dim))])
        self.totals = [sum(sizes) for sizes in zip(*lengths, strict=True)]
        flat = [draw(self.totals[of], *rest, dtype=dtype, seed=n) for n, (of, rest) in enumerate(shapes)]
        self.tensors = [x.unflatten(0, (len(lengths), -1)) if self.dense else x for x in flat]

    def call(self, tensors, **options):
        function = getattr(flash_attn, self.name)
        if self.dense:
            return function(*tensors, **options)
        starts = [torch.tensor([0, *itertools.accumulate(sizes)]).int() for sizes in zip(*self.lengths, strict=True)]
        longest = [max(sizes) for sizes in zip(*self.lengths, strict=True)]
        if self.packed == "qkvpacked":
            return function(*tensors, starts[0], longest[0], **options)
        return function(*tensors, *starts, *longest, **options)

    def sequences(self, tensors):
        """(q, k, v) of each, as views."""
        dim = 2 if self.dense else 1
        parts = [part for x in tensors for part in (x.unbind(dim) if x.dim() == dim + 3 else [x])]
        if self.dense:
            return list(zip(*parts, strict=True))
        split = [x.split([pair[n > 0] for pair in self.lengths]) for n, x in enumerate(parts)]
        return list(zip(*split, strict=True))

    def joined(self, outs, lses):
        if self.dense:
            return torch.stack(outs), torch.stack(lses)
        return torch.cat(outs), torch.cat(lses, -1)


def expected(given, dtype, kept=None, dout=None, slopes=None, **options):
    """(out, lse) of the formula in this dtype, and the gradients of the tensors where `dout` is given."""
    tensors = [x.to(dtype).requires_grad_() for x in given.tensors]
    found = []
    for n, sequence in enumerate(given.sequences(tensors)):
        of = slopes[n] if slopes is not None and slopes.dim() == 2 else slopes
        factor = 1.0 if kept is None else kept[n].to(dtype)
        found.append(formula(*sequence, slopes=of, kept=factor, **options))
    out, lse = given.joined(*zip(*found, strict=True))
    gradients = [] if dout is None else torch.autograd.grad(out, tensors, dout.to(dtype))
    return [out.detach(), lse.detach(), *gradients]


def check(actual, truths, references):
    """out, lse and gradients."""
    losses = [0.0]
    for truth, reference in zip(truths, references, strict=True):
        finite = truth.isfinite() & (truth != 0)
        if finite.any():
            losses.append(float((reference.double() - truth)[finite].abs().max() / truth[finite].abs().max()))
    for n, (given, truth) in enumerate(zip(actual, truths, strict=True)):
        finite = truth.isfinite()
        assert given.shape == truth.shape and torch.equal(given.double()[~finite], truth[~finite])
        largest = truth[finite].abs().max() if finite.any() else 0
        # Of few elements the largest error is a matter of luck: the formula's is that of all it computes.
        allowed = ((2 if n < 2 else 3) * max(losses) + torch.finfo(given.dtype).eps) * largest
        error = (given.double() - truth)[finite].abs()
        assert error.le(allowed).all(), (n, float(error.max()), float(allowed))


def compare(given, dropout_p=0.0, alibi_slopes=None, **options):
    """The function with gradients, by the formula; a dropout mask is taken from what the function says it is."""
    torch.manual_seed(0)
    dtype = given.tensors[0].dtype
    tensors = [x.clone().requires_grad_() for x in given.tensors]
    asked = {"dropout_p": dropout_p, "alibi_slopes": alibi_slopes, **options}
    out, lse, dmask = given.call(tensors, return_attn_probs=True, **asked)
    assert out.dtype == dtype and lse.dtype == torch.float32
    dout = draw(*out.shape, dtype=dtype, seed=9)
    gradients = torch.autograd.grad(out, tensors, dout)
    kept = None
    if dropout_p:
        dropped = [m[:, :q, :k] < 0 for m, (q, k) in zip(dmask, given.lengths, strict=True)]
        kept = [(~d).double() / (1 - dropout_p) for d in dropped]
    else:
        assert dmask.numel() == 0
    asked = {"kept": kept, "dout": dout, "slopes": alibi_slopes, **options}
    truths, references = (expected(given, wide, **asked) for wide in (torch.float64, dtype))
    check([out.detach(), lse.detach(), *gradients], truths, references)
    return dmask


def slopes_of(kind, batch, heads):
    if kind == "none":
        return None
    slopes = draw(batch, heads, dtype=torch.float32, seed=8).abs()
    return slopes if kind == "batch" else slopes[0]


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(flash_attn, name))
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(parameters)) == SIGNATURES[name]


def test_every_function_is_here():
    assert set(flash_attn.__all__) == set(SIGNATURES)


@pytest.mark.parametrize("window_size", [(-1, -1), (5, 0), (6, 3), (-1, 2), (4, -1)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_options(name, causal, window_size):
    """All of softcap, ALiBi, grouped heads and dropout with each other."""
    dtypes = itertools.cycle(DTYPES)
    lengths = itertools.cycle(LENGTHS["varlen" if "varlen" in name else "dense"])
    kv_heads = [4] if "qkvpacked" in name and "_kvpacked" not in name else [4, 2, 1]
    for heads, softcap, alibi, dropout_p in itertools.product(
        kv_heads, [0.0, 2.5], ["none", "heads", "batch"], [0.0, 0.3]
    ):
        given = Given(name, next(lengths), 16, kv_heads=heads, dtype=next(dtypes))
        slopes = slopes_of(alibi, len(given.lengths), 4)
        compare(given, dropout_p, slopes, causal=causal, window_size=window_size, softcap=softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(dim, dtype):
    for name in FUNCTIONS:
        lengths = [(13, 13), (0, 0), (30, 37)] if "varlen" in name else [(19, 27)]
        compare(Given(name, lengths, dim, heads=2, kv_heads=1, dtype=dtype), causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(1, 147), (113, 203), (108, 256), (203, 113), (64, 65), (129, 128)])
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_unequal_lengths(name, queries, keys):
    for causal in (False, True):
        compare(Given(name, [(queries, keys)], 32, heads=2, kv_heads=2, dtype=torch.bfloat16), causal=causal)


@pytest.mark.parametrize(
    ("queries", "keys", "mask"),
    [(2, 5, [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), (5, 2, [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]])],
    ids=["2x5", "5x2"],
)
@pytest.mark.parametrize("name", ["flash_attn_func", "flash_attn_varlen_func"])
def test_causal_masks_end_in_the_bottom_right_corner(name, queries, keys, mask):
    """The examples of flash-attn's README: v tells which keys were seen; a row that sees none is zero."""
    mask = torch.tensor(mask, dtype=torch.float32)
    q, k, v = torch.zeros(queries, 1, 8), torch.zeros(keys, 1, 8), torch.eye(keys, 8).unsqueeze(1)
    given = Given(name, [(queries, keys)], 8)
    given.tensors = [x.unsqueeze(0) if given.dense else x for x in (q, k, v)]
    out = given.call(given.tensors, causal=True).view(queries, 8)[:, :keys]
    torch.testing.assert_close(out, mask / mask.sum(1, keepdim=True).clamp(min=1))


@pytest.mark.parametrize("scale", [0.05, 0.7])
def test_softmax_scale(scale):
    given = Given("flash_attn_func", [(9, 12)], 16)
    truth, reference = (expected(given, dtype, scale=scale) for dtype in (torch.float64, torch.float32))
    out, lse, _ = given.call(given.tensors, softmax_scale=scale, return_attn_probs=True)
    check([out, lse], truth, reference)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dropout_is_drawn_from_torchs_generator(name):
    given = Given(name, LENGTHS["varlen" if "varlen" in name else "dense"][0], 16)
    torch.manual_seed(1)
    first, second = (given.call(given.tensors, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = given.call(given.tensors, dropout_p=0.5)
    assert same_bits(first, again) and not torch.equal(first, second)
    state = torch.random.get_rng_state()
    given.call(given.tensors)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.83])
def test_dropout_drops_as_often_as_it_says(dropout_p):
    torch.manual_seed(0)
    given = Given("flash_attn_func", [(300, 300)] * 2, 16)
    _, _, dmask = given.call(given.tensors, dropout_p=dropout_p, return_attn_probs=True)
    assert dmask.shape == (2, 4, 300, 300)
    for axis in range(3):  # over all, over each sequence, over each head
        shares = (dmask < 0).double().transpose(0, max(axis - 1, 0)).flatten(min(axis, 1)).mean(-1)
        deviation = math.sqrt(dropout_p * (1 - dropout_p) * shares.numel() / dmask.numel())
        assert (shares - dropout_p).abs().max() < 5 * deviation
    probabilities = dmask.abs().sum(-1)
    torch.testing.assert_close(probabilities, torch.ones_like(probabilities))


def test_gradients_have_the_same_bits_every_time():
    given = Given("flash_attn_func", [(50, 50)], 32, kv_heads=1, dtype=torch.bfloat16)
    runs = []
    for deterministic in (False, True):
        tensors = [x.clone().requires_grad_() for x in given.tensors]
        out = given.call(tensors, causal=True, deterministic=deterministic)
        runs.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)])
    assert all(same_bits(*pair) for pair in zip(*runs, strict=True))


def test_any_strides():
    """A projection's (batch, seqlen, heads · dim), heads before tokens, every other token."""
    q, k, v = (draw(2, 4, 40, 16, dtype=torch.float32, seed=seed).transpose(1, 2)[:, ::2] for seed in range(3))
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert same_bits(out, flash_attn.flash_attn_func(*(x.contiguous() for x in (q, k, v)), causal=True))


@pytest.mark.parametrize("name", ["flash_attn_varlen_func", "flash_attn_varlen_qkvpacked_func"])
def test_tokens_after_the_last_sequence_are_nobodys(name):
    given = Given(name, [(5, 5), (8, 8)], 16)
    longer = [torch.cat((x, torch.full_like(x[:4], 3.0))) for x in given.tensors]
    out = given.call(longer)
    assert same_bits(out[:13], given.call(given.tensors)) and torch.equal(out[13:], torch.zeros_like(out[13:]))


@pytest.mark.parametrize("page_size", [4, 256])
def test_paged_keys_of_packed_queries(page_size):
    lengths = [(3, 9), (1, 4), (0, 0), (2, 13)]
    given = Given("flash_attn_varlen_func", lengths, 16, kv_heads=2)
    q, k, v = given.tensors
    pages = [[7, 2, 5, 0], [1, 0, 0, 0], [0, 0, 0, 0], [6, 3, 4, 8]]
    k_cache, v_cache = (torch.full((9, page_size, 2, 16), math.nan) for _ in range(2))
    token = 0
    for row, (_, keys) in zip(pages, lengths, strict=True):
        for place in range(keys):
            for cache, new in ((k_cache, k), (v_cache, v)):
                cache[row[place // page_size], place % page_size] = new[token]
            token += 1
    table = torch.tensor(pages, dtype=torch.int32)
    out = given.call([q, k_cache, v_cache], causal=True, block_table=table)
    assert same_bits(out, given.call(given.tensors, causal=True))


def test_bert_padding():
    x = draw(3, 7, 2, 5, dtype=torch.float32, seed=0).requires_grad_()
    mask = torch.tensor([[1] * 7, [0] * 7, [1, 1, 0, 0, 1, 0, 0]])
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 7, 7, 10] and cu_seqlens.dtype == torch.int32
    assert longest == 7 and isinstance(longest, int)
    assert indices.tolist() == [*range(7), 14, 15, 18] and used.tolist() == [7, 0, 3]
    assert same_bits(packed, index_first_axis(x.flatten(0, 1), indices)) and same_bits(packed, x[mask.bool()])
    padded = pad_input(packed, indices, 3, 7)
    assert torch.equal(padded, x * mask[..., None, None])
    (dx,) = torch.autograd.grad(padded.sum(), x)
    assert torch.equal(dx, mask[..., None, None].expand_as(dx).float())
    unused = torch.zeros_like(mask).index_fill(1, torch.tensor(3), 1) * (1 - mask)
    packed, indices, cu_seqlens, longest, used = unpad_input(x, mask, unused)
    assert cu_seqlens.tolist() == [0, 7, 8, 12] and used.tolist() == [7, 0, 3]
    assert indices.tolist() == [*range(7), 10, 14, 15, 17, 18]
    with pytest.raises(ValueError, match=r"unpad_input: attention_mask has shape \(3, 6\).*\(batch, seqlen\) = \(3, 7"):
        unpad_input(x, mask[:, 1:])


def test_padded_batch_by_way_of_packed_sequences():
    """What bert_padding is for."""
    qkv, mask = draw(2, 9, 3, 2, 16, dtype=torch.float32, seed=0), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False
    packed, indices, cu_seqlens, longest, _ = unpad_input(qkv, mask)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(packed, cu_seqlens, longest, causal=True)
    whole = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    torch.testing.assert_close(pad_input(out, indices, 2, 9), whole * mask[..., None, None])


def rotated(x, cos, sin, interleaved):
    """x (T, H, D) by tables (T, R/2)."""
    size = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = x[..., :size], x[..., size:]
    pairs = turned.unflatten(-1, (-1, 2)) if interleaved else turned.unflatten(-1, (2, -1)).transpose(-1, -2)
    a, b = pairs.unbind(-1)
    pairs = torch.stack((a * cos - b * sin, a * sin + b * cos), -1)
    return torch.cat(((pairs if interleaved else pairs.transpose(-1, -2)).flatten(-2), rest), -1)


class Cache:
    """Random arguments of flash_attn_with_kvcache: three sequences, and what is in the cache, sequence by sequence."""

    def __init__(self, layout, queries=3, new=2, heads=4, kv_heads=2, dim=32, dtype=torch.float32):
        self.layout, self.dtype = layout, dtype
        self.q = draw(3, queries, heads, dim, dtype=dtype, seed=0)
        self.k, self.v = (draw(3, new, kv_heads, dim, dtype=dtype, seed=seed) for seed in (1, 2))
        self.lengths, self.rows, self.starts = torch.tensor([11, 0, 37], dtype=torch.int32), [0, 1, 2], [0, 0, 0]
        if layout == "paged":
            self.table = torch.tensor([[5, 3, 0], [8, 1, 0], [2, 7, 4]], dtype=torch.int32)
        elif layout != "plain":
            self.rows = [4, 0, 3]
        if layout == "leftpad":
            self.starts, self.lengths = [4, 0, 9], torch.tensor([11, 0, 37], dtype=torch.int32)
        shape = (9, 16) if layout == "paged" else (5, 48)
        self.caches = [draw(*shape, kv_heads, dim, dtype=dtype, seed=seed) for seed in (3, 4)]

    def options(self):
        rows = torch.tensor(self.rows, dtype=torch.int32)
        return {
            "plain": {},
            "paged": {"block_table": getattr(self, "table", None)},
            "indexed": {"cache_batch_idx": rows},
            "leftpad": {"cache_batch_idx": rows, "cache_leftpad": torch.tensor(self.starts, dtype=torch.int32)},
        }[self.layout]

    def place(self, n, s):
        """Where the token s of sequence n is."""
        if self.layout == "paged":
            return int(self.table[n, s // 16]), s % 16
        return self.rows[n], s

    def expected(self, dtype, new, tables, interleaved, local, slopes, **options):
        """(out, lse, caches) by the formula."""
        caches = [cache.to(dtype, copy=True) for cache in self.caches]
        outs, lses = [], []
        for n, length in enumerate(self.lengths.tolist()):
            q, fresh = self.q[n].to(dtype), [self.k[n].to(dtype), self.v[n].to(dtype)]
            if tables is not None:
                cos, sin = (table.to(dtype)[length - self.starts[n] :] for table in tables)
                fresh[0] = rotated(fresh[0], cos[: len(fresh[0])], sin[: len(fresh[0])], interleaved)
                rows = slice(len(q)) if local else [0] * len(q)
                q = rotated(q, cos[rows], sin[rows], interleaved)
            if new:
                for cache, x in zip(caches, fresh, strict=True):
                    for t, token in enumerate(x):
                        cache[self.place(n, length + t)] = token
                length += len(fresh[0])
            k, v = (
                torch.stack([cache[self.place(n, s)] for s in range(self.starts[n], length)])
                if length
                else cache.new_empty(0, *cache.shape[2:])
                for cache in caches
            )
            out, lse = formula(q, k, v, slopes=None if slopes is None else slopes[n], **options)
            outs.append(out)
            lses.append(lse)
        return [torch.stack(outs), torch.stack(lses)], caches


@pytest.mark.parametrize("layout", ["plain", "paged", "indexed", "leftpad"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (6, 0), (9, 2)], ids=str)
def test_kvcache(layout, causal, window_size):
    """Every layout, with new tokens and without, rotated or not, one query and several."""
    dtypes, softcaps = itertools.cycle(DTYPES), itertools.cycle([0.0, 2.5])
    alibis, kv_heads = itertools.cycle(["none", "batch"]), itertools.cycle([4, 2, 1, 2])
    for queries, new, rotary in [(1, 0, None), (3, 0, None), (1, 1, None), (3, 3, True), (1, 1, False), (2, 5, True)]:
        given = Cache(layout, queries, new, kv_heads=next(kv_heads), dtype=next(dtypes))
        slopes, softcap = slopes_of(next(alibis), 3, 4), next(softcaps)
        angles = draw(64, 8, dtype=torch.float64, seed=7)
        tables = None if rotary is None else [table.to(given.dtype) for table in (angles.cos(), angles.sin())]
        appended = {"k": given.k, "v": given.v} if new else {}
        if tables is not None:
            appended |= {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": rotary}
        options = {"causal": causal, "window_size": window_size, "softcap": softcap}
        caches = [cache.clone() for cache in given.caches]
        found = flash_attn.flash_attn_with_kvcache(
            *(given.q, *caches),
            cache_seqlens=given.lengths,
            alibi_slopes=slopes,
            return_softmax_lse=True,
            **{**given.options(), **appended, **options},
        )
        asked = (new, tables, rotary, causal or window_size != (-1, -1), slopes)
        (truths, wide), (references, narrow) = (
            given.expected(dtype, *asked, **options) for dtype in (torch.float64, given.dtype)
        )
        check(found, truths, references)
        check(caches, wide, narrow)
        for cache, old, exact in zip(caches, given.caches, wide, strict=True):  # nothing else is touched
            untouched = (exact == old.double()).all(-1)
            assert torch.equal(cache[untouched], old[untouched])


def test_kvcache_whole_and_by_number():
    """cache_seqlens by default and as an int; no lse; strides of heads before tokens; half of a cache."""
    q, cache = draw(2, 1, 2, 16, dtype=torch.float32, seed=0), draw(2, 2, 40, 16, dtype=torch.float32, seed=1)
    cache = cache.transpose(1, 2)
    whole = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    torch.testing.assert_close(whole, flash_attn.flash_attn_func(q, cache, cache))
    half = flash_attn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=20, causal=True, num_splits=4)
    torch.testing.assert_close(half, flash_attn.flash_attn_func(q, cache[:, :20], cache[:, :20]))


def test_kvcache_is_filled_token_by_token():
    """As a model generates: the outputs are those of causal attention to the whole sequence."""
    qkv = draw(2, 19, 3, 4, 16, dtype=torch.float32, seed=0)
    expected = flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)
    k_cache, v_cache = (torch.full((2, 24, 4, 16), math.nan) for _ in range(2))
    start, outs = 0, []
    for piece in qkv.split([7, 1, 1, 4, 6], 1):
        q, k, v = piece.unbind(2)
        outs.append(flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=start, causal=True))
        start += piece.shape[1]
    torch.testing.assert_close(torch.cat(outs, 1), expected)


X, WIDE, PACKED = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 264), torch.zeros(4, 2, 8)
STARTS = torch.tensor([0, 4], dtype=torch.int32)
BOTH = (STARTS, STARTS, 4, 4)
ERRORS = [
    (ValueError, "head dim D from 1 to 256", "func", [WIDE] * 3, {}),
    (ValueError, "H=2 to be a multiple of K=3", "func", [X, *[torch.zeros(1, 4, 3, 8)] * 2], {}),
    (TypeError, "k is torch.bfloat16, expected torch.float32", "func", [X, X.bfloat16(), X], {}),
    (TypeError, "q is torch.int64", "func", [X.long()] * 3, {}),
    (ValueError, "dropout_p is 1.0", "func", [X, X, X, 1.0], {}),
    (ValueError, r"window_size is \(-2, 0\), expected", "func", [X] * 3, {"window_size": (-2, 0)}),
    (ValueError, r"window_size is \(None, None\)", "func", [X] * 3, {"window_size": (None, None)}),
    (ValueError, r"alibi_slopes has shape \(3,\)", "func", [X] * 3, {"alibi_slopes": torch.ones(3)}),
    (
        ValueError,
        r"kvpacked_func: kv has shape \(1, 4, 3, 2, 8\)",
        "kvpacked_func",
        [X, torch.zeros(1, 4, 3, 2, 8)],
        {},
    ),
    (
        ValueError,
        r"qkvpacked_func: qkv has shape \(1, 4, 2, 2, 8\)",
        "qkvpacked_func",
        [torch.zeros(1, 4, 2, 2, 8)],
        {},
    ),
    (ValueError, "varlen_kvpacked_func: kv", "varlen_kvpacked_func", [PACKED, torch.zeros(4, 3, 2, 8), *BOTH], {}),
    (ValueError, "varlen_qkvpacked_func: qkv", "varlen_qkvpacked_func", [torch.zeros(4, 2, 2, 8), STARTS, 4], {}),
    (TypeError, "cu_seqlens_q is torch.int64", "varlen_func", [*[PACKED] * 3, STARTS.long(), STARTS, 4, 4], {}),
    (ValueError, "max_seqlen_k is 3, expected at least 4", "varlen_func", [*[PACKED] * 3, STARTS, STARTS, 4, 3], {}),
    (
        ValueError,
        r"cu_seqlens_q is \[0, 8\] for 4 tokens",
        "varlen_func",
        [*[PACKED] * 3, 2 * STARTS, STARTS, 8, 4],
        {},
    ),
    (ValueError, "cache_seqlens is None", "with_kvcache", [X] * 5, {}),
    (ValueError, "k is given alone", "with_kvcache", [X] * 4, {"cache_seqlens": 0}),
    (ValueError, "block_table and cache_leftpad", "with_kvcache", [X] * 3, {"block_table": X, "cache_leftpad": X}),
    (ValueError, "block_table and cache_batch_idx", "with_kvcache", [X] * 3, {"block_table": X, "cache_batch_idx": X}),
    (ValueError, "rotary_sin None and k None", "with_kvcache", [X] * 3, {"rotary_cos": PACKED[0]}),
    (
        ValueError,
        "have 2 and 2 rows, expected at least 4",
        "with_kvcache",
        [X] * 5,
        {"cache_seqlens": 0, "rotary_cos": PACKED[0, :, :4], "rotary_sin": PACKED[0, :, :4]},
    ),
    (
        ValueError,
        "expected with cache_leftpad one row right behind",
        "with_kvcache",
        [torch.zeros(2, 1, 2, 8), *[torch.zeros(4, 2, 2, 8).transpose(0, 1)] * 2],
        {"cache_seqlens": 0, "cache_leftpad": STARTS},
    ),
    (ValueError, "block_table is torch.int64", "varlen_func", [PACKED, X, X, *BOTH], {"block_table": STARTS.long()}),
]


@pytest.mark.parametrize(("error", "message", "name", "arguments", "options"), ERRORS)
def test_errors(error, message, name, arguments, options):
    with pytest.raises(error, match=message):
        getattr(flash_attn, f"flash_attn_{name}")(*arguments, **options)
