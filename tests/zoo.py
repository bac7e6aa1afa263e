"""Small networks of the shapes that people bring, with random weights; ``tests/deploy/test_zoo.py`` runs them.

Each entry makes a classifier of ``SHAPE`` or of the shape it names. BatchNorm statistics are random numbers, so that
folding and signs have something to get wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from dfqlib.network._torchvision import import_torchvision

SHAPE = (3, 16, 16)
Build = Callable[[], nn.Module]
ZOO: dict[str, Build] = {}
SHAPES: dict[str, tuple[int, int, int]] = {}


def entry(build: Any) -> Any:
    ZOO[build.__name__] = build
    return build


def randomized(model: nn.Module) -> nn.Module:
    """Statistics and affine parameters of BatchNorm as training leaves them: of both signs, some channels dead."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            if module.affine:
                nn.init.normal_(module.weight, 1.0, 0.3)
                nn.init.normal_(module.bias, 0.1, 0.2)
    return model.eval()


class Net(nn.Module):
    """Layers by name, and a forward given as a function of them and x."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=more.pop("padding", size // 2), **more)


def block(inputs: int, outputs: int, act: nn.Module | None = None, **more: Any) -> nn.Sequential:
    return nn.Sequential(conv(inputs, outputs, bias=False, **more), nn.BatchNorm2d(outputs), act or nn.ReLU())


def head(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(block(3, 8), *layers, head())


# Activations, pooling and padding
for activation in (nn.ReLU6, nn.LeakyReLU, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU, nn.Mish, nn.Hardtanh, nn.Sigmoid):
    ZOO[f"activation {activation.__name__}"] = partial(lambda kind: sequential(block(8, 8, kind())), activation)
for pooling in (
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True),
    nn.AdaptiveAvgPool2d(4), nn.AdaptiveMaxPool2d(1), nn.ZeroPad2d((0, 1, 0, 1)), nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=2, mode="bicubic"), nn.PixelShuffle(1), nn.Identity(), nn.Dropout(),
):  # fmt: skip
    ZOO[f"between {pooling}"] = partial(lambda layer: sequential(layer, block(8, 8)), pooling)
for options in (
    {"stride": 2}, {"groups": 8}, {"groups": 4}, {"dilation": 2, "padding": 2}, {"padding": (1, 0)}, {"size": 1},
    {"size": 1, "stride": 2}, {"size": 5}, {"padding": "same"}, {"padding": "valid"},
):  # fmt: skip
    ZOO[f"convolution {options}"] = partial(lambda given: sequential(block(8, 8, **given)), options)


@entry
def residual() -> nn.Module:
    return Net(
        lambda m, x: m.head(F.relu(m.b(m.a(x)) + m.a(x))), a=block(3, 8), b=block(8, 8, nn.Identity()), head=head()
    )


@entry
def residual_in_place() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.a(x)
        z = m.b(y)
        z += y
        return m.head(F.relu(z, inplace=True))

    return Net(forward, a=block(3, 8, nn.ReLU(inplace=True)), b=block(8, 8, nn.Identity()), head=head())


@entry
def one_in_place_activation_called_twice() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.act(m.a(x))
        return m.head(m.act(m.b(x)) + x)

    return Net(forward, a=conv(3, 8), b=conv(8, 8), act=nn.ReLU(inplace=True), head=head())


@entry
def preactivation() -> nn.Module:
    layers = {"a": conv(3, 8), "n": nn.BatchNorm2d(8), "b": conv(8, 8), "head": head()}
    return Net(lambda m, x: m.head(m.b(F.relu(m.n(m.a(x)))) + m.a(x)), **layers)


@entry
def dense() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        y = torch.cat([x, m.b(x)], 1)
        return m.head(torch.cat([y, m.c(y)], 1))

    return Net(forward, a=block(3, 8), b=block(8, 4), c=block(12, 4), head=head(16))


@entry
def the_same_tensor_twice() -> nn.Module:
    return Net(lambda m, x: m.head(m.b(torch.cat([m.a(x)] * 2, 1))), a=block(3, 8), b=block(16, 8), head=head())


@entry
def branches_that_pool() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(torch.cat([m.b(x), m.c(F.max_pool2d(x, 3, 1, 1)), F.avg_pool2d(x, 3, 1, 1)], 1))

    return Net(forward, a=block(3, 8), b=block(8, 4), c=block(8, 4), head=head(16))


@entry
def squeeze_and_excitation() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        gate = m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1))))
        return m.head(x * torch.sigmoid(gate))

    return Net(forward, a=block(3, 8, nn.SiLU()), down=conv(8, 4, 1), up=conv(4, 8, 1), head=head())


@entry
def inverted_residual() -> nn.Module:
    layers = {"a": block(3, 8, nn.ReLU6()), "up": block(8, 16, nn.ReLU6(), size=1)}
    layers |= {
        "deep": block(16, 16, nn.ReLU6(), groups=16),
        "down": block(16, 8, nn.Identity(), size=1),
        "head": head(),
    }

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(x + m.down(m.deep(m.up(x))))

    return Net(forward, **layers)


@entry
def shuffled_halves() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        first, second = m.a(x).chunk(2, 1)
        x = torch.cat([first, m.b(second)], 1)
        x = x.view(x.shape[0], 2, 4, x.shape[2], x.shape[3]).transpose(1, 2).reshape(x.shape)
        return m.head(x)

    return Net(forward, a=block(3, 8), b=block(4, 4), head=head())


@entry
def mean_then_linear() -> nn.Module:
    return Net(lambda m, x: m.f(m.a(x).mean((2, 3))), a=block(3, 8), f=nn.Linear(8, 5))


@entry
def mean_with_dims_kept() -> nn.Module:
    return Net(lambda m, x: m.f(m.a(x).mean([-1, -2], keepdim=True)).flatten(1), a=block(3, 8), f=conv(8, 5, 1))


@entry
def pooled_by_size() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.f(F.avg_pool2d(x, x.size()[3]).view(x.size(0), -1))

    return Net(forward, a=block(3, 8), f=nn.Linear(8, 5))


@entry
def max_pooled_by_size() -> nn.Module:
    return Net(lambda m, x: m.f(F.max_pool2d(x := m.a(x), x.shape[2:]).flatten(1)), a=block(3, 8), f=nn.Linear(8, 5))


@entry
def convolution_as_the_last_layer() -> nn.Module:
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), conv(8, 5, 1), nn.Flatten())


@entry
def convolution_then_pool() -> nn.Module:
    return nn.Sequential(block(3, 8), conv(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@entry
def batchnorm_of_features() -> nn.Module:
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 5))


@entry
def linear_with_batchnorm() -> nn.Module:
    ends = (nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *ends)


@entry
def batchnorm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), block(3, 8), head())


@entry
def linear_on_pixels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.f(F.relu(m.p(m.a(x).flatten(2).transpose(1, 2))).mean(1))

    return Net(forward, a=block(3, 8, stride=4), p=nn.Linear(8, 8), f=nn.Linear(8, 5))


@entry
def no_batchnorm() -> nn.Module:
    return nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), head())


# Layers that are more than weight and geometry
class OnlyAConstructor(nn.Conv2d):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1)


class SamePadding(nn.Conv2d):
    """TensorFlow's: pads by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StandardizedWeights(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        weight = (self.weight - mean) / (std + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class OwnParameters(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.2 * torch.randn(outputs, inputs, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, padding=1)


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Cosine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 5 * F.linear(F.normalize(x), F.normalize(self.weight))


class ByValue(nn.Module):
    """What torch.fx cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(3, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x)) if x.abs().sum() >= 0 else x


@entry
def subclass_with_a_constructor() -> nn.Module:
    return sequential(OnlyAConstructor(8, 8), nn.ReLU())


@entry
def subclass_that_pads() -> nn.Module:
    return sequential(SamePadding(8, 8, 2), nn.BatchNorm2d(8), nn.ReLU())


@entry
def subclass_that_standardizes() -> nn.Module:
    return sequential(StandardizedWeights(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


@entry
def functional_convolution() -> nn.Module:
    return sequential(OwnParameters(8, 8), nn.BatchNorm2d(8), nn.ReLU())


@entry
def functional_product() -> nn.Module:
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Product(8, 5))


@entry
def cosine_head() -> nn.Module:
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Cosine(8, 5, bias=False))


@entry
def opaque_first_block() -> nn.Module:
    return nn.Sequential(ByValue(), block(8, 8), head())


@entry
def weight_norm() -> nn.Module:
    return sequential(parametrizations.weight_norm(conv(8, 8)), nn.BatchNorm2d(8), nn.ReLU())


@entry
def spectral_norm() -> nn.Module:
    return sequential(parametrizations.spectral_norm(conv(8, 8)), nn.BatchNorm2d(8), nn.ReLU())


@entry
def weight_norm_by_hook() -> nn.Module:
    return sequential(torch.nn.utils.weight_norm(conv(8, 8)), nn.ReLU())


@entry
def pruned() -> nn.Module:
    return sequential(prune.l1_unstructured(conv(8, 8), "weight", 0.5), nn.BatchNorm2d(8), nn.ReLU())


@entry
def tied_weights() -> nn.Module:
    first, second = conv(8, 8, bias=False), conv(8, 8, bias=False)
    second.weight = first.weight
    return sequential(first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(8), nn.ReLU())


@entry
def one_layer_called_twice() -> nn.Module:
    return Net(lambda m, x: m.head(F.relu(m.b(F.relu(m.b(m.a(x)))))), a=block(3, 8), b=conv(8, 8), head=head())


@entry
def layers_called_by_keyword() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.pool(input=m.b(input=m.a(x)))
        return m.f(input=torch.flatten(input=torch.add(input=y, other=0.25), start_dim=1))

    return Net(forward, a=block(3, 8), b=conv(8, 8), pool=nn.AdaptiveAvgPool2d(1), f=nn.Linear(8, 5))


class MoreParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = sequential()

    def forward(
        self, images: Tensor, target: Tensor | None = None, *more: Any, gain: float = 2.0, **rest: Any
    ) -> Tensor:
        logits = gain * self.body(images)
        return logits if target is None else F.cross_entropy(logits, target)


@entry
def forward_of_many_parameters() -> nn.Module:
    return MoreParameters()


@entry
def wrapped() -> nn.Module:
    return nn.DataParallel(sequential())


@entry
def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(sequential())


@entry
def names_that_collide() -> nn.Module:
    layers = {"images": block(3, 8), "logits": block(8, 8), "quantize_relu": block(8, 8), "conv_weight": conv(8, 8)}
    layers |= {"conv": conv(8, 8), "store_add": nn.ReLU(), "network": nn.Identity(), "code_0": head()}

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.quantize_relu(m.logits(m.images(x)))
        return m.code_0(m.network(m.store_add(m.conv(F.relu(m.conv_weight(x))) + x)))

    return Net(forward, **layers)


# What forwards do beside calling layers
class Blur(nn.Module):
    """A fixed kernel in a buffer."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("kernel", (line[:, None] * line / 16).expand(8, 1, 3, 3).clone())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, padding=1, groups=8)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x)


@entry
def kernel_in_a_buffer() -> nn.Module:
    return sequential(Blur(), block(8, 8))


@entry
def function_of_autograd() -> nn.Module:
    return sequential(ByFunction(), block(8, 8))


@entry
def overwrites_its_input() -> nn.Module:
    return Net(lambda m, x: m.b(x.mul_(0.5)), b=sequential())


@entry
def names_of_any_kind() -> nn.Module:
    names = {"my layer": block(3, 8), "ünï": block(8, 8), "store_x": conv(8, 8), "0": head()}

    def forward(m: Any, x: Tensor) -> Tensor:
        for name in names:
            x = m.get_submodule(name)(x)
        return x

    return Net(forward, **names)


@entry
def assertion() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        assert x.isfinite().all()
        return m.b(x)

    return Net(forward, b=sequential())


@entry
def difference_of_relus() -> nn.Module:
    layers = {"a": block(3, 8), "b": block(3, 8), "c": block(8, 8), "head": head()}
    return Net(lambda m, x: m.head(m.c(m.a(x) - m.b(x))), **layers)


@entry
def sum_with_a_negative_factor() -> nn.Module:
    layers = {"a": block(3, 8), "b": block(3, 8), "c": block(8, 8), "head": head()}
    return Net(lambda m, x: m.head(m.c(torch.add(m.a(x), m.b(x), alpha=-1))), **layers)


@entry
def clamped() -> nn.Module:
    act = {"a": block(3, 8, nn.Identity()), "b": block(8, 8, nn.Identity()), "c": block(8, 8), "head": head()}
    return Net(lambda m, x: m.head(m.c(torch.clamp(m.b(m.a(x).clamp(min=0, max=6)), -1, 1))), **act)


@entry
def squared_and_added_to_itself() -> nn.Module:
    return Net(lambda m, x: m.head(m.b((y := m.a(x)) * y + sum([y, y]))), a=block(3, 8), b=block(8, 8), head=head())


@entry
def normalizes_by_itself() -> nn.Module:
    return Net(lambda m, x: m.b((x - 0.5) / 0.25), b=sequential())


# Layers whose class is a torch layer's and whose forward is not
class ShiftedNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + 1


class StandardizedByValue(StandardizedWeights):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.abs().sum() >= 0 else x


class HalvedWeights(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, 0.5 * weight, bias)


class SummedSequential(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class LoweredReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.5


@entry
def subclass_of_batchnorm() -> nn.Module:
    return sequential(conv(8, 8), ShiftedNorm(8), nn.ReLU(), conv(8, 8))


@entry
def subclass_that_cannot_be_followed() -> nn.Module:
    return sequential(StandardizedByValue(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), block(8, 8))


@entry
def subclass_with_its_own_product() -> nn.Module:
    return sequential(HalvedWeights(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())


@entry
def subclasses_of_containers_and_activations() -> nn.Module:
    return sequential(SummedSequential(block(8, 8)), conv(8, 8), LoweredReLU(), conv(8, 8), nn.ReLU())


# More of what forwards do
@entry
def positive_and_negative_parts() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(m.b(torch.cat([F.relu(x), F.relu(-x)], 1)))

    return Net(forward, a=conv(3, 8), b=block(16, 8), head=head())


@entry
def joined_logits() -> nn.Module:
    layers = {"a": block(3, 8), "f": nn.Linear(8, 3), "g": nn.Linear(8, 2)}
    return Net(lambda m, x: torch.cat([m.f(y := m.a(x).mean((2, 3))), m.g(y)], -1), **layers)


@entry
def mean_of_two_heads() -> nn.Module:
    return Net(lambda m, x: (m.g(y := m.a(x)) + m.h(y)) / 2, a=block(3, 8), g=head(), h=head())


@entry
def mean_with_an_axis() -> nn.Module:
    return Net(lambda m, x: m.f(torch.mean(m.a(x), axis=(-1, -2))), a=block(3, 8), f=nn.Linear(8, 5))


@entry
def slices_of_channels() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        return m.head(torch.cat([x[:, :4], m.b(x[:, 4:])], 1))

    return Net(forward, a=block(3, 8), b=block(4, 4), head=head())


@entry
def scaled_residual_in_a_loop() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.a(x)
        for _ in range(3):
            x = x + 0.1 * m.b(x)
        return m.head(x)

    return Net(forward, a=block(3, 8), b=block(8, 8), head=head())


@entry
def one_pixel_and_a_batchnorm_at_the_end() -> nn.Module:
    ends = (nn.Flatten(), nn.Linear(8, 5), nn.BatchNorm1d(5))
    return nn.Sequential(block(3, 8), nn.AdaptiveAvgPool2d(1), block(8, 8, size=1), conv(8, 8), nn.ReLU(), *ends)


@entry
def hard_swish_by_hand() -> nn.Module:
    return Net(lambda m, x: m.head((y := m.a(x)) * F.relu6(y + 3) / 6), a=conv(3, 8), head=head())


@entry
def layers_used_for_their_weights_alone() -> nn.Module:
    layers = {"a": block(3, 5), "f": nn.Linear(7, 5)}
    return Net(lambda m, x: F.linear(F.relu(F.linear(m.a(x).mean((2, 3)), m.f.weight.t())), m.f.weight), **layers)


@entry
def batchnorm_with_fixed_buffers() -> nn.Module:
    return sequential(conv(8, 8), import_torchvision().ops.FrozenBatchNorm2d(8), nn.ReLU(), conv(8, 8))


@entry
def slope_per_channel() -> nn.Module:
    return sequential(conv(8, 8), nn.PReLU(8), conv(8, 8))


@entry
def transposed_convolution() -> nn.Module:
    return sequential(nn.ConvTranspose2d(8, 8, 2, 2), nn.BatchNorm2d(8), nn.ReLU(), block(8, 8))


@entry
def reflected_edges() -> nn.Module:
    return sequential(conv(8, 8, padding_mode="reflect"), nn.BatchNorm2d(8), nn.ReLU())


@entry
def activation_checkpointing() -> nn.Module:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.head(checkpoint(m.b, m.a(x), use_reentrant=False))

    return Net(forward, a=block(3, 8), b=block(8, 8), head=head())


# torchvision's families, thin
def _torchvision(name: str, shape: tuple[int, int, int], build: Callable[[Any], nn.Module]) -> None:
    ZOO[name] = lambda: build(import_torchvision().models)
    SHAPES[name] = shape


_torchvision("alexnet", (3, 64, 64), lambda m: m.alexnet(num_classes=5))
_torchvision("vgg", (3, 32, 32), lambda m: nn.Sequential(m.vgg.make_layers([8, "M", 16, "M"], True), head(16)))
_torchvision("resnet", (3, 32, 32), lambda m: m.ResNet(m.resnet.BasicBlock, [1, 1, 1, 1], 5))
_torchvision(
    "resnext", (3, 32, 32), lambda m: m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], 5, groups=4, width_per_group=4)
)
_torchvision("densenet", (3, 32, 32), lambda m: m.DenseNet(4, (2, 2), 8, num_classes=5))
_torchvision("squeezenet", (3, 64, 64), lambda m: m.SqueezeNet("1_1", 5))
_torchvision("mobilenet_v2", (3, 32, 32), lambda m: m.MobileNetV2(5, 0.25))
_torchvision("mnasnet", (3, 32, 32), lambda m: m.MNASNet(0.25, 5))
_torchvision("shufflenet", (3, 32, 32), lambda m: m.ShuffleNetV2([1, 1, 1], [8, 16, 16, 16, 32], 5))
_torchvision("googlenet", (3, 64, 64), lambda m: m.GoogLeNet(5, aux_logits=False, init_weights=False))
_torchvision(
    "mobilenet_v3", (3, 32, 32),
    lambda m: m.MobileNetV3(m.mobilenetv3._mobilenet_v3_conf("mobilenet_v3_small", width_mult=0.25)[0], 32, 5),
)  # fmt: skip
_torchvision(
    "efficientnet", (3, 32, 32),
    lambda m: m.EfficientNet(
        [m.efficientnet.MBConvConfig(1, 3, 1, 8, 8, 1), m.efficientnet.MBConvConfig(4, 3, 2, 8, 16, 2)],
        0.0,
        num_classes=5,
    ),
)  # fmt: skip
_torchvision(
    "regnet", (3, 32, 32),
    lambda m: m.RegNet(m.regnet.BlockParams.from_init_params(4, 8, 8.0, 2.0, 8, se_ratio=0.25), 5),
)  # fmt: skip
_torchvision(
    "convnext",
    (3, 32, 32),
    lambda m: m.ConvNeXt([m.convnext.CNBlockConfig(8, 16, 1), m.convnext.CNBlockConfig(16, None, 1)], num_classes=5),
)


def full_width() -> list[str]:
    """torchvision's convolutional classifiers; of the largest several copies do not fit into the memory at hand."""
    names = import_torchvision().models.list_models(module=import_torchvision().models)
    return [name for name in names if "vit" not in name and "swin" not in name and name != "regnet_y_128gf"]


def make_full_width(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network as torchvision makes it, with random weights, and a shape of images that it takes."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(import_torchvision().models, name)(**options)
        return randomized(model), (3, 299, 299) if name == "inception_v3" else (3, 64, 64)


def make(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The network of that name, the same each time, and the shape of its images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(ZOO[name]()), SHAPES.get(name, SHAPE)
