"""Images out of noise and out of generators, and the quick path that is built on them."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfqlib import losses, models, quantizer, synthesis
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.generators import ConditionalGenerator, UnconditionalGenerator
from dfqlib.recipes import base, express
from dfqlib.spec import QuantSpec
from dfqlib.training import Session, Task, distillation
from dfqlib.training.augment import shift_and_flip

SHAPE = (1, 16, 16)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return models.load_model("digits_resnet8").requires_grad_(False)


def objective(_: Tensor, logits: Tensor, probe: BatchNormProbe, labels: Tensor) -> dict[str, Tensor]:
    return {"loss": losses.bn_norm_loss(probe) + 0.2 * F.cross_entropy(logits, labels)}


def adam(pixels: list[nn.Parameter], plateau: bool = False) -> tuple[torch.optim.Optimizer, synthesis.Schedule]:
    optimizer = torch.optim.Adam(pixels, 0.1)
    if plateau:
        return optimizer, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 40)


def test_noise_becomes_images_that_the_teacher_recognizes(teacher: nn.Module) -> None:
    labels = synthesis.balanced_labels(30, 10)
    session = Session(progress=False)
    images = synthesis.from_noise(teacher, labels, SHAPE, objective, adam, 40, session)
    assert images.shape == (30, *SHAPE)
    assert (teacher(images).argmax(1) == labels).float().mean() > 0.9
    with BatchNormProbe(teacher) as probe:
        teacher(images)
        made = losses.bn_norm_loss(probe)
        teacher(torch.randn(30, *SHAPE))
        assert made < 0.5 * losses.bn_norm_loss(probe)
    assert session.history[-1]["loss"] < session.history[0]["loss"]


def test_same_seed_same_images_and_batches_are_made_one_after_another(teacher: nn.Module) -> None:
    make = partial(synthesis.from_noise, teacher, synthesis.balanced_labels(10, 10), SHAPE, objective, adam, 3)
    first, again, other = make(Session(1, False)), make(Session(1, False)), make(Session(2, False))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    session = Session(1, False)
    assert make(session, batch=4).shape == first.shape
    assert {row["phase"] for row in session.history} == {"synthesis 1/3", "synthesis 2/3", "synthesis 3/3"}


def test_a_plateau_schedule_lowers_the_rate(teacher: nn.Module) -> None:
    rates: list[float] = []

    def constant(_: Tensor, logits: Tensor, __: BatchNormProbe, ___: Tensor) -> dict[str, Tensor]:
        rates.append(optimizers[-1].param_groups[0]["lr"])
        return {"loss": logits.sum() * 0 + 1}

    optimizers: list[torch.optim.Optimizer] = []

    def plateau(pixels: list[nn.Parameter]) -> tuple[torch.optim.Optimizer, synthesis.Schedule]:
        made = adam(pixels, plateau=True)
        optimizers.append(made[0])
        return made

    synthesis.from_noise(teacher, torch.zeros(2).long(), SHAPE, constant, plateau, 6, Session(0, False))
    assert rates[0] == 0.1
    assert rates[-1] < 0.1


def test_a_batch_ends_where_its_loss_no_longer_falls_and_the_next_one_begins() -> None:
    def steps_taken(plateau: float) -> list[int]:
        session, seen = Session(progress=False), torch.zeros(())

        def falling(images: Tensor, *_: object) -> dict[str, Tensor]:  # by a percent a step, for forty steps
            seen.add_(1)
            return {"loss": images.mean() * 0 + 0.99 ** seen.clamp(max=40)}

        teacher = models.load_model("digits_resnet8")
        synthesis.from_noise(
            teacher, torch.zeros(2).long(), SHAPE, falling, adam, 100, session, batch=1, plateau=plateau
        )
        last = {row["phase"]: row["step"] for row in session.history}
        return list(last.values())

    assert steps_taken(0.0) == [100, 100]
    assert steps_taken(0.01) == [80, 80]  # the second batch starts on the plateau, and does not end there
    assert steps_taken(0.5) == [80, 80]
    assert steps_taken(1e-9) == [80, 80]


def test_shift_and_flip_moves_pixels_and_loses_none() -> None:
    images = torch.arange(2 * 9.0).view(2, 1, 3, 3)
    torch.manual_seed(0)
    for _ in range(10):
        moved = shift_and_flip(images, 1)
        assert torch.equal(moved.flatten(1).sort()[0], images.flatten(1).sort()[0])
    assert torch.equal(shift_and_flip(images, 0, flip=False), images)


def test_generators_are_sampled_with_balanced_labels_where_they_take_any() -> None:
    images, labels = synthesis.from_generator(ConditionalGenerator(SHAPE, 10), 25, batch=10)
    assert images.shape == (25, *SHAPE)
    assert labels is not None
    assert labels.bincount().tolist() == [3] * 5 + [2] * 5
    images, labels = synthesis.from_generator(UnconditionalGenerator(SHAPE), 3)
    assert images.shape == (3, *SHAPE)
    assert labels is None


def test_cutmix_takes_one_box_from_another_image() -> None:
    images = torch.stack([torch.full(SHAPE, 1.0), torch.full(SHAPE, 2.0)])
    torch.manual_seed(0)
    shares = []
    for _ in range(200):
        mixed, own = distillation.cutmix(images)
        assert torch.equal(mixed[0] + mixed[1], torch.full(SHAPE, 3.0))
        shares.append(float((mixed[0] == 2.0).float().mean()))
        assert own == pytest.approx(1 - shares[-1])
    assert 0.4 < sum(shares) / len(shares) < 0.6


@pytest.mark.parametrize(
    ("change", "message"),
    [({"images": 1}, "images=1"), ({"cutmix": 2.0}, "cutmix=2.0"), ({"temperature": 0}, "temperature=0")],
)
def test_express_settings_are_checked(change: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        express.Settings(**change)  # type: ignore[arg-type]


def test_fine_tuning_leaves_batchnorm_statistics_and_moves_steps(teacher: nn.Module) -> None:
    frozen, classes = base.prepare_teacher(teacher, SHAPE, torch.device("cpu"))
    task = Task(frozen, SHAPE, classes, Session(0, False))
    outcome = express.quantize(task, QuantSpec(2, 2), express.Settings(images=20, synthesis_steps=5, steps=5, batch=8))
    assert outcome.calibrated is not None
    statistics = {k: v for k, v in teacher.state_dict().items() if "running" in k}
    tuned = outcome.model.state_dict()
    assert all(torch.equal(tuned[name], value) for name, value in statistics.items())
    before = dict(quantizer.quantizers(outcome.calibrated))
    after = dict(quantizer.quantizers(outcome.model))
    assert any(not torch.equal(after[name].step, before[name].step) for name in after)


def test_fourier_images_start_as_noise_whose_amplitudes_fall_with_the_frequency() -> None:
    noise = torch.randn(4, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    images = synthesis.Fourier(noise)()
    ratio = torch.fft.rfft2(images).abs() / torch.fft.rfft2(noise).abs()
    assert images.shape == noise.shape
    assert ratio[..., 0, 2].div(ratio[..., 0, 1]).sub(0.5).abs().max() < 1e-4  # two periods in the width, or one
    assert ratio[..., 3, 0].div(ratio[..., 1, 0]).sub(1 / 3).abs().max() < 1e-4
    assert ratio[..., 0, 0].div(ratio[..., 0, 1]).sub(1).abs().max() < 1e-4  # the mean counts as one period


def test_each_coefficient_of_fourier_images_is_learned() -> None:
    canvas = synthesis.Fourier(torch.randn(2, 1, 8, 8))
    target = torch.randn(2, 1, 8, 8)
    optimizer = torch.optim.LBFGS(canvas.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def distance() -> Tensor:
        optimizer.zero_grad()
        gap = (canvas() - target).square().sum()
        gap.backward()
        return gap

    optimizer.step(distance)
    assert (canvas() - target).abs().max() < 1e-3


def test_fourier_images_meet_the_statistics_sooner_than_pixels(teacher: nn.Module) -> None:
    reached = {}
    for parametrization in ("pixels", "fourier"):
        session = Session(progress=False)
        labels = synthesis.balanced_labels(30, 10)
        synthesis.from_noise(teacher, labels, SHAPE, objective, adam, 40, session, parametrization=parametrization)
        reached[parametrization] = session.history[-1]["loss"]
    assert reached["fourier"] < 0.7 * reached["pixels"]
