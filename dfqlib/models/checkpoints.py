"""Read weights from a file safely and load them into a network.

A PyTorch checkpoint is a pickle, which can run code when it is read. Files are therefore opened with
``weights_only=True``, which refuses everything but tensors and plain containers before any code runs. A model changes
only after the whole file has been read and found to fit.
"""

import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dfqlib.errors import InputError, NonFiniteError

_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
"""Keys under which training scripts save the weights."""
_NAME_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes that DataParallel, torch.compile and Lightning add to every name."""


def load_checkpoint(model: nn.Module, path: str | PathLike[str], *, sha256: str | None = None) -> nn.Module:
    """Load the weights of ``path`` into ``model``, of any architecture.

    Reads ``torch.save`` files (old and new format) and safetensors, finds the state dict inside a training checkpoint,
    and strips the prefixes of ``DataParallel``, ``torch.compile`` and Lightning.

    Args:
        model: changed in place and put into eval mode.
        path: checkpoint file.
        sha256: expected SHA-256 of the file in hex, or its first 8 or more digits; not checked when None.

    Returns:
        ``model``.

    Raises:
        InputError: missing, empty, truncated or refused file, hash mismatch, weights of another architecture.
        NonFiniteError: a weight is NaN or infinite. In every case ``model`` keeps the weights it had.

    Taught in notebook 07.
    """
    own = model.state_dict()
    weights = _strip_prefixes(read_state_dict(path, sha256=sha256), own)
    require_fit(weights, own, f'checkpoint="{path}"', type(model).__name__)
    model.load_state_dict(weights)
    return model.eval()


def read_state_dict(path: str | PathLike[str], *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by the names stored there, on the CPU.

    Args:
        path: a ``torch.save`` or safetensors file.
        sha256: expected SHA-256 in hex, or its first 8 or more digits.

    Raises:
        InputError: as ``read_file``, or the file has no state dict.
    """
    what = f'checkpoint="{path}"'
    content = read_file(path, what, sha256=sha256)
    while isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return dict(content)
        inner = next((content[k] for k in _WRAPPER_KEYS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise InputError(
        f"{what} holds no state dict (found: {found or 'nothing'}); save it with torch.save(model.state_dict(), path)"
    )


def read_file(
    path: str | PathLike[str],
    what: str,
    *,
    sha256: str | None = None,
    remedy: str = "torch.save(model.state_dict(), path)",
) -> Any:
    """The tensors and plain containers of a file, on the CPU; no code in the file runs.

    Args:
        path: a ``torch.save`` or safetensors file.
        what: name of the file in messages, such as ``checkpoint="a.pt"``.
        sha256: expected SHA-256 in hex, or its first 8 or more digits.
        remedy: how to save the file, for messages.

    Raises:
        InputError: the file is missing, empty, a folder, truncated, refused, or has another hash.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} is a folder; give the file inside it")
    if not path.is_file():
        raise InputError(f"{what} does not exist; check the path")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{what} cannot be read ({error.strerror}); check its permissions") from None
    if sha256 is not None:
        expected, found = normalize_sha256(sha256), hashlib.sha256(content).hexdigest()
        if not found.startswith(expected):
            raise InputError(
                f"{what} has SHA-256 {found}, expected {expected}; fetch the file again or correct sha256="
            )
    if not content:
        raise InputError(f"{what} is empty; fetch or save it again")
    try:
        if content[8:9] == b"{":  # safetensors: an 8-byte length, then a JSON header
            from safetensors.torch import load

            return load(content)
        with warnings.catch_warnings(action="ignore"):  # old pickle protocols warn
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises almost anything on a damaged file
        foreign = re.search(r"GLOBAL (\w+(\.\w+)*)(?![\w.])", str(error))
        reason = f"it holds {foreign[1]}, not only tensors" if foreign else "it is truncated or no checkpoint"
        raise InputError(
            f"{what} is refused, nothing in it was run: {reason}; fetch it again, or save it again with {remedy}"
        ) from None


def normalize_sha256(sha256: str) -> str:
    """A SHA-256, or its first 8 or more hex digits, in lower case; InputError for anything else."""
    digits = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", digits):
        raise InputError(f'sha256="{sha256}" is not a SHA-256: give its 64 hex digits, or at least the first 8')
    return digits


def _strip_prefixes(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _NAME_PREFIXES * len(_NAME_PREFIXES):  # wrappers nest: module._orig_mod.conv1.weight
        # A network whose only child is called "model" has the prefix in its own names.
        if all(k.startswith(prefix) for k in weights) and not all(k.startswith(prefix) for k in own):
            consume_prefix_in_state_dict_if_present(weights, prefix)
    return weights


def require_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, architecture: str) -> None:
    """Compare the weights of a file with a network's own.

    Args:
        weights: read from the file, by name.
        own: the network's ``state_dict()``.
        what: name of the file in messages.
        architecture: name of the network in messages.

    Raises:
        InputError: names are missing or unexpected, or shapes differ.
        NonFiniteError: a weight is NaN or infinite.
    """
    # Checkpoints older than PyTorch 0.4.1 lack BatchNorm's counter, which evaluation never reads.
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    different = [
        f"{k} {_describe(weights[k])} instead of {_describe(own[k])}"
        for k in own
        if k in weights and _describe(weights[k]) != _describe(own[k])
    ]
    problems = [
        f"{label} {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
        for label, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", different))
        if keys
    ]
    if problems:
        raise InputError(
            f"{what} does not fit {architecture}: {'; '.join(problems)}; name the architecture it was trained with"
        )
    for name, tensor in weights.items():
        if not torch.isfinite(tensor.float()).all():
            raise NonFiniteError(f"{what}: {name} has NaN or infinite values; use an earlier checkpoint")


def _describe(tensor: Tensor) -> str:
    """Shape, and whatever prevents copying the values: half precision can be copied, int8 cannot."""
    shape = str(tuple(tensor.shape))
    if tensor.is_meta:
        return f"{shape} without values"
    if tensor.layout is not torch.strided:
        return f"{shape} {tensor.layout}"
    return shape if tensor.is_floating_point() else f"{shape} {tensor.dtype}"
