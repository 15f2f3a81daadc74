"""Targets and the Bellman update equal loops, values computed by hand and finite differences."""

import math
from itertools import product

import numpy as np
import pytest
import torch as th

from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.values.heads import HEADS, ExpectedHead, make_head
from sb3_scratch_dqn.values.losses import LOSSES
from sb3_scratch_dqn.values.td import MunchausenSettings, Objective, at_actions, make_target, td_losses

N_ACTIONS = 3


class LinearNetwork:
    """A matrix product, the simplest online or target network."""

    def __init__(self, weights, head):
        self.weights, self.head = weights, head

    def outputs(self, obs):
        return (obs @ self.weights).view(len(obs), N_ACTIONS, -1)

    target_outputs = outputs

    def q_values_from(self, obs, target_outputs):
        return self.head.q_values(target_outputs)

    def __call__(self, obs):
        return self.head.q_values(self.outputs(obs))

    eval_q_values = __call__


def make_batch(size, observation_dim, seed, dtype=th.float32, masks=False):
    generator = th.Generator().manual_seed(seed)

    def normal(*shape):
        return th.randn(*shape, generator=generator, dtype=dtype)

    def random_masks():
        allowed = normal(size, N_ACTIONS) > 0
        allowed[range(size), th.randint(N_ACTIONS, (size,), generator=generator)] = True
        return allowed

    action_masks, next_action_masks = (random_masks(), random_masks()) if masks else (None, None)
    actions = th.randint(N_ACTIONS, (size,), generator=generator)
    if masks:
        action_masks[range(size), actions] = True
    return Batch(
        observations=normal(size, observation_dim),
        actions=actions,
        returns=3 * normal(size),
        discounts=th.rand(size, generator=generator, dtype=dtype) * (normal(size) > 0),
        next_observations=normal(size, observation_dim),
        weights=th.ones(size, dtype=dtype),
        action_masks=action_masks,
        next_action_masks=next_action_masks,
    )


def networks(head, seed=0, observation_dim=5, dtype=th.float64):
    generator = th.Generator().manual_seed(seed)
    n_outputs = N_ACTIONS * (8 if isinstance(head, HEADS["iqn"]) else head.n_outputs)
    return [
        LinearNetwork(th.randn(observation_dim, n_outputs, generator=generator, dtype=dtype), head) for _ in range(2)
    ]


def allowed_actions(masks, sample):
    return [a for a in range(N_ACTIONS) if masks is None or masks[sample, a]]


def naive_target(batch, i, online, target, double_q, munchausen):
    """Compute the target of one transition for scalar action values by loops, from the papers."""
    q_target = target(batch.next_observations)[i].tolist()
    q_choice = (online if double_q else target)(batch.next_observations)[i].tolist()
    allowed = allowed_actions(batch.next_action_masks, i)
    discount, returned = batch.discounts[i].item(), batch.returns[i].item()
    if munchausen is None:
        best = max(allowed, key=lambda a: q_choice[a])
        return returned + discount * q_target[best]
    tau, alpha, clip = munchausen

    def log_policy(q, actions):
        total = sum(math.exp((q[a] - max(q)) / tau) for a in actions)
        return {a: (q[a] - max(q)) / tau - math.log(total) for a in actions}

    log_pi_next = log_policy(q_choice, allowed)
    soft_value = sum(math.exp(lp) * (q_target[a] - tau * lp) for a, lp in log_pi_next.items())
    q_here = (online if double_q else target)(batch.observations)[i].tolist()
    log_pi = log_policy(q_here, allowed_actions(batch.action_masks, i))[batch.actions[i].item()]
    bonus = alpha * min(max(tau * log_pi, clip), 0)
    return returned + bonus + discount * soft_value


MUNCHAUSEN = MunchausenSettings(tau=0.5, alpha=0.8, clip=-1.5)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("munchausen", [None, MUNCHAUSEN])
@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_priorities_equal_a_loop(loss, double_q, munchausen, masks):
    head = ExpectedHead()
    batch = make_batch(40, 5, seed=0, dtype=th.float64, masks=masks)
    online, target = networks(head)
    make = make_target(Objective(LOSSES[loss], double_q, munchausen), online, target, head)
    actual = td_losses(batch, online.outputs, make, head, LOSSES[loss])
    errors = [
        online(batch.observations)[i, batch.actions[i]].item()
        - naive_target(batch, i, online, target, double_q, munchausen)
        for i in range(40)
    ]
    absolute = np.abs(errors)
    assert absolute.min() < 1 < absolute.max(), "both branches of the Huber loss occur"
    expected = absolute**2 if loss == "mse" else np.where(absolute < 1, 0.5 * absolute**2, absolute - 0.5)
    np.testing.assert_allclose(actual.losses, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(actual.priorities, absolute, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("double_q", [False, True])
def test_munchausen_averages_and_shifts_every_quantile(double_q):
    head = make_head("quantile", {"n_quantiles": 4})
    batch = make_batch(10, 5, seed=0, dtype=th.float64)
    online, target = networks(head)
    actual = make_target(Objective(LOSSES["huber"], double_q, MUNCHAUSEN), online, target, head)(batch)
    tau, alpha, clip = MUNCHAUSEN
    chooser = online if double_q else target
    for i in range(10):
        log_pi_next = (chooser(batch.next_observations)[i] / tau).log_softmax(0)
        log_pi = (chooser(batch.observations)[i] / tau).log_softmax(0)[batch.actions[i]]
        bonus = alpha * min(max(tau * log_pi.item(), clip), 0)
        for k in range(4):
            soft = sum(
                math.exp(log_pi_next[a])
                * (target.outputs(batch.next_observations)[i, a, k].item() - tau * log_pi_next[a].item())
                for a in range(N_ACTIONS)
            )
            expected = batch.returns[i].item() + bonus + batch.discounts[i].item() * soft
            assert actual[i, k].item() == pytest.approx(expected)


def test_the_bonus_of_munchausen_is_clipped_in_some_samples_and_not_in_others():
    # Otherwise the comparison above would not detect a wrong clip
    _, target = networks(ExpectedHead())
    batch = make_batch(40, 5, seed=0, dtype=th.float64)
    log_policy = (target(batch.observations) / MUNCHAUSEN.tau).log_softmax(1)
    bonus = MUNCHAUSEN.tau * at_actions(log_policy.unsqueeze(2), batch.actions)
    assert (bonus < MUNCHAUSEN.clip).any()
    assert (bonus > MUNCHAUSEN.clip).any()


def test_one_transition_by_hand():
    batch = Batch(
        observations=th.zeros(2, 1),
        actions=th.tensor([1, 0]),
        returns=th.tensor([1.0, -2.0]),
        discounts=th.tensor([0.5, 0.0]),  # the second transition ends an episode
        next_observations=th.ones(2, 1),
        weights=th.ones(2),
    )

    class Fixed(LinearNetwork):
        def __init__(self, here, there):
            self.here, self.there, self.head = th.tensor(here), th.tensor(there), ExpectedHead()

        def outputs(self, obs):
            return (self.there if obs.any() else self.here).unsqueeze(2)

        target_outputs = outputs

    online = Fixed(here=[[0.0, 2.25], [1.0, 7.0]], there=[[-1.0, 8.0], [0.0, 0.0]])
    target = Fixed(here=[[0.0, 0.0], [0.0, 0.0]], there=[[3.0, -4.0], [100.0, 200.0]])

    def losses(double_q, loss):
        make = make_target(Objective(LOSSES[loss], double_q), online, target, ExpectedHead())
        return td_losses(batch, online.outputs, make, ExpectedHead(), LOSSES[loss])

    # 1 + 0.5 * 3 = 2.5 against 2.25; -2 against 1
    assert losses(False, "mse").losses.tolist() == [0.0625, 9.0]
    assert losses(False, "huber").losses.tolist() == [0.03125, 2.5]
    assert losses(False, "mse").priorities.tolist() == [0.25, 3.0]
    # The online network prefers action 1, whose value in the target network is -4: 1 + 0.5 * -4 = -1
    assert losses(True, "mse").losses.tolist() == [3.25**2, 9.0]


# C51 uses cross-entropy, and its outputs are not returns, which Munchausen needs
SUPPORTED = [
    (name, loss, munchausen)
    for name, loss, munchausen in product(HEADS, LOSSES, [None, MUNCHAUSEN])
    if name != "c51" or (loss == "huber" and munchausen is None)
]


@pytest.mark.parametrize("double_q", [False, True])
@pytest.mark.parametrize(("name", "loss", "munchausen"), SUPPORTED)
def test_gradients_equal_finite_differences(name, loss, double_q, munchausen):
    head = make_head(name, {"n_quantiles": 5} if name == "quantile" else {"n_atoms": 6} if name == "c51" else None)
    batch = make_batch(6, 4, seed=1, dtype=th.float64)
    online, target = networks(head, observation_dim=4)
    make = make_target(Objective(LOSSES[loss], double_q, munchausen), online, target, head)
    fixed_target = make(batch)
    fractions = th.rand(6, N_ACTIONS, 4, dtype=th.float64, generator=th.Generator().manual_seed(2))

    def losses(weights):
        def outputs(obs):
            found = LinearNetwork(weights, head).outputs(obs)
            return th.cat([found[..., :4], fractions], dim=2) if name == "iqn" else found

        return td_losses(batch, outputs, lambda _: fixed_target, head, LOSSES[loss]).losses

    assert th.autograd.gradcheck(losses, (online.weights.clone().requires_grad_(),))


@pytest.mark.parametrize("munchausen", [None, MUNCHAUSEN])
@pytest.mark.parametrize("double_q", [False, True])
def test_targets_and_priorities_get_no_gradient(double_q, munchausen):
    head = ExpectedHead()
    batch = make_batch(10, 5, seed=2, dtype=th.float64)
    online, target = networks(head)
    online.weights.requires_grad_()
    target.weights.requires_grad_()
    make = make_target(Objective(LOSSES["huber"], double_q, munchausen), online, target, head)
    actual = td_losses(batch, online.outputs, make, head, LOSSES["huber"])
    assert actual.losses.requires_grad
    assert not actual.target.requires_grad
    assert not actual.priorities.requires_grad
    actual.losses.sum().backward()
    assert target.weights.grad is None


def test_all_outputs_of_an_action_are_selected():
    outputs = th.arange(24).view(2, 3, 4)
    assert at_actions(outputs, th.tensor([2, 0])).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
