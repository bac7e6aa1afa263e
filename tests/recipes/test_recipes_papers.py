"""The papers' recipes do what their algorithm boxes say: ZeroQ, GDFQ, DFQF."""

import math
from typing import Any

import pytest
import torch
from short_runs import SHAPE, SHORT, same, short, weights
from torch import Tensor, nn

import dfqlib
from dfqlib import losses, quantizer
from dfqlib.batchnorm import BatchNormProbe
from dfqlib.errors import InputError
from dfqlib.models.resnet import ResNet, projection_shortcut
from dfqlib.network.inference import Batches
from dfqlib.recipes import base, dfqf, gdfq, zeroq
from dfqlib.training import adversarial
from dfqlib.training.numerics import descend, make_optimizer
from dfqlib.training.task import Task


def statistics(model: nn.Module) -> Tensor:
    return torch.cat([value for name, value in model.state_dict().items() if name.endswith("running_mean")])


def averaged(model: nn.Module | None) -> dict[str, quantizer.AffineQuantizer]:
    """The quantizers whose range is a moving average: those of activations."""
    assert model is not None
    found = dict(quantizer.quantizers(model)).items()
    return {name: q for name, q in found if isinstance(q, quantizer.AffineQuantizer) and not q.follow}


# What holds of each recipe


@pytest.mark.parametrize("recipe", SHORT)
def test_a_seed_repeats_every_bit_and_the_model_passed_in_stays(teacher: nn.Module, recipe: str) -> None:
    before = weights(teacher)
    first, again, other = (short(teacher, recipe, seed=seed) for seed in (3, 3, 4))
    assert same(weights(first.model), weights(again.model))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert same(weights(teacher), before)
    assert first.calibrated is not None
    assert not same(weights(first.model), weights(first.calibrated)) or recipe == "zeroq"  # which sets ranges only


@pytest.mark.parametrize("recipe", ["gdfq", "dfqf"])
def test_fixed_steps_stay_and_learned_ones_move(teacher: nn.Module, recipe: str) -> None:
    for step in ("fixed", "learned"):
        report = short(teacher, recipe, dfqlib.QuantSpec(step=step))  # type: ignore[arg-type]
        assert report.calibrated is not None
        after, before = (dict(quantizer.quantizers(m)) for m in (report.model, report.calibrated))
        moved = [not torch.equal(after[name].step, before[name].step) for name in after]  # type: ignore[arg-type]
        assert any(moved) == (step == "learned")
        assert not torch.equal(report.model.get_parameter("conv1.weight"), teacher.get_parameter("conv1.weight"))


@pytest.mark.parametrize(
    ("recipe", "fixed", "drifting"),
    [("gdfq", {"fixed_bn": True}, {"fixed_bn": False}), ("dfqf", {"student_bn": "eval"}, {"student_bn": "train"})],
)
def test_batchnorm_statistics_stay_unless_training_mode_lets_them_drift(
    teacher: nn.Module, recipe: str, fixed: dict[str, Any], drifting: dict[str, Any]
) -> None:
    assert torch.equal(statistics(short(teacher, recipe, **fixed).model), statistics(teacher))
    assert not torch.allclose(statistics(short(teacher, recipe, **drifting).model), statistics(teacher), atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "changes", "field"),
    [
        (gdfq.Settings, {"label_weight": 0.0, "bn_weight": 0.0}, "bn_weight=0"),
        (gdfq.Settings, {"student_label_weight": 0.0, "kd_weight": 0.0}, "kd_weight=0"),
        (gdfq.Settings, {"label_weight": 0.0}, "student_label_weight=1"),
        (gdfq.Settings, {"stop_at": 99.5}, "stop_at=99.5"),
        (gdfq.Settings, {"stop_at": "often"}, "stop_at='often' must be a share"),
        (gdfq.Settings, {"stop_at": 0.9, "label_weight": 0.0, "student_label_weight": 0.0}, "stop_at=0.9"),
        (gdfq.Settings, {"lr_g": math.inf}, "lr_g=inf must be finite"),
        (gdfq.Settings, {"lr_q": math.nan}, "lr_q=nan must be a number"),
        (gdfq.Settings, {"training": "both"}, 'training=\'both\' must be "alternating" or "two-step"'),
        (gdfq.Settings, {"range_epochs": 0}, "range_epochs=0"),
        (gdfq.Settings, {"batch": 2.5}, "batch=2.5"),
        (dfqf.Settings, {"generator": "adversarial", "adversarial_weight": 0.0}, "adversarial_weight"),
        (dfqf.Settings, {"lower_bound": 1.5}, "lower_bound=1.5"),
        (dfqf.Settings, {"student_bn": "frozen"}, "student_bn='frozen'"),
        (zeroq.Settings, {"clip": "median"}, "clip='median'"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(settings: Any, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        settings(**changes)


def test_a_step_down_a_loss_touches_only_what_the_optimizer_trains() -> None:
    ours, theirs = nn.Linear(2, 2), nn.Linear(2, 2)
    before = weights(theirs)
    descend(torch.optim.SGD(ours.parameters(), 0.1), theirs(ours(torch.ones(1, 2))).sum())
    assert theirs.weight.grad is None
    assert same(weights(theirs), before)


def test_steps_of_sgd_feel_neither_momentum_nor_decay(task: Task) -> None:
    student = quantizer.quantize_layers(task.teacher, dfqlib.QuantSpec()).requires_grad_(True)
    sgd = torch.optim.SGD(quantizer.parameter_groups(student, 0.1, 0.01), 0.1, 0.9, weight_decay=0.1, nesterov=True)
    step = student.get_parameter("conv1.weight_quantizer.step")
    for gradient, expected in ((1.0, 0.99), (0.0, 0.99)):
        step.grad = torch.tensor(gradient)
        sgd.step()
        assert step.item() == pytest.approx(expected)


# ZeroQ


def test_zeroq_matches_statistics_image_by_image_and_trains_no_weight(teacher: nn.Module, task: Task) -> None:
    report = short(teacher, "zeroq", iterations=60, images=16)

    def distance(images: Tensor) -> float:
        with BatchNormProbe(task.teacher) as probe, torch.no_grad():
            task.teacher(images)
            return float(losses.zeroq_loss(probe, images))

    assert distance(report.images) < 0.3 * distance(torch.randn(16, *SHAPE))
    assert report.model is report.calibrated
    assert torch.equal(report.model.get_parameter("conv1.weight"), teacher.get_parameter("conv1.weight"))


# GDFQ


@pytest.mark.parametrize("kind", ["embedding", "categorical"])
def test_gdfq_generator_descends_the_terms_that_are_on(task: Task, kind: Any) -> None:
    for label_weight, bn_weight in ((1.0, 0.1), (1.0, 0.0), (0.0, 0.1)):
        off = {} if label_weight else {"student_label_weight": 0.0}
        settings = gdfq.Settings(
            generator=kind, batch=8, iterations=3, label_weight=label_weight, bn_weight=bn_weight, **off
        )  # type: ignore[arg-type]
        with BatchNormProbe(task.teacher) as probe:
            batch = gdfq.GeneratorTraining(task, settings).draw(probe)
            expected = label_weight * losses.label_loss(batch.teacher, batch.labels)
            expected = expected + bn_weight * losses.bn_l2_loss(probe)
        torch.testing.assert_close(batch.losses["generator"].detach(), expected.detach())


def test_gdfq_released_losses_are_means_where_the_paper_sums(task: Task) -> None:
    student, target, labels = torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)
    label = losses.label_loss(student, labels)
    paper = losses.gdfq_student_loss(student, target, labels)
    released = losses.gdfq_student_loss(student, target, labels, variant="released")
    torch.testing.assert_close(paper - label, 10 * (released - label), atol=1e-4, rtol=1e-4)


def test_gdfq_generator_rests_in_two_step_training_and_beyond_the_threshold(task: Task) -> None:
    for settings, accuracy, learn, moves in (
        (gdfq.Settings(batch=8), 1.0, True, True),
        (gdfq.Settings(batch=8), 1.0, False, False),
        (gdfq.Settings(batch=8, stop_at=0.9), 0.95, True, False),
        (gdfq.Settings(batch=8, stop_at=0.9), 0.85, True, True),
    ):
        training = gdfq.GeneratorTraining(task, settings)
        training.accuracy.best.fill_(accuracy)
        before = training.generator.trunk.linear.weight.clone()
        with BatchNormProbe(task.teacher) as probe:
            training.draw(probe, learn)
        assert torch.equal(training.generator.trunk.linear.weight, before) != moves


def test_gdfq_optimizers_are_the_papers(teacher: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def noted(name: str, groups: Any, lr: float, **sgd: Any) -> torch.optim.Optimizer:
        asked.append({"name": name, "lr": lr, **sgd})
        return make_optimizer(name, groups, lr, **sgd)

    monkeypatch.setattr(gdfq, "make_optimizer", noted)
    short(teacher, "gdfq", budget="published", batch=4, epochs=1, warm_up_epochs=1, iterations=1)
    assert asked == [{"name": "sgd", "lr": 1e-4, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}]
    training = gdfq.GeneratorTraining(task, gdfq.Settings())
    assert (training.adam.defaults["lr"], training.adam.defaults["betas"]) == (1e-3, (0.5, 0.999))
    assert isinstance(training.decay, torch.optim.lr_scheduler.StepLR)
    assert (training.decay.step_size, training.decay.gamma) == (100 * 200, 0.1)


def test_gdfq_two_step_trains_the_generator_to_its_end_first(teacher: nn.Module) -> None:
    rows = short(teacher, "gdfq", training="two-step").history
    assert [(row["phase"], row["step"]) for row in rows if row["step"] % 10] == [("warm-up", 8), ("fine-tuning", 4)]


def test_gdfq_ranges_follow_the_first_epochs_and_then_stay(teacher: nn.Module) -> None:
    for range_epochs, batches in ((2, 4), (3, 6)):
        report = short(teacher, "gdfq", gdfq.paper_spec("w4a4"), range_epochs=range_epochs)
        after, before = averaged(report.model), averaged(report.calibrated)
        assert {int(q.batches) for q in after.values()} == {batches}
        unmoved = [torch.equal(q.high, before[name].high) for name, q in after.items()]
        assert all(unmoved) == (range_epochs <= 2)


def test_gdfq_quantizer_of_the_paper_has_every_layer_at_n_bits(teacher: nn.Module) -> None:
    spec = gdfq.paper_spec("w3a3")
    assert (spec.edge_bits, spec.scheme, spec.granularity, spec.step) == (3, "affine", "channel", "fixed")
    report = short(teacher, "gdfq", spec)
    low = report.model.get_parameter("conv1.weight_quantizer.low")
    dfqlib.agreement(report.model, teacher, report.images)  # the ranges follow the weights at each forward pass
    torch.testing.assert_close(low, report.model.get_parameter("conv1.weight").amin((1, 2, 3)))


# DFQF


def test_dfqf_thresholds_have_their_lower_bound(teacher: nn.Module) -> None:
    for bound in (0.3, 0.9):
        calibrated = short(teacher, "dfqf", "w2a2", lower_bound=bound).calibrated
        assert calibrated is not None
        shares = []
        for name, layer in calibrated.named_modules():
            if hasattr(layer, "weight_quantizer"):
                largest = teacher.get_parameter(f"{name}.weight").detach().abs().max()
                shares.append(float(layer.weight_quantizer.step.detach() * layer.weight_quantizer.qmax / largest))
        assert min(shares) >= bound - 1e-6
    assert min(shares) == pytest.approx(0.9)


def test_dfqf_tool_student_has_forgotten_the_teacher(task: Task) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.arange(100.0))

    before = weights(task.teacher)
    tool = adversarial.reinitialized(task.teacher)
    assert same(weights(task.teacher), before)
    assert dfqlib.agreement(tool, task.teacher, torch.randn(200, *SHAPE)) < 40
    assert all(p.requires_grad for p in tool.parameters())
    assert float(statistics(tool).abs().max()) == 0
    own, shuffled = Scaled(), adversarial.reinitialized(Scaled())
    assert not torch.equal(own.scale, shuffled.get_parameter("scale"))
    assert torch.equal(own.scale, shuffled.get_parameter("scale").sort().values)


@pytest.mark.parametrize("mode", ["fixed", "adversarial"])
def test_dfqf_generator_is_fixed_or_goes_on_as_the_adversary(task: Task, mode: Any) -> None:
    settings = dfqf.Settings(**{**SHORT["dfqf"], "generator": mode})
    generator = base.make_generator(task, settings.latent, settings.lr_g)
    before = weights(generator.network)
    student = quantizer.quantize_layers(task.teacher, dfqlib.QuantSpec()).requires_grad_(True)
    quantizer.calibrate(student, torch.randn(16, *SHAPE))
    dfqf.fine_tune(task, generator, student, settings)
    assert same(weights(generator.network), before) == (mode == "fixed")


# What they are for


@pytest.mark.parametrize("recipe", ["gdfq", "dfqf"])
def test_two_bits_come_back_without_data(teacher: nn.Module, digits: Batches, recipe: str) -> None:
    few = {"warm_up_epochs": 2, "epochs": 4, "batch": 32, "lr_q" if recipe == "gdfq" else "lr": 1e-3}
    report = dfqlib.quantize(teacher, SHAPE, "w2a2", recipe=recipe, progress=False, **few)
    assert report.calibrated is not None
    assert dfqlib.evaluate(report.model, digits) > dfqlib.evaluate(report.calibrated, digits) + 20


def test_a_smaller_student_learns_digits_it_has_never_seen(teacher: nn.Module, digits: Batches) -> None:
    student = ResNet((1, 1, 1), (6, 12, 24), 1, 10, projection_shortcut)
    before = weights(student)
    report = dfqlib.distill(teacher, student, SHAPE, progress=False, distill_epochs=3, batch=32)
    assert dfqlib.evaluate(report.model, digits) > 20
    assert report.calibrated is None
    assert same(weights(student), before)
