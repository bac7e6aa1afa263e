"""Write each integer operation in ONNX.

Taught in notebook 10.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from dfqlib.deploy.integer.arithmetic import pair
from dfqlib.deploy.integer.layer import IntegerLayer
from dfqlib.deploy.integer.operations import (
    Clamp,
    Dequantize,
    IntegerAdd,
    IntegerAverage,
    IntegerProduct,
    Quantize,
    Table,
    window_step,
)
from dfqlib.deploy.onnx.shortcut import sampled_and_padded, write_shortcut
from dfqlib.deploy.onnx.writer import INPUT, OPSETS, OUTPUT, FloatWriter, Shapes, Writer
from dfqlib.errors import InputError
from dfqlib.network import graph, kinds


def integer_model(simulation: fx.GraphModule, shapes: Shapes, container: str) -> Any:
    """The ONNX model of what ``integer.simulate`` made.

    Args:
        simulation: the integer network.
        shapes: of each node's tensor, without the batch.
        container: "int8" or "int4".

    Raises:
        InputError: a layer has no ONNX form; names it.
    """
    return _write(Writer(shapes, container), simulation)


def float_model(simulation: fx.GraphModule, shapes: Shapes) -> Any:
    """The same network in floating point, BatchNorm folded, for comparison."""
    return _write(FloatWriter(shapes, "int8"), simulation)


def _write(writer: Writer, simulation: fx.GraphModule) -> Any:
    nodes = list(simulation.graph.nodes)
    for node in nodes:
        _visit(writer, node)
    helper = writer.onnx.helper
    (source,) = [node for node in nodes if node.op == "placeholder"]
    result: Any = nodes[-1].args[0]
    if writer.names[result] != OUTPUT:
        writer.add("Identity", [writer.real(result)], OUTPUT)
    ends = [
        helper.make_tensor_value_info(name, writer.onnx.TensorProto.FLOAT, ["batch", *writer.shapes[node.name]])
        for name, node in ((INPUT, source), (OUTPUT, result))
    ]
    content = helper.make_graph(writer.nodes, "dfqlib", ends[:1], ends[1:], list(writer.constants.values()))
    opset, version = OPSETS[writer.container]
    return helper.make_model(
        content, opset_imports=[helper.make_opsetid("", opset)], ir_version=version, producer_name="dfqlib"
    )


def _visit(writer: Writer, node: fx.Node) -> None:
    if node.op == "placeholder":
        writer.keep(node, INPUT, None)
    elif node.op != "output" and node.name in writer.shapes:  # other nodes are sizes, which are constants here
        module = graph.module_of(node) if node.op == "call_module" else None
        write = _WRITERS.get(type(module) if module is not None else node.target)
        if write is None and graph.operation(node) in kinds.VIEWS:
            write = _reshape
        if write is None:
            raise InputError(f"{node.name} ({graph.operation(node)}) has no ONNX form here; use a plain layer")
        write(writer, node, module)


def _source(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _quantize(writer: Writer, node: fx.Node, module: Quantize) -> None:
    writer.store(node, writer.names[_source(node)], module.target)


def _dequantize(writer: Writer, node: fx.Node, _: Dequantize) -> None:
    writer.keep(node, writer.real(_source(node)), None)


def _layer(writer: Writer, node: fx.Node, layer: IntegerLayer) -> None:
    source = _source(node)
    if not layer.is_convolution and len(writer.shapes[source.name]) != 1:
        raise InputError(
            f'layer "{layer.name}" multiplies more than two dimensions, which has no integer form; flatten first'
        )
    if layer.is_convolution and layer.target is None and source in writer.quantizers:
        _last_convolution(writer, node, layer)
        return
    kind, attributes = ("Conv", _convolution(layer)) if layer.is_convolution else ("Gemm", {"transB": 1})
    inputs = [writer.real(source), *writer.layer_constants(node, layer)]
    values = writer.add(kind, inputs, _result_name(node) if layer.target is None else f"{node.name}/sum", **attributes)
    if layer.target is None:
        writer.keep(node, values, None)
    else:
        writer.store(node, values, layer.target)


def _result_name(node: fx.Node) -> str:
    """The name of logits: that of the file's output unless an operation follows."""
    return OUTPUT if all(user.op == "output" for user in node.users) else f"{node.name}/logits"


def _last_convolution(writer: Writer, node: fx.Node, layer: IntegerLayer) -> None:
    """Scale the accumulator explicitly: no fused integer convolution has a floating-point output."""
    source, name = _source(node), node.name
    quantizer = writer.quantizers[source]
    integers, bias, steps = layer.integers()
    inputs = [writer.names[source], writer.weight(f"{name}/weight", integers, layer.bits), writer.bound(0, quantizer)]
    product = writer.add("ConvInteger", inputs, f"{name}/product", **_convolution(layer))
    whole, scale = (values.view(-1, 1, 1) for values in (bias, quantizer.step * steps))
    total = writer.add("Add", [product, writer.constant(f"{name}/bias", whole, "int32")], f"{name}/sum")
    floats = writer.add("Cast", [total], f"{name}/float", to=writer.onnx.TensorProto.FLOAT)
    writer.keep(
        node, writer.add("Mul", [floats, writer.constant(f"{name}/step", scale, "float32")], _result_name(node)), None
    )


def _convolution(layer: IntegerLayer) -> dict[str, Any]:
    conv = layer.layer
    if not isinstance(conv, nn.Conv2d):  # a lone BatchNorm: one weight per channel
        return {"group": layer.channels}
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [t // 2 for t in total] + [t - t // 2 for t in total]
    else:
        pads = [0] * 4 if conv.padding == "valid" else [int(p) for p in conv.padding] * 2
    return {
        "kernel_shape": list(conv.kernel_size), "strides": list(conv.stride), "dilations": list(conv.dilation),
        "pads": pads, "group": conv.groups,
    }  # fmt: skip


def _combine(writer: Writer, node: fx.Node, module: IntegerAdd | IntegerProduct) -> None:
    terms = [writer.real(term) for term in node.args if isinstance(term, fx.Node)]
    kind = "Add" if isinstance(module, IntegerAdd) else "Mul"
    writer.store(node, writer.add(kind, terms, f"{node.name}/result"), module.target)


def _average(writer: Writer, node: fx.Node, module: IntegerAverage) -> None:
    values, (channels, height, width) = writer.real(_source(node)), writer.shapes[_source(node).name]
    pool = module.window(height, width)
    name = f"{node.name}/mean"
    if pool is None:
        writer.add("GlobalAveragePool", [values], name)
    else:
        ones = torch.ones(channels, 1, *pair(pool.kernel_size))
        weight = writer.average_weight(node, ones, window_step(pool))
        pads = [*pair(pool.padding)] * 2
        writer.add("Conv", [values, weight], name, group=channels, strides=list(pair(pool.stride)), pads=pads)
    writer.store(node, name, module.target)
    if not module.keepdim:
        flat = writer.add("Flatten", [writer.names[node]], f"{node.name}/flat")
        writer.keep(node, flat, writer.quantizers.get(node))


def _table(writer: Writer, node: fx.Node, module: Table) -> None:
    writer.table(node, _source(node), module.entries(), module.target)


def _rearrange(writer: Writer, node: fx.Node, kind: str, *constants: str, **attributes: Any) -> None:
    """An operation that rearranges or selects values: the same in integers as in floating point."""
    source = _source(node)
    name = writer.add(kind, [writer.names[source], *constants], node.name, **attributes)
    writer.keep(node, name, writer.quantizers.get(source))


def _clamp(writer: Writer, node: fx.Node, module: Clamp) -> None:
    if _source(node) in writer.clipped:  # the source was stored within these bounds already
        writer.keep(node, writer.names[_source(node)], module.quantizer)
    else:
        _rearrange(writer, node, "Clip", *(writer.bound(value, module.quantizer) for value in module.bounds))


def _max_pool(writer: Writer, node: fx.Node, module: nn.MaxPool2d | None) -> None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    pool = module or nn.MaxPool2d(**given)
    _rearrange(
        writer, node, "MaxPool", kernel_shape=list(pair(pool.kernel_size)), strides=list(pair(pool.stride)),
        pads=[*pair(pool.padding)] * 2, dilations=list(pair(pool.dilation)), ceil_mode=int(pool.ceil_mode),
    )  # fmt: skip


def _reshape(writer: Writer, node: fx.Node, _: None) -> None:
    shape = writer.shapes[node.name]
    if len(shape) == 1:
        _rearrange(writer, node, "Flatten")
    else:
        _rearrange(writer, node, "Reshape", writer.constant(f"{node.name}/shape", [-1, *shape], "int64"))


def _slice(writer: Writer, node: fx.Node, _: None) -> None:
    if sampled_and_padded(writer, node):
        return  # it is written with its padding
    index, shape = node.args[1], writer.shapes[_source(node).name]
    entries: Any = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(entry, slice) for entry in entries) or entries[0] != slice(None):
        raise InputError(f"{node.name}: indexing with {index} has no form here; use slices after the batch dimension")
    ranges = [
        (axis, *entry.indices(size)) for axis, (entry, size) in enumerate(zip(entries[1:], shape, strict=False), 1)
    ]
    axes, starts, ends, steps = zip(*ranges, strict=True)
    columns = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    _rearrange(
        writer, node, "Slice", *(writer.constant(f"{node.name}/{n}", list(c), "int64") for n, c in columns.items())
    )


def _pad(writer: Writer, node: fx.Node, _: None) -> None:
    source = _source(node)
    shortcut = sampled_and_padded(writer, source)
    if shortcut is not None:
        write_shortcut(writer, node, shortcut)
        return
    amounts: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    dims = len(writer.shapes[source.name]) + 1
    before, after = [0] * dims, [0] * dims
    for axis, (first, last) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), 1):
        before[-axis], after[-axis] = first, last
    quantizer = writer.quantizers.get(source)
    zero = writer.constant("value/zero", 0.0, "float32") if quantizer is None else writer.bound(0, quantizer)
    _rearrange(writer, node, "Pad", writer.constant(f"{node.name}/pads", before + after, "int64"), zero)


def _concatenate(writer: Writer, node: fx.Node, _: None) -> None:
    parts: Any = node.args[0]  # the same tensor may come twice
    axis: Any = node.args[1]
    name = writer.add("Concat", [writer.names[part] for part in parts], node.name, axis=axis)
    writer.keep(node, name, writer.quantizers.get(parts[0]))


_WRITERS: dict[Any, Callable[[Writer, fx.Node, Any], None]] = {
    Quantize: _quantize,
    Dequantize: _dequantize,
    IntegerLayer: _layer,
    IntegerAdd: _combine,
    IntegerProduct: _combine,
    IntegerAverage: _average,
    Table: _table,
    Clamp: _clamp,
    nn.MaxPool2d: _max_pool,
    F.max_pool2d: _max_pool,
    operator.getitem: _slice,
    F.pad: _pad,
    torch.cat: _concatenate,
}
