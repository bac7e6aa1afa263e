"""Export a quantized network as an ONNX file that another runtime executes in integers.

Each operation of ``integer.simulate`` is written in the form that runtimes recognize (DequantizeLinear, the operation,
QuantizeLinear), which ONNX Runtime fuses into one integer kernel. Between layers integer values of fewer than 8 bits
are stored in bytes, and a Clip keeps them in their range.

Taught in notebook 10.
"""

import copy
import importlib
import os
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, fx, nn

from dfqlib.deploy import integer
from dfqlib.deploy.onnx.operators import integer_model
from dfqlib.errors import InputError
from dfqlib.network import graph
from dfqlib.quantizer import QuantSpec, quantize_layers, set_mode
from dfqlib.training.files import check_writable, written_whole

Container = Literal["int8", "int4"]
ImageShape = tuple[int, int, int]


class Quantized(Protocol):
    """What ``dfqlib.quantize`` returned, as far as it is exported."""

    model: nn.Module
    images: Tensor


def export_onnx(
    model: Quantized | nn.Module,
    path: str | os.PathLike[str],
    image_shape: ImageShape | None = None,
    container: Container = "int8",
) -> Path:
    """Write a quantized network as an integer ONNX file: input "images" (batch, C, H, W), output "logits".

    Both containers hold the same integer values and run the same kernels; "int8" stores each weight in a byte (opset
    17, read by any runtime with QDQ support), "int4" two weights of up to 4 bits in one byte (opset 21).

    The file computes the same on every processor, with the runtime's default options: where x86 processors without VNNI
    instructions could saturate, weights are stored in 7 bits (``integer.narrowed`` counts these channels). Unsigned
    8-bit weights would be exact too, but take ONNX Runtime two to three times as long where there is VNNI.

    Args:
        model: the report of ``dfqlib.quantize``, or its ``model``; left untouched. The ranges of sums come from the
            report's images, or, for a model without ``integer.prepare``, from its BatchNorm statistics.
        path: the file, replaced whole; nothing is left there when something fails.
        image_shape: (channels, height, width), for any batch size; None where the report or the network has it.
        container: "int8" or "int4".

    Returns:
        ``path``.

    Raises:
        InputError: a layer has no integer form, the network is not quantized or not in float32, its shapes depend on
            the batch, onnx is not installed or too old, or the path cannot be written.
        NonFiniteError: a weight, a step or a statistic is NaN or infinite.

    Taught in notebook 10.
    """
    if container not in get_args(Container):
        raise InputError(f'container={container!r} must be "int8" or "int4"')
    import_extra("onnx")
    path = Path(path)
    check_writable(path, "path")
    image_shape = _known_shape(model) if image_shape is None else image_shape
    simulation = integer_network(model, image_shape)
    write_onnx(integer_model(simulation, shapes_of(simulation, image_shape), container), path)
    return path


def _known_shape(model: Quantized | nn.Module) -> ImageShape:
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "images", None), Tensor) and len(model.images):
        channels, height, width = model.images.shape[1:]
        return channels, height, width
    network: Any = network_of(model)
    meta = getattr(network, "meta", {})
    shape = meta.get("image_shape") or ((meta.get("saved") or {}).get("settings") or {}).get("image_shape")
    if shape is None:
        raise InputError("image_shape is not known of this network; give (channels, height, width)")
    channels, height, width = shape
    return channels, height, width


def check_exportable(model: nn.Module, spec: QuantSpec, image_shape: ImageShape) -> None:
    """Raise InputError if a model, once quantized, could not be exported; for a check before the work.

    Taught in notebook 10.
    """
    import_extra("onnx")
    network = quantize_layers(model, spec)
    set_mode(network, "quantize")
    simulation = integer_network(network, image_shape)
    integer_model(simulation, shapes_of(simulation, image_shape), "int8")


def integer_network(model: Quantized | nn.Module, image_shape: ImageShape) -> fx.GraphModule:
    """The integer simulation that ``export_onnx`` writes, of a copy of the model or of the report's model.

    Taught in notebook 10.
    """
    _check_shape(image_shape)
    network: Any = copy.deepcopy(network_of(model)).cpu().eval().requires_grad_(False)
    network.meta = {**getattr(network, "meta", {}), "image_shape": tuple(image_shape)}
    if not isinstance(model, nn.Module):
        integer.prepare(network, model.images.cpu())
    elif network.meta.get("sums"):
        integer.prepare_from_saved(network, network.meta["sums"], network.meta["signed"])
    integer.prepare_from_noise(network, image_shape)
    return integer.simulate(network)


def network_of(model: Quantized | nn.Module) -> nn.Module:
    """The fake-quantized network of a report, or the network itself."""
    network = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(network, nn.Module):
        raise InputError(f"model={type(model).__name__} is no network; give what dfqlib.quantize returned")
    return network


def shapes_of(network: fx.GraphModule, image_shape: ImageShape) -> dict[str, tuple[int, ...]]:
    """The shape of each node's tensor without its batch dimension.

    Raises:
        InputError: images of that shape do not pass, or a shape depends on the batch; names the layer.
    """
    _check_shape(image_shape)
    two, three = (graph.Run(network, batch, image_shape).shapes for batch in (2, 3))
    for name, shape in two.items():
        if shape[:1] != (2,) or three[name] != (3, *shape[1:]):
            raise InputError(
                f"{name}: its shape is {shape} for a batch of 2 and {three[name]} for a batch of 3; an integer file "
                "needs every tensor to keep the batch as its first dimension, so reshape to (x.shape[0], ...)"
            )
    return {name: shape[1:] for name, shape in two.items()}


def _check_shape(image_shape: Any) -> None:
    try:
        channels, height, width = image_shape
        torch.empty(0, channels, height, width)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"image_shape={image_shape!r} must be (channels, height, width), for example (3, 32, 32)"
        ) from None


def write_onnx(proto: Any, path: Path) -> None:
    """Check an ONNX model and write it, whole or not at all."""
    onnx = import_extra("onnx")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except onnx.checker.ValidationError as error:
        raise InputError(
            f"onnx {onnx.__version__} refuses the graph ({str(error).splitlines()[0]}); update onnx, and if it still "
            "does, report it with the network"
        ) from error
    try:
        with written_whole(path) as temporary:
            temporary.write_bytes(proto.SerializeToString())
    except OSError as error:
        raise InputError(f"path={path} cannot be written ({error.strerror}); name another place") from error


def import_extra(name: str) -> Any:
    """A package of the ``export`` extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f'exporting needs the package {name}; pip install "dfqlib[export]"') from error
