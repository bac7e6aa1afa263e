"""Which operations of a traced graph have an integer form, by what they do to codes."""

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from dfqlib.network import graph
from dfqlib.quantizer import QuantConv2d, QuantLinear

LAYERS: set[Any] = {QuantConv2d, QuantLinear}
ADDS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS: set[Any] = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIFFERENCES: set[Any] = {operator.sub, operator.truediv, torch.sub, torch.div, "sub", "div"}
ARITHMETIC = ADDS | PRODUCTS | DIFFERENCES
"""With a number on one side they are functions of one tensor."""
MEANS: set[Any] = {torch.mean, "mean"}
ADAPTIVE: set[Any] = {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d}
AVERAGES: set[Any] = {nn.AvgPool2d, F.avg_pool2d, *ADAPTIVE, *MEANS}
NOTHING: set[Any] = {nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, F.dropout2d, "contiguous"}
NOTHING_BY_NAME = {"stochastic_depth"}
"""Functions of other packages that change nothing in eval mode."""
MAX_POOLS: set[Any] = {nn.MaxPool2d, F.max_pool2d}
PADS: set[Any] = {F.pad}
MOVES: set[Any] = {operator.getitem, *PADS, *graph.VIEWS, *MAX_POOLS}
"""Operations that move codes, or choose among them, and leave each as it is."""
SIXES: set[Any] = {nn.ReLU6, F.relu6}
KEEPS = MOVES | graph.RELU | {torch.cat}
"""Operations that commute with quantization: what they read can be stored on the grid of what they make."""
SIZES: set[Any] = {"size", "dim"}
SIZE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
"""What a tensor says of itself; other attributes, such as ``x.mT``, are tensors."""
ELEMENTWISE: set[Any] = {nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU}
ELEMENTWISE |= {nn.Mish, nn.Softplus, F.silu, F.hardswish, F.gelu, F.hardsigmoid, F.leaky_relu, F.elu, F.mish}
ELEMENTWISE |= {
    F.softplus,
    F.sigmoid,
    F.tanh,
    torch.sigmoid,
    torch.tanh,
    torch.abs,
    torch.exp,
    "sigmoid",
    "tanh",
    "abs",
    operator.neg,
    torch.neg,
    "neg",
}
