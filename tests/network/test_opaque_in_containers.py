"""A block that cannot be traced stays one block, however deep it lies."""

import torch
from torch import Tensor, nn

from dfqlib.network import graph


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(2, 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return x if x.sum() > 0 else -x


def test_only_the_block_itself_is_opaque() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Sequential(nn.ReLU(), nn.Sequential(Opaque(), nn.Conv2d(2, 2, 1))))
    traced, opaque = graph.trace(model)
    assert opaque == ["1.1.0"]
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1.0", "1.1.0", "1.1.1"]
    images = torch.randn(2, 2, 3, 3)
    torch.testing.assert_close(traced(images), model(images))
