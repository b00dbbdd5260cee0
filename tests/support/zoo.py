"""Small models with random weights, one for each family of networks, shared by the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, **kwargs: object) -> nn.Sequential:
    """Convolution, BatchNorm with statistics that are not trivial, in-place ReLU."""
    kwargs = {"padding": kernel // 2, **kwargs}
    norm = nn.BatchNorm2d(outputs)
    nn.init.normal_(norm.running_mean, std=0.1)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    nn.init.normal_(norm.bias, std=0.1)
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, bias=False, **kwargs), norm, nn.ReLU(inplace=True))


def alexnet(width: int = 4) -> nn.Sequential:
    w = width
    return nn.Sequential(
        *[nn.Conv2d(3, w, 11, 4, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(w, 2 * w, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
        *[nn.Conv2d(2 * w, 2 * w, 3, padding=1), nn.ReLU(inplace=True)],
        *[nn.Conv2d(2 * w, w, 3, padding=1), nn.ReLU(inplace=True)],
        *[nn.Conv2d(w, w, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2)],
    )


def vgg(convolutions: tuple[int, ...] = (2, 2, 3, 3, 3), width: int = 4) -> nn.Sequential:
    """VGG16 in depth; the pools are the layers `pool1` to `pool5`."""
    model = nn.Sequential()
    channels = 3
    for stage, repeats in enumerate(convolutions, 1):
        for i in range(1, repeats + 1):
            model.add_module(f"conv{stage}_{i}", nn.Conv2d(channels, width, 3, padding=1))
            model.add_module(f"relu{stage}_{i}", nn.ReLU(inplace=True))
            channels = width
        model.add_module(f"pool{stage}", nn.MaxPool2d(2, 2))
    return model


def mobilenet_v1(width: int = 4, blocks: tuple[int, ...] = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)) -> nn.Sequential:
    """Depthwise separable convolutions; `blocks` are the strides."""
    layers: list[nn.Module] = [conv_bn(3, width, 3, 2)]
    for stride in blocks:
        layers += [conv_bn(width, width, 3, stride, groups=width), conv_bn(width, width, 1)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """A bottleneck block with its stride in the 3x3, or a basic block of two 3x3."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            convs = [conv_bn(inputs, outputs, 1), conv_bn(outputs, outputs, 3, stride), conv_bn(outputs, outputs, 1)]
        else:
            convs = [conv_bn(inputs, outputs, 3, stride), conv_bn(outputs, outputs, 3)]
        self.branch = nn.Sequential(*convs[:-1], *convs[-1][:-1])
        changes = stride != 1 or inputs != outputs
        self.shortcut = conv_bn(inputs, outputs, 1, stride)[:-1] if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        out += self.shortcut(x)
        return F.relu_(out)


def resnet(blocks: tuple[int, ...] = (1, 1, 1), width: int = 4, *, bottleneck: bool = False) -> nn.Sequential:
    """(3, 4, 6, 3) with bottlenecks is ResNet-50 in depth; stages are `layer1` to `layer4`."""
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(conv_bn(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)))
    channels = width
    for stage, repeats in enumerate(blocks, 1):
        outputs = width + stage
        layer = [
            Residual(outputs if i else channels, outputs, 2 if stage > 1 and i == 0 else 1, bottleneck=bottleneck)
            for i in range(repeats)
        ]
        channels = outputs
        model.add_module(f"layer{stage}", nn.Sequential(*layer))
    return model


class Inception(nn.Module):
    """Branches of 1x1, 5x5, factorised 1x7 and 7x1, and a pool, side by side in the channels."""

    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.one = conv_bn(inputs, each, 1)
        self.five = nn.Sequential(conv_bn(inputs, each, 1), conv_bn(each, each, 5))
        self.seven = nn.Sequential(
            nn.Conv2d(inputs, each, (1, 7), padding=(0, 3)), nn.Conv2d(each, each, (7, 1), padding=(3, 0))
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), conv_bn(inputs, each, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.five(x), self.seven(x), self.pool(x)], 1)


class Reduction(nn.Module):
    def __init__(self, inputs: int, each: int) -> None:
        super().__init__()
        self.conv = conv_bn(inputs, each, 3, 2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x), F.max_pool2d(x, 3, 2)], 1)


def inception() -> nn.Sequential:
    return nn.Sequential(
        conv_bn(3, 4, 3, 2, padding=0), Inception(4, 2), Reduction(8, 3), Inception(11, 2), nn.Conv2d(8, 4, 1)
    )


class Dense(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


def densenet(blocks: tuple[int, ...] = (2, 2), growth: int = 2) -> nn.Sequential:
    channels = 2 * growth
    layers: list[nn.Module] = [conv_bn(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for i, repeats in enumerate(blocks):
        if i:
            layers += [conv_bn(channels, channels, 1), nn.AvgPool2d(2)]
        for _ in range(repeats):
            layers.append(Dense(channels, growth))
            channels += growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels))


class ConvNextBlock(nn.Module):
    """Depthwise 7x7, then LayerNorm and Linear on channels-last maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.project = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out = self.scale * self.project(F.gelu(self.expand(out)))
        return x + out.permute(0, 3, 1, 2)


def convnext(width: int = 4) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 4, 4), ConvNextBlock(width), nn.Conv2d(width, width, 2, 2), ConvNextBlock(width)
    )


class Shuffle(nn.Module):
    """ShuffleNet: half of the channels pass by, grouped convolutions, then the groups are interleaved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(conv_bn(half, half, 3, groups=2), nn.Conv2d(half, half, 1, groups=2))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, 1)
        out = torch.cat([kept, self.branch(changed)], 1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Sequential:
    return nn.Sequential(conv_bn(3, 8, 3, 2), Shuffle(8), Shuffle(8), nn.Conv2d(8, 4, 3, 2))


class AtrousPyramid(nn.Module):
    """Three dilations side by side, summed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in (1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([branch(x) for branch in self.branches]).sum(0)


def dilated() -> nn.Sequential:
    return nn.Sequential(
        conv_bn(3, 4, 3, 2), nn.MaxPool2d(3, 1, 1, dilation=2), AtrousPyramid(4), nn.Conv2d(4, 4, 2, dilation=3)
    )


def asymmetric() -> nn.Sequential:
    """TensorFlow's "same" padding: more on the right and below, as padding layers and inside the convolution."""
    return nn.Sequential(
        *[nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2), nn.Softplus()],
        *[nn.Conv2d(4, 4, (3, 5), padding="same", dilation=(1, 2)), nn.Softplus()],
        *[nn.ConstantPad2d((3, -1, 2, 0), 0.5), nn.Conv2d(4, 4, (3, 5), (2, 3), padding=(0, 2))],
    )


def bordered() -> nn.Sequential:
    """Borders that repeat the image."""
    return nn.Sequential(
        *[nn.ReflectionPad2d((2, 1, 3, 0)), nn.Conv2d(3, 4, 3, 2), nn.Softplus()],
        *[nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.Softplus()],
        *[nn.ReplicationPad2d(2), nn.Conv2d(4, 4, 5)],
    )


def ceil_mode() -> nn.Sequential:
    """SqueezeNet and GoogLeNet pool this way: the last window hangs over the border."""
    return nn.Sequential(
        *[nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)],
        *[nn.Conv2d(4, 4, 3, padding=1), nn.AvgPool2d(2, 2, ceil_mode=True), nn.Conv2d(4, 4, 2)],
        nn.AdaptiveAvgPool2d((2, 3)),
    )


class UNet(nn.Module):
    """Down, up by a transposed convolution or an interpolation, and a skip connection."""

    def __init__(self, up: nn.Module) -> None:
        super().__init__()
        self.first, self.down = conv_bn(3, 4, 3), conv_bn(4, 4, 3, 2)
        self.middle, self.up = nn.Conv2d(4, 4, 3, padding=1), up
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        up = self.up(self.middle(self.down(skip)))
        return self.last(
            torch.cat([skip, F.pad(up, (0, skip.shape[3] - up.shape[3], 0, skip.shape[2] - up.shape[2]))], 1)
        )


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.excite = nn.Sequential(nn.Conv2d(width, width, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.excite(self.squeeze(x))


class Attention(nn.Module):
    """Every position of the map looks at every other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(width, 2, batch_first=True)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.attend(tokens, tokens, tokens, need_weights=False)[0]
        return self.out(tokens.transpose(1, 2).reshape(x.shape))


class WindowAttention(nn.Module):
    """Swin: attention inside windows of 4x4, by scaled dot products, the windows shifted by two."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        tiles = x.roll((-2, -2), (2, 3)).view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        tiles = F.scaled_dot_product_attention(*self.qkv(tiles).chunk(3, -1))
        x = tiles.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)
        return self.out(x.roll((2, 2), (2, 3)))


@dataclass(frozen=True)
class Case:
    name: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]
    interpolates: bool = False  # some weights are exactly zero, which NaN does not respect

    def model(self) -> nn.Module:
        """In eval mode, with weights that let a signal neither fade nor drown in biases on its way down."""
        torch.manual_seed(0)
        model = self.build().eval()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=0.05)
        return model


LOCAL = [
    Case("alexnet", alexnet, (95, 79)),
    Case("vgg", lambda: vgg((2, 2, 2)), (26, 35)),
    Case("mobilenet", lambda: mobilenet_v1(blocks=(1, 2, 1, 2)), (37, 50)),
    Case("resnet", resnet, (43, 58)),
    Case("resnet-bottleneck", lambda: resnet(bottleneck=True), (58, 41)),
    Case("inception", inception, (39, 46)),
    Case("densenet", densenet, (40, 57)),
    Case("convnext", convnext, (48, 40)),
    Case("shufflenet", shufflenet, (31, 42)),
    Case("dilated", dilated, (33, 40)),
    Case("asymmetric-padding", asymmetric, (29, 36)),
    Case("repeated-borders", bordered, (25, 34)),
    Case("ceil-mode", ceil_mode, (36, 53)),
    Case("unet-transposed", lambda: UNet(nn.ConvTranspose2d(4, 4, 3, 2, 1, groups=2)), (21, 30)),
    Case("unet-transposed-wide", lambda: UNet(nn.ConvTranspose2d(4, 4, 2, 2, output_padding=1, dilation=2)), (22, 29)),
    Case("unet-nearest", lambda: UNet(nn.Upsample(scale_factor=2)), (21, 30)),
    Case("unet-bilinear", lambda: UNet(nn.Upsample(scale_factor=2, mode="bilinear")), (20, 28), True),
    Case("unet-corners", lambda: UNet(nn.Upsample((20, 23), mode="bilinear", align_corners=True)), (20, 28), True),
    Case("pixel-shuffle", lambda: nn.Sequential(conv_bn(3, 8, 3, 2), nn.PixelShuffle(2), nn.Conv2d(2, 4, 3)), (20, 27)),
    Case("local-response-norm", lambda: nn.Sequential(conv_bn(3, 6, 3), nn.LocalResponseNorm(3)), (12, 15)),
    Case("windows", lambda: nn.Sequential(conv_bn(3, 4, 2, 2, padding=0), WindowAttention(4)), (16, 32)),
]

WHOLE = [
    Case("squeeze-excite", lambda: nn.Sequential(conv_bn(3, 4, 3, 2), SqueezeExcite(4)), (15, 22)),
    Case("attention", lambda: nn.Sequential(conv_bn(3, 4, 3, 2), Attention(4)), (12, 15)),
    Case("instance-norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.InstanceNorm2d(4)), (15, 23)),
    Case("group-norm", lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.GroupNorm(2, 4)), (15, 23)),
    Case("layer-norm-positions", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 13, 20])), (15, 22)),
    Case("global-average", lambda: nn.Sequential(conv_bn(3, 4, 3, 2), nn.AdaptiveAvgPool2d(1)), (15, 22)),
    Case("global-maximum", lambda: nn.Sequential(conv_bn(3, 4, 3, 2), nn.AdaptiveMaxPool2d(1)), (15, 22)),
    Case("fully-connected", lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(520, 5)), (12, 15)),
]


class NormAct(nn.BatchNorm2d):
    """Normalisation and activation in one module, as timm writes it (`BatchNormAct2d`)."""

    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))
