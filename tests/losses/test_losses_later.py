"""Terms of later papers: each against a case worked by hand, its gradient, and what it is for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dfqlib import losses
from dfqlib.errors import InputError

HALF = torch.tensor([[0.0, 0.0]])
"""Logits of two classes, as likely as each other."""
ODDS = torch.tensor([[math.log(3.0), 0.0]])
"""Three to one: probabilities 3/4 and 1/4."""


def gradcheck(loss, *shape: int, tensors: int = 1) -> bool:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return torch.autograd.gradcheck(
        loss, [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for _ in range(tensors)]
    )


def test_difficulty_is_what_the_label_lacks() -> None:
    both = torch.cat([ODDS, ODDS])
    torch.testing.assert_close(losses.difficulty(both, torch.tensor([0, 1])), torch.tensor([0.25, 0.75]))


def test_difficulty_of_a_mixture_is_zero_where_it_is_shown_exactly() -> None:
    mixture = torch.tensor([[0.75, 0.25]])
    torch.testing.assert_close(losses.difficulty(ODDS, mixture), torch.zeros(1))
    torch.testing.assert_close(losses.difficulty(HALF, mixture), torch.tensor([0.25]))
    one_hot = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(losses.difficulty(ODDS, one_hot), losses.difficulty(ODDS, torch.tensor([1])))


def test_hard_samples_by_hand() -> None:
    both, labels = torch.cat([HALF, ODDS]), torch.tensor([0, 0])
    expected = (0.5**2 * math.log(2) + 0.25**2 * math.log(4 / 3)) / 2
    torch.testing.assert_close(losses.hard_sample_loss(both, labels), torch.tensor(expected))


def test_hard_samples_without_gamma_are_the_plain_cross_entropy() -> None:
    logits, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    torch.testing.assert_close(losses.hard_sample_loss(logits, labels, 0.0), F.cross_entropy(logits, labels))


def test_hard_samples_pull_less_at_what_is_easy() -> None:
    """Relative to the cross-entropy's gradient, which is 1 - p: the easier an image, the sooner it is left alone."""
    ratios = []
    for certainty in (0.0, 2.0, 4.0):
        logits = torch.tensor([[certainty, 0.0]], requires_grad=True)
        (pull,) = torch.autograd.grad(losses.hard_sample_loss(logits, torch.tensor([0])), logits)
        (plain,) = torch.autograd.grad(losses.label_loss(logits, torch.tensor([0])), logits)
        ratios.append(float(pull[0, 0] / plain[0, 0]))
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < ratios[0] / 50
    assert gradcheck(lambda logits: losses.hard_sample_loss(logits, torch.tensor([0, 2])), 2, 3)


def test_adaptability_by_hand() -> None:
    """t - s has odds three to one and t + s none; the entropy of (3/4, 1/4) is 0.811 of one bit, 0.011 too high."""
    teacher, student = ODDS / 2, -ODDS / 2
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    expected = 0.2 * math.log(4 / 3) + 0.1 * math.log(2) + (entropy - 0.8)
    torch.testing.assert_close(losses.adaptability_loss(teacher, student, torch.tensor([0])), torch.tensor(expected))


def test_adaptability_wants_neither_agreement_nor_contradiction() -> None:
    def hinge(gap: float) -> float:
        t, s = torch.tensor([[gap, 0.0]]), torch.zeros(1, 2)
        return float(losses.adaptability_loss(t, s, torch.tensor([0]), 0.0, 0.0))

    assert hinge(0.0) == pytest.approx(0.2)  # full agreement: entropy 1, and 0.8 is free
    assert hinge(2.0) == 0.0
    assert hinge(20.0) == pytest.approx(0.1, abs=1e-5)  # utter disagreement: entropy 0, and 0.1 is free
    assert gradcheck(lambda t, s: losses.adaptability_loss(t, s, torch.tensor([0, 2])), 2, 3, tensors=2)


def test_attention_is_of_directions_in_channels() -> None:
    """Mean squares (1, 0) against (9, 16)/25 of another size: lengths 1, (1, 0) and (9, 16)/sqrt(337)."""
    student = torch.tensor([[1.0, 0.0]]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    teacher = torch.tensor([[3.0, -4.0]]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    length = math.sqrt(9**2 + 16**2)
    expected = ((1 - 9 / length) ** 2 + (16 / length) ** 2) / 2
    torch.testing.assert_close(losses.attention_loss([student], [teacher]), torch.tensor(expected))
    corner = torch.zeros(1, 2, 4, 4)
    corner[0, 0, :2, :2] = 2.0  # a quarter of the pixels: the mean square is 1 too
    torch.testing.assert_close(losses.attention_loss([corner], [teacher]), torch.tensor(expected))
    assert float(losses.attention_loss([5 * teacher, student], [teacher, -student])) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(losses.attention_loss([student] * 3, [teacher] * 3), torch.tensor(3 * expected))
    vectors = [x[:, :, 0, 0] for x in (student, teacher)]  # of a fully connected layer
    torch.testing.assert_close(losses.attention_loss([vectors[0]], [vectors[1]]), torch.tensor(expected))


def test_attention_has_a_gradient_that_leads_to_the_teachers() -> None:
    teacher, student = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2).requires_grad_()
    before = losses.attention_loss([student], [teacher])
    (gradient,) = torch.autograd.grad(before, student)
    assert losses.attention_loss([student - 0.1 * gradient], [teacher]) < before
    (slope,) = torch.autograd.grad(losses.attention_loss([student], [teacher]), student)
    step = 1e-3 * torch.randn(4, 3, 2, 2)
    change = losses.attention_loss([student + step], [teacher]) - losses.attention_loss([student - step], [teacher])
    torch.testing.assert_close(change, 2 * (slope * step).sum(), rtol=1e-2, atol=1e-6)


def test_labels_are_trusted_where_the_teacher_sees_them() -> None:
    teacher, labels = torch.cat([ODDS, ODDS]), torch.tensor([0, 1])
    rows = losses.trusted_labels(teacher, labels, 0.5)
    assert rows.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    student = torch.randn(2, 2, requires_grad=True)
    loss = losses.label_loss(student, rows)
    torch.testing.assert_close(loss, F.cross_entropy(student[:1], labels[:1]) / 2)
    (gradient,) = torch.autograd.grad(loss, student)
    assert gradient[1].tolist() == [0.0, 0.0]
    assert float(gradient[0].abs().min()) > 0
    assert losses.trusted_labels(teacher, labels, 0.0).sum() == 0
    assert losses.trusted_labels(teacher, labels, 0.8).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: losses.hard_sample_loss(t, torch.tensor([0]), -1.0), "gamma=-1.0 must be 0 or more"),
        (lambda t: losses.adaptability_loss(t, t[:, :1], torch.tensor([0])), r"student has shape \(1, 1\)"),
        (lambda t: losses.adaptability_loss(t, t, torch.tensor([0]), low=0.9), "low=0.9 and high=0.8"),
        (lambda t: losses.attention_loss([], []), "0 student and 0 teacher"),
        (lambda t: losses.attention_loss([t], [t, t]), "1 student and 2 teacher"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        call(HALF)


def test_a_label_and_its_row_of_probabilities_are_the_same() -> None:
    """To every term that takes both."""
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    rows = F.one_hot(labels, 5).float()

    def terms(y: Tensor) -> list[Tensor]:
        student = logits.roll(1, 0)
        return [
            losses.difficulty(logits, y),
            losses.hard_sample_loss(logits, y),
            losses.adaptability_loss(logits, student, y),
            losses.trusted_labels(logits, y, 0.7),
        ]

    for ours, theirs in zip(terms(labels), terms(rows), strict=True):
        torch.testing.assert_close(ours, theirs)
