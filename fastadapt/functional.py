"""The public functions and the autograd Functions behind them."""

from __future__ import annotations

import importlib.util
import os
import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops
from .checks import check_adapter_linear, check_weight_norm
from .reference import (
    AdapterForm,
    adapter_linear_reference,
    merged_weight_reference,
    weight_norm_reference,
)

BACKENDS = ("auto", "triton", "eager", "reference")

# Share of the frozen pass above which the recomposed weight is kept for the backward instead of remade there:
# remaking costs 2·K·N·r FLOPs against 4·M·K·N, so r / (2 M). See `_recompose`.
_KEEP_RECOMPOSED_ABOVE = 0.1


# Finding out does not import it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def resolve_backend(backend: str, *tensors: Tensor) -> str:
    """The backend that these tensors run on: "triton", "eager" or "reference".

    "auto" takes Triton for 16- and 32-bit tensors on a GPU that it supports, else eager. An explicit choice is never
    replaced: where it cannot run it raises ValueError (unknown name, no Triton, tensors not on a GPU) or TypeError
    (a dtype without a kernel). Under TRITON_INTERPRET=1 an explicit "triton" takes CPU tensors too.
    """
    kind = tensors[0].device.type
    if backend == "auto":
        on_gpu = kind == "cuda" and HAS_TRITON and all(t.dtype != torch.float64 for t in tensors)
        return "triton" if on_gpu else "eager"
    check_backend(backend)
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend "triton" needs the package triton: pip install "fastadapt[triton]"')
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend "triton" needs tensors on a GPU, got {kind}: move them, take backend="eager", '
                "or set TRITON_INTERPRET=1 to run the kernels in the interpreter"
            )
        if any(t.dtype == torch.float64 for t in tensors):
            raise TypeError('backend "triton" has no float64 kernels: take backend="eager"')
    return backend


def merged_weight(weight: Tensor, form: AdapterForm) -> Tensor:
    """W' = diag(g) W0 + diag(h) B diag(d) A: the merge rule of every adapter form, computed in at least fp32.

    Shapes: weight and W' [N, K]. The result has the dtype of `weight`; F.linear(x, W', β) equals the form.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors: dict[str, Any] = {name: v.to(dtype) for name, v in form._asdict().items() if isinstance(v, Tensor)}
    cast = form._replace(**tensors)
    return merged_weight_reference(weight.to(dtype), cast).to(weight.dtype)


class ShrinkCache:
    """The last u = x Aᵀ of a frozen A, so that layers which read the same x (q, k, v; gate, up) compute it once.

    It holds one u, and only as long as its x lives. A hit needs the very same tensors, unwritten since.
    """

    def __init__(self) -> None:
        self._entry: tuple[tuple[Any, ...], weakref.ref[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles start empty
        return ShrinkCache, ()

    def shrink(self, x: Tensor, A: Tensor, dtype: torch.dtype, backend: str) -> Tensor | None:
        """u [M, r] for x [..., K], or None where identity cannot be told (compiling, inference tensors)."""
        if torch.compiler.is_compiling() or x.is_inference() or A.is_inference():
            return None
        key = (id(x), x._version, A.data_ptr(), A.shape, A.stride(), A._version, dtype, backend)
        entry = self._entry
        if entry is not None and entry[0] == key and entry[1]() is x:
            return entry[2]
        u: Tensor = ops.shrink(_rows(x.detach()).to(dtype), A, None, 0.0, backend)
        self._entry = (key, weakref.ref(x, self._forget), u)
        return u

    def _forget(self, x: weakref.ref[Tensor]) -> None:
        if self._entry is not None and self._entry[1] is x:
            self._entry = None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on for x's device, else x's own."""
    kind = x.device.type
    if _autocasts(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _recompose(rows: int, weight: Tensor, A: Tensor, backward: bool) -> str:
    """Whether W' = W0 + diag(h) B diag(d) A made once costs fewer FLOPs than the low-rank path: "no", "remake", "keep".

    Per 2·r FLOPs: the path takes M·N (expand) and, in the backward, M·N (q) + M·K (q A); W' takes K·N, twice where the
    backward makes it again. u and P = dyᵀu are needed either way. "keep" holds [N, K] until the backward, which pays
    where remaking would add more than a tenth of the frozen pass.
    """
    n, k = weight.shape
    r = A.shape[0]
    if not backward:
        return "remake" if k * n < rows * (k + n) else "no"
    keep = r > 2 * rows * _KEEP_RECOMPOSED_ABOVE
    path = rows * (2 * n + k)
    return "no" if path <= k * n * (1 if keep else 2) else "keep" if keep else "remake"


class AdapterLinearFunction(torch.autograd.Function):
    """y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β with the smallest set of saved tensors.

    Kept for the backward: x only where A trains, u [M, r] only where B, d or h do, z = W0 x only where g does, and what
    makes the dropout mask. Gradients are once differentiable. Algebra: with t = d ⊙ u, q = (h ⊙ dy) B, P = dyᵀ u,

        dx = (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A)     dA = (d ⊙ q)ᵀ x̃     dB = h ⊙ P ⊙ d     dβ = Σ dy
        dh = rowsum(B ⊙ P ⊙ d)     dd = colsum(h ⊙ B ⊙ P)     dg = Σ dy ⊙ z
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        A: Tensor,
        B: Tensor,
        mid_scale: Tensor | None,
        out_scale: Tensor | None,
        base_scale: Tensor | None,
        bias: Tensor | None,
        shared_u: Tensor | None,
        drop: Tensor | None,
        scaling: float,
        p: float,
        dropout_on_base: bool,
        backend: str,
        backward: bool,
    ) -> Tensor:
        dtype = _compute_dtype(x)
        # needs_input_grad does not know of no_grad, where nothing needs to be kept or prepared.
        needs = [backward and needed for needed in ctx.needs_input_grad[:8]]
        needs_x, _, needs_A, needs_B, needs_mid, needs_out, needs_base, _ = needs
        backward = any(needs)
        with _without_autocast(x):
            rows, base = ops.cast(_rows(x), dtype), ops.cast(weight, dtype)
            recompose = "no"
            # In 16 bit a recomposed weight would round away deltas below its half-ulp.
            may_recompose = backend == "eager" and drop is None and A.shape[0] > 0 and not (needs_A or needs_base)
            if may_recompose and dtype in (torch.float32, torch.float64):
                recompose = _recompose(rows.shape[0], weight, A, backward)
            z = recomposed = u = None
            if recompose == "no" or needs_B or needs_mid or needs_out:
                u = ops.shrink(rows, A, drop, p, backend) if shared_u is None else shared_u
            if recompose != "no":
                form = AdapterForm(A, B, mid_scale, _out_scale(out_scale, scaling), base_scale)
                recomposed = _recomposed_weight(base, form)
                y = rows @ recomposed.T if bias is None else torch.addmm(bias.to(dtype), rows, recomposed.T)
            else:
                op = ops.adapter_linear_keep_base if needs_base else ops.adapter_linear
                y = op(
                    rows, base, u, B, mid_scale, out_scale, scaling, base_scale, bias, drop, p, dropout_on_base, backend
                )
                if needs_base:
                    y, z = y
        if backward:
            ctx.save_for_backward(
                rows if needs_A else None,
                weight,
                A,
                B,
                mid_scale,
                out_scale,
                base_scale,
                u if needs_B or needs_mid or needs_out else None,
                z,
                drop if needs_x or needs_A else None,
                recomposed if recompose == "keep" and needs_x else None,
            )
            ctx.x_shape, ctx.dtype, ctx.recompose = x.shape, dtype, recompose
            ctx.scaling, ctx.p, ctx.dropout_on_base, ctx.backend = scaling, p, dropout_on_base, backend
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B, mid_scale, out_scale, base_scale, u, z, drop, recomposed = ctx.saved_tensors
        needs_x, _, needs_A, needs_B, needs_mid, needs_out, needs_base, needs_bias = ctx.needs_input_grad[:8]
        scaling, p, backend = ctx.scaling, ctx.p, ctx.backend
        dx = dA = dB = dmid = dout = dbase = dbias = None
        with _without_autocast(dy):
            dy, base = _rows(dy), ops.cast(weight, ctx.dtype)
            q = None
            if needs_A or (needs_x and ctx.recompose == "no"):
                q = ops.shrink_grad(dy, B, out_scale, scaling, backend)
            if u is not None or needs_bias or needs_base:
                sums = iter(ops.output_grads(dy, u, z, needs_bias, backend))
                if u is not None:
                    needs = (needs_B, needs_mid, needs_out)
                    dB, dmid, dout = _factor_grads(next(sums), B, mid_scale, out_scale, scaling, needs)
                if needs_bias:
                    dbias = next(sums)
                if needs_base:
                    dbase = next(sums)
            if needs_A:
                dA = ops.input_grads(rows, q, mid_scale, drop, p, backend)
            if needs_x:
                if ctx.recompose == "no":
                    dx = ops.adapter_linear_dx(
                        dy, base, q, A, mid_scale, base_scale, drop, p, ctx.dropout_on_base, backend
                    )
                else:
                    if recomposed is None:
                        form = AdapterForm(A, B, mid_scale, _out_scale(out_scale, scaling), base_scale)
                        recomposed = _recomposed_weight(base, form)
                    dx = dy @ recomposed
                dx = dx.view(ctx.x_shape)
        # In other dtypes than their tensors' the gradients are sums in fp32: autograd casts them.
        return dx, None, dA, dB, dmid, dout, dbase, dbias, None, None, None, None, None, None, None


def _factor_grads(
    P: Tensor,
    B: Tensor,
    mid_scale: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB, dd and dh from P = dyᵀ u [N, R]: nothing larger than B is made."""
    needs_B, needs_mid, needs_out = needs
    dB = dmid = dout = None
    if needs_B:
        dB = P if mid_scale is None else P * mid_scale
        if out_scale is not None:
            dB = dB * (scaling * out_scale)[:, None]
        elif scaling != 1.0:
            dB = dB * scaling
    if needs_mid or needs_out:
        PB = P * B
        if needs_mid:
            dmid = (PB.sum(0) if out_scale is None else ops.cast(out_scale, PB.dtype) @ PB).mul_(scaling)
        if needs_out:
            dout = (PB.sum(1) if mid_scale is None else PB @ ops.cast(mid_scale, PB.dtype)).mul_(scaling)
    return dB, dmid, dout


def _out_scale(out_scale: Tensor | None, scaling: float) -> Tensor | float:
    return scaling if out_scale is None else out_scale if scaling == 1.0 else out_scale * scaling


def _recomposed_weight(weight: Tensor, form: AdapterForm) -> Tensor:
    """`merged_weight` in one product: for weights of 32 bits and more."""
    down, up, alpha = form.A, form.B, 1.0
    if form.mid_scale is not None:  # on the smaller factor
        n, k = weight.shape
        down, up = (down * form.mid_scale[:, None], up) if k < n else (down, up * form.mid_scale)
    if isinstance(form.out_scale, Tensor):
        up = up * form.out_scale[:, None]
    else:
        alpha = form.out_scale
    base = weight if form.base_scale is None else weight * form.base_scale[:, None]
    return torch.addmm(base, up.to(weight.dtype), down.to(weight.dtype), alpha=alpha)


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    form: AdapterForm,
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    shrink_cache: ShrinkCache | None = None,
) -> Tensor:
    """The adapter form on a frozen linear layer: y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β.

    x̃ = dropout(x) while `training`, on the low-rank path only; with form.dropout_on_base also on the part of the base
    path that g adds (see AdapterForm). The mask follows torch.manual_seed and gradient checkpointing.

    Shapes: x [..., K]; weight [N, K]; form as AdapterForm states, r may be 0; y [..., N].
    Dtypes: weight has x's dtype, or autocast's takes the place of both; the form's tensors may be fp32 beside 16-bit x.
    Gradients flow to x and to every tensor of the form; weight is frozen. Once differentiable.
    `shrink_cache` lets layers that read the same x through the same frozen A share u = A x; it is not used under
    dropout. Raises ValueError on mismatched shapes, devices, a dropout outside [0, 1), a weight that requires grad or
    a backend that cannot run; TypeError on dtypes that cannot be mixed.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353; Kopiczko et al. 2023,
    arXiv:2310.11454.
    """
    check_adapter_linear(x, weight, form, dropout)
    dtype = _compute_dtype(x)
    if dtype == x.dtype and weight.dtype != x.dtype:
        raise TypeError(
            f"weight must have x's dtype {x.dtype}, got {weight.dtype}: cast one of them or use torch.autocast"
        )
    backend = resolve_backend(backend, x, weight)
    p = dropout if training else 0.0
    drop = None
    if p > 0.0:
        with torch.no_grad():
            drop = ops.draw_dropout(_rows(x), p, "eager" if backend == "reference" else backend)
    if backend == "reference":
        keep = ops.keep_probability(p, "eager")
        mask = None if drop is None else ops.dropout_mask(drop, x.shape)
        return adapter_linear_reference(x, weight, form, mask=mask, p=1.0 - keep)
    scaling, out_scale = 1.0, None
    if not isinstance(form.out_scale, Tensor):
        scaling = float(form.out_scale)
    else:
        out_scale = form.out_scale if form.out_scale.dim() > 0 else form.out_scale.expand(weight.shape[0])
    shared_u = None
    if shrink_cache is not None and drop is None and not form.A.requires_grad:
        with torch.no_grad():
            shared_u = shrink_cache.shrink(x, form.A, dtype, backend)
    return AdapterLinearFunction.apply(  # type: ignore[no-any-return]
        x,
        weight,
        form.A,
        form.B,
        form.mid_scale,
        out_scale,
        form.base_scale,
        form.bias,
        shared_u,
        drop,
        scaling,
        p,
        form.dropout_on_base,
        backend,
        torch.is_grad_enabled(),
    )


class WeightNormFunction(torch.autograd.Function):
    """n_j = ‖(W0 + s·B·A)_j‖ with gradients to A and B: with c = dn / n and V = W0 + s·B·A,

    dB = s · c ⊙ (V Aᵀ) = s · c ⊙ (W0Aᵀ + s·B (A Aᵀ))     dA = s · (c ⊙ B)ᵀ V = s · ((c ⊙ B)ᵀ W0 + s·(Bᵀ(c ⊙ B)) A)
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, A: Tensor, B: Tensor, base_squared: Tensor, scaling: float, backend: str
    ) -> Tensor:
        n, WA = ops.weight_norm(weight, A, B, scaling, base_squared, backend)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(weight, A, B, n, WA)
            ctx.scaling = scaling
        return n  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, n, WA = ctx.saved_tensors
        s = ctx.scaling
        down, up = A.to(n.dtype), B.to(n.dtype)
        weighted = torch.where(n > 0, dn / n, 0.0)[:, None]
        dB = (s * weighted * (WA + s * (up @ (down @ down.T)))).to(B.dtype)
        scaled_up = weighted * up
        dA = (s * ((scaled_up.T.to(weight.dtype) @ weight).to(n.dtype) + s * (up.T @ scaled_up).T @ down)).to(A.dtype)
        return None, dA, dB, None, None, None


def row_squares(weight: Tensor, *, backend: str = "auto") -> Tensor:
    """‖W0‖² by rows in fp32, the constant part of the DoRA norm. Shapes: weight [N, K]; result [N]."""
    backend = resolve_backend(backend, weight)
    squares: Tensor = ops.row_squares(weight, "eager" if backend == "reference" else backend)
    return squares


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row norms of W0 + s·B·A without forming B·A, in fp32 (fp64 for an fp64 weight):

        n² = ‖W0‖²_row + 2s · rowsum(B ⊙ (W0 Aᵀ)) + s² · rowsum((B (A Aᵀ)) ⊙ B)

    Shapes: weight [N, K]; lora_A [r, K]; lora_B [N, r]; base_squared [N] = row_squares(weight), a constant that a
    caller may keep; n [N]. Gradients flow to lora_A and lora_B; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, TypeError on dtypes without a kernel.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.
    """
    check_weight_norm(weight, lora_A, lora_B)
    backend = resolve_backend(backend, weight)
    if backend == "reference":
        return weight_norm_reference(weight, lora_A, lora_B, scaling)
    if base_squared is None:
        base_squared = ops.row_squares(weight.detach(), backend)
    if not (torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)):
        return ops.weight_norm(weight, lora_A, lora_B, scaling, base_squared, backend)[0]  # type: ignore[no-any-return]
    return WeightNormFunction.apply(weight, lora_A, lora_B, base_squared, scaling, backend)  # type: ignore[no-any-return]
