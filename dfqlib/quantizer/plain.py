"""A fake-quantized network without its quantizers."""

import copy

import torch
from torch import fx, nn

from dfqlib.network import graph
from dfqlib.quantizer.insertion import QuantConv2d, QuantLinear, set_mode
from dfqlib.quantizer.modules import AffineQuantizer, StepQuantizer

__all__ = ["float_network", "without_quantizers"]


def without_quantizers(network: fx.GraphModule) -> fx.GraphModule:
    """The same graph with every activation quantizer bypassed; modules are shared, node names stay."""
    plain = fx.GraphModule(network, copy.deepcopy(network.graph))
    for node in list(plain.graph.nodes):
        if graph.operation(node) in (StepQuantizer, AffineQuantizer):
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    plain.recompile()
    return plain


def float_network(network: nn.Module) -> nn.Module:
    """A copy of a fake-quantized network without its quantizers: plain layers, as they were before quantization."""
    plain = copy.deepcopy(network).cpu()
    assert isinstance(plain, fx.GraphModule)
    set_mode(plain, "float")  # of layers inside what cannot be traced
    plain = without_quantizers(plain)
    for module in plain.modules():
        if isinstance(module, QuantConv2d | QuantLinear):
            module.__class__ = nn.Conv2d if isinstance(module, QuantConv2d) else nn.Linear  # type: ignore[assignment]
    return plain.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
