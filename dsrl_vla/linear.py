"""Affine layers, by the quicker of the two libraries that torch multiplies float32 matrices with on a CPU.

torch's own choice is MKL, which on processors that are not Intel's does without AVX-512. oneDNN, which torch brings
too, does not: there it halves a product's time, once that outweighs its dearer call. On Intel's own, MKL is the
quicker one. Same function, other rounding.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORTHWHILE = 2**21
"""Multiplications in a product from which on oneDNN's dearer call pays."""
_WIDE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
_CPUINFO = Path("/proc/cpuinfo")
"""Where Linux says whose processor it is; elsewhere `platform` does."""
_INTEL = "GenuineIntel" in (_CPUINFO.read_text() if _CPUINFO.exists() else platform.processor())
_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _WIDE and not _INTEL else None


def affine(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """x @ weight + bias: (N, in), (in, out), (out,) -> (N, out)."""
    return _Affine.apply(x, weight, bias) if pays(x, weight) else torch.addmm(bias, x, weight)


class QuickLinear(nn.Linear):
    """A frozen `nn.Linear` that chooses by how much it is given."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        rows = input.reshape(-1, input.shape[-1])
        if not pays(rows, self.weight):
            return super().forward(input)
        return _multiply(rows, self.weight, self.bias).view(*input.shape[:-1], -1)


def quicken(model: nn.Module) -> None:
    """Turn every plain `nn.Linear` of a frozen model into a `QuickLinear`; the weights keep their names."""
    for module in model.modules() if _product is not None else ():
        if type(module) is nn.Linear:
            module.__class__ = QuickLinear


def pays(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x @ weight is for oneDNN."""
    size = len(x) * weight.numel()
    return _product is not None and size >= WORTHWHILE and x.device.type == "cpu" and x.dtype == torch.float32


class _Affine(torch.autograd.Function):
    """The products of forward and backward by oneDNN; transposes are views, which it reads as they are."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight.t(), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight) if for_x else None,
            _multiply(x.t(), gradient.t()) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias: (N, in), (out, in) -> (N, out)."""
    assert _product is not None
    return _product(x, weight, bias, "none", [], "")
