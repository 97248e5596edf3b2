"""The op-level cases: for each op its sizes, its inputs, llmfast's call and the ways that PyTorch has to do the same.

Sizes are those of GPT-2 124M (C=768, F=3072, V=50257, D=64) and of SmolLM2 135M (C=576, F=1536, 9 heads on 3), with few
enough rows that a processor without bfloat16 instructions, where torch needs seconds for them, gets through.
`backward` is timed on one graph that is kept; `forward` without gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

import llmfast
from llmfast import backend, ops, reference
from llmfast.bench.harness import Case, Contest, Provider, Tensors
from llmfast.bench.peers import Function, compiled, peers_of
from llmfast.models import GPT, PRESETS

__all__ = [
    "OPS",
    "Options",
    "Work",
    "attention",
    "case_of",
    "cases",
    "cross_entropy",
    "ffn",
    "linear",
    "norm",
]

Size = Literal["full", "quick", "smoke"]


@dataclass(frozen=True)
class Options:
    """What to build.

    Attributes:
        size: full; quick (fewer, smaller); smoke (tiny, odd sizes: a check, not a measurement).
        compile: also measure ``torch.compile`` of the eager peers.
        all_isas: a provider for every instruction set that this machine has, not only for the best.
    """

    size: Size = "full"
    compile: bool = False
    all_isas: bool = False


@dataclass(frozen=True)
class Work:
    """One op at one size: all that differs between cases."""

    op: str
    direction: str
    dims: dict[str, int]
    inputs: dict[str, tuple[int, ...] | torch.Tensor]  # a shape: random values; a tensor: itself
    call: dict[str, object]  # keyword arguments other than inputs
    flops: float
    values: float  # elements that must be read or written
    natives: tuple[str, ...]  # its dispatch tables
    precision: str = "highest"  # of llmfast's float32 products


def _contest(work: Work, dtype: torch.dtype, options: Options) -> Contest:
    inputs = {
        name: value if isinstance(value, torch.Tensor) else _random(value, dtype, seed)
        for seed, (name, value) in enumerate(work.inputs.items())
    }
    exact_inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    ours = functools.partial(getattr(ops, work.op), **work.call)
    slack = 2.0 if work.precision == "highest" else 100.0  # some 3e-5 of the largest value, after several products
    own = functools.partial(
        Provider, Function(ours, inputs, work.direction), precision=work.precision, slack=slack, ours=True
    )
    providers: dict[str, Provider | str] = {"llmfast": own()}
    for isa in _lower_isas(work.natives, dtype) if options.all_isas else []:
        providers[f"llmfast {isa}"] = own(isa=isa)

    peers = peers_of(work.op, work.call, dtype)
    baseline = next(iter(peers))
    for name, peer in peers.items():
        if isinstance(peer, str):
            providers[name] = peer
        elif peer.differentiable or work.direction == "forward":
            providers[name] = Provider(Function(peer.function, inputs, work.direction), slack=peer.slack)
    if options.compile:
        function = Function(compiled(peers[baseline].function), inputs, work.direction)
        providers["torch.compile"] = Provider(function, compiles=True)
    else:
        providers["torch.compile"] = "not asked for (--compile)"
    oracle = functools.partial(getattr(reference, work.op), **work.call)
    return Contest(Function(oracle, exact_inputs, work.direction), baseline, providers)


def case_of(work: Work, dtype: torch.dtype, options: Options) -> Case:
    return Case(
        op=work.op,
        direction=work.direction,
        dtype=dtype,
        dims=work.dims,
        flops=int(work.flops),
        moved=int(work.values * dtype.itemsize),
        build=lambda: _contest(work, dtype, options),
        memory=work.op in ("attention", "linear_cross_entropy", "ffn") and options.size == "full",
        options=_shown(work.call) | ({"precision": work.precision} if work.precision != "highest" else {}),
    )


def _shown(call: dict[str, object]) -> dict[str, object]:
    """The arguments that tell one case from another; a tensor (a mask) by its shape."""
    return {
        name: "x".join(str(n) for n in value.shape) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
        if value is not None and value is not False
    }


def _random(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values; matrices of weights ``[N, K]`` scaled so that products stay of order one."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if len(shape) == 2 and seed > 0:
        values *= shape[1] ** -0.5
    return values.to(dtype)


def _lower_isas(natives: Iterable[str], dtype: torch.dtype) -> list[str]:
    """The processor's instruction sets below its best that have a row of their own for the op."""
    name = str(dtype).removeprefix("torch.")
    rows = [row for op in natives if op in backend.ops() for row in backend.implementations(op)]
    isas = {row["isa"] for row in rows if row["available"] and name in row["dtypes"] and row["isa"] in backend.ISAS}
    return sorted(isas, key=backend.ISAS.index, reverse=True)[1:]


def linear(M: int, K: int, N: int, direction: str) -> Work:
    both = 2 if direction == "backward" else 1
    inputs = {"x": (M, K), "weight": (N, K), "bias": (N,)}
    values = both * (M * K + N * K) + M * N
    natives = ("linear_backward",) if direction == "backward" else ("linear",)
    return Work("linear", direction, {"M": M, "K": K, "N": N}, inputs, {}, both * 2 * M * N * K, values, natives)


def ffn(M: int, C: int, width: int, activation: str, gated: bool, direction: str) -> Work:
    inputs: dict = {"x": (M, C), "up_weight": (width, C), "down_weight": (C, width)}
    if gated:
        inputs["gate_weight"] = (width, C)
        call: dict = {"up_bias": None, "down_bias": None, "activation": activation}
    else:
        inputs.update(up_bias=(width,), down_bias=(C,))
        call = {"activation": activation}
    matrices = 3 if gated else 2
    times = 3 if direction == "forward+backward" else 1
    dims = {"M": M, "C": C, "F": width}
    values = 2 * M * C + matrices * C * width * (2 if times == 3 else 1)
    return Work("ffn", direction, dims, inputs, call, times * 2 * matrices * M * C * width, values, ("ffn",))


def norm(op: str, M: int, C: int, direction: str) -> Work:
    inputs: dict = {"x": (M, C), "residual": (M, C), "weight": (C,)}
    if op == "add_layer_norm":
        inputs["bias"] = (C,)
    natives = (op,) if direction == "forward" else (f"{op}_backward",)
    # forward: x, residual in; normed, summed out. backward: their gradients and summed in, one gradient out
    return Work(op, direction, {"M": M, "C": C}, inputs, {}, 0, 4 * M * C, natives)


PRODUCTS = {"forward": 2, "backward": 5, "forward+backward": 7}  # backward: S again, dP, dQ, dK, dV
PASSES = {"forward": 1, "backward": 2, "forward+backward": 3}  # over q, k, v, out or their gradients


def attention(B: int, Hq: int, Hkv: int, Tq: int, Tk: int, D: int, direction: str, **call) -> Work:
    inputs = {"q": (B, Hq, Tq, D), "k": (B, Hkv, Tk, D), "v": (B, Hkv, Tk, D)}
    visible = reference.visible(Tq, Tk, causal=call.get("causal", False), window=call.get("window"))[None, None]
    if "mask" in call:
        visible = visible & call["mask"]
    flops = PRODUCTS[direction] * 2 * B * Hq * D * visible.expand(B, 1, Tq, Tk).sum().item()
    values = PASSES[direction] * (2 * B * Hq * Tq * D + 2 * B * Hkv * Tk * D)
    dims = {"B": B, "Hq": Hq, "Hkv": Hkv, "Tq": Tq, "Tk": Tk, "D": D}
    return Work("attention", direction, dims, inputs, call, flops, values, _attention_natives(direction))


def padded(B: int, H: int, T: int, D: int, direction: str) -> Work:
    """Sequences of T, 3/4 T, 1/2 T, ... tokens in a batch padded to T, as a tokenizer's attention_mask has it."""
    lengths = torch.tensor([max(1, T - i * T // 4) for i in range(B)])
    mask = (torch.arange(T) < lengths[:, None])[:, None, None, :]
    return attention(B, H, H, T, T, D, direction, mask=mask)


def packed(documents: int, length: int, Hq: int, Hkv: int, D: int, direction: str) -> Work:
    """Documents one after another in one stream, without padding; each sees only itself."""
    T = documents * length
    bounds = torch.arange(0, T + 1, length, dtype=torch.int32)
    inputs = {"q": (T, Hq, D), "k": (T, Hkv, D), "v": (T, Hkv, D), "cu_seqlens_q": bounds, "cu_seqlens_k": bounds}
    flops = PRODUCTS[direction] * 2 * documents * Hq * D * length * (length + 1) / 2
    values = PASSES[direction] * 2 * T * (Hq + Hkv) * D
    dims = {"documents": documents, "T": T, "Hq": Hq, "Hkv": Hkv, "D": D}
    natives = _attention_natives(direction)
    return Work("varlen_attention", direction, dims, inputs, {"causal": True}, flops, values, natives)


def _attention_natives(direction: str) -> tuple[str, ...]:
    both = {"forward": ("attention",), "backward": ("attention_backward",)}
    return both.get(direction, ("attention", "attention_backward"))


def cross_entropy(M: int, C: int, V: int) -> Work:
    target = torch.randint(V, (M,), generator=torch.Generator().manual_seed(0))
    inputs = {"x": (M, C), "weight": (V, C), "target": target}
    values = 2 * (M * C + V * C)
    natives = ("linear_cross_entropy_joint",)
    dims = {"M": M, "C": C, "V": V}
    return Work("linear_cross_entropy", "forward+backward", dims, inputs, {}, 6 * M * C * V, values, natives)


def _work(op: str, size: Size) -> list[Work]:
    """The sizes of one op."""
    few = {"full": 512, "quick": 128, "smoke": 7}[size]
    if op == "linear":
        if size == "smoke":
            return [linear(7, 33, 19, "forward"), linear(7, 33, 19, "backward")]
        work = [linear(16, 768, 3072, "forward"), linear(2 * few, 768, 3072, "forward")]
        if size == "full":
            work.append(linear(2 * few, 3072, 768, "forward"))
            work += [linear(M, 768, 3072, "forward") for M in (1, 64)]
            work += [linear(M, 768, 50257, "forward") for M in (1, 16, 64)]
        return [*work, linear(few, 768, 3072, "backward")]
    if op == "ffn":
        C, width = (33, 70) if size == "smoke" else (768, 3072)
        work = [ffn(few, C, width, "gelu_tanh", False, d) for d in ("forward", "forward+backward")]
        if size != "quick":
            C, width = (33, 70) if size == "smoke" else (576, 1536)
            work.append(ffn(few, C, width, "silu", True, "forward+backward"))
        return work
    if op in ("add_layer_norm", "add_rms_norm"):
        shapes = [(5, 33)] if size == "smoke" else [(4096, 768)]
        if size == "full":
            shapes.append((65536, 768))  # far beyond the caches
        return [norm(op, *shape, direction) for shape in shapes for direction in ("forward", "backward")]
    if op == "attention":
        if size == "smoke":
            work = [attention(2, 4, 2, 9, 9, 20, d, causal=True) for d in ("forward", "backward")]
            return [*work, padded(3, 2, 9, 20, "forward+backward")]
        B = 2 if size == "full" else 1
        work = [attention(B, 12, 12, 1024, 1024, 64, d, causal=True) for d in ("forward", "backward")]
        if size == "full":
            work += [attention(1, 9, 3, 2048, 2048, 64, d, causal=True, window=256) for d in ("forward", "backward")]
            work += [attention(1, 12, 12, 1024, 1024, 128, d, causal=True) for d in ("forward", "backward")]
            work.append(attention(8, 12, 12, 1, 1024, 64, "forward", causal=True))
            work.append(padded(4, 12, 1024, 64, "forward+backward"))
            work.append(attention(1, 12, 3, 2048, 2048, 64, "forward+backward", causal=True))
        return work
    if op == "varlen_attention":
        if size == "smoke":
            return [packed(3, 7, 4, 2, 20, "forward+backward")]
        return [packed(*((8, 512) if size == "full" else (4, 128)), 12, 12, 64, "forward+backward")]
    if op == "linear_cross_entropy":
        return [cross_entropy(*{"full": (128, 768, 50257), "quick": (128, 256, 8192), "smoke": (7, 33, 101)}[size])]
    raise ValueError(f"op: got {op!r}, expected one of {', '.join(OPS)}")


def _less_precise(op: str, size: Size) -> list[Work]:
    """The sizes that halves of bfloat16 are worth while for: more than a few rows."""
    return [replace(work, precision="high") for work in _work(op, size) if work.dims["M"] > 16 or size == "smoke"]


def _adamw_case(dtype: torch.dtype, options: Options) -> Case:
    """All tensors of a GPT in one step. Correctness: 3 steps of a few odd shapes, because the first alone hides `v`."""
    preset = {"full": "gpt2", "quick": "gpt-mini", "smoke": "gpt-nano"}[options.size]
    with torch.device("meta"):
        shapes = [p.shape for p in GPT(PRESETS[preset]).parameters()]
    count = sum(shape.numel() for shape in shapes)
    settings = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)

    def steps(make: Callable, wide: bool = False) -> Tensors:
        odd = [(7,), (33, 5), (130, 67), (1,)]
        parameters = [_random(s, dtype, seed=i) for i, s in enumerate(odd)]
        parameters = [(p.double() if wide else p).requires_grad_() for p in parameters]
        optimizer = make(parameters, **settings)
        for step in range(3):
            for i, p in enumerate(parameters):
                p.grad = _random(p.shape, dtype, seed=100 * step + i).to(p.dtype)
            optimizer.step()
        return tuple(p.detach() for p in parameters)

    def build() -> Contest:
        parameters = [_random(shape, dtype, seed=i) for i, shape in enumerate(shapes)]
        for p in parameters:  # shared by the providers: each has its own moments
            p.grad = torch.full_like(p, 1e-3)

        def provider(make: Callable, **how) -> Provider:
            made: list = []

            def run() -> None:
                if not made:
                    made.append(make(parameters, **settings))
                made[0].step()

            return Provider(run, lambda: steps(make), **how)

        providers: dict[str, Provider | str] = {
            "llmfast": provider(lambda *a, **k: llmfast.AdamW(*a, **k), ours=True),
            "torch fused": provider(lambda p, **k: torch.optim.AdamW(p, fused=True, **k)),
            "torch foreach": provider(lambda p, **k: torch.optim.AdamW(p, foreach=True, **k)),
        }
        oracle = lambda: steps(lambda p, **k: torch.optim.AdamW(p, foreach=False, **k), wide=True)  # noqa: E731
        return Contest(oracle, "torch fused", providers)

    dims = {"tensors": len(shapes), "parameters": count}
    # reads parameter, gradient and two float32 moments; writes all but the gradient
    moved = count * (3 * dtype.itemsize + 4 * 4)
    return Case("AdamW", "step", dtype, dims, 12 * count, moved, build)


OPS = (
    "linear",
    "ffn",
    "attention",
    "varlen_attention",
    "add_layer_norm",
    "add_rms_norm",
    "linear_cross_entropy",
    "AdamW",
)


def cases(
    options: Options, only: Iterable[str] | None = None, dtypes: Iterable[torch.dtype] = (torch.float32,)
) -> list:
    """The cases of the ops named in `only` (default: all), for each dtype.

    Raises:
        ValueError: `only` names something else.
    """
    wanted = list(OPS if only is None else only)
    unknown = [op for op in wanted if op not in OPS]
    if unknown:
        raise ValueError(f"only: got {', '.join(unknown)}, expected some of {', '.join(OPS)}")
    found = []
    for dtype in dtypes:
        for op in wanted:
            if op != "AdamW":
                found += [case_of(work, dtype, options) for work in _work(op, options.size)]
                if op in ("linear", "ffn") and dtype == torch.float32 and backend.native().active_isa() == "amx":
                    found += [case_of(work, dtype, options) for work in _less_precise(op, options.size)]
            elif dtype == torch.float32:  # torch keeps no float32 copy of narrow parameters: nothing to compare with
                found.append(_adamw_case(dtype, options))
    return found
