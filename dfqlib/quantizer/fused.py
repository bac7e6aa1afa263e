"""Faster training of the same function with the same parameters, in fewer passes over memory.

* BatchNorm with fixed statistics is a factor and a bias per channel. The factor multiplies the weights *after* they are
  quantized, so that integer values and step sizes do not change.
* A ReLU before an unsigned quantizer is redundant: the quantizer's smallest value is 0.
* Where PyTorch finds a compiler, ``compiled`` compiles the whole network.

Taught in notebook 07.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dfqlib.network import folding, graph, kinds
from dfqlib.network.convolution import convolve
from dfqlib.network.folding import per_channel
from dfqlib.quantizer.modules import StepQuantizer


class _Merged(nn.Module):
    """A layer and the BatchNorm after it as one product with scaled weights."""

    def __init__(self, layer: Any, norm: Any) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: Tensor) -> Tensor:
        layer, norm = self.layer, self.norm
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else torch.addcmul(norm.bias, bias, scale)
        weight = layer.weight_quantizer(layer.weight) if hasattr(layer, "weight_quantizer") else layer.weight
        weight = weight * per_channel(scale, weight)
        return convolve(layer, x, weight, bias) if isinstance(layer, nn.Conv2d) else F.linear(x, weight, bias)


def fused(network: nn.Module) -> fx.GraphModule:
    """The network in fewer passes, equal to rounding in values and gradients, with the same parameters.

    Where a value before a ReLU is exactly 0, as in a channel whose BatchNorm has neither gain nor bias, the gradient
    passes, which the ReLU would stop: such a dead channel can come back to life.
    Hooks on the merged layers are not called; use ``network`` where features or BatchNorm statistics are recorded.

    Args:
        network: a graph, such as ``quantize_layers`` makes, in eval mode and calibrated; any other network is copied.
            BatchNorm layers in training mode stay as they are.

    Taught in notebook 07.
    """
    source = network if isinstance(network, fx.GraphModule) else graph.trace(network)[0]
    result = graph.shared_copy(source)
    for layer in folding.find_layers(result).values():
        if layer.norm is not None and not layer.norm.training:
            result.set_submodule(layer.name, _Merged(layer.module, layer.norm))
            layer.output.replace_all_uses_with(layer.node)
            result.graph.erase_node(layer.output)
    for node in list(result.graph.nodes):
        _leave_out_relu(node)
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def _leave_out_relu(node: fx.Node) -> None:
    quantizer = graph.module_of(node) if node.op == "call_module" else None
    if not isinstance(quantizer, StepQuantizer) or quantizer.signed or quantizer.mode != "quantize":
        return
    relu = node.all_input_nodes[0]
    if graph.operation(relu) in kinds.RELU and len(relu.users) == 1:
        node.replace_input_with(relu, relu.all_input_nodes[0])
        node.graph.erase_node(relu)


def compiled(network: nn.Module, images: Tensor) -> nn.Module:
    """The same function with the same parameters, compiled forward and backward; for fine-tuning only.

    All operations between two convolutions become one pass over memory. The kernels compute in float32, so that in
    bfloat16 they round once where PyTorch rounds after each operation; in float32 only the order of sums differs.

    Compiles at once, in the current autocast (ResNet-20: some 20 s on two cores, 5 s from the compiler's cache in later
    processes). Where that fails it warns and returns ``network`` itself.

    Args:
        network: in eval mode and without hooks, such as ``fused`` makes; some parameters are trained.
        images: (batch, channels, height, width), as in later calls; other shapes are compiled again.

    Taught in notebook 07.
    """
    made: Any = torch.compile(network)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        torch.autograd.grad(made(images).float().sum(), trained, allow_unused=True)
    except Exception as error:  # a missing compiler shows in many ways
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"compiled=True: PyTorch cannot compile here, its own kernels are used ({reason}); "
            "install a C++ compiler (Debian, Ubuntu: g++ and python3-dev)",
            stacklevel=2,
        )
        return network
    return made
