"""The networks of head and critic: a small transformer over observation and noise tokens, and an MLP.

Both are *stacked*: every weight has a leading ensemble axis E. An actor is a stack of one. The transformer's many
small layers are batched over E, activations (E, B, tokens, width); the MLP's few large ones go member by member
on a CPU, whose activations then stay in its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from .errors import bad
from .linear import affine

Member = Callable[[torch.Tensor], torch.Tensor]
"""One layer of a stack."""


class StackedLinear(nn.Module):
    """E independent linear layers, (E, …, in) -> (E, …, out)."""

    def __init__(self, members: int, inputs: int, outputs: int, gain: float = 1.0):
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound) * gain)
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(x.shape[0], -1, x.shape[-1])
        return torch.baddbmm(self.bias, rows, self.weight).view(*x.shape[:-1], -1)

    def members(self) -> list[Member]:
        """The layers one by one, each (N, in) -> (N, out)."""
        pairs = zip(self.weight.unbind(0), self.bias.squeeze(1).unbind(0), strict=True)
        return [partial(affine, weight=weight, bias=bias) for weight, bias in pairs]


class StackedNorm(nn.Module):
    """E independent layer norms over the last axis of (E, B, …, width).

    On a CPU one by one, for torch's own kernel does the affine part, and its gradients, in the same pass.
    """

    def __init__(self, members: int, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(members, width))
        self.bias = nn.Parameter(torch.zeros(members, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # where it matters more how many kernels there are
            gain, bias = (p.view(len(p), *(1,) * (x.ndim - 2), -1) for p in (self.gain, self.bias))
            return torch.addcmul(bias, F.layer_norm(x, x.shape[-1:]), gain)
        return _stacked(_each(self, x.unbind(0)))

    def members(self) -> list[Member]:
        """The norms one by one, each over the last axis of what it is given."""
        pairs = zip(self.gain.unbind(0), self.bias.unbind(0), strict=True)
        return [partial(F.layer_norm, normalized_shape=gain.shape, weight=gain, bias=bias) for gain, bias in pairs]


Attend = Callable[[torch.Tensor], torch.Tensor]
"""Queries (E, B, Q, width) to what they find in the memory, of the same shape."""


def attention(memory: torch.Tensor, layer: StackedLinear, layers: int, heads: int, queries: int) -> list[Attend]:
    """One attention per layer over `memory` (E, B, T, width); `layer` projects it to all keys and values.

    Keys and values of many tokens cost more than all else. Where few queries ask many tokens, the projections are
    applied on the queries' side instead: q . (W_k m + b_k) = (W_k^T q) . m + a constant that the softmax ignores,
    and sum_t p_t (W_v m_t + b_v) = W_v sum_t p_t m_t + b_v.
    """
    members, width = memory.shape[0], memory.shape[3]
    if memory.shape[2] <= 4 * queries:
        projected = layer(memory).view(*memory.shape[:3], 2 * layers, heads, -1).unsqueeze(2).unbind(4)
        return [partial(_attend, *pair) for pair in zip(projected[::2], projected[1::2], strict=True)]
    weights = layer.weight.view(members, width, 2 * layers, heads, -1).unbind(2)
    biases = layer.bias.view(members, 1, 1, 2 * layers, width).unbind(3)
    return [
        partial(_attend_absorbed, memory, *pair)
        for pair in zip(weights[::2], weights[1::2], biases[1::2], strict=True)
    ]


def _attend(keys: torch.Tensor, values: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """keys, values: (E, B, 1, T, heads, size). For a handful of tokens a fused kernel costs more than it saves."""
    heads, size = keys.shape[4:]
    scores = (query.view(*query.shape[:3], 1, heads, size) * keys).sum(-1, keepdim=True) * size**-0.5
    return (scores.softmax(3) * values).sum(3).flatten(3)


def _attend_absorbed(
    memory: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, query: torch.Tensor
) -> torch.Tensor:
    """keys, values: weights (E, width, heads, size); bias: of the values, (E, 1, 1, width)."""
    (members, batch, queries, width), (heads, size) = query.shape, keys.shape[2:]
    by_head = query.view(members, batch * queries, heads, size).transpose(1, 2).flatten(0, 1)
    asked = torch.bmm(by_head, keys.permute(0, 2, 3, 1).flatten(0, 1)) * size**-0.5
    asked = asked.view(members, heads, batch, queries, width).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    tokens = memory.flatten(0, 1)
    found = torch.bmm(torch.bmm(asked, tokens.transpose(1, 2)).softmax(-1), tokens)
    found = found.view(members, batch, heads, queries, width).transpose(1, 2).reshape(members * heads, -1, width)
    out = torch.bmm(found, values.permute(0, 2, 1, 3).flatten(0, 1)).view(members, heads, batch, queries, size)
    return out.permute(0, 2, 3, 1, 4).flatten(3) + bias


class Block(nn.Module):
    """A pre-norm layer in which query tokens attend to a memory; (E, B, Q, width) in and out."""

    def __init__(self, members: int, width: int):
        super().__init__()
        self.norm = StackedNorm(members, width)
        self.q = StackedLinear(members, width, width)
        self.out = StackedLinear(members, width, width)
        self.norm_mlp = StackedNorm(members, width)
        self.up = StackedLinear(members, width, 2 * width)
        self.down = StackedLinear(members, 2 * width, width)

    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        x = x + self.out(attend(self.q(self.norm(x))))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))


@dataclass(frozen=True)
class NetworkConfig:
    """Sizes of head and critic networks."""

    kind: str = "transformer"
    """transformer or mlp."""
    width: int = 64
    layers: int = 2
    heads: int = 4
    """Attention heads (transformer only)."""
    activation: Literal["relu", "tanh"] = "relu"
    """Of the MLP; tanh is the reference's (mlp only)."""
    norm: bool = True
    """LayerNorm before every activation of the MLP (mlp only)."""

    def __post_init__(self) -> None:
        if self.kind not in ("transformer", "mlp"):
            raise bad("network.kind", "transformer or mlp", f"'{self.kind}'")
        if self.heads < 1:
            raise bad("network.heads", "1 or more", self.heads)
        if self.width < 8 or self.width % self.heads:
            raise bad("network.width", f"a multiple of network.heads={self.heads}, 8 or more", self.width)
        if self.layers < 1:
            raise bad("network.layers", "1 or more", self.layers)
        if self.activation not in ("relu", "tanh"):
            raise bad("network.activation", "relu or tanh", f"'{self.activation}'")
        if self.kind == "transformer" and (self.activation, self.norm) != ("relu", True):
            what = f"activation {self.activation}, norm {self.norm}"
            raise bad("network.kind", "mlp with network.activation or network.norm changed", f"a transformer, {what}")


@dataclass(frozen=True)
class Shape:
    """What goes into a network and what comes out."""

    members: int
    """E, the ensemble's size."""
    inputs: list[int]
    """Widths of the observed vectors (state, feature, image embeddings)."""
    vectors: tuple[int, int]
    """(n, d) of the noise latent the network reads; (0, 0) for none."""
    queries: int
    """How many tokens are read out, …"""
    outputs: int
    """… each into this many numbers."""


class Transformer(nn.Module):
    """Query tokens that attend, layer by layer, to a token for each observed vector and each noise vector.

    A query starts from a linear view of everything that is observed, to which attention adds: with the
    attention silent this is a residual MLP, which is the floor under it. The observed tokens are the memory
    of all layers, so their keys and values are one matrix product.
    """

    def __init__(self, config: NetworkConfig, shape: Shape):
        super().__init__()
        members, inputs, queries = shape.members, shape.inputs, shape.queries
        width, (count, dim) = config.width, shape.vectors
        self.heads, self.layers = config.heads, config.layers
        self.tokens = nn.ModuleList(StackedLinear(members, size, width) for size in inputs)
        self.kinds = nn.Parameter(torch.randn(members, 1, len(inputs), width) * 0.02)
        self.vector = StackedLinear(members, dim, width) if count else None
        self.places = nn.Parameter(torch.randn(members, 1, count, width) * 0.02) if count else None
        self.norm_memory = StackedNorm(members, width)
        self.memory = StackedLinear(members, width, 2 * config.layers * width)
        self.everything = StackedLinear(members, sum(inputs) + count * dim, width)
        self.queries = nn.Parameter(torch.randn(members, 1, queries, width) * 0.02)
        self.blocks = nn.ModuleList(Block(members, width) for _ in range(config.layers))
        self.norm = StackedNorm(members, width)
        self.read = StackedLinear(members, width, shape.outputs, gain=0.1)

    def forward(self, inputs: list[torch.Tensor], vectors: torch.Tensor | None) -> torch.Tensor:
        """inputs: [(B, size)], vectors: (B, n, d) or None, for all members -> (E, B, queries, outputs)."""
        members = self.kinds.shape[0]
        inputs = [x.expand(members, *x.shape) for x in inputs]
        tokens = [torch.stack([embed(x) for embed, x in zip(self.tokens, inputs, strict=True)], 2) + self.kinds]
        flat = list(inputs)
        if self.vector is not None and self.places is not None and vectors is not None:
            vectors = vectors.expand(members, *vectors.shape)
            tokens.append(self.vector(vectors) + self.places)
            flat.append(vectors.flatten(2))
        memory = self.norm_memory(torch.cat(tokens, 2)).relu_()
        x = self.everything(torch.cat(flat, -1)).unsqueeze(2) + self.queries
        attends = attention(memory, self.memory, self.layers, self.heads, x.shape[2])
        for block, attend in zip(self.blocks, attends, strict=True):
            x = block(x, attend)
        return self.read(self.norm(x))


class MLP(nn.Module):
    """The plain alternative: everything concatenated, `layers` + 1 layers of LayerNorm and ReLU, or what is set."""

    def __init__(self, config: NetworkConfig, shape: Shape):
        super().__init__()
        members, (count, dim) = shape.members, shape.vectors
        sizes = [sum(shape.inputs) + count * dim] + [config.width] * (config.layers + 1)
        self.layers = nn.ModuleList(StackedLinear(members, a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(StackedNorm(members, size) for size in sizes[1:]) if config.norm else None
        self.activate = torch.relu_ if config.activation == "relu" else torch.tanh
        self.read = StackedLinear(members, config.width, shape.queries * shape.outputs, gain=0.1)
        self.shape = (shape.members, -1, shape.queries, shape.outputs)

    def forward(self, inputs: list[torch.Tensor], vectors: torch.Tensor | None) -> torch.Tensor:
        """inputs: [(B, size)], vectors: (B, n, d) or None, for all members -> (E, B, queries, outputs)."""
        x = torch.cat([*inputs, vectors.flatten(1)] if vectors is not None else inputs, -1)
        if x.is_cuda:
            return self._at_once(x.expand(self.shape[0], *x.shape))
        parts = [x] * self.shape[0]
        for number, layer in enumerate(self.layers):
            parts = _each(layer, parts)
            parts = _each(self.norms[number], parts) if self.norms is not None else parts
            parts = [self.activate(part) for part in parts]
        return _stacked(_each(self.read, parts)).view(self.shape)

    def _at_once(self, x: torch.Tensor) -> torch.Tensor:
        """The same with all members in each operation, as a GPU wants it: (E, B, inputs)."""
        for number, layer in enumerate(self.layers):
            x = layer(x)
            x = self.activate(self.norms[number](x) if self.norms is not None else x)
        return self.read(x).view(self.shape)


def _stacked(parts: list[torch.Tensor]) -> torch.Tensor:
    """As torch.stack, which copies a lone part too."""
    return torch.stack(parts) if len(parts) > 1 else parts[0].unsqueeze(0)


def _each(stack: Any, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Each part by its own member of a StackedLinear or StackedNorm."""
    return [member(part) for member, part in zip(stack.members(), parts, strict=True)]


def build(
    config: NetworkConfig, members: int, inputs: list[int], vectors: tuple[int, int], queries: int, outputs: int
) -> Transformer | MLP:
    """Build the network that `config.kind` names; for the other arguments see `Shape`."""
    kind: type[Transformer | MLP] = Transformer if config.kind == "transformer" else MLP
    return kind(config, Shape(members, inputs, vectors, queries, outputs))


class ImageTokens(nn.Module):
    """Small camera images to one vector each: uint8 (B, S, S, 3) -> float32 (B, width)."""

    def __init__(self, size: int, width: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3),
            nn.ReLU(),
        )
        with torch.no_grad():
            flat = self.convolutions(torch.zeros(1, 3, size, size)).numel()
        self.project = nn.Sequential(nn.Linear(flat, width), nn.LayerNorm(width), nn.Tanh())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = images.permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.project(self.convolutions(pixels).flatten(1))
