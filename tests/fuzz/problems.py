"""A hypothesis strategy for each op: shapes around every tile and register boundary, layouts, dtypes, options.

Hypothesis gives a tape of random bytes, from which a `Maker` reads sizes, options, and seeds of values and layouts. Zeros
stand for the simplest choice, so hypothesis, which turns bytes to zero, makes a failing problem small; and every problem
is new (drawn choice by choice, hypothesis makes four of five by changing one choice of the last).
Inputs are of order one and products are scaled to stay so: the rule's floor relies on it.

Above 500 lines: a strategy for each op, a page each, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import llmfast
from fuzz.layouts import embed
from fuzz.rule import Problem
from llmfast import reference
from llmfast.ops.ffn import ACTIVATIONS

__all__ = [
    "attention",
    "decode",
    "embedding",
    "ffn",
    "linear",
    "linear_cross_entropy",
    "norm",
    "rotary",
    "twin",
    "varlen",
]

Case = TypeVar("Case")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (F32, BF16, F16)
EDGES = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    23,
    24,
    25,
    31,
    32,
    33,
    47,
    48,
    49,
    63,
    64,
    65,
    66,
    95,
    96,
    97,
    127,
    128,
    129,
)
INF = math.inf
TAPE_BYTES = 600


class Maker:
    """Makes one problem's choices and tensors, as the tape says; past its end all choices are the simplest."""

    def __init__(self, tape: bytes) -> None:
        self._tape = tape
        self._read = 0
        self.generator = torch.Generator().manual_seed(self.integer(0, 2**31))

    def integer(self, least: int, most: int) -> int:
        word = int.from_bytes(self._tape[self._read : self._read + 4], "big")
        self._read += 4
        return least + word % (most - least + 1)

    def choose(self, options: Sequence):
        return options[self.integer(0, len(options) - 1)]

    def flag(self) -> bool:
        return self.choose((False, True))

    def dtype(self) -> torch.dtype:
        return self.choose(DTYPES)

    def layout(self) -> int:
        return self.integer(0, 2**16) if self.flag() else 0

    def size(self, least: int, most: int, edges: tuple[int, ...] = EDGES) -> int:
        """A small one, or one beside the edges of registers, tiles and blocks."""
        if self.flag():
            return self.choose([e for e in edges if least <= e <= most])
        return self.integer(least, min(most, 12))

    def sizes(self, most_of_them: int, least: int, most: int) -> list[int]:
        return [self.size(least, most) for _ in range(self.integer(0, most_of_them))]

    def normal(self, *shape: int, dtype: torch.dtype = F32, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator) * scale
        return embed(values.to(dtype), self.layout())

    def below(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def maybe(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return tensor if self.flag() else None

    def wanted(self, inputs: dict[str, torch.Tensor | None]) -> tuple[str, ...]:
        """All gradients mostly, sometimes none or a few of them."""
        names = [name for name, t in inputs.items() if t is not None and t.is_floating_point()]
        kind = self.choose(("none", "all", "all", "all", "some"))
        if kind == "some":
            return tuple(name for name in names if self.flag())
        return tuple(names) if kind == "all" else ()

    def leading(self, rows: int) -> tuple[int, ...]:
        """Dimensions that hold `rows` rows."""
        kind = self.integer(0, 3)
        if kind == 1 and rows % 2 == 0:
            return 2, rows // 2
        return {2: (1, rows), 3: (rows, 1, 1)}.get(kind, (rows,))


def strategy(make_case: Callable[[Maker], Case]) -> st.SearchStrategy[Case]:
    return st.binary(min_size=TAPE_BYTES, max_size=TAPE_BYTES).map(lambda tape: make_case(Maker(tape)))


def linear(make: Maker) -> Problem:
    dtype = make.dtype()
    M, N = make.size(0, 129), make.size(0, 129)
    K = make.size(0, 129 if M * N > 1000 else 1025, (*EDGES, 255, 257, 511, 513, 1023, 1025))
    inputs = {
        "x": make.normal(*make.leading(M), K, dtype=dtype),
        "weight": make.normal(N, K, dtype=dtype, scale=max(K, 1) ** -0.5),
        "bias": make.maybe(make.normal(N, dtype=dtype)),
    }
    about = f"linear M={M} K={K} N={N}"
    return Problem(
        llmfast.linear, F.linear, F.linear, inputs, make.wanted(inputs), make.layout(), narrow=dtype, about=about
    )


def ffn(make: Maker) -> Problem:
    dtype = make.dtype()
    M, C, width = make.size(0, 97), make.size(1, 97), make.size(1, 129)
    activation, gated = make.choose(ACTIVATIONS), make.flag()
    inputs = {
        "x": make.normal(*make.leading(M), C, dtype=dtype),
        "up_weight": make.normal(width, C, dtype=dtype, scale=C**-0.5),
        "up_bias": make.maybe(make.normal(width, dtype=dtype)),
        "down_weight": make.normal(C, width, dtype=dtype, scale=width**-0.5),
        "down_bias": make.maybe(make.normal(C, dtype=dtype)),
        "gate_weight": make.normal(width, C, dtype=dtype, scale=C**-0.5) if gated else None,
    }

    def with_options(function):
        return lambda **tensors: function(**tensors, activation=activation)

    x, up, gate = (None if inputs[n] is None else inputs[n].double() for n in ("x", "up_weight", "gate_weight"))
    up = F.linear(x, up, None if inputs["up_bias"] is None else inputs["up_bias"].double())
    pre = F.linear(x, gate) if gated else up
    slope = 2 * pre if activation == "relu2" else torch.full_like(pre, 1.2)
    hidden = [reference.activation(activation, pre), slope]
    if gated:
        hidden = [*hidden, hidden[0] * up, slope * up]
    terms = 2 * max([1.0, *(t.abs().max().item() for t in hidden if t.numel())])  # gradients from above are up to 2
    below = terms * max(1.0, math.sqrt(C / width))  # and after down_weight sums of C products
    ours, plain = with_options(llmfast.ffn), with_options(reference.ffn)
    return Problem(
        ours,
        plain,
        plain,
        inputs,
        make.wanted(inputs),
        make.layout(),
        units={
            "output 0": terms / 2,
            "grad down_weight": terms,
            **{f"grad {name}": below for name in ("up_bias", "up_weight", "gate_weight", "x")},
        },
        narrow=dtype,
        about=f"ffn M={M} C={C} F={width} {activation}",
    )


def norm(make: Maker) -> Problem:
    layer, eps = make.flag(), make.choose([1e-5, 1e-6, 1e-3])
    rows, C = make.size(0, 65), make.size(1, 300, (*EDGES, 255, 256, 257, 300))
    dtype, residual_dtype, weight_dtype, out_dtype = (make.dtype() for _ in range(4))
    spread = torch.linspace(-2, 2, C) if C > 1 else torch.ones(1)  # the variance of no row is near 0
    large = make.choose([1.0, 1.0, 1e3]) if dtype == residual_dtype == F32 else 1.0
    shape = (*make.leading(rows), C)
    x = torch.randn(shape, generator=make.generator) / 2
    inputs = {
        "x": embed(((x + spread) * large).to(dtype), make.layout(), broadcast=False),
        "residual": make.maybe(make.normal(*shape, dtype=residual_dtype, scale=0.5 * large)),
        "weight": make.normal(C, dtype=weight_dtype) if not layer or make.flag() else None,
        "bias": make.maybe(make.normal(C, dtype=weight_dtype)) if layer else None,
    }
    if not layer:
        del inputs["bias"]
    residual = inputs["residual"]
    summed = inputs["x"].double() + (0 if residual is None else residual.double())
    centred = summed - summed.mean(-1, keepdim=True) if layer else summed
    variance = centred.square().mean(-1)
    steepest = (variance + eps).rsqrt().max().item() if rows else 0.0

    def fused(module):
        def call(x, residual, weight, bias=None):
            dtype = None if x.dtype == torch.float64 else out_dtype
            if layer:
                return module.add_layer_norm(x, residual, weight, bias, eps, out_dtype=dtype)
            return module.add_rms_norm(x, residual, weight, eps, out_dtype=dtype)

        return call

    def plain(x, residual, weight, bias=None):
        """As a model in plain torch has it: the sum rounded to the residual's dtype, then the norm in float32."""
        summed = x if residual is None else (x + residual).to(residual.dtype)
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
        if layer:
            normed = F.layer_norm(summed.float(), (C,), weight, bias, eps)
        else:
            normed = F.rms_norm(summed.float(), (C,), weight, eps)
        return normed.to(out_dtype), summed

    terms = 8 * steepest  # gradients from above are up to 2, weights up to 4
    return Problem(
        fused(llmfast), plain, fused(reference), inputs, make.wanted(inputs), make.layout(),
        units={"grad x": terms, "grad residual": terms, "output 1": large},
        narrow=max(dtype, residual_dtype, out_dtype, key=_coarseness),
        about=f"{'layer' if layer else 'rms'} norm rows={rows} C={C} eps={eps} out={out_dtype} values times {large:g}",
    )  # fmt: skip


def _coarseness(dtype: torch.dtype) -> int:
    return (F32, F16, BF16).index(dtype)


def plain_attention(q, k, v, *, causal=False, mask=None, window=None, scale=None, softcap=None):
    """The formula in plain PyTorch operations, each in q's dtype."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(q.dtype).min
    allowed = reference.visible(q.shape[2], k.shape[2], causal=causal, window=window)
    if mask is not None and mask.dtype == torch.bool:
        allowed = allowed & mask
    elif mask is not None:
        scores, allowed = scores + mask.to(q.dtype).clamp(min=lowest), allowed & (mask != -INF)
    weights = torch.softmax(scores.masked_fill(~allowed, lowest), dim=-1) * allowed
    return weights @ v


def _mask(make: Maker, B: int, Hq: int, Tq: int, Tk: int, dtype: torch.dtype):
    """Boolean or additive, of up to four dimensions, each full or 1; often with rows that see nothing."""
    kind = make.choose([None, None, "bool", "add", "add -inf"])
    if kind is None:
        return None
    shape = [size if make.flag() else 1 for size in (B, Hq, Tq, Tk)]
    while len(shape) > 1 and shape[0] == 1 and make.flag():
        shape = shape[1:]
    hidden = torch.rand(shape, generator=make.generator) < make.choose([0.3, 0.05, 0.95])
    layout = make.layout()
    if kind == "bool":
        return embed(~hidden, layout)
    values = torch.randn(shape, generator=make.generator)
    if kind == "add -inf":
        values = torch.where(hidden, -INF, values)
    return embed(values.to(make.choose([F32, dtype])), layout)


def _score_options(make: Maker, D: int) -> dict:
    window = make.choose((None, None, "int", "pair"))
    if window == "int":
        window = make.integer(1, 140)
    elif window == "pair":
        window = make.integer(-1, 70), make.integer(-1, 70)
    return {
        "scale": make.choose([None, None, None, 0.5 / math.sqrt(D), 2.0 / math.sqrt(D), 0.0]),
        "softcap": make.choose([None, None, None, 2.0, 30.0]),
        "causal": make.flag(),
        "window": window,
    }


def _spoil(make: Maker, inputs: dict, mask, options: dict) -> dict[str, torch.Tensor]:
    """Writes NaN or infinity to keys and values that no query sees; returns what the others get instead."""
    bad = make.choose([None, math.nan, INF, -INF])
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if bad is None or not k.numel():
        return {}
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1], k.shape[2]
    seen = reference.visible(Tq, Tk, causal=options["causal"], window=options["window"])
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -INF)
    unseen = ~seen.expand(B, Hq, Tq, Tk).unflatten(1, (Hkv, Hq // Hkv)).any(3).any(2)  # [B, Hkv, Tk]
    layouts = make.layout(), make.layout()
    clean = {}
    for name, t, layout in (("k", k, layouts[0]), ("v", v, layouts[1])):
        clean[name] = t.contiguous()
        inputs[name] = embed(t.masked_fill(unseen[..., None], bad), layout, broadcast=False)
    return clean


def _attention_problem(make: Maker, B: int, Hkv: int, group: int, Tq: int, Tk: int) -> Problem:
    dtype = make.dtype()
    D = make.size(1, 129)
    Dv = D if make.flag() else make.size(1, 70)
    Hq = Hkv * group
    inputs = {
        "q": make.normal(B, Hq, Tq, D, dtype=dtype),
        "k": make.normal(B, Hkv, Tk, D, dtype=dtype),
        "v": make.normal(B, Hkv, Tk, Dv, dtype=dtype),
    }
    options = _score_options(make, D)
    mask = _mask(make, B, Hq, Tq, Tk, dtype)
    clean = _spoil(make, inputs, mask, options)
    about = f"attention {options} mask " + (
        "none" if mask is None else f"{mask.dtype} {tuple(mask.shape)} strides {mask.stride()}"
    )

    def with_options(function):
        return lambda q, k, v: function(q, k, v, mask=mask, **options)

    terms = 4 * math.sqrt(Dv)  # dP - delta: sums of Dv products, which cancel where a row sees little
    return Problem(
        with_options(llmfast.attention), with_options(plain_attention), with_options(reference.attention),
        inputs, make.wanted(inputs), make.layout(), clean,
        units={"grad q": terms, "grad k": terms}, narrow=dtype, about=about,
    )  # fmt: skip


def attention(make: Maker) -> Problem:
    B, Hkv, group = make.integer(0, 2), make.integer(1, 2), make.integer(1, 3)
    return _attention_problem(make, B, Hkv, group, make.size(0, 129), make.size(0, 150, (*EDGES, 150)))


def decode(make: Maker) -> Problem:
    """Few queries, many keys."""
    B, Hkv, group = make.integer(1, 3), make.integer(1, 3), make.integer(1, 4)
    Tk = make.size(1, 600, (*EDGES, 255, 256, 257, 511, 513, 600))
    return _attention_problem(make, B, Hkv, group, make.integer(1, 5), Tk)


def varlen(make: Maker) -> Problem:
    dtype = make.dtype()
    D = make.size(1, 97)
    Dv = D if make.flag() else make.size(1, 65)
    Hkv, group = make.integer(1, 2), make.integer(1, 3)
    q_lengths = make.sizes(4, 0, 97)
    k_lengths = q_lengths if make.flag() else [make.size(0, 97) for _ in q_lengths]
    bounds_dtype, options = make.choose([torch.int32, torch.int64]), _score_options(make, D)
    bounds = [torch.tensor([0, *lengths]).cumsum(0).to(bounds_dtype) for lengths in (q_lengths, k_lengths)]
    bounds = [embed(b, make.layout()) for b in bounds]
    inputs = {
        "q": make.normal(sum(q_lengths), Hkv * group, D, dtype=dtype),
        "k": make.normal(sum(k_lengths), Hkv, D, dtype=dtype),
        "v": make.normal(sum(k_lengths), Hkv, Dv, dtype=dtype),
    }

    def ours(q, k, v):
        return llmfast.varlen_attention(q, k, v, *bounds, **options)

    def one_by_one(function):
        def call(q, k, v):
            spans = zip(*(pair for b in bounds for pair in (b.tolist()[:-1], b.tolist()[1:])))
            outs = []
            for a, b, c, d in spans:
                one = function(*(t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d])), **options)
                outs.append(one[0].transpose(0, 1))
            return torch.cat(outs) if outs else q.new_zeros(0, q.shape[1], v.shape[-1])

        return call

    wanted = make.wanted(inputs) if q_lengths else ()
    terms = 4 * math.sqrt(Dv)
    return Problem(
        ours, one_by_one(plain_attention), one_by_one(reference.attention), inputs, wanted, make.layout(),
        units={"grad q": terms, "grad k": terms}, narrow=dtype,
        about=f"varlen {options} queries {q_lengths} keys {k_lengths}",
    )  # fmt: skip


def linear_cross_entropy(make: Maker) -> Problem:
    dtype = make.dtype()
    M, C = make.size(1, 65), make.size(1, 129)
    V = make.size(1, 4100 if M * C < 300 else 129, (*EDGES, 2047, 2048, 2049, 4100))
    confident = make.choose([1.0, 1.0, 20.0])
    ignore_index, reduction = make.choose([-100, 0, V - 1]), make.choose(["mean", "sum", "none"])
    leading = make.leading(M)
    target = make.below(V, *leading)
    ignored = torch.rand(leading, generator=make.generator) < make.choose([0.0, 0.25, 1.0])
    target = embed(target.masked_fill(ignored, ignore_index), make.layout())
    inputs = {
        "x": make.normal(*leading, C, dtype=dtype, scale=confident),
        "weight": make.normal(V, C, dtype=dtype, scale=C**-0.5),
    }
    if reduction == "mean" and bool((target == ignore_index).all()):
        reduction = "sum"  # 0 / 0 is NaN, gradients included, in torch and here; tested apart

    def ours(x, weight):
        return llmfast.linear_cross_entropy(x, weight, target, ignore_index=ignore_index, reduction=reduction)

    def plain(x, weight):
        logits = F.linear(x, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(
            logits.flatten(0, -2), target.flatten(), ignore_index=ignore_index, reduction=reduction
        )
        return losses.view(target.shape) if reduction == "none" else losses

    terms = confident if reduction == "mean" else confident * M**0.5
    return Problem(
        ours, plain, plain, inputs, make.wanted(inputs), make.layout(),
        units={"output 0": 4 * confident * (M if reduction == "sum" else 1), "grad x": 1.0, "grad weight": terms},
        narrow=dtype, about=f"cross-entropy M={M} C={C} V={V} ignore {ignore_index} {reduction} x times {confident:g}",
    )  # fmt: skip


def rotary(make: Maker) -> Problem:
    dtype = make.dtype()
    B, Hq, Hkv = make.integer(0, 3), make.integer(1, 4), make.integer(1, 3)
    T, D = make.size(0, 33), make.size(1, 130)
    half = make.integer(0, D // 2)
    table_dtype = make.choose([F32, F32, dtype])
    batch = make.choose([(), (1,), (B,)])
    positions = make.below(4000, *batch, T)
    tables = [t.to(table_dtype) for t in llmfast.rotary_tables(positions, 2 * half)]
    if make.flag():
        tables = [torch.cat((t, t), -1) for t in tables]
    cos, sin = (embed(t, make.layout(), broadcast=False) for t in tables)
    inputs = {"q": make.normal(B, Hq, T, D, dtype=dtype), "k": make.normal(B, Hkv, T, D, dtype=dtype)}

    def ours(q, k):
        return llmfast.rotary(q, k, cos, sin, rotary_dim=2 * half)

    def plain(q, k):
        return tuple(_half_rotation(t, cos[..., :half], sin[..., :half]) for t in (q, k))

    about = f"rotary R={2 * half}, tables {tuple(cos.shape)} {table_dtype}"
    return Problem(ours, plain, plain, inputs, make.wanted(inputs), make.layout(), narrow=dtype, about=about)


def _half_rotation(x, cos, sin):
    """As Hugging Face writes it, in x's own dtype."""
    R = 2 * cos.shape[-1]
    c, s = (torch.cat((t, t), -1).to(x.dtype) for t in (cos, sin))
    if c.dim() == 3:
        c, s = c[:, None], s[:, None]
    turned = x[..., :R]
    other = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    return torch.cat((turned * c + other * s, x[..., R:]), -1)


def embedding(make: Maker) -> Problem:
    dtype = make.dtype()
    out_dtype = make.choose([None, F32, BF16, F16])
    V, C, T = make.size(1, 129), make.size(1, 129), make.size(0, 33)
    leading = make.choose([(), (1,), (3,), (0,), (2, 2)])
    ids_dtype = make.choose([torch.int64, torch.int32])
    ids = embed(make.below(V, *leading, T).to(ids_dtype), make.layout())
    P = T + make.integer(0, 3)
    inputs = {
        "weight": make.normal(V, C, dtype=dtype),
        "position_weight": make.maybe(make.normal(P, C, dtype=dtype)) if P else None,
    }
    position_ids = None
    if inputs["position_weight"] is not None and make.flag():
        shape = make.choose([(T,), (*leading, T), (*(1 for _ in leading), T)])
        position_ids = embed(make.below(P, *shape).to(ids_dtype), make.layout())

    def ours(weight, position_weight):
        return llmfast.embedding(ids, weight, position_weight, position_ids, out_dtype=out_dtype)

    def plain(weight, position_weight):
        out = F.embedding(ids.long(), weight)
        if position_weight is not None:
            positions = torch.arange(T) if position_ids is None else position_ids.long()
            out = out + F.embedding(positions, position_weight)
        return out if weight.dtype == torch.float64 else out.to(out_dtype or dtype)

    about = f"embedding {tuple(ids.shape)} of {ids_dtype} to {out_dtype}, positions " + (
        "none" if position_ids is None else f"{tuple(position_ids.shape)}"
    )
    return Problem(ours, plain, plain, inputs, make.wanted(inputs), make.layout(), narrow=dtype, about=about)


def twin(make: Maker) -> Problem:
    """`scaled_dot_product_attention` with torch's arguments, three or four dimensions."""
    dtype = make.dtype()
    B, Hkv, group = make.integer(1, 2), make.integer(1, 2), make.integer(1, 3)
    Tq, Tk, D = make.size(1, 97), make.size(1, 97), make.size(1, 80)
    Hq = Hkv * group
    leading = make.choose([(), (B,)])
    inputs = {
        "query": make.normal(*leading, Hq, Tq, D, dtype=dtype),
        "key": make.normal(*leading, Hkv, Tk, D, dtype=dtype),
        "value": make.normal(*leading, Hkv, Tk, D, dtype=dtype),
    }
    options = {"enable_gqa": group > 1, "scale": make.choose([None, 0.3 / math.sqrt(D)])}
    mask = _mask(make, *(leading or (1,)), Hq, Tq, Tk, dtype) if make.flag() else None
    if mask is None:
        options["is_causal"] = make.flag()
    elif mask.dim() < 2 or mask.dim() > len(leading) + 3:
        mask = None
    elif mask.dtype not in (torch.bool, dtype):
        mask = embed(mask.to(dtype), make.layout())

    def ours(query, key, value):
        return llmfast.scaled_dot_product_attention(query, key, value, mask, **options)

    def plain(query, key, value):
        """Through plain_attention or, in float64, the reference: torch gives NaN or not for rows without keys."""
        function = reference.attention if query.dtype == torch.float64 else plain_attention
        allowed = mask
        if options.get("is_causal"):
            allowed = reference.visible(Tk, Tk, causal=True)[:Tq]  # top-left
            allowed = F.pad(allowed, (0, 0, 0, Tq - len(allowed)), value=True)
        four = (t if t.dim() == 4 else t[None] for t in (query, key, value))
        out = function(*four, mask=allowed, scale=options["scale"])
        return out if query.dim() == 4 else out[0]

    terms = 4 * math.sqrt(D)
    about = f"SDPA {options} mask " + ("none" if mask is None else f"{mask.dtype} {tuple(mask.shape)} {mask.stride()}")
    return Problem(
        ours, plain, plain, inputs, make.wanted(inputs), make.layout(),
        units={"grad query": terms, "grad key": terms}, narrow=dtype, about=about,
    )  # fmt: skip
