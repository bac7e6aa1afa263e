"""Measure an exported file against the network it came from: equal logits, size, latency.

Taught in notebook 10.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from dfqlib.deploy.onnx import Quantized, import_extra, integer_network, network_of, shapes_of
from dfqlib.deploy.onnx.operators import float_model
from dfqlib.deploy.onnx.writer import INPUT
from dfqlib.errors import InputError
from dfqlib.network.inference import Batches, as_images, predict
from dfqlib.quantizer.plain import float_network
from dfqlib.training.machine import processor

BATCHES = (1, 64)
"""Batch sizes that are timed, each in ``TURNS`` turns of at least ``SECONDS``."""
TURNS, SECONDS = 3, 0.05
INTEGER_FILE, FLOAT_FILE, FLOAT_TORCH = "integer file", "ONNX Runtime FP32", "PyTorch FP32"
EXACT = "session.x64quantprecision"
"""The option for kernels of ONNX Runtime that cannot saturate."""


@dataclass(frozen=True)
class ExportCheck:
    """What ``verify_export`` measured on the original, the fake-quantized network, its integer simulation and the file.

    The file runs in a *default* session and in an *exact* one, whose kernels cannot saturate. Agreement is the share of
    images, in percent, on which two networks choose the same class.

    Attributes:
        images: number of images.
        agreement, largest_difference: of the file with the integer simulation; the difference is of logits.
        exact_agreement, exact_largest_difference: the same in the exact session.
        model_agreement: of the file with the fake-quantized network.
        simulation_agreement: of the integer simulation with the fake-quantized network.
        original_agreement: of the fake-quantized network with the original; None where that is not known.
        file_top1, exact_top1, simulation_top1, model_top1: accuracy in percent of the file, of the file in the exact
            session, of the integer simulation and of the fake-quantized network; None without labels.
        file_bytes: size of the file.
        float_bytes: size of the same network as an FP32 ONNX file, BatchNorm folded; None where it has no such form.
        operations: number of nodes of each kind that ONNX Runtime executes after its optimizations.
        milliseconds: median processor time on one thread, by engine and batch size.
        processor: name of the processor and those of its instructions that integer kernels use.
    """

    images: int
    agreement: float
    largest_difference: float
    exact_agreement: float
    exact_largest_difference: float
    model_agreement: float
    simulation_agreement: float
    original_agreement: float | None
    file_top1: float | None
    exact_top1: float | None
    simulation_top1: float | None
    model_top1: float | None
    file_bytes: int
    float_bytes: int | None
    operations: dict[str, int]
    milliseconds: dict[str, dict[int, float]]
    processor: str

    @property
    def all_integer(self) -> bool:
        """Whether every convolution and every matrix product runs on integers."""
        floating = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
        return not floating & set(self.operations)

    def speedup(self, engine: str, batch: int) -> float:
        """How many times faster than ``engine`` the file runs."""
        return self.milliseconds[engine][batch] / self.milliseconds[INTEGER_FILE][batch]

    def __str__(self) -> str:
        pairs = {
            "original → fake-quantized": self.original_agreement,
            "fake-quantized → simulation": self.simulation_agreement,
            "simulation → file": self.agreement,
        }
        steps = ", ".join(f"{name} {share:.1f} %" for name, share in pairs.items() if share is not None)
        named = [kind for kind in ("QLinearConv", "QGemm", "ConvInteger") if kind in self.operations]
        kernels = ", ".join(f"{self.operations[kind]} {kind}" for kind in named)
        lines = [
            f"agreement with the integer simulation: {self.agreement:.2f} % of {self.images:,} images, "
            f"logits differ by at most {self.largest_difference:.2g}",
            f"the same with ONNX Runtime's exact kernels ({EXACT}): {self.exact_agreement:.2f} %, "
            f"{self.exact_largest_difference:.2g}",
            f"agreement with the fake-quantized network: {self.model_agreement:.2f} %, step by step: {steps}",
            f"size: {self.file_bytes / 1e3:,.0f} kB"
            + (f", {self.float_bytes / self.file_bytes:.1f} times smaller than FP32" if self.float_bytes else ""),
            f"every layer runs in integers: {'yes' if self.all_integer else 'no'} ({kernels})",
        ]
        if self.file_top1 is not None:
            exact = f"with exact kernels {self.exact_top1:.2f} %"
            network = f"fake-quantized network {self.model_top1:.2f} %"
            lines.insert(3, f"top-1: file {self.file_top1:.2f} %, {exact}, {network}")
        for batch in BATCHES:
            times = ", ".join(f"{engine} {each[batch]:.2f} ms" for engine, each in self.milliseconds.items())
            lines.append(f"batch {batch}: {times}")
        lines.append(f"on one thread of: {self.processor}")
        return "\n".join(lines)


def verify_export(
    report: Quantized | nn.Module, path: str | os.PathLike[str], images: Tensor | Batches, labels: Tensor | None = None
) -> ExportCheck:
    """Run an exported file beside the network it came from.

    The file runs on one thread with ONNX Runtime's default options, and again with the option for exact kernels: on x86
    processors without VNNI the default ones cut pairs of products to 16 bits, which no product in a file of
    ``export_onnx`` reaches, so both must agree. Latencies are those of the default session.

    Args:
        report: what was given to ``export_onnx``.
        path: the file that it wrote.
        images: (N, C, H, W), normalized, or a loader of (images, labels).
        labels: (N,), for accuracies.

    Raises:
        InputError: the file is missing, is of another network, or ONNX Runtime cannot load it; images and labels
            do not match; onnx or onnxruntime is not installed.

    Taught in notebook 10.
    """
    if not isinstance(images, Tensor):
        pairs = list(images)
        images, labels = as_images(pairs), torch.cat([each for _, each in pairs])
    if images.ndim != 4 or len(images) == 0 or (labels is not None and len(labels) != len(images)):
        raise InputError(
            f"images={tuple(images.shape)} and labels={None if labels is None else tuple(labels.shape)} must be "
            "(N, channels, height, width) with N at least 1, and (N,)"
        )
    if images.dtype != torch.float32:
        raise InputError(f"images are {images.dtype}, and the file takes float32; give normalized images.float()")
    path = Path(path)
    image_shape = (images.shape[1], images.shape[2], images.shape[3])
    simulation = integer_network(report, image_shape)
    session, operations = load(path)
    found, exact = (_run(each, images.cpu(), path) for each in (session, load(path, exact=True)[0]))
    engines: dict[str, Callable[[Tensor], Any]] = {INTEGER_FILE: lambda x: session.run(None, {INPUT: x.numpy()})}
    float_bytes = _add_float_engines(engines, network_of(report), simulation, image_shape)
    # Timed before PyTorch runs larger batches: memory kept from those would hide what its allocations cost.
    milliseconds = latencies(engines, images.cpu())
    expected = predict(simulation, images)
    if found.shape != expected.shape:
        raise InputError(f"path={path} returns logits of shape {tuple(found.shape)}; give the file of this network")
    model, original = predict(network_of(report), images), getattr(report, "teacher", None)
    return ExportCheck(
        images=len(images),
        agreement=_agreement(found, expected.argmax(1)),
        largest_difference=float((found - expected).abs().max()),
        exact_agreement=_agreement(exact, expected.argmax(1)),
        exact_largest_difference=float((exact - expected).abs().max()),
        model_agreement=_agreement(found, model.argmax(1)),
        simulation_agreement=_agreement(expected, model.argmax(1)),
        original_agreement=None if original is None else _agreement(model, predict(original, images).argmax(1)),
        file_top1=_top1(found, labels),
        exact_top1=_top1(exact, labels),
        simulation_top1=_top1(expected, labels),
        model_top1=_top1(model, labels),
        file_bytes=path.stat().st_size,
        float_bytes=float_bytes,
        operations=operations,
        milliseconds=milliseconds,
        processor=processor(),
    )


def load(file: Path | bytes, exact: bool = False) -> tuple[Any, dict[str, int]]:
    """An ONNX Runtime session of one thread, and what its optimized graph consists of.

    Args:
        file: the file, or its content.
        exact: use kernels that cannot saturate; on x86 without VNNI they take up to twice the time.

    Raises:
        InputError: no such file, or not one that the installed ONNX Runtime can run.
    """
    runtime, onnx = import_extra("onnxruntime"), import_extra("onnx")
    if isinstance(file, Path) and not file.is_file():
        raise InputError(f"path={file} does not exist; write it with dfqlib.export_onnx")
    try:
        source = file if isinstance(file, bytes) else file.read_bytes()
        session = runtime.InferenceSession(source, _options(runtime, exact), providers=["CPUExecutionProvider"])
        with tempfile.TemporaryDirectory() as folder:
            writing = _options(runtime, exact)
            writing.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            runtime.InferenceSession(source, writing, providers=["CPUExecutionProvider"])
            optimized = onnx.load(writing.optimized_model_filepath)
    except Exception as error:  # its exceptions share no base class
        raise InputError(
            f"path={file if isinstance(file, Path) else '(FP32)'}: ONNX Runtime {runtime.__version__} cannot load "
            f"it ({str(error).splitlines()[0]}); update onnxruntime, or export it again for an older one "
            'with container="int8"'
        ) from error
    return session, dict(Counter(node.op_type for node in optimized.graph.node))


def _options(runtime: Any, exact: bool) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry(EXACT, "1")
    return options


def _run(session: Any, images: Tensor, path: Path) -> Tensor:
    try:
        parts = [session.run(None, {INPUT: part.numpy()})[0] for part in images.contiguous().split(256)]
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"path={path} cannot take these images ({reason}); give the file of this network") from error
    return torch.from_numpy(np.concatenate(parts))


def _top1(logits: Tensor, labels: Tensor | None) -> float | None:
    return None if labels is None else _agreement(logits, labels.cpu())


def _agreement(logits: Tensor, classes: Tensor) -> float:
    """Share of the images on which the logits choose these classes, in percent."""
    return 100 * float((logits.argmax(1) == classes).float().mean())


def _add_float_engines(
    engines: dict[str, Callable[[Tensor], Any]],
    network: nn.Module,
    simulation: fx.GraphModule,
    image_shape: tuple[int, int, int],
) -> int | None:
    """Add the FP32 network in PyTorch and, if it has an ONNX form, in ONNX Runtime; returns that file's size."""
    size = None
    try:
        content = float_model(simulation, shapes_of(simulation, image_shape)).SerializeToString()
        session, _ = load(content)
    except InputError:  # only a comparison
        pass
    else:
        engines[FLOAT_FILE] = lambda x: session.run(None, {INPUT: x.numpy()})
        size = len(content)
    engines[FLOAT_TORCH] = float_network(network)
    return size


@torch.inference_mode()
def latencies(engines: dict[str, Callable[[Tensor], Any]], images: Tensor) -> dict[str, dict[int, float]]:
    """Median milliseconds of each engine at each batch size, on one thread, caches warm.

    Processor time leaves out what else the machine does; engines take turns, so that a change of clock affects all.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured: dict[str, dict[int, float]] = {engine: {} for engine in engines}
    try:
        for size in BATCHES:
            batch = images.repeat(-(-size // len(images)), 1, 1, 1)[:size].contiguous()
            times: dict[str, list[float]] = {engine: [] for engine in engines}
            for _ in range(TURNS):
                for engine, run in engines.items():
                    times[engine] += _turn(run, batch)
            for engine, all_times in times.items():
                measured[engine][size] = 1e3 * float(np.median(all_times))
    finally:
        torch.set_num_threads(threads)
    return measured


def _turn(run: Callable[[Tensor], Any], batch: Tensor) -> list[float]:
    """Seconds of each of at least three calls in a row, after one that warms the caches."""
    run(batch)
    started, times = time.perf_counter(), list[float]()
    while len(times) < 3 or time.perf_counter() - started < SECONDS:
        before = time.thread_time()
        run(batch)
        times.append(time.thread_time() - before)
    return times
