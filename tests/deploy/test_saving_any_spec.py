"""Whatever a quantized network looks like, it comes back from its file as it was."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dfqlib.deploy.saving import load_quantized, save_quantized
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers

widths = st.integers(2, 16)
specs = st.builds(
    QuantSpec, widths, widths, widths, granularity=st.sampled_from(["tensor", "channel"]),
    scheme=st.sampled_from(["symmetric", "affine"]), step=st.sampled_from(["learned", "fixed"]),
    skip=st.sampled_from(["quantized", "float"]), layers=st.dictionaries(st.sampled_from(["0", "5"]), widths),
)  # fmt: skip


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@settings(deadline=None, max_examples=20)
@given(specs)
def test_any_spec_comes_back(spec: QuantSpec) -> None:
    images = torch.randn(8, 1, 6, 6)
    network = quantize_layers(small(), spec)
    calibrate(network, images)
    with tempfile.TemporaryDirectory() as folder:
        again = load_quantized(save_quantized(network, Path(folder) / "q.pt"), small())
    assert again.meta["spec"] == spec
    ours, theirs = network.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(network(images), again(images))
