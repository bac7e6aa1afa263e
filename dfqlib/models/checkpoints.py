"""Read weights from a file safely and put them into a network.

A PyTorch checkpoint is a pickle, and a pickle is a program. Files are opened with ``weights_only=True``,
which refuses whatever is not tensors and plain containers *before* running it. Nothing is written into the
model until the whole file has been read and found to fit.
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

from dfqlib.errors import InputError, NonFiniteError

# Scripts keep the weights under one of these keys, and wrappers (DataParallel, torch.compile, Lightning)
# put one of these prefixes before every name.
_WRAPPER_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")
_NAME_PREFIXES = ("module.", "_orig_mod.", "model.")


def load_checkpoint(model: nn.Module, path: str | PathLike[str], *, sha256: str | None = None) -> nn.Module:
    """Load the weights of ``path`` into ``model``, any architecture of yours.

    Reads ``torch.save`` files (old and new format) and safetensors; finds the state dict inside a training
    checkpoint and strips the prefixes of ``DataParallel``, ``torch.compile`` and Lightning.

    Args:
        model: network to fill, changed in place and put into eval mode.
        path: checkpoint file.
        sha256: expected SHA-256 of the file in hex, or its first 8 or more digits; not checked when None.

    Returns:
        ``model``.

    Raises:
        InputError: missing, empty, truncated or refused file, hash mismatch, weights of another architecture.
        NonFiniteError: a weight is NaN or infinite. In every case ``model`` keeps the weights it had.

    Taught in notebook 07.
    """
    weights = read_state_dict(path, sha256=sha256)
    own = model.state_dict()
    weights = _strip_prefixes(weights, own)
    require_fit(weights, own, f'checkpoint="{path}"', type(model).__name__)
    model.load_state_dict(weights)
    return model.eval()


def read_state_dict(path: str | PathLike[str], *, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, on the CPU, names as stored.

    Args:
        path: a ``torch.save`` or safetensors file.
        sha256: expected SHA-256 in hex, or its first 8 or more digits.

    Returns:
        Name to tensor, in the file's order.

    Raises:
        InputError: the file is missing, empty, a folder, truncated, refused, of another hash, or without a
            state dict.
    """
    what = f'checkpoint="{path}"'
    return _find_state_dict(read_file(path, what, sha256=sha256), what)


def read_file(
    path: str | PathLike[str],
    what: str,
    *,
    sha256: str | None = None,
    remedy: str = "torch.save(model.state_dict(), path)",
) -> Any:
    """Whatever tensors and plain containers a file holds, on the CPU; no code in it is run.

    Args:
        path: a ``torch.save`` or safetensors file.
        what: how messages call it, such as ``checkpoint="a.pt"``.
        sha256: expected SHA-256 in hex, or its first 8 or more digits.
        remedy: what messages say to save the file with.

    Raises:
        InputError: the file is missing, empty, a folder, truncated, refused, or of another hash.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} is a folder; give the file inside it")
    if not path.is_file():
        raise InputError(f"{what} does not exist; check the path")
    try:
        with path.open("rb") as file:
            if sha256 is not None:
                _require_hash(file, sha256, what)
            return _read(file, what, remedy)
    except OSError as error:
        raise InputError(f"{what} cannot be read ({error.strerror}); check its permissions") from None


def normalize_sha256(sha256: str) -> str:
    """Lower-case hex digits of a SHA-256 or of its first 8 or more digits; InputError for anything else."""
    digits = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", digits):
        raise InputError(f'sha256="{sha256}" is not a SHA-256: give its 64 hex digits, or at least the first 8')
    return digits


def _require_hash(file: io.BufferedReader, sha256: str, what: str) -> None:
    expected = normalize_sha256(sha256)
    found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(expected):
        raise InputError(f"{what} has SHA-256 {found}, expected {expected}; fetch the file again or correct sha256=")
    file.seek(0)


def _read(file: io.BufferedReader, what: str, remedy: str) -> Any:
    start = file.read(9)
    file.seek(0)
    if not start:
        raise InputError(f"{what} is empty; fetch or save it again")
    try:
        if start[8:9] == b"{":  # safetensors: an 8-byte length, then a JSON header
            from safetensors.torch import load

            return load(file.read())
        with warnings.catch_warnings(action="ignore"):  # of old pickle protocols; what matters becomes an error
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere in the unpickler, with almost anything
        foreign = re.search(r"GLOBAL (\w+(\.\w+)*)(?![\w.])", str(error))
        found = f"it holds {foreign[1]}, not only tensors" if foreign else "it is truncated or no checkpoint"
        raise InputError(
            f"{what} is refused, nothing in it was run: {found}; fetch it again, or save it again with {remedy}"
        ) from None


def _find_state_dict(content: Any, what: str) -> dict[str, Tensor]:
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


def _strip_prefixes(weights: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for _ in _NAME_PREFIXES:  # wrappers nest, for example module._orig_mod.conv1.weight
        for prefix in _NAME_PREFIXES:
            # A network may itself have a child called "model": its names then carry the prefix too.
            if all(k.startswith(prefix) for k in weights) and not all(k.startswith(prefix) for k in own):
                weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def require_fit(weights: Mapping[str, Tensor], own: Mapping[str, Tensor], what: str, architecture: str) -> None:
    """Check weights read from a file against a network's own before any is put in.

    Args:
        weights: read from the file, by name.
        own: the network's ``state_dict()``.
        what: how messages call the file.
        architecture: how messages call the network.

    Raises:
        InputError: names are missing or unexpected, or shapes differ; names the first.
        NonFiniteError: a weight is NaN or infinite; names it.
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
    """Shape, and what would keep the values from being copied: half precision is fine, int8 is not."""
    shape = str(tuple(tensor.shape))
    if tensor.is_meta:
        return f"{shape} without values"
    if tensor.layout is not torch.strided:
        return f"{shape} {tensor.layout}"
    return shape if tensor.is_floating_point() else f"{shape} {tensor.dtype}"
