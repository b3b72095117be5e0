"""ResNets as detectron2 names their parts and strides them: the bodies of the C4 and FPN detectors.

Widths, depths and groups are read from the weights: a file says itself what it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5
State = Mapping[str, Tensor]


class FrozenNorm(nn.Module):
    """Batch normalisation with fixed statistics: (x - mean) / sqrt(var + 1e-5) * weight + bias, [B, C, H, W]."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(width))
        self.register_buffer("bias", torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, EPSILON)


class ConvNorm(nn.Conv2d):
    """A convolution without bias, and its normalisation as `norm`, until `fold` makes one of both."""

    def __init__(
        self, shape: torch.Size, stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1
    ) -> None:
        super().__init__(shape[1] * groups, shape[0], shape[2], stride, padding, dilation, groups, bias=False)
        self.norm: nn.Module = FrozenNorm(shape[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))

    @torch.no_grad()
    def fold(self) -> None:
        """Scales the weights and adds a bias in place of `norm`: the same function, one pass over memory less."""
        norm = {name: value.double() for name, value in self.norm.named_buffers()}
        scale = norm["weight"] / (norm["running_var"] + EPSILON).sqrt()
        self.weight.copy_(self.weight * scale[:, None, None, None])
        self.bias = nn.Parameter((norm["bias"] - norm["running_mean"] * scale).to(self.weight.dtype))
        self.norm = nn.Identity()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 beside a shortcut. The stride is the first 1x1's, or with groups (ResNeXt) the 3x3's."""

    def __init__(self, state: State, name: str, stride: int, dilation: int = 1) -> None:
        super().__init__()
        first, middle, last = (state[f"{name}.conv{i}.weight"].shape for i in (1, 2, 3))
        groups = first[0] // middle[1]
        outer, inner = (stride, 1) if groups == 1 else (1, stride)
        self.conv1 = ConvNorm(first, outer)
        self.conv2 = ConvNorm(middle, inner, dilation, dilation, groups)
        self.conv3 = ConvNorm(last)
        own = f"{name}.shortcut.weight"
        self.shortcut = ConvNorm(state[own].shape, stride) if own in state else None

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu_(self.conv1(x))
        out = F.relu_(self.conv2(out))
        out = self.conv3(out)
        return F.relu_(out.add_(x if self.shortcut is None else self.shortcut(x)))


def stage(state: State, name: str, stride: int, dilation: int = 1) -> nn.Sequential:
    """All blocks of a stage, `name.0`, `name.1`, ...; the first has the stride."""
    blocks: list[Bottleneck] = []
    while f"{name}.{len(blocks)}.conv1.weight" in state:
        blocks.append(Bottleneck(state, f"{name}.{len(blocks)}", 1 if blocks else stride, dilation))
    return nn.Sequential(*blocks)


class Stem(nn.Module):
    """7x7 convolution and 3x3 pooling, stride 4 in all.

    caffe_pool  the pooling has no padding and counts windows that stick out (Caffe); else padding 1, windows inside
    """

    def __init__(self, state: State, name: str, caffe_pool: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(state[f"{name}.conv1.weight"].shape, 2, 3)
        self.caffe_pool = caffe_pool

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(self.conv1(x))
        return F.max_pool2d(x, 3, 2, 0 if self.caffe_pool else 1, ceil_mode=self.caffe_pool)


class Body(nn.Module):
    """Stem and stages: [B, 3, H, W] -> the map of each of `stages` by name."""

    def __init__(self, state: State, name: str, stages: Sequence[str], caffe_pool: bool) -> None:
        super().__init__()
        self.stages = tuple(stages)
        self.stem = Stem(state, f"{name}.stem", caffe_pool)
        for i, one in enumerate(stages):
            self.add_module(one, stage(state, f"{name}.{one}", 2 if i else 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        maps = {}
        for name in self.stages:
            x = self.get_submodule(name)(x)
            maps[name] = x
        return maps


class LastMap(Body):
    """A body of which only res4 is used, stride 16: the C4 detectors."""

    def __init__(self, state: State, name: str, caffe_pool: bool) -> None:
        super().__init__(state, name, ("res2", "res3", "res4"), caffe_pool)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return [super().forward(x)["res4"]]


class Pyramid(nn.Module):
    """Feature pyramid (Lin et al. 2017) as detectron2's: p2 to p5 of one width, p6 every other cell of p5."""

    def __init__(self, state: State, name: str, caffe_pool: bool) -> None:
        super().__init__()
        self.bottom_up = Body(state, f"{name}.bottom_up", ("res2", "res3", "res4", "res5"), caffe_pool)
        for level in range(2, 6):
            for part in ("lateral", "output"):
                out, into, side, _ = state[f"{name}.fpn_{part}{level}.weight"].shape
                self.add_module(f"fpn_{part}{level}", nn.Conv2d(into, out, side, padding=side // 2))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.bottom_up(x)
        out: list[Tensor] = []
        above: Tensor | None = None
        for level in range(5, 1, -1):
            here = self.get_submodule(f"fpn_lateral{level}")(maps[f"res{level}"])
            above = here if above is None else here + F.interpolate(above, scale_factor=2.0, mode="nearest")
            out.insert(0, self.get_submodule(f"fpn_output{level}")(above))
        return [*out, F.max_pool2d(out[-1], 1, 2)]
