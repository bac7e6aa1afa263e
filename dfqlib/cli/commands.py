"""The commands of the command line.

The output path, the recipe's settings, the checkpoint and the images to evaluate on are checked before the minutes of
work. The result is written before it is evaluated.
"""

import argparse
import ast
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dfqlib import models, recipes
from dfqlib.cli.subject import build_own, labeled_images, load_subject
from dfqlib.deploy import integer
from dfqlib.deploy.onnx import check_exportable, export_onnx, integer_network
from dfqlib.deploy.onnx.verify import verify_export
from dfqlib.deploy.saving import load_quantized, save_quantized
from dfqlib.errors import InputError
from dfqlib.evaluation.metrics import agreement, compare_classes, predict_classes
from dfqlib.network.inference import Batches
from dfqlib.recipes import Report
from dfqlib.recipes.base import RECIPES_WITH_IMAGES
from dfqlib.spec import QuantSpec
from dfqlib.training.files import check_writable

INTEGER_SHARE = 0.2
"""Default ``integer_share`` of express when the output is ONNX."""
PREPROCESSING = ("mean", "std", "classes")
"""What a saved file keeps of the images."""
COMPARED = ("top-1 %", "difference", "agreement %", "seconds")
NAMED_LAYERS = 4
"""Most layers with 7-bit channels that are named one by one."""


@dataclass(frozen=True)
class _Reference:
    """The original network's classes of the evaluation images, and the true ones, each of shape (N,)."""

    loader: Batches
    chosen: Tensor
    labels: Tensor

    def figures(self, model: nn.Module | None = None) -> list[str]:
        """The columns COMPARED except the last, for a network or, with None, for the original."""
        chosen = self.chosen if model is None else predict_classes(model, self.loader)[0]
        found = compare_classes(chosen, self.chosen, self.labels)
        change = f"{found.difference:+.2f} ± {found.standard_error:.2f}"
        return [f"{found.top1:.2f}", change, f"{found.agreement:.1f}"]


def quantize(options: argparse.Namespace) -> int:
    """``dfqlib quantize``: check, quantize, write, compare; returns the exit code."""
    _check_files(options)
    spec = QuantSpec.parse(
        options.bits, edge_bits=options.edge_bits, granularity=options.granularity, scheme=options.scheme,
        step=options.step, skip=options.skip,
    )  # fmt: skip
    settings = read_settings(options.settings, options.recipe, options.budget)
    _check_images(options)
    if options.threads is not None:
        torch.set_num_threads(_usable_threads(options.threads))
    model, info = load_subject(options)
    model.to(recipes.usable_device(options.device, model))
    as_integers = options.output.suffix.lower() == ".onnx"
    if as_integers:
        check_exportable(model, spec, info.image_shape)
    reference = None
    if options.evaluate is not None:
        loader = labeled_images(options.evaluate, model, info, options.resize)
        reference = _Reference(loader, *predict_classes(model, loader))
    if options.images is not None:
        given = labeled_images(options.images, model, info, options.resize, "--images", "train")
        settings["images"] = torch.cat([images for images, _ in given])
    if as_integers and options.recipe == "express":
        settings.setdefault("integer_share", INTEGER_SHARE)
    report = recipes.quantize(
        model, info.image_shape, spec, recipe=options.recipe, budget=options.budget, seed=options.seed,
        progress=not options.quiet, resume=options.resume, **settings,
    )  # fmt: skip
    facts = f"{report.coverage()}{_in_integers(report)}{_narrowed(report.model)}"
    if as_integers:
        export_onnx(report, options.output, info.image_shape, options.container)
        report = replace(report, model=integer_network(report, info.image_shape))  # the table is of the file
    else:
        save_quantized(
            report,
            options.output,
            arch=None if ":" in info.name else info.name,
            **{name: getattr(info, name) or None for name in PREPROCESSING},
        )
    if report.interrupted:
        again = f"; the same command resumes from {options.resume}" if options.resume else ""
        print(f"dfqlib: interrupted; {options.output} has what was done{again}", file=sys.stderr)
        return 130
    print(
        f"{options.arch}: {options.bits}, first and last layer {spec.edge_bits} bits, weights per {spec.granularity}, "
        f"skip {spec.skip}; {options.recipe} ({options.budget}), seed {options.seed}\n"
    )
    print(summary(report, model, reference, options.evaluate))
    print(f"\n{facts}")
    reader = "an integer network for ONNX Runtime" if as_integers else "read it with dfqlib.load_quantized"
    print(f"\nwritten: {options.output} ({options.output.stat().st_size / 1e6:.2f} MB; {reader})")
    return 0


def _usable_threads(threads: int) -> int:
    """At most one thread per core: more would wait for one another, and very many end the process."""
    cores = os.cpu_count() or 1
    if threads > cores:
        print(f"dfqlib: --threads {threads}: this machine has {cores} cores, {cores} threads are used", file=sys.stderr)
    return min(threads, cores)


def _check_images(options: argparse.Namespace) -> None:
    """Refuse real images for a recipe that takes none, and no images for one that needs some."""
    if options.images is not None and options.recipe not in RECIPES_WITH_IMAGES:
        able = " and ".join(RECIPES_WITH_IMAGES)
        raise InputError(f"--images={options.images}: --recipe {options.recipe} makes its own; {able} take some")
    if options.images is None and options.recipe == "real":
        raise InputError("--recipe real fine-tunes on real images: name them with --images, or take --recipe express")


def export(options: argparse.Namespace) -> int:
    """``dfqlib export``: write a saved network as an integer file, and check it on the images of ``--evaluate``."""
    _check_files(options)
    model = None
    if options.arch is not None:
        model = build_own(options.arch) if ":" in options.arch else models.info(options.arch).build()
    network = load_quantized(options.checkpoint, model)
    saved: dict[str, Any] = network.meta["saved"]  # type: ignore[assignment,index]
    shape = options.image_shape or saved["settings"].get("image_shape")
    if shape is None:
        raise InputError(f"{options.checkpoint} does not say how large its images are; give --image-shape C,H,W")
    channels, height, width = shape
    written = export_onnx(network, options.output, (channels, height, width), options.container)
    size = f"{written.stat().st_size / 1e6:.2f} MB"
    print(f"written: {written} ({size}; an integer network for ONNX Runtime){_narrowed(network)}")
    if options.evaluate is not None:
        described: dict[str, Any] = {name: tuple(saved[name] or ()) for name in PREPROCESSING}
        info = models.ModelInfo(saved["arch"] or "", type(network), (channels, height, width), **described)
        loader = labeled_images(options.evaluate, network, info, options.resize)
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
        print(f"\non {options.evaluate}:\n{verify_export(network, written, images, labels)}")
    return 0


def _in_integers(report: Report) -> str:
    """The share of fine-tuning computed in integers, as a line of its own; empty for recipes without the setting."""
    share = report.settings.get("integer_share")
    return (
        ""
        if share is None
        else f"\nfine-tuned in integers, as an exported file computes: {share:.0%} of the iterations"
    )


def _narrowed(network: nn.Module) -> str:
    """What an exported file of ``network`` stores in 7 bits, as a line of its own; empty if nothing."""
    try:
        counts = integer.narrowed(network)
    except InputError:  # it has no integer form
        return ""
    if not counts:
        return ""
    total = f"{sum(counts.values())} in {len(counts)} layers"
    which = ", ".join(f"{count} of {name}" for name, count in counts.items()) if len(counts) <= NAMED_LAYERS else total
    return f"\nchannels stored in 7 bits instead of 8, to compute the same on any processor: {which}"


def list_models(_: argparse.Namespace) -> int:
    """``dfqlib models``: the networks with known checkpoints."""
    rows = [["name", "image", "classes", "top-1 %", "source"]]
    for known in map(models.info, models.names()):
        shape, top1 = "x".join(map(str, known.image_shape)), known.published_top1
        rows.append([known.name, shape, str(len(known.classes)), f"{top1:.2f}" if top1 else "", known.source])
    print(_table(rows))
    return 0


def list_recipes(options: argparse.Namespace) -> int:
    """``dfqlib recipes``: what each does, and its settings in the quick budget; of one recipe also what they mean."""
    for name in [options.name] if options.name else recipes.names():
        method, settings = recipes.find(name, "quantize", "quick", {})
        values = [f"{key}={value}" for key, value in vars(settings).items()]
        print(f"{name}: {(method.__doc__ or '').splitlines()[0]}")
        if options.name:
            meanings = [[f"    {value}", settings.meanings[value.partition("=")[0]]] for value in values]
            print(_table(meanings))
        else:
            print(f"    {' '.join(values)}")
    return 0


def _check_files(options: argparse.Namespace) -> None:
    check_writable(options.output, "--output")
    others = {"CHECKPOINT": options.checkpoint, "--resume": getattr(options, "resume", None)}
    for argument, other in others.items():
        if other is not None and Path(other).resolve() == options.output.resolve():
            raise InputError(f"--output={options.output} is the file of {argument} too; name another one")


def read_settings(texts: Iterable[str], recipe: str, budget: str) -> dict[str, Any]:
    """Read ``["steps=20", "bf16=false"]`` as settings of a recipe, each of its default's type.

    Raises:
        InputError: no NAME=VALUE, a value of another type or out of range, an unknown name, recipe or budget.
    """
    _, defaults = recipes.find(recipe, "quantize", budget, {})
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise InputError(f'--set "{text}" must be NAME=VALUE, for example steps=1000')
        changes[name.strip()] = _parsed(value.strip(), getattr(defaults, name.strip(), None))
    recipes.find(recipe, "quantize", budget, changes)
    return changes


def _parsed(text: str, default: Any) -> Any:
    """The value of ``text`` for a setting; what cannot be read stays text, which the recipe then refuses."""
    if isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text.capitalize() if isinstance(default, bool) else text)
    except (SyntaxError, ValueError):
        return text
    return float(value) if isinstance(default, float) and type(value) is int else value


def summary(report: Report, teacher: nn.Module, reference: _Reference | None, data: str | None) -> str:
    """The final table: the original, the network with calibrated ranges, the fine-tuned network."""
    made = {"calibrated only": report.calibrated or report.model}
    if report.model is not made["calibrated only"]:
        made["fine-tuned"] = report.model
    rows = [["", "agreement %", "seconds"]] if reference is None else [["", *COMPARED], ["FP32"]]
    for name, model in made.items():
        figures = [f"{agreement(model, teacher, report.images):.1f}"] if reference is None else reference.figures(model)
        rows.append([name, *figures, f"{report.seconds:.1f}" if model is report.model else ""])
    if reference is None:
        origin = "given" if isinstance(report.settings.get("images"), str) else "synthetic"
        images = f"the {len(report.images):,} {origin} images; --evaluate compares on real ones"
        return f"{_table(rows)}\n\nagreement: same class as FP32, on {images}"
    rows[1] += [reference.figures()[0], "", "", ""]
    return (
        f"{_table(rows)}\n\non {len(reference.labels):,} images of {data}; difference: points against FP32 ± its "
        "paired standard error; agreement: same class as FP32"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text, the first column and long texts aligned left, numbers right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = ["<" if index == 0 or width > 20 else ">" for index, width in enumerate(widths)]
    lines = ("   ".join(f"{c:{a}{w}}" for c, a, w in zip(row, align, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
