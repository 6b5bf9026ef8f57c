"""Copies of networks with some modules replaced: copied and shared modules, and originals that never change."""

import torch
from torch import nn

from bayeslm.models.lm.module_copies import with_forward, with_modules


def test_a_module_in_two_places_is_replaced_in_both():
    linear, other = nn.Linear(2, 2), nn.Linear(2, 2)
    network = nn.Sequential(linear, nn.Sequential(linear), nn.ReLU())
    new = with_modules(network, {linear: other})
    assert new[0] is new[1][0] is other
    assert new[2] is network[2]
    assert network[0] is network[1][0] is linear


def test_empty_and_missing_children_are_kept():
    network = nn.Module()
    network.empty, network.linear = nn.ModuleList(), nn.Linear(2, 2)
    network.register_module("none", None)
    new = with_modules(network, {network.linear: nn.Identity()})
    assert new.empty is network.empty
    assert new.none is None


def test_a_forward_set_on_an_instance_is_not_copied():
    """It would run the original, as that of accelerate does."""
    network = nn.Sequential(nn.Linear(2, 2))
    network.forward = lambda x: NotImplemented
    new = with_modules(network, {network[0]: nn.Identity()})
    assert torch.equal(new(torch.ones(2)), torch.ones(2))
    assert network(torch.ones(2)) is NotImplemented


def test_a_copy_with_another_forward_has_the_hooks_and_weights():
    linear, calls = nn.Linear(2, 2), []
    linear.register_forward_hook(lambda *_: calls.append(1))
    new = with_forward(linear, lambda x: x + 1)
    assert torch.equal(new(torch.ones(2)), 2 * torch.ones(2))
    assert calls == [1]
    assert new.weight is linear.weight
    assert "forward" not in vars(linear)
