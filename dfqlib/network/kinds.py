"""Kinds of operations in a traced graph, by their effect on tensors.

An operation is a module's class (torch's own for a plain subclass), a function, or a method's name.
"""

import operator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_F: Any = F  # the functional namespace is only partly typed
Kinds = set[Any]

# Activations
RELU: Kinds = {nn.ReLU, F.relu, torch.relu, "relu"}
RELU6: Kinds = {nn.ReLU6, F.relu6}
RELUS = RELU | RELU6
CLAMPS: Kinds = {torch.clamp, torch.clip, "clamp", "clip", F.hardtanh, nn.Hardtanh}
POSITIVE: Kinds = {nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus, F.sigmoid, F.hardsigmoid}
POSITIVE |= {F.softmax, F.softplus, torch.sigmoid, torch.softmax, torch.abs, torch.exp, torch.square, torch.sqrt}
POSITIVE |= {"sigmoid", "softmax", "abs", "exp", "square", "sqrt"}
"""Functions without negative values."""
ELEMENTWISE: Kinds = {nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.LeakyReLU, nn.ELU}
ELEMENTWISE |= {nn.Mish, nn.Softplus, nn.SELU, nn.CELU, nn.Hardtanh, F.silu, F.hardswish, F.gelu, F.hardsigmoid}
ELEMENTWISE |= {F.leaky_relu, F.elu, F.mish, F.softplus, F.sigmoid, F.tanh, F.selu, F.celu, F.hardtanh, torch.sigmoid}
ELEMENTWISE |= {torch.tanh, torch.abs, torch.exp, torch.clamp, torch.square, operator.neg, torch.neg}
ELEMENTWISE |= {"sigmoid", "tanh", "abs", "exp", "clamp", "square", "neg"}
"""Functions of each number by itself."""

# Arithmetic
ADDS: Kinds = {operator.add, operator.iadd, torch.add, "add", "add_"}
PRODUCTS: Kinds = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
DIFFERENCES: Kinds = {operator.sub, operator.truediv, torch.sub, torch.div, "sub", "div"}
QUOTIENTS: Kinds = {operator.truediv, torch.div, "div"}
ARITHMETIC = ADDS | PRODUCTS | DIFFERENCES
"""With a number on one side they are functions of one tensor."""
CATS: Kinds = {torch.cat, torch.concat, torch.concatenate}
STACKS: Kinds = CATS | {torch.stack}
MAXIMA: Kinds = {torch.maximum, "maximum"}
MINIMA: Kinds = {torch.minimum, "minimum"}

# Pooling and rearranging
MEANS: Kinds = {torch.mean, "mean"}
ADAPTIVE: Kinds = {nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d}
AVERAGES: Kinds = {nn.AvgPool2d, F.avg_pool2d, *ADAPTIVE, *MEANS}
MAX_POOLS: Kinds = {nn.MaxPool2d, F.max_pool2d}
ADAPTIVE_MAX_POOLS: Kinds = {nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d}
FLATTENS: Kinds = {nn.Flatten, torch.flatten, "flatten", "view", "reshape"}
NOTHING: Kinds = {nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout, F.dropout, F.dropout2d, "contiguous"}
"""Operations that change nothing in eval mode."""
NOTHING_BY_NAME = {"stochastic_depth"}
"""Functions of other packages that change nothing in eval mode."""
VIEWS = FLATTENS | NOTHING | {"squeeze", "unsqueeze", torch.squeeze, torch.unsqueeze}
"""Operations that return the same tensor in memory, perhaps in another shape."""
RESIZES: Kinds = {nn.Upsample, F.interpolate}
PADS: Kinds = {F.pad}
PAD_MODULES: Kinds = {nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d}
SELECTIONS = AVERAGES | MAX_POOLS | ADAPTIVE_MAX_POOLS | RESIZES | PADS | PAD_MODULES
SELECTIONS |= {nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, operator.getitem, torch.transpose, "transpose"}
SELECTIONS |= {torch.permute, "permute", torch.chunk, "chunk", torch.split, "split", "repeat", "expand", torch.roll}
SELECTIONS |= {"roll", torch.flip, "flip", torch.sum, "sum", torch.amax, "amax"}
"""Operations that select, average or sum the elements of one tensor."""
REARRANGEMENTS = VIEWS | MAX_POOLS | PADS | {operator.getitem}
"""Operations that rearrange or select elements without changing them."""
COMMUTING = REARRANGEMENTS | RELUS | CATS
"""Operations that commute with quantization: their input can be quantized with the scale of their output."""

# Attributes of tensors
SIZES: Kinds = {"size", "dim"}
SIZE_ATTRIBUTES = {"shape", "ndim", "device", "dtype"}
"""Other attributes, such as ``x.mT``, are tensors."""

# Layers
LAYERS: Kinds = {nn.Conv2d, nn.Linear}
BATCH_NORMS: Kinds = {nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm}
"""Those that are what their weights and statistics say; a subclass with a forward of its own is neither."""
CONVOLUTIONS: Kinds = {F.conv2d, torch.conv2d}
LINEARS: Kinds = {F.linear}
