"""Copy a model so that each layer is exactly its weight, bias and geometry, or refuse it in one line.

Folding, quantization and export rewrite layers. Wrappers, weights that a hook or a parametrization computes, and shared
weights are made plain on the copy; hooks and what torch.fx cannot represent are refused by name, before any work.
"""

import copy
import keyword
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.optim.swa_utils import AveragedModel

from dfqlib.errors import InputError

__all__ = ["plain", "unwrapped"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)
_TAKEN = {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name)} | {"meta"}
LARGEST_VARIANCE = 1e12
"""Of BatchNorm statistics: losses square them, and beyond 1e19 the square overflows float32."""
_REMOVERS = {"WeightNorm": remove_weight_norm, "SpectralNorm": remove_spectral_norm}


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, AveragedModel or ``torch.compile``."""
    while not isinstance(model, torch.jit.ScriptModule):
        inner = model._modules.get("_orig_mod") or (model.module if isinstance(model, _WRAPPERS) else None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model


def plain(model: nn.Module) -> nn.Module:
    """A deep copy without wrappers, with plain parameters for weights; it computes the same in eval mode.

    Weights that ``parametrize``, ``prune``, ``weight_norm`` or ``spectral_norm`` compute become parameters, and of
    weights that several layers share each gets its own.

    Args:
        model: left as it is.

    Raises:
        InputError: it is a ScriptModule, has hooks or layers that were never run, or cannot be copied; names what.
    """
    model = unwrapped(model)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            what = f'"{name}" is' if name else "it is"
            raise InputError(
                f"model: {what} a ScriptModule, whose layers are out of reach; give the nn.Module it is of"
            )
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise InputError(f'model: "{name}" has no weights yet (a lazy layer); run the model on an image first')
        if "forward" in vars(module) and not isinstance(module, fx.GraphModule):
            what = f'of "{name}" ' if name else ""
            raise InputError(f"model: the forward {what}was replaced on the object; write a class with that forward")
        _refuse_names(name, module)
    copied = _copied(model)
    for name, module in copied.named_modules():
        _compute_weights_once(module)
        _refuse_hooks(name, module)
        _refuse_tensors(name, module)
    _share_nothing(copied)
    return copied


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy; tensors that a forward pass stored are copied without their autograd graph."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in _tensors(
            [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
        ):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        for name, module in model.named_modules():
            for attribute, value in vars(module).items():
                if attribute not in ("_modules", "_parameters", "_buffers") and not _can_be_copied(value, memo):
                    where = f"{name}.{attribute}" if name else attribute
                    raise InputError(
                        f'model: its attribute "{where}" ({type(value).__name__}) cannot be copied; remove it first'
                    ) from error
        raise InputError(f"model cannot be copied ({str(error).splitlines()[0]}); give one that can") from error


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
    elif isinstance(values, list | tuple | set):
        for value in values:
            yield from _tensors(value)


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    try:
        copy.deepcopy(value, dict(memo))
    except Exception:
        return False
    return True


def _compute_weights_once(module: nn.Module) -> None:
    if parametrize.is_parametrized(module):
        kind = type(module)  # made for the original, with the weights as its properties: the copy needs one of its own
        module.__class__ = type(kind.__name__, kind.__bases__, dict(kind.__dict__))
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
    for hook in list(module._forward_pre_hooks.values()):
        hook_kind = type(hook).__name__
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif hook_kind in _REMOVERS and type(hook).__module__.startswith("torch."):
            _REMOVERS[hook_kind](module, hook.name)  # type: ignore[attr-defined]


def _refuse_hooks(name: str, module: nn.Module) -> None:
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if not getattr(hook, "__module__", "").startswith("dfqlib."):
            what = f'"{name}" has' if name else "it has"
            raise InputError(
                f"model: {what} forward hooks, which a rewritten layer would lose; remove them (handle.remove()), or "
                "write what they do into forward"
            )


def _refuse_names(name: str, module: nn.Module) -> None:
    """torch.fx writes names into Python code, and gives the network attributes of its own."""
    own = [*module._modules, *module._parameters, *module._buffers]
    for each in own:
        if keyword.iskeyword(each) or any(sign in each for sign in '"\\\n') or (not name and each in _TAKEN):
            where = f"{name}.{each}" if name else each
            raise InputError(
                f"model: the name {where!r} cannot stand in the Python code that torch.fx writes; rename it"
            )


def _refuse_tensors(name: str, module: nn.Module) -> None:
    """Statistics that no training leaves, and weights that images have no use for."""
    variance = module._buffers.get("running_var")
    if isinstance(module, _BatchNorm) and variance is not None and not variance.is_meta:
        for channel, value in enumerate(variance.tolist()):
            if math.isfinite(value) and not 0 < value + module.eps <= LARGEST_VARIANCE:
                raise InputError(
                    f'model: "{name}" has the running variance {value:.3g} in channel {channel}; load a sound '
                    "checkpoint"
                )
    for each, parameter in module.named_parameters(recurse=False):
        if parameter.ndim > 4:
            raise InputError(f'model: "{name}.{each}" has {parameter.ndim} dimensions; images need at most 4 (Conv2d)')


def _share_nothing(model: nn.Module) -> None:
    """Give each module its own parameters and buffers: rewriting one layer must not change another."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in seen:
                module._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            seen.add(id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in seen:
                module._buffers[name] = buffer.clone()
            seen.add(id(buffer))
