"""Whether an exported file does what was promised: the same answers, a smaller file, less time.

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
"""Batch sizes that are timed."""
TURNS = 3
"""How often each engine is timed at each of them."""
SECONDS = 0.05
"""How long, at least, in each turn."""
INTEGER_FILE, FLOAT_FILE, FLOAT_TORCH = "integer file", "ONNX Runtime FP32", "PyTorch FP32"
EXACT = "session.x64quantprecision"
"""The option with which ONNX Runtime takes kernels that cannot saturate where the fast ones could."""


@dataclass(frozen=True)
class ExportCheck:
    """What ``verify_export`` found.

    The file runs as it does for anyone who opens it, in a *default* session, and beside it in an *exact* one, whose
    kernels cannot saturate. A file of ``export_onnx`` answers the same in both, on every processor.

    Four networks answer: the original, the fake-quantized one that was made of it, the integer simulation of that, and
    the file. A loss shows between the two where it arises.

    Attributes:
        images: how many images the networks saw.
        agreement: share of them on which file and integer simulation choose the same class, in percent.
        largest_difference: between the two's logits.
        exact_agreement: the same share in the exact session.
        exact_largest_difference: the same difference in the exact session.
        model_agreement: share on which the file chooses the class of the fake-quantized network.
        simulation_agreement: share on which the integer simulation chooses the class of the fake-quantized network.
        original_agreement: share on which the fake-quantized network chooses the class of the original; None where the
            original is not known.
        file_top1: accuracy of the file in percent; None without labels, as for the next three.
        exact_top1: accuracy of the file in the exact session.
        simulation_top1: accuracy of the integer simulation.
        model_top1: accuracy of the fake-quantized network.
        file_bytes: size of the file.
        float_bytes: size of the same network as an FP32 ONNX file, BatchNorm folded.
        operations: how many nodes of each kind ONNX Runtime executes, after its optimizations.
        milliseconds: median processor time on one thread: engine, then batch size.
        processor: what all this ran on: its name, and those of its instructions that integer kernels care about.
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

    def _steps(self) -> str:
        steps = {
            "original → fake-quantized": self.original_agreement,
            "fake-quantized → simulation": self.simulation_agreement,
        }
        steps["simulation → file"] = self.agreement
        return ", ".join(f"{name} {share:.1f} %" for name, share in steps.items() if share is not None)

    def __str__(self) -> str:
        named = [kind for kind in ("QLinearConv", "QGemm", "ConvInteger") if kind in self.operations]
        kernels = ", ".join(f"{self.operations[kind]} {kind}" for kind in named)
        lines = [
            f"agreement with the integer simulation: {self.agreement:.2f} % of {self.images:,} images, "
            f"logits differ by at most {self.largest_difference:.2g}",
            f"the same with ONNX Runtime's exact kernels ({EXACT}): {self.exact_agreement:.2f} %, "
            f"{self.exact_largest_difference:.2g}",
            f"agreement with the fake-quantized network: {self.model_agreement:.2f} %, step by step: {self._steps()}",
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

    The file runs with ONNX Runtime's default options, on one thread, as it will for whoever gets it. On x86 processors
    without VNNI the kernels of such a session cut pairs of products to 16 bits; ``export_onnx`` sees to it that nothing
    in its files is large enough for that. As evidence the file runs a second time with the option that takes exact
    kernels instead, and must answer the same. Latencies are those of the default session.

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
        agreement=_share(found, expected.argmax(1)),
        largest_difference=float((found - expected).abs().max()),
        exact_agreement=_share(exact, expected.argmax(1)),
        exact_largest_difference=float((exact - expected).abs().max()),
        model_agreement=_share(found, model.argmax(1)),
        simulation_agreement=_share(expected, model.argmax(1)),
        original_agreement=None if original is None else _share(model, predict(original, images).argmax(1)),
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
        exact: take kernels that cannot saturate where the default ones could: on x86 without VNNI they make up to
            twice the time of it.

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
    return None if labels is None else _share(logits, labels.cpu())


def _share(logits: Tensor, classes: Tensor) -> float:
    """On how many images the logits choose these classes, in percent."""
    return 100 * float((logits.argmax(1) == classes).float().mean())


def _add_float_engines(
    engines: dict[str, Callable[[Tensor], Any]],
    network: nn.Module,
    simulation: fx.GraphModule,
    image_shape: tuple[int, int, int],
) -> int | None:
    """Add the network in floating point, in ONNX Runtime where it can be written, and in PyTorch; the file's size."""
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

    Processor time is counted, so that what else the machine does stays out, and engines take turns, so that a change
    of its clock slows all of them alike.
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
    """Seconds of each of several calls in a row, at least three, after one that warms the caches."""
    run(batch)
    started, times = time.perf_counter(), list[float]()
    while len(times) < 3 or time.perf_counter() - started < SECONDS:
        before = time.thread_time()
        run(batch)
        times.append(time.thread_time() - before)
    return times
