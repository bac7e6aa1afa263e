"""Points out of a network: what the first lesson relies on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfqlib.data import toy_boundary
from dfqlib.errors import InputError, NonFiniteError
from dfqlib.lessons import toy


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # made before the fixture that sets it for each test
    return toy.fit(toy.mlp(2), *toy_boundary(1000, 0), steps=300)


def test_a_small_network_separates_the_classes(teacher):
    assert toy.accuracy(teacher, *toy_boundary(2000, 1)) > 95
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_fitted_points_have_the_stored_statistics_and_the_scale_of_the_data(teacher):
    noise = torch.randn(500, 2)
    points, history = toy.points_from_statistics(teacher, noise)
    assert toy.statistics_gap(teacher, points) < toy.statistics_gap(teacher, noise) / 100
    assert len(history) == 300
    assert points.std() == pytest.approx(8 / 12**0.5, rel=0.1)


def test_a_generator_makes_what_is_ordered_at_the_right_scale(teacher):
    generator, history = toy.train_generator(teacher, steps=300)
    points, labels = generator.draw(400)
    assert labels.bincount().tolist() == [200, 200]
    assert toy.accuracy(teacher, points, labels) > 95
    assert set(history) == {"label", "statistics"}
    assert history["statistics"][-1] < history["statistics"][0] / 10
    assert not points.requires_grad


def test_two_bits_lose_more_than_eight_and_leave_the_teacher_alone(teacher):
    points, labels = toy_boundary(1000, 1)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    wide, narrow = (toy.accuracy(toy.quantize(teacher, bits, points), points, labels) for bits in (8, 2))
    assert narrow < wide
    assert wide == pytest.approx(toy.accuracy(teacher, points, labels), abs=1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_fine_tuning_changes_weights_and_not_statistics(teacher):
    points, labels = toy_boundary(1000, 1)
    student = toy.quantize(teacher, 2, points)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    toy.fine_tune(student, teacher, toy.from_pool(points, labels), steps=20)
    changed = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.endswith("weight") for name in changed)
    assert not any("running" in name for name in changed)


def test_the_same_seed_gives_the_same_points(teacher):
    clouds = []
    for _ in range(2):
        torch.manual_seed(3)
        clouds.append(toy.train_generator(teacher, steps=20)[0].draw(10)[0])
    assert torch.equal(*clouds)


def test_energy_distance_is_zero_for_the_same_cloud_and_grows_with_the_shift():
    cloud = torch.randn(300, 2)
    shifted = [toy.energy_distance(cloud, cloud + shift) for shift in (0, 1, 3)]
    assert shifted[0] == pytest.approx(0, abs=1e-5)
    assert shifted == sorted(shifted)


def test_unsure_points_are_those_near_the_boundary():
    network = nn.Linear(2, 2)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
        network.bias.zero_()
    assert toy.unsure_share(network, torch.tensor([[0.0, 0.0], [5.0, 0.0]])) == 50


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: toy.mlp(layers=0), "layers=0"),
        (lambda net: toy.mlp(width=1), "width=1"),
        (lambda net: toy.train_generator(net, beta=-1.0), "beta=-1.0"),
        (lambda net: toy.train_generator(net, beta=0.0, alpha=0.0), "one must be above 0"),
        (lambda net: toy.points_from_statistics(net, torch.zeros(10, 2)), "one spot"),
        (lambda net: toy.fine_tune(net, net, toy.from_pool(*toy_boundary(10)), gamma=-1.0), "gamma=-1.0"),
    ],
)
def test_input_that_cannot_work_is_named(teacher, call, words):
    with pytest.raises(InputError, match=words):
        call(teacher)


def test_a_loss_that_is_not_finite_stops_at_its_step():
    weight = torch.ones(1, requires_grad=True)
    with pytest.raises(NonFiniteError, match="nan at step 0"):
        toy.minimize(lambda step: weight.sum() * float("nan"), [weight], 5, lr=0.1)
