"""What released code gets wrong, each with the test that keeps it right here; and no loss without a test.

The traps are those of the docstrings' "Where the released code differs".
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib.training import Session
from dfqlib.training.session import Step

SHAPE = (1, 16, 16)
PHASE: dict[str, Any] = {"warm_up_epochs": 1, "epochs": 1, "iterations": 2, "batch": 4}
TRAINED: dict[str, dict[str, Any]] = {
    "express": {"images": 4, "synthesis_steps": 2, "steps": 2, "batch": 4},
    "gdfq": PHASE,
    "dfqf": {**PHASE, "latent": 16},
    "dsg": {"images": 9, "gaussian_images": 8, "iterations": 2, "steps": 2, "batch": 4},
    "deepinversion": {"rounds": 1, "images": 4, "synthesis_batch": 4, "synthesis_steps": 2, "steps": 2, "batch": 4},
    "dafl": {**PHASE, "latent": 16},
    "dfad": {**PHASE, "latent": 16},
    "akd": {**PHASE, "latent": 16, "student_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("recipe", TRAINED)
def test_the_last_step_is_the_result_however_bad(
    teacher: nn.Module, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of fine-tuning is made to ruin the student; nothing goes back to a better one."""
    loop = Session.loop

    def ruined(self: Session, phase: str, steps: int, step: Step, state: Any, *rest: Any, **more: Any) -> None:
        def spoiled(index: int) -> Any:
            found = step(index)
            student = state.get("student", state.get("student 0"))
            if phase == "fine-tuning" and index == steps - 1:
                with torch.no_grad():
                    student.get_parameter("conv1.weight").fill_(0.125)
            return found

        loop(self, phase, steps, spoiled, state, *rest, **more)

    monkeypatch.setattr(Session, "loop", ruined)
    report = dfqlib.quantize(teacher, SHAPE, recipe=recipe, progress=False, **TRAINED[recipe])
    assert bool((report.model.get_parameter("conv1.weight") == 0.125).all())


class Unpaired(nn.Module):
    """A convolution without BatchNorm, one with two, and a BatchNorm defined before everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.last_norm = nn.BatchNorm2d(4)
        self.bare = nn.Conv2d(1, 4, 3, stride=2)
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(torch.relu(self.bare(x)))))
        return self.head(self.last_norm(x).mean((2, 3)))


def test_zeroq_takes_networks_whose_layers_cannot_be_paired() -> None:
    network = Unpaired().eval()
    network.norm.running_mean.fill_(0.5)
    report = dfqlib.quantize(network, SHAPE, recipe="zeroq", images=8, iterations=30, progress=False)
    losses_seen = [row["loss"] for row in report.history]
    assert losses_seen[-1] < losses_seen[0]
