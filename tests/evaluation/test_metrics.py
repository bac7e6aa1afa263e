"""Accuracy, agreement, paired differences and signal to noise against cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dfqlib.errors import InputError
from dfqlib.evaluation.metrics import agreement, compare, correct, evaluate, predict_classes, sqnr
from dfqlib.models import load_model
from dfqlib.network.inference import predict
from dfqlib.quantizer import QuantSpec, calibrate, quantize_layers, quantizers

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


class Answers(nn.Module):
    """Chooses the class that each image carries in its pixel of this index."""

    def __init__(self, pixel: int, classes: int = 3) -> None:
        super().__init__()
        self.pixel, self.classes = pixel, classes

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(x[:, 0, 0, self.pixel].long(), self.classes).float()


def batches(*answers: list[int], size: int = 4) -> DataLoader:  # type: ignore[type-arg]
    """Images (N, 1, 1, len(answers)) whose pixels are what the models ``Answers(0)``, ``Answers(1)`` say."""
    images = torch.tensor(answers, dtype=torch.float32).T[:, None, None]
    return DataLoader(TensorDataset(images, LABELS[: len(images)]), size)


# Right are 8 of 10 (teacher) and 7 of 10 (model). Both are right on 6; they agree on those and on the last image.
TEACHER = [0, 1, 2, 0, 1, 2, 0, 1, 0, 1]
MODEL = [0, 1, 2, 0, 1, 2, 1, 2, 2, 1]


def test_accuracy_is_the_share_of_right_answers_whatever_the_batches() -> None:
    for size in (1, 4, 10, 64):
        loader = batches(TEACHER, MODEL, size=size)
        assert (evaluate(Answers(0), loader), evaluate(Answers(1), loader)) == (80.0, 70.0)
    assert correct(Answers(1), batches(TEACHER, MODEL)).tolist() == [True] * 6 + [False, False, True, False]
    chosen, labels = predict_classes(Answers(1), batches(TEACHER, MODEL))
    assert (chosen.tolist(), labels.tolist()) == (MODEL, LABELS.tolist())


def test_paired_comparison_against_a_case_by_hand() -> None:
    found = compare(Answers(1), Answers(0), batches(TEACHER, MODEL))
    # Changes: -1 twice, +1 once, 0 seven times. Mean -0.1, mean square 0.3, so the variance is 0.3 - 0.01.
    assert found.difference == pytest.approx(-10.0)
    assert found.standard_error == pytest.approx(100 * math.sqrt(0.29 / 10))
    assert (found.top1, found.teacher_top1, found.images) == (70.0, 80.0, 10)
    assert found.agreement == 70.0
    assert str(found) == "70.00 % against the teacher's 80.00 %: -10.00 ± 17.03 points on 10 images"


def test_only_images_on_which_they_differ_make_the_difference_uncertain() -> None:
    same = compare(Answers(0), Answers(0), batches(TEACHER, MODEL))
    assert (same.difference, same.standard_error, same.agreement) == (0.0, 0.0, 100.0)


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    images = torch.cat([x for x, _ in batches(TEACHER, MODEL)])
    assert agreement(Answers(1), Answers(0), images) == 70.0
    assert agreement(Answers(0), Answers(0), images) == 100.0
    with pytest.raises(InputError, match="needs at least one image"):
        agreement(Answers(0), Answers(0), images[:0])


def test_prediction_does_not_depend_on_the_batch() -> None:
    model, images = load_model("digits_resnet8"), torch.randn(10, 1, 16, 16)
    logits = predict(model, images)
    assert logits.shape == (10, 10)
    torch.testing.assert_close(predict(model, images, batch=3), logits)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_leaves_modes_and_statistics_as_they_were(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten()).train(training)
    model[1].eval()  # a frozen layer in a training network stays frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(10, 1, 1, 1)
    loader = DataLoader(TensorDataset(images, LABELS), 5)
    assert evaluate(model, loader) == evaluate(model, loader)  # no dropout either
    sqnr(model, model, images)
    assert [module.training for module in model] == [training, False, training, training]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(InputError):
        predict(model, torch.randn(2, 5, 1, 1))
    assert model.training == training


def test_signal_to_noise_grows_by_six_decibels_with_each_bit_of_the_weights() -> None:
    model = load_model("digits_resnet8")
    images = torch.randn(32, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    ratios = []
    for bits in (6, 10):
        network = quantize_layers(model, QuantSpec(bits, 16, bits))
        calibrate(network, images, "max")  # the same range at both widths
        for name, quantizer in quantizers(network):  # tensors stay exact: the input's 8 bits would hide the rest
            quantizer.mode = "quantize" if "weight" in name else "float"
        ratios.append(sqnr(network, model, images))
    assert ratios[0].keys() == {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    gains = [(ratios[1][name] - low) / 4 for name, low in ratios[0].items()]
    assert min(gains) > 5
    assert max(gains) < 7
    assert sum(gains) / len(gains) == pytest.approx(6.02, abs=0.5)


def test_equal_layers_have_no_noise_and_a_lost_signal_has_none_left() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    images = torch.randn(8, 1, 2, 2)
    assert sqnr(model, model, images)["1"] > 200
    silent = nn.Sequential(nn.Flatten(), nn.Linear(4, 3, bias=False))
    nn.init.zeros_(silent[1].weight)
    assert sqnr(silent, model, images)["1"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize("count", [1, 64, 65, 300])
def test_signal_to_noise_of_many_images_is_that_of_all_at_once_and_holds_few(count: int) -> None:
    images = torch.randn(count, 1, 2, 2) + 30
    model, teacher = (nn.Sequential(nn.Flatten(), nn.Linear(4, 3)) for _ in range(2))
    held: list[int] = []
    model.register_forward_pre_hook(lambda _, given: held.append(len(given[0])))
    found = sqnr(model, teacher, images)["1"]
    assert (sum(held), max(held) <= 64, max(held) - min(held) <= 1) == (count, True, True)
    noisy, exact = (each(images).detach().double() for each in (model, teacher))
    ratio = exact.square().sum() / (noisy - exact).square().sum()
    assert found == pytest.approx(float(10 * ratio.log10()), rel=1e-6)


def test_what_cannot_be_evaluated_is_named_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"label 2 is beyond the model's 2 classes; check the folder names"):
        evaluate(Answers(0, classes=2), batches([0] * 10))
    for empty in ([], [(torch.zeros(0, 1, 1, 1), torch.zeros(0).long())]):
        with pytest.raises(InputError, match="loader has no images; check the folder"):
            evaluate(Answers(0), empty)
    model = load_model("digits_resnet8")
    with pytest.raises(InputError, match=r"cannot take images of shape \(3, 16, 16\) .*; check image_shape"):
        predict(model, torch.randn(2, 3, 16, 16))
    with pytest.raises(InputError, match=r"returns \(2, 1, 4, 4\), not logits of shape \(batch, classes\)"):
        predict(nn.Conv2d(1, 1, 1), torch.randn(2, 1, 4, 4))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_models_that_are_no_classifiers_of_images_are_named() -> None:
    with pytest.raises(InputError, match="returns tuple, not logits"):
        predict(Pair(), torch.randn(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"cannot take images .*missing 1 required positional argument"):
        predict(TwoInputs(), torch.randn(2, 1, 4, 4))
