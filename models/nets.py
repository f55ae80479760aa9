"""The three small nets for Fashion-MNIST, as PyTorch modules.

    fmnist_resnet   residual classifier; projection shortcuts where the shape changes       151,738 parameters
    fmnist_mbv2     MobileNetV2-like classifier: depthwise convolutions, linear bottlenecks   97,226
    fmnist_srunet   super-resolution by 2: ConvTranspose, a Concat skip, a residual output    52,953

Every convolution is followed by BatchNormalization and so has no bias, but the last of fmnist_srunet.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution that keeps the size (but for its stride), then BatchNormalization."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


def upconv(inputs: int, outputs: int, kernel: int, padding: int) -> nn.Sequential:
    """Transposed convolution that doubles the size, BatchNormalization, ReLU."""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, kernel, 2, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def head(width: int) -> list[nn.Module]:
    """Global average pool and the classifier: N x width x H x W -> N x 10."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2015, figure 3)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Make the layers; the shortcut is a 1 x 1 projection where the shape changes."""
        super().__init__()
        self.first = nn.Sequential(*conv(inputs, outputs, 3, stride), nn.ReLU())
        self.second = nn.Sequential(*conv(outputs, outputs, 3))
        same_shape = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same_shape else nn.Sequential(*conv(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x outputs x H/stride x W/stride."""
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """1 x 1 expansion, 3 x 3 depthwise, linear 1 x 1 projection (Sandler et al. 2018, figure 4)."""

    def __init__(self, inputs: int, outputs: int, expand: int, stride: int) -> None:
        """Make the layers; with `expand` 1 there is no expansion."""
        super().__init__()
        width = inputs * expand
        layers: list[nn.Module] = [] if expand == 1 else [*conv(inputs, width, 1), nn.ReLU6()]
        layers += [*conv(width, width, 3, stride, groups=width), nn.ReLU6(), *conv(width, outputs, 1)]
        self.layers = nn.Sequential(*layers)
        self.residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """N x inputs x H x W -> N x outputs x H/stride x W/stride."""
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class SuperResolutionUNet(nn.Module):
    """Adds detail to the nearest-neighbour enlargement of its input."""

    def __init__(self) -> None:
        """One level down and up again at 14 pixels, then up to 28."""
        super().__init__()
        self.enter = nn.Sequential(*conv(1, 24, 3), nn.ReLU())
        self.down = nn.Sequential(*conv(24, 48, 3, stride=2), nn.ReLU(), *conv(48, 48, 3), nn.ReLU())
        self.up = upconv(48, 24, kernel=2, padding=0)
        self.merge = nn.Sequential(*conv(48, 24, 3), nn.ReLU())
        self.enlarge = upconv(24, 16, kernel=4, padding=1)
        self.leave = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """N x 1 x 14 x 14 -> N x 1 x 28 x 28, both 0..1."""
        skip = self.enter(x)
        merged = self.merge(torch.cat([self.up(self.down(skip)), skip], 1))
        detail: Tensor = self.leave(self.enlarge(merged))
        return detail + functional.interpolate(x, scale_factor=2, mode="nearest")


def fmnist_resnet() -> nn.Module:
    """N x 1 x 28 x 28 in 0..1 -> N x 10 logits."""
    blocks = [BasicBlock(16, 16, 1), BasicBlock(16, 32, 2), BasicBlock(32, 64, 2), BasicBlock(64, 64, 1)]
    return nn.Sequential(*conv(1, 16, 3), nn.ReLU(), *blocks, *head(64))


def fmnist_mbv2() -> nn.Module:
    """N x 1 x 28 x 28 in 0..1 -> N x 10 logits."""
    layers: list[nn.Module] = [*conv(1, 16, 3, stride=2), nn.ReLU6()]
    width = 16
    plan = ((1, 16, 1), (4, 24, 2), (4, 24, 1), (4, 40, 1), (4, 40, 1), (4, 64, 1), (4, 64, 1))
    for expand, outputs, stride in plan:
        layers.append(InvertedResidual(width, outputs, expand, stride))
        width = outputs
    return nn.Sequential(*layers, *conv(width, 128, 1), nn.ReLU6(), *head(128))


def fmnist_srunet() -> nn.Module:
    """N x 1 x 14 x 14 in 0..1 -> N x 1 x 28 x 28."""
    return SuperResolutionUNet()
