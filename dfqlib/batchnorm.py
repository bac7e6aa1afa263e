"""Statistics of a network's training data, as its BatchNorm layers store them, and of the batches that pass them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from dfqlib.errors import InputError


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (channels,) each, in plain PyTorch.

    The readable form of ``_BatchStatistics``, which the library uses and a test compares with this one.
    """
    var, mean = torch.var_mean(x, [0, *range(2, x.dim())], correction=0)
    return mean, var


class _BatchStatistics(torch.autograd.Function):
    """``batch_statistics`` in fused kernels: one reduction forward, one multiply-add per value backward.

    Forward is BatchNorm in training mode, with float32 sums. The gradient of n values per channel,
    ``grad_mean / n + 2 / n * grad_var * (x - mean)``, has the form of BatchNorm in evaluation mode with mean
    ``mean``, variance 1, scale ``2 / n * grad_var`` and shift ``grad_mean / n``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x.dtype, torch.float32)
        unused = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)  # sets the precision of the results
        mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
        ctx.save_for_backward(x, mean)
        return mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        x, mean = ctx.saved_tensors
        grad_mean, grad_var = grads
        count = x.numel() // x.shape[1]
        slope, offset = 2.0 / count * grad_var, grad_mean / count
        return torch.native_batch_norm(x, slope, offset, mean, torch.ones_like(mean), False, 0.0, 0.0)[0]


@dataclass(frozen=True, eq=False)
class LayerInput:
    """Input of one BatchNorm layer in the last forward pass, and the statistics that the layer has stored.

    Attributes:
        name: qualified name of the layer in the model.
        input: the layer's input, shape (batch, channels) or (batch, channels, height, width).
        stored_mean: running mean, shape (channels,).
        stored_var: running variance, shape (channels,).
        eps: constant that the layer adds to the variance.
    """

    name: str
    input: Tensor
    stored_mean: Tensor
    stored_var: Tensor
    eps: float

    def statistics(self, per_sample: bool = False, unbiased: bool = False) -> tuple[Tensor, Tensor]:
        """Mean and variance of each channel of the input, differentiable.

        Args:
            per_sample: over each image instead of over the batch.
            unbiased: divide the sum of squares by n - 1 instead of n.

        Returns:
            Two tensors of shape (channels,), or (batch, channels) when ``per_sample``.

        Raises:
            InputError: the unbiased variance of a single value.
        """
        batch, channels = self.input.shape[:2]
        count = self.input.numel() // (channels if not per_sample else batch * channels)
        if unbiased and count < 2:
            raise InputError(f"layer {self.name!r} has one value per channel: unbiased=True needs two or more")
        if per_sample:
            values = self.input.reshape(batch, channels, -1)
            mean = values.mean(2)
            var = (values - mean.unsqueeze(2)).square().mean(2)
        else:
            mean, var = _BatchStatistics.apply(self.input)
        return mean, var * (count / (count - 1)) if unbiased else var

    def mean(self, per_sample: bool = False) -> Tensor:
        """Mean of each channel: shape (channels,), or (batch, channels) when ``per_sample``."""
        return self.statistics(per_sample)[0]

    def var(self, per_sample: bool = False, unbiased: bool = False) -> Tensor:
        """Variance of each channel: shape (channels,), or (batch, channels) when ``per_sample``."""
        return self.statistics(per_sample, unbiased)[1]


class BatchNormProbe:
    """Records the input of every BatchNorm layer while a model runs.

    The hooks are on the BatchNorm layers, so inputs and stored statistics always belong to the same layer, whatever
    the order of definition and the number of calls. Only references are kept, and statistics are computed on demand.
    Each forward pass of the model replaces the records of the previous one.

    Example:
        >>> with BatchNormProbe(model) as probe:
        ...     logits = model(images)
        ...     loss = bn_norm_loss(probe)

    Taught in notebook 03.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._layers = layers(model)
        if not self._layers:
            raise InputError("model has no BatchNorm layer with running statistics to probe: give one that has")
        self._records: list[tuple[str, _BatchNorm, Tensor, int]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "BatchNormProbe":
        names = {layer: name for name, layer in self._layers.items()}

        # deepcopy copies the hooks too; those of a copy must not record.
        def erase(model: nn.Module, _: object) -> None:
            if model is self._model:
                self._records.clear()

        def record(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            if layer in names:
                self._records.append((names[layer], layer, args[0], _version(args[0])))

        self._handles = [self._model.register_forward_pre_hook(erase)]
        self._handles += [layer.register_forward_pre_hook(record) for layer in names]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __len__(self) -> int:
        """Number of BatchNorm inputs recorded in the last forward pass."""
        return len(self._records)

    def __iter__(self) -> Iterator[LayerInput]:
        """The inputs of the last forward pass, in the order the layers ran.

        Raises:
            InputError: no forward pass was recorded, or an input has been overwritten since.
        """
        if not self._records:
            raise InputError("probe is empty: call the model inside `with BatchNormProbe(model) as probe:` first")
        for name, layer, x, version in self._records:
            if _version(x) != version:
                raise InputError(f"input of layer {name!r} was overwritten: set inplace=False in its other consumers")
            assert layer.running_mean is not None
            assert layer.running_var is not None
            yield LayerInput(name, x, layer.running_mean, layer.running_var, layer.eps)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers of a model with running statistics, by name, in the order of definition."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    }


def _stay_in_eval(layer: nn.Module, _: object) -> None:
    if layer.training:
        layer.eval()


def freeze(model: nn.Module) -> None:
    """Fix the running statistics of a model's BatchNorm layers, in place and permanently.

    The layers normalize with the stored statistics from now on, even after ``model.train()``, so that fine-tuning
    does not replace them by those of the synthetic images. Scale and shift remain trainable.
    """
    for layer in layers(model).values():
        layer.eval()
        if _stay_in_eval not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_stay_in_eval)
