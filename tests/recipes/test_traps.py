"""What released code gets wrong, each with the test that keeps it right here; and no loss without a test.

The traps are those of the docstrings' "Where the released code differs".
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dfqlib
from dfqlib import losses
from dfqlib.training import Session
from dfqlib.training.session import Step

HERE = Path(__file__).parent
SHAPE = (1, 16, 16)
COVERED = {
    "GDFQ's range corrects its bias recursively and blows up near step 20": (
        "test_quantizer.py::test_affine_range_of_a_constant_stays_put",
        "test_quantizer.py::test_affine_range_is_the_bias_corrected_moving_average",
    ),
    "a student left in training mode drifts to the statistics of synthetic images (DFQF)": (
        "test_recipes_papers.py::test_batchnorm_statistics_stay_unless_training_mode_lets_them_drift",
        "test_batchnorm.py::test_frozen_statistics_survive_training_mode",
    ),
    "the absolute value in max(|gap - delta|, 0) cancels the slack (DSG)": (
        "test_losses.py::test_a_gap_within_the_slack_has_no_gradient",
        "test_losses.py::test_only_what_exceeds_the_slack_costs",
    ),
    "convolutions and BatchNorm layers paired by the order of modules (ZeroQ)": (
        "test_batchnorm.py::test_probe_records_each_call_in_the_order_of_execution",
        "test_traps.py::test_zeroq_takes_networks_whose_layers_cannot_be_paired",
    ),
    "the best epoch is picked on the test set": (
        "test_traps.py::test_the_last_step_is_the_result_however_bad",
        "test_results.py::test_a_result_says_how_it_was_measured",
    ),
    "the KL search assumes edges that float32 does not have": (
        "test_clipping.py::test_kl_takes_float32_whose_bin_edges_are_not_symmetric",
    ),
    "training and evaluation normalize differently": (
        "test_saving.py::test_a_known_architecture_loads_from_the_file_alone",
        "test_data.py::test_digits_normalization_is_that_of_the_training_images",
    ),
    "0.8 in BatchNorm2d(C, 0.8) is eps": (
        "test_generators.py::test_point_eight_is_the_eps_of_two_norms_and_nobodys_momentum",
    ),
}
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


@pytest.mark.parametrize("trap", COVERED)
def test_each_trap_has_its_test(trap: str) -> None:
    for place in COVERED[trap]:
        file, name = place.split("::")
        assert re.search(rf"^def {name}\(", (HERE / file).read_text(), re.MULTILINE), place


def test_each_loss_is_called_by_a_test() -> None:
    tests = "".join(path.read_text() for path in HERE.glob("test_*.py"))
    functions = [name for name in losses.__all__ if name[0].islower()]
    assert [name for name in functions if f"losses.{name}" not in tests and f"{name}(" not in tests] == []


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
