"""Strided 1×1 convolutions: the same values, and no crash where the threads do not divide the batch."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dfqlib import convolution

RUNS = {
    "quantize": 'dfqlib.quantize(model, (1, 16, 16), images=9, synthesis_steps=1, steps=3, batch=9, progress=False)',
    "distill": 'dfqlib.distill(model, dfqlib.models.ResNet8(), (1, 16, 16), distill_epochs=1, iterations=3, batch=9, '
    "progress=False)",
}  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [2, (1, 3)])
def test_leaving_pixels_out_first_computes_the_same(groups: int, stride: int | tuple[int, int]) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 1, stride, groups=groups), nn.Conv2d(6, 2, 1), nn.Conv2d(2, 2, 3, 2))
    x = torch.randn(2, 4, 7, 8)
    before = model(x)
    changed = convolution.prepare_for_training(model)
    assert [type(layer) is nn.Conv2d for layer in changed] == [False, True, True]
    torch.testing.assert_close(changed(x), before)
    assert all(type(layer) is nn.Conv2d for layer in convolution.restore(model))


@pytest.mark.parametrize("verb", RUNS)
def test_two_threads_train_on_an_odd_batch(verb: str) -> None:
    code = f'import dfqlib; model = dfqlib.load_model("digits_resnet8"); {RUNS[verb]}'
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
