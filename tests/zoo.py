"""Small networks, one for each way in which layers are coupled, and what each should yield."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.core import PruningSpace, Slice
from autoprune.tasks.resnet import ResNet


def conv(i: int, o: int, k: int = 3, s: int = 1, g: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(o), nn.ReLU())


def reordered(
    tensors: Mapping[str, Tensor], slices: Sequence[Sequence[Slice]], orders: Sequence[Any]
) -> dict[str, Tensor]:
    """Copies of these tensors, by name, in which the units of each group are in this order."""
    found = dict(tensors)
    for pieces, order in zip(slices, orders, strict=True):
        for p in (p for p in pieces if p.tensor in found):
            index = np.arange(found[p.tensor].shape[p.dim])
            index[p.positions] = p.positions[order]
            found[p.tensor] = found[p.tensor].index_select(p.dim, torch.from_numpy(index))
    return found


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


class VGG(nn.Sequential):
    """Flatten: each channel owns 16 columns of the first linear layer."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 12, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(12 * 16, 20),
            nn.ReLU(True),
            nn.Dropout(),
            nn.Linear(20, 5),
        )


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(i, 4 * i, 1), conv(4 * i, 4 * i, 3, stride, 4 * i), nn.Conv2d(4 * i, o, 1), nn.BatchNorm2d(o)
        )
        self.skip = stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.skip else self.body(x)


class MobileNetV2(nn.Sequential):
    def __init__(self, classes: int = 5, channels: int = 3) -> None:
        super().__init__(
            conv(channels, 8),
            InvertedResidual(8, 12, 2),
            InvertedResidual(12, 12, 1),
            conv(12, 24, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, classes),
        )


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + 4 * i), nn.ReLU(), nn.Conv2d(8 + 4 * i, 4, 3, padding=1)) for i in range(3)
        )
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


class Grouped(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 8), conv(8, 16, g=4), conv(16, 12), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5)
        )


class Shuffle(nn.Module):
    """Channel shuffle written with view and transpose, between grouped convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(8, 16, g=2), conv(16, 8, g=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x))
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.head(self.c(x).mean((2, 3)))


class C2f(nn.Module):
    """YOLOv8's block; `cached` splits by a size kept in an attribute, as its forward_split does."""

    def __init__(self, cached: bool = False) -> None:
        super().__init__()
        self.c, self.cached = 8, cached
        self.stem, self.cv1, self.cv2 = conv(3, 12), conv(12, 16, 1), conv(32, 12, 1)
        self.m = nn.ModuleList(nn.Sequential(conv(8, 8), conv(8, 8)) for _ in range(2))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(self.stem(x))
        parts = list(x.split((self.c, self.c), 1) if self.cached else x.chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.head(self.cv2(torch.cat(parts, 1)).mean((2, 3)))


class Slices(nn.Module):
    """Halves taken by slicing, one gated by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 12), conv(6, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        half = x.shape[1] // 2
        return self.head(self.b(x[:, :half] * torch.sigmoid(x[:, half:])).mean((2, 3)))


class ListedSplit(nn.Module):
    """Depthwise kernels of several sizes, as in MixNet: how many channels each gets is kept in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head, self.sizes = conv(3, 6), conv(6, 12), nn.Linear(12, 5), [4, 2]
        self.mixed = nn.ModuleList(conv(n, n, k, g=n) for n, k in zip(self.sizes, (3, 5), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.a(x), self.sizes, 1)
        x = torch.cat([mixed(part) for mixed, part in zip(self.mixed, parts, strict=True)], 1)
        return self.head(self.b(x).mean((2, 3)))


class FixedSplit(nn.Module):
    """The first two channels are a gate, by the code; the others are as many as there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(6, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate, x = torch.split(x, [2, x.shape[1] - 2], 1)
        return self.head(self.b(x * torch.sigmoid(gate.mean(1, keepdim=True))).mean((2, 3)))


class SuperResolution(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(conv(3, 8), conv(8, 16), nn.PixelShuffle(2), conv(4, 12), nn.Conv2d(12, 3, 3, padding=1))


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 12), conv(12, 8)
        self.down, self.up = nn.Conv2d(12, 6, 1), nn.Conv2d(6, 12, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head(self.b(x * gate).mean((2, 3)))


class AutoEncoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            conv(3, 8, s=2),
            conv(8, 12, s=2),
            nn.ConvTranspose2d(12, 10, 2, 2),
            nn.BatchNorm2d(10),
            nn.ReLU(),
            nn.ConvTranspose2d(10, 3, 2, 2),
        )


class MLP(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(768, 24), nn.GELU(), nn.Linear(24, 16), nn.PReLU(16), nn.Linear(16, 5))


class ViTBlock(nn.Module):
    """Patch embedding and one transformer encoder layer: the MLP's width is free, the embedding is not."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 16, 16) * 0.02)
        self.norm1, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm2 = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


class Tokens(nn.Module):
    """Patches as tokens [N, 16, 16], a body, and the mean of what it gives; no normalisation binds the embedding."""

    def __init__(self, body: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.patch, self.body, self.head = nn.Conv2d(3, 16, 4, 4), body, nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.patch(x).flatten(2).transpose(1, 2)).mean(1))


class TokenMixer(nn.Module):
    """What mixes the patches of each channel and then the channels of each patch, as MLP-Mixer does; the layer norms
    hold the embedding whole."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(16), nn.LayerNorm(16)
        self.tokens = nn.Sequential(nn.Linear(16, 10), nn.GELU(), nn.Linear(10, 16))
        self.channels = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm_channels(x))


class Attention(nn.Module):
    """Heads that the code counts anew; keys and values of fewer heads are repeated, and `rotary` scales what each head
    holds by numbers of its own."""

    def __init__(self, heads: int = 4, keys: int = 4, rotary: bool = False) -> None:
        super().__init__()
        self.dim, self.repeats = 16 // heads, heads // keys
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 4 * keys), nn.Linear(16, 4 * keys)
        self.o = nn.Linear(16, 12)
        self.turn = torch.linspace(0.5, 1.5, 16 * self.dim).view(1, 1, 16, self.dim) if rotary else None

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, -1, self.dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.turn is not None:
            q, k = q * self.turn.to(q), k * self.turn.to(k)
        k, v = (y.repeat_interleave(self.repeats, 1) for y in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, -1))


class FusedAttention(nn.Module):
    """One layer for queries, keys and values, sizes kept in attributes, products written out."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.head_dim, self.inner = 4, 4, 16
        self.qkv, self.o = nn.Linear(16, 48), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / self.head_dim**0.5).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).reshape(n, t, self.inner))


class Projections(nn.Module):
    """Layers that keep their width in an attribute and use it, as GPT-2's do."""

    class Layer(nn.Module):
        def __init__(self, i: int, o: int) -> None:
            super().__init__()
            self.width, self.weight, self.bias = o, nn.Parameter(torch.randn(i, o)), nn.Parameter(torch.zeros(o))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.width)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = self.Layer(16, 24), self.Layer(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU], **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(16, 12, batch_first=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Tied(nn.Module):
    """The embedding's table is the decoder's weight too; outputs have names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        read = self.embedding((x[:, 0].flatten(1)[:, :9].abs() * 8).long() % 20)
        hidden = self.down(F.relu(self.up(read)))
        return {"logits": F.linear(hidden, self.embedding.weight), "length": hidden.square().sum(-1)}


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.middle, self.up = conv(3, 8), conv(8, 12, s=2), conv(20, 6)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        y = F.interpolate(self.middle(F.pad(skip, (0, 1, 0, 1)))[:, :, :8, :8], scale_factor=2)
        return self.out(self.up(torch.cat([skip, y], 1)))


class ZeroPadShortcut(nn.Module):
    """ResNet's option A: the shortcut is padded with zero channels by a size written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 16), conv(16, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.c(self.b(x) + F.pad(x, (0, 0, 0, 0, 4, 4))).mean((2, 3)))


class Shared(nn.Module):
    """One convolution used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.head = conv(3, 8), conv(8, 8), conv(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.c(self.b(self.b(self.a(x)))).mean((2, 3)))


class Unknown(nn.Module):
    """An operation that no rule covers (sorting gathers units by value) after the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = torch.cumprod(x, 1)
        return self.head(self.b(x).mean((2, 3)))


class GroupNormed(nn.Module):
    def __init__(self, groups: int = 2) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), nn.GroupNorm(groups, 8), conv(8, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(F.relu(self.norm(self.a(x)))).mean((2, 3)))


@dataclass(frozen=True)
class Specimen:
    """A network and its groups: name -> size."""

    build: Callable[[], nn.Module]
    groups: dict[str, int]
    size: int = 16

    def inputs(self, examples: int = 1) -> tuple[Tensor, ...]:
        return (torch.randn(examples, 3, self.size, self.size, generator=torch.Generator().manual_seed(0)),)


ZOO = {
    "plain": Specimen(Plain, {"0.0": 8, "1.0": 12}),
    "vgg": Specimen(VGG, {"0": 8, "3": 12, "7": 20}),
    "resnet": Specimen(
        lambda: ResNet(depth=8, width=8),
        {"conv1": 8, "layer1.0.conv1": 8, "layer2.0.conv1": 16, "layer2.0.conv2": 16}
        | {"layer3.0.conv1": 32, "layer3.0.conv2": 32},
    ),
    "mobilenetv2": Specimen(MobileNetV2, {"0.0": 8, "1.body.0.0": 32, "1.body.2": 12, "2.body.0.0": 48, "3.0": 24}),
    "densenet": Specimen(DenseNet, {"stem": 8, "layers.0.2": 4, "layers.1.2": 4, "layers.2.2": 4}),
    "grouped": Specimen(Grouped, {"0.0": 2, "1.0": 4, "2.0": 12}),
    "shuffle": Specimen(Shuffle, {"a.0": 4, "b.0": 4, "c.0": 4}),
    "c2f": Specimen(
        C2f, {"stem.0": 12, "cv1.0": 8, "m.0.0.0": 8, "m.0.1.0": 8, "m.1.0.0": 8, "m.1.1.0": 8, "cv2.0": 12}
    ),
    "c2f_cached_split": Specimen(
        lambda: C2f(cached=True),
        {"stem.0": 12, "cv1.0": 8, "m.0.0.0": 8, "m.0.1.0": 8, "m.1.0.0": 8, "m.1.1.0": 8, "cv2.0": 12},
    ),
    "slices": Specimen(Slices, {"a.0": 6, "b.0": 8}),
    "super_resolution": Specimen(SuperResolution, {"0.0": 8, "1.0": 4, "3.0": 12}),
    "squeeze_excite": Specimen(SqueezeExcite, {"a.0": 12, "down": 6, "b.0": 8}),
    "auto_encoder": Specimen(AutoEncoder, {"0.0": 8, "1.0": 12, "2": 10}),
    "mlp": Specimen(MLP, {"1": 24, "3": 16}),
    "vit_block": Specimen(ViTBlock, {"mlp.0": 32}),
    "heads": Specimen(lambda: Tokens(Attention(), 12), {"patch": 16, "body.q": 4, "body.o": 12}),
    "grouped_queries": Specimen(
        lambda: Tokens(Attention(keys=2, rotary=True), 12), {"patch": 16, "body.q": 2, "body.o": 12}
    ),
    "fused_attention": Specimen(lambda: Tokens(FusedAttention(), 12), {"patch": 16, "body.qkv": 4, "body.o": 12}),
    "projections": Specimen(lambda: Tokens(Projections(), 12), {"patch": 16, "body.a": 24, "body.b": 12}),
    "token_mixer": Specimen(lambda: Tokens(TokenMixer(), 16), {"body.tokens.0": 10, "body.channels.0": 24}),
    "lstm": Specimen(lambda: Tokens(Recurrent(nn.LSTM), 12), {"patch": 16, "body.rnn": 12}),
    "lstm_projected": Specimen(
        lambda: Tokens(Recurrent(nn.LSTM, proj_size=6, num_layers=2, bidirectional=True), 12),
        {"patch": 16, "body.rnn#2": 6},
    ),
    "gru": Specimen(
        lambda: Tokens(Recurrent(nn.GRU, num_layers=2, bidirectional=True), 24), {"patch": 16, "body.rnn": 12}
    ),
    "tied": Specimen(Tied, {"embedding": 12, "up": 24}),
    "unet": Specimen(UNet, {"down.0": 8, "middle.0": 12, "up.0": 6}),
    "zero_pad_shortcut": Specimen(ZeroPadShortcut, {"a.0": 8, "c.0": 12}),
    "shared": Specimen(Shared, {"a.0": 8, "c.0": 12}),
    "unknown": Specimen(Unknown, {"b.0": 12}),
    "group_normed": Specimen(GroupNormed, {"a": 2, "b.0": 12}),
    "group_normed_by_one": Specimen(lambda: GroupNormed(1), {"b.0": 12}),
    "listed_split": Specimen(ListedSplit, {"a.0": 4, "a.0#2": 2, "b.0": 12}),
    "fixed_split": Specimen(FixedSplit, {"a.0#2": 6, "b.0": 12}),
}


def cells(space: PruningSpace, count: int) -> list[tuple[int, int]]:
    """(group, level) of at most `count` levels a group, spread evenly, the deepest included."""
    found = []
    for g, group in enumerate(space.groups):
        last = len(group.levels) - 1
        found += [(g, level) for level in sorted({math.ceil((i + 1) * last / count) for i in range(count)} - {0})]
    return found
