"""The Bellman update against loops, hand-computed values and finite differences."""

import numpy as np
import pytest
import torch as th

from sb3_scratch_dqn.heads import LOSSES, ExpectedHead
from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.td import at_actions, td_losses


def make_batch(size, observation_dim, n_actions, seed, dtype=th.float32):
    generator = th.Generator().manual_seed(seed)

    def normal(*shape):
        return th.randn(*shape, generator=generator, dtype=dtype)

    return Batch(
        observations=normal(size, observation_dim),
        actions=th.randint(n_actions, (size,), generator=generator),
        returns=3 * normal(size),
        discounts=th.rand(size, generator=generator, dtype=dtype) * (normal(size) > 0),
        next_observations=normal(size, observation_dim),
        weights=th.ones(size, dtype=dtype),
    )


def naive_td_losses(batch, q, q_target, loss):
    """https://www.nature.com/articles/nature14236, algorithm 1, with a loop over the samples."""
    losses, errors = [], []
    for i in range(len(batch.actions)):
        best_next = max(q_target[i].tolist())
        target = batch.returns[i].item() + batch.discounts[i].item() * best_next
        error = q[i, batch.actions[i]].item() - target
        if loss == "mse":
            losses.append(error**2)
        else:
            losses.append(0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5)
        errors.append(abs(error))
    return losses, errors


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_priorities_equal_those_of_a_loop(loss):
    batch = make_batch(40, 5, 3, seed=0)
    net, target_net = th.nn.Linear(5, 3), th.nn.Linear(5, 3)
    losses, priorities = td_losses(
        batch, lambda x: net(x).unsqueeze(2), lambda x: target_net(x).unsqueeze(2), ExpectedHead(), LOSSES[loss]
    )
    expected_losses, expected_errors = naive_td_losses(
        batch, net(batch.observations), target_net(batch.next_observations), loss
    )
    assert min(expected_errors) < 1 < max(expected_errors), "both branches of the Huber loss must occur"
    np.testing.assert_allclose(losses.detach(), expected_losses, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(priorities, expected_errors, rtol=1e-4, atol=1e-6)
    assert losses.requires_grad
    assert not priorities.requires_grad


def test_one_transition_by_hand():
    batch = Batch(
        observations=th.zeros(2, 1),
        actions=th.tensor([1, 0]),
        returns=th.tensor([1.0, -2.0]),
        discounts=th.tensor([0.5, 0.0]),  # the second transition ends an episode
        next_observations=th.zeros(2, 1),
        weights=th.ones(2),
    )
    online = th.tensor([[[0.0], [2.25]], [[1.0], [7.0]]])
    target = th.tensor([[[3.0], [-4.0]], [[100.0], [200.0]]])
    # 1 + 0.5 * 3 = 2.5 against 2.25; -2 against 1
    losses, priorities = td_losses(batch, lambda _: online, lambda _: target, ExpectedHead(), LOSSES["mse"])
    assert losses.tolist() == [0.0625, 9.0]
    losses, _ = td_losses(batch, lambda _: online, lambda _: target, ExpectedHead(), LOSSES["huber"])
    assert losses.tolist() == [0.03125, 2.5]
    assert priorities.tolist() == [0.25, 3.0]


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_equal_finite_differences(loss):
    batch = make_batch(10, 4, 3, seed=1, dtype=th.float64)
    target_weights = th.randn(4, 3, dtype=th.float64)

    def loss_of(weights):
        losses, _ = td_losses(
            batch,
            lambda x: (x @ weights).unsqueeze(2),
            lambda x: (x @ target_weights).unsqueeze(2),
            ExpectedHead(),
            LOSSES[loss],
        )
        return losses

    weights = th.randn(4, 3, dtype=th.float64, requires_grad=True)
    assert th.autograd.gradcheck(loss_of, (weights,))


def test_the_target_network_gets_no_gradient():
    batch = make_batch(10, 4, 3, seed=2)
    net, target_net = th.nn.Linear(4, 3), th.nn.Linear(4, 3)
    losses, _ = td_losses(
        batch, lambda x: net(x).unsqueeze(2), lambda x: target_net(x).unsqueeze(2), ExpectedHead(), LOSSES["huber"]
    )
    losses.sum().backward()
    assert net.weight.grad is not None
    assert target_net.weight.grad is None


def test_actions_pick_all_outputs_of_an_action():
    outputs = th.arange(24).view(2, 3, 4)
    assert at_actions(outputs, th.tensor([2, 0])).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
