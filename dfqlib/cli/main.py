"""The command line: ``python -m dfqlib quantize CHECKPOINT --arch NAME --output q.pt``, or shorter ``dfqlib quantize``.

Taught in notebook 07.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import dfqlib
from dfqlib import models, recipes, spec
from dfqlib.cli import commands
from dfqlib.errors import InputError
from dfqlib.lessons.reruns import command as rerun

EXAMPLES = """\
examples:
  dfqlib quantize --arch digits_resnet8 --bits w2a2 --evaluate digits --output q.pt
      the bundled network; needs no download
  dfqlib quantize resnet20.th --arch cifar10_resnet20 --evaluate photos/ --output q.pt
      a checkpoint of yours, compared on a folder of photos/<class>/*.png
  dfqlib quantize my.pt --arch mynet:build --image-shape 3,64,64 --output q.pt
      an architecture of yours: build() in mynet.py makes the network
  dfqlib export q.pt --output q.onnx --evaluate digits
      that network as integers for ONNX Runtime; quantize --output q.onnx also fine-tunes the last fifth in integers
  dfqlib rerun notebooks/07_w4a4_fine_tuning.ipynb -p bits w3a3 --output out
      a lesson with a parameter of yours; "dfqlib rerun --help" has more

The result is read back in Python with dfqlib.load_quantized("q.pt").
Exit codes: 0 done, 2 an argument cannot be used (nothing is written), 130 Ctrl-C (what was done is written).
"""


class _Parser(argparse.ArgumentParser):
    """Reports errors as the rest of the library does: one line, with the remedy."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f'{message}; see "{self.prog} --help"')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code: 0, 1 for a notebook that failed, 2 for an input that cannot be used, 130 for Ctrl-C.
    """
    usual, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        options = _parser().parse_args(argv)
        run: Callable[[argparse.Namespace], int] = options.run
        return run(options)
    except InputError as error:
        print(f"dfqlib: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dfqlib: interrupted; nothing more is written", file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = usual


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """One line for a warning, without its place in the library's code."""
    return f"dfqlib: warning: {' '.join(str(message).split())}\n"


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="dfqlib", description="Quantize a trained image classifier without its training data.",
        epilog=EXAMPLES, formatter_class=style,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"dfqlib {dfqlib.__version__}")
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    quantize = parsers.add_parser(
        "quantize", help="quantize the network of a checkpoint", epilog=EXAMPLES, formatter_class=style
    )
    quantize.set_defaults(run=commands.quantize)
    _add_network(quantize.add_argument_group("the network"))
    _add_result(quantize.add_argument_group("the result"))
    _add_run(quantize.add_argument_group("the run"))
    export = parsers.add_parser(
        "export", help="write a quantized network as integer ONNX", epilog=EXAMPLES, formatter_class=style
    )
    export.set_defaults(run=commands.export)
    _add_export(export)
    notebook = parsers.add_parser(
        "rerun", help="run a lesson with parameters of your own", epilog=rerun.EXAMPLES, formatter_class=style
    )
    notebook.set_defaults(run=rerun.rerun)
    rerun.add_arguments(notebook)
    listing = parsers.add_parser("models", help="list the networks with known checkpoints")
    listing.set_defaults(run=commands.list_models)
    listing = parsers.add_parser("recipes", help="list the recipes and their settings")
    listing.add_argument("name", nargs="?", metavar="NAME", help="explain the settings of this recipe")
    listing.set_defaults(run=commands.list_recipes)
    return parser


def _add_network(group: Any) -> None:
    group.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT",
        help="file with the weights, or an https URL with --sha256; without it the bundled or published one of --arch",
    )  # fmt: skip
    group.add_argument(
        "--arch", required=True, metavar="NAME",
        help=f"{', '.join(models.names())}; or module:callable, which is imported and called to build your own",
    )  # fmt: skip
    group.add_argument("--sha256", metavar="HEX", help="expected SHA-256 of the checkpoint, 8 digits or more")
    group.add_argument(
        "--image-shape", type=_shape, metavar="C,H,W", help="shape of an image, such as 3,32,32 (needed for your own)"
    )
    group.add_argument("--mean", type=_floats, metavar="M,...", help="subtracted from each channel of [0, 1] images")
    group.add_argument("--std", type=_floats, metavar="S,...", help="divides each channel afterwards")
    group.add_argument(
        "--classes", type=_names, metavar="A,B,...",
        help="class names in the order of the logits, or a text file with one per line (default: those of --arch, "
        "or the sorted names of the evaluated folder)",
    )  # fmt: skip


def _add_result(group: Any) -> None:
    group.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="FILE",
        help="file of the quantized network; .onnx for an integer network",
    )
    _add_container(group)
    group.add_argument(
        "--evaluate", metavar="DATA",
        help="compare with the original on a folder of <class>/<image>, or on digits, mnist, cifar10, cifar100, svhn, "
        "imagenet",
    )  # fmt: skip
    _add_resize(group)
    default = spec.QuantSpec()
    group.add_argument("--bits", default="w4a4", help="bit widths of weights and activations (default: %(default)s)")
    group.add_argument(
        "--edge-bits", type=int, metavar="N", default=default.edge_bits,
        help="bit width of the first and the last layer (default: %(default)s)",
    )  # fmt: skip
    for name, kind, meaning in (
        ("granularity", spec.Granularity, "one step size of the weights per tensor or per output channel"),
        ("scheme", spec.Scheme, "ranges symmetric around zero, or with two bounds"),
        ("step", spec.Step, "train the step sizes, or keep the calibrated ones"),
        ("skip", spec.Skip, "whether skip connections are quantized"),
    ):
        group.add_argument(
            f"--{name}",
            choices=get_args(kind),
            default=getattr(default, name),
            help=f"{meaning} (default: %(default)s)",
        )


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="QUANTIZED", help="file that dfqlib quantize wrote")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="the ONNX file")
    _add_container(parser)
    parser.add_argument("--arch", metavar="NAME", help="as for quantize; needed for an architecture of your own")
    parser.add_argument("--image-shape", type=_shape, metavar="C,H,W", help="shape of an image (default: as quantized)")
    parser.add_argument("--evaluate", metavar="DATA", help="check the file on these images: agreement, size, speed")
    _add_resize(parser)


def _add_resize(group: Any) -> None:
    group.add_argument(
        "--resize", type=int, metavar="N",
        help="scale the shorter side of a folder's images to N pixels and crop their center to the network's size (256 "
        "is usual for 224; default: the images have the network's size)",
    )  # fmt: skip


def _add_container(group: Any) -> None:
    group.add_argument(
        "--container", choices=("int8", "int4"), default="int8",
        help="bytes of ONNX weights: one each, or half of one (default: %(default)s)",
    )  # fmt: skip


def _add_run(group: Any) -> None:
    group.add_argument(
        "--recipe", default="express", help=f"{', '.join(recipes.names())} (default: %(default)s)", metavar="NAME"
    )
    group.add_argument(
        "--images", metavar="DATA",
        help="real images for the recipes real and calibrate; as for --evaluate, of a data set its training split",
    )  # fmt: skip
    group.add_argument("--budget", default="quick", help="quick or published (default: %(default)s)")
    group.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="NAME=VALUE",
        help='change a setting of the recipe, as often as needed; "dfqlib recipes NAME" explains them',
    )  # fmt: skip
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: %(default)s)"
    )
    group.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    group.add_argument(
        "--threads", type=_count, metavar="N", help="CPU threads, at most one per core (default: what PyTorch takes)"
    )
    group.add_argument(
        "--resume", type=Path, metavar="FILE", help="resume file: save progress to it, and resume from it if it exists"
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars, only the final table")


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(side) for side in text.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" must be channels,height,width, for example 3,32,32')
    return shape


def _floats(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f'"{text}" must be one number per channel, such as 0.5,0.5,0.5') from None


def _names(text: str) -> tuple[str, ...]:
    try:
        names = text.split(",") if "," in text else Path(text).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f'"{text}" is no text in UTF-8; save it so') from None
    except OSError as error:
        message = f'"{text}" is neither names with commas nor a file that can be read ({error.strerror})'
        raise argparse.ArgumentTypeError(message) from None
    return tuple(name.strip() for name in names if name.strip())


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'"{text}" must be a whole number of at least 1')
    return int(text)
