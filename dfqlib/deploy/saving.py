"""Save a quantized network in one file, and rebuild it from there bit for bit.

The file holds tensors and plain values only: weights, ranges and signs of the quantizers, and the spec. The layers come
from the architecture, so reading a file never runs code from it.
"""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn

from dfqlib import models
from dfqlib.deploy import integer
from dfqlib.errors import InputError
from dfqlib.models.checkpoints import read_file, require_fit
from dfqlib.network import folding
from dfqlib.quantizer import QuantSpec, StepQuantizer, quantize_layers, quantizers, set_mode
from dfqlib.training.files import check_writable, written_whole

FORMAT = "dfqlib quantized network"
VERSION = 1


class Run(Protocol):
    """What ``dfqlib.quantize`` returned, as far as it is kept."""

    model: nn.Module
    settings: dict[str, Any]


def save_quantized(
    network: Run | nn.Module,
    path: str | PathLike[str],
    *,
    arch: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write a quantized network to one file, which takes its place only when it is whole.

    Args:
        network: the report of ``dfqlib.quantize``, or a calibrated network of ``quantizer.quantize_layers``.
        path: the file, in a folder that exists; one that is there already is replaced.
        arch: one of ``models.names()`` when the network is one of those: it then loads without ``model=``.
        mean: per channel, what was subtracted from images in [0, 1]; None takes that of ``arch``.
        std: per channel, what they were then divided by; None takes that of ``arch``.
        classes: class names in the order of the logits; None takes those of ``arch``.

    Returns:
        ``path``.

    Raises:
        InputError: the path cannot be written, the network is not quantized or not calibrated, or it is not ``arch``.

    Taught in notebook 07.
    """
    path = Path(path)
    check_writable(path, "path")
    model, settings = (network, {}) if isinstance(network, nn.Module) else (network.model, network.settings)
    meta = getattr(model, "meta", {})
    settings = settings or dict((meta.get("saved") or {}).get("settings") or {})  # of the file that it was read from
    spec, changes = meta.get("spec"), dict(meta.get("changes", {}))
    if not isinstance(spec, QuantSpec):
        raise InputError(f"network={type(model).__name__} has no quantizers; give what dfqlib.quantize returned")
    if any(quantizer.mode != "quantize" for _, quantizer in quantizers(model)):
        raise InputError("network is not calibrated; call quantizer.calibrate(network, images) before saving it")
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    prepared = _prepared(network, model)
    if arch is not None:
        known = models.info(arch)
        rebuilt = _rebuilt(known.build(), changes, spec, weights)
        require_fit(weights, rebuilt.state_dict(), "network", f'arch="{arch}"')
        mean, std, classes = mean or known.mean, std or known.std, classes or known.classes
    content = {
        "format": FORMAT,
        "version": VERSION,
        "arch": arch,
        "changes": changes,
        "spec": dataclasses.asdict(spec),
        "mean": None if mean is None else list(mean),
        "std": None if std is None else list(std),
        "classes": None if classes is None else list(classes),
        "settings": {name: _plain(value) for name, value in settings.items()},
        "state_dict": weights,
        "sums": {name: value.detach().cpu() for name, value in prepared.state_dict().items() if name not in weights},
        "signed": {name: each.signed for name, each in quantizers(prepared) if isinstance(each, StepQuantizer)},
    }
    with written_whole(path) as temporary:
        torch.save(content, temporary)
    return path


def _prepared(network: Any, model: Any) -> nn.Module:
    """The network with the ranges that an exported file adds: an export from the saved file is then the same file."""
    images = None if network is model else getattr(network, "images", None)
    prepared = copy.deepcopy(model)
    try:
        if isinstance(images, Tensor) and len(images):
            integer.prepare(prepared, images.to(next(model.parameters()).device))
        elif model.meta.get("sums"):
            integer.prepare_from_saved(prepared, model.meta["sums"], model.meta["signed"])
    except InputError:  # it has no integer form, and needs no such ranges
        return model
    return prepared


def load_quantized(path: str | PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network that ``save_quantized`` wrote.

    Args:
        path: the file.
        model: a network of the architecture that was quantized, with any weights; left untouched. Not needed when
            the file names its architecture.

    Returns:
        The fake-quantized network in eval mode, on the CPU, frozen, equal to the saved one bit for bit. Its
        ``meta["saved"]`` has the file's ``arch``, ``mean``, ``std``, ``classes`` and ``settings``.

    Raises:
        InputError: no such file, no file of ``save_quantized`` (nothing in it is run), one of a newer dfqlib, one
            that needs ``model=``, or a model of another architecture.
        NonFiniteError: a weight is NaN or infinite.

    Taught in notebook 07.
    """
    what = f'path="{path}"'
    content = read_file(path, what, remedy="dfqlib.save_quantized(report, path)")
    spec, weights = _parts(content, what)
    if model is None:
        if content["arch"] is None:
            raise InputError(
                f"{what} is of an architecture of your own; pass model= with a network of it (on the command line: "
                "--arch module:callable)"
            )
        model = models.info(content["arch"]).build()
    network = _rebuilt(model, content.get("changes", {}), spec, weights).cpu()
    require_fit(weights, network.state_dict(), what, type(model).__name__)
    # Taking the tensors as they are keeps their memory layout too, on which the last bit of a convolution depends.
    network.load_state_dict(weights, assign=True)
    set_mode(network, "quantize")
    signed = dict(content.get("signed", {}))
    for name, quantizer in quantizers(network):
        if isinstance(quantizer, StepQuantizer):
            quantizer.set_sign(signed.get(name, quantizer.signed))
    network.meta.update(sums=dict(content.get("sums", {})), signed=signed)
    network.meta["saved"] = {name: content.get(name) for name in ("arch", "mean", "std", "classes", "settings")}
    return network.eval().requires_grad_(False)


def _rebuilt(
    model: nn.Module, changes: Mapping[str, Any], spec: QuantSpec, weights: Mapping[str, Tensor]
) -> fx.GraphModule:
    """The architecture of ``model`` with a recipe's ``changes`` and the quantizers that ``weights`` belong to."""
    network = quantize_layers(folding.rebuild(model, changes), spec)
    network.meta["changes"] = dict(changes)
    set_mode(network, "quantize")
    if weights.keys() - network.state_dict().keys():  # those of integer.prepare
        integer.attach(network)
    return network


def _parts(content: Any, what: str) -> tuple[QuantSpec, dict[str, Tensor]]:
    """The spec and the weights of a file's content; InputError says what the file is instead."""
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise InputError(f"{what} is no quantized network; give a file that dfqlib.save_quantized wrote")
    if content.get("version") != VERSION:
        raise InputError(
            f"{what} has version {content.get('version')} of the format, this dfqlib reads {VERSION}; update dfqlib"
        )
    try:
        spec, weights = QuantSpec(**content["spec"]), dict(content["state_dict"])
        content["arch"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{what} is damaged ({error}); save it again with dfqlib.save_quantized") from None
    return spec, weights


def _plain(value: Any) -> Any:
    """A setting as something that can be read back without running code."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    plain = type(value) in (bool, int, float, str, type(None))  # a subclass, such as torch's version, is code
    return value if plain else str(value)
