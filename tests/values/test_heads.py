"""Each head equals loops written from its paper, and the quantile head equals sb3-contrib's QR-DQN."""

import math

import numpy as np
import pytest
import torch as th
from sb3_contrib import QRDQN
from sb3_contrib.common.utils import quantile_huber_loss

from sb3_scratch_dqn import ScratchDQN
from sb3_scratch_dqn.replay.batch import Batch
from sb3_scratch_dqn.values.heads import CategoricalHead, Constant, ImplicitQuantiles, make_head, midpoints
from sb3_scratch_dqn.values.losses import LOSSES
from sb3_scratch_dqn.values.td import make_target, td_losses

RNG = np.random.default_rng(0)


def softmax(logits):
    exponentials = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(exponentials) for x in exponentials]


def naive_projection(probabilities, returned, discount, n_atoms, v_min, v_max):
    """https://arxiv.org/abs/1707.06887, algorithm 1, except that atoms on the grid keep their probability."""
    delta = (v_max - v_min) / (n_atoms - 1)
    target = [0.0] * n_atoms
    for j, p in enumerate(probabilities):
        moved = min(max(returned + discount * (v_min + j * delta), v_min), v_max)
        b = (moved - v_min) / delta
        b = round(b) if abs(b - round(b)) < 1e-9 else b
        low, high = math.floor(b), math.ceil(b)
        if low == high:
            target[low] += p
        else:
            target[low] += p * (high - b)
            target[high] += p * (b - low)
    return target


@pytest.mark.parametrize(("v_min", "v_max"), [(-10, 10), (0, 200), (-3, 0), (-7, -2), (2, 5)])
@pytest.mark.parametrize("n_atoms", [2, 11, 51])
def test_the_projection_of_c51_equals_the_loop(v_min, v_max, n_atoms):
    head = make_head("c51", {"n_atoms": n_atoms, "v_min": v_min, "v_max": v_max})
    delta = (v_max - v_min) / (n_atoms - 1)
    cases = [
        (0.0, 1.0),  # every atom stays on the grid
        (delta, 1.0),  # moved by one atom: the highest leaves the range
        (-2.5 * delta, 1.0),
        ((v_max + v_min) / 2, 0.0),  # the end of an episode: all atoms coincide
        (v_max, 0.0),
        (v_min, 0.0),
        (v_max + 100, 0.99),  # all above
        (v_min - 100, 0.99),  # all below
        *((RNG.normal() * 3, RNG.uniform()) for _ in range(20)),
    ]
    logits = RNG.normal(size=(len(cases), n_atoms)) * 2
    returns, discounts = (th.tensor(column, dtype=th.float64) for column in zip(*cases, strict=True))
    target = head.backup(th.tensor(logits), returns, discounts)
    for i, (returned, discount) in enumerate(cases):
        expected = naive_projection(softmax(logits[i].tolist()), returned, discount, n_atoms, v_min, v_max)
        np.testing.assert_allclose(target[i], expected, atol=1e-9)
    np.testing.assert_allclose(target.sum(dim=1), 1.0)


def test_the_losses_of_c51_equal_the_loop():
    head = make_head("c51", {"n_atoms": 7})
    outputs, target = RNG.normal(size=(9, 7)) * 3, RNG.dirichlet(np.ones(7), size=9)
    target[0] = np.eye(7)[2]  # the other atoms have no probability
    losses, priorities = head.losses(th.tensor(outputs), th.tensor(target), LOSSES["huber"])
    for i in range(9):
        p = softmax(outputs[i].tolist())
        cross_entropy = -sum(t * math.log(q) for t, q in zip(target[i], p, strict=True))
        divergence = sum(t * math.log(t / q) for t, q in zip(target[i], p, strict=True) if t > 0)
        assert losses[i].item() == pytest.approx(cross_entropy)
        assert priorities[i].item() == pytest.approx(divergence)


def test_the_priority_of_c51_is_zero_where_the_prediction_equals_the_target():
    head = make_head("c51", {"n_atoms": 7})
    outputs = th.randn(5, 7, dtype=th.float64, generator=th.Generator().manual_seed(0))
    _, priorities = head.losses(outputs, outputs.softmax(1), LOSSES["huber"])
    np.testing.assert_allclose(priorities, 0, atol=1e-12)


@pytest.mark.parametrize("dtype", [th.float32, th.float64])
def test_action_values_are_means_of_the_distributions(dtype):
    logits = th.tensor([[[0.0, 0.0, math.log(2)], [math.log(3), 0.0, 0.0]]], dtype=dtype)
    c51 = make_head("c51", {"n_atoms": 3, "v_min": -1, "v_max": 5})  # atoms -1, 2, 5
    np.testing.assert_allclose(c51.q_values(logits), [[(-1 + 2 + 2 * 5) / 4, (-3 + 2 + 5) / 5]], rtol=1e-6)
    quantiles = th.tensor([[[1.0, 2.0, 6.0], [0.0, -3.0, 0.0]]], dtype=dtype)
    np.testing.assert_allclose(make_head("quantile", {"n_quantiles": 3}).q_values(quantiles), [[3.0, -1.0]])
    iqn = th.cat([quantiles, th.full_like(quantiles, 0.5)], dim=2)
    np.testing.assert_allclose(make_head("iqn").q_values(iqn), [[3.0, -1.0]])


def naive_quantile_loss(predicted, fractions, target, loss):
    """https://arxiv.org/abs/1710.10044, equation 10, and https://arxiv.org/abs/1806.06923, equation 3."""
    total = 0.0
    for theta, tau in zip(predicted, fractions, strict=True):
        for y in target:
            u = y - theta
            size = abs(u)
            error = u * u if loss == "mse" else 0.5 * u * u if size <= 1 else size - 0.5
            total += abs(tau - (u < 0)) * error / len(target)
    return total


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_quantiles_equals_the_loop(loss):
    head = make_head("quantile", {"n_quantiles": 5})
    outputs, next_outputs = RNG.normal(size=(2, 8, 5)) * 2
    returns, discounts = RNG.normal(size=8), RNG.uniform(size=8) * (RNG.uniform(size=8) < 0.7)
    target = head.backup(*map(th.tensor, (next_outputs, returns, discounts)))
    losses, priorities = head.losses(th.tensor(outputs), target, LOSSES[loss])
    for i in range(8):
        expected_target = [returns[i] + discounts[i] * z for z in next_outputs[i]]
        expected = naive_quantile_loss(outputs[i], [0.1, 0.3, 0.5, 0.7, 0.9], expected_target, loss)
        assert losses[i].item() == pytest.approx(expected)
    assert priorities.tolist() == losses.tolist()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_of_implicit_quantiles_equals_the_loop(loss):
    head = make_head("iqn")
    quantiles, fractions = RNG.normal(size=(8, 4)) * 2, RNG.uniform(size=(8, 4))
    next_quantiles, next_fractions = RNG.normal(size=(8, 6)) * 2, RNG.uniform(size=(8, 6))
    returns, discounts = RNG.normal(size=8), RNG.uniform(size=8)
    target = head.backup(
        th.tensor(np.concatenate([next_quantiles, next_fractions], axis=1)), th.tensor(returns), th.tensor(discounts)
    )
    losses, _ = head.losses(th.tensor(np.concatenate([quantiles, fractions], axis=1)), target, LOSSES[loss])
    for i in range(8):
        expected_target = [returns[i] + discounts[i] * z for z in next_quantiles[i]]
        assert losses[i].item() == pytest.approx(naive_quantile_loss(quantiles[i], fractions[i], expected_target, loss))


def test_fractions_are_the_midpoints_of_the_paper():
    assert midpoints(4, th.empty(0)).tolist() == [0.125, 0.375, 0.625, 0.875]


def test_constants_are_created_once_per_dtype_and_device():
    calls = []

    def make(like):
        calls.append(like.dtype)
        return midpoints(3, like)

    constant = Constant(make)
    kept = constant.like(th.zeros(2))
    assert constant.like(th.ones(5, 5)) is kept
    assert constant.like(th.zeros(1, dtype=th.float64)).dtype == th.float64
    assert constant.like(th.zeros(1)) is kept
    assert calls == [th.float32, th.float64]


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_implicit_quantiles_survive_packing(shape):
    quantiles, fractions = th.randn(shape), th.rand(shape)
    packed = ImplicitQuantiles(quantiles, fractions).pack()
    assert packed.shape == (*shape[:-1], 6)
    assert th.equal(packed[..., :3], quantiles)
    assert th.equal(packed[..., 3:], fractions)
    unpacked = ImplicitQuantiles.unpack(packed)
    assert th.equal(unpacked.quantiles, quantiles)
    assert th.equal(unpacked.fractions, fractions)


def test_the_quantile_head_equals_qrdqn():
    """The same weights and batch give the same loss and gradients."""
    n_quantiles, n_actions, size = 25, 2, 64
    kwargs = {"net_arch": [32, 16]}
    theirs = QRDQN("MlpPolicy", "CartPole-v1", policy_kwargs={**kwargs, "n_quantiles": n_quantiles}, seed=0)
    ours = ScratchDQN(
        "MlpPolicy",
        "CartPole-v1",
        policy_kwargs={**kwargs, "head": "quantile", "head_kwargs": {"n_quantiles": n_quantiles}},
        seed=1,
    )
    # Their outputs are (quantiles, actions), ours (actions, quantiles)
    order = th.arange(n_quantiles * n_actions).view(n_quantiles, n_actions).T.flatten()
    for source, network in (
        (theirs.quantile_net, ours.q_net),
        (theirs.quantile_net_target, ours.q_net_target),
    ):
        state = {name.replace("quantile_net", "q_net"): value.clone() for name, value in source.state_dict().items()}
        for name in ("q_net.4.weight", "q_net.4.bias"):
            state[name] = state[name][order]
        network.load_state_dict(state)
    # Move the online network away from the target network
    generator = th.Generator().manual_seed(0)
    with th.no_grad():
        for their_parameter, our_parameter in zip(
            theirs.quantile_net.parameters(), ours.q_net.parameters(), strict=True
        ):
            change = 0.1 * th.randn(their_parameter.shape, generator=generator)
            their_parameter += change
            our_parameter += change[order] if len(change) == len(order) else change

    def normal(*shape):
        return th.randn(*shape, generator=generator)

    observations, next_observations = normal(size, 4), normal(size, 4)
    actions = th.randint(n_actions, (size, 1), generator=generator)
    rewards, dones = 3 * normal(size, 1), (normal(size, 1) > 1).float()

    # As QRDQN.train() computes it
    with th.no_grad():
        next_quantiles = theirs.quantile_net_target(next_observations)
        best = next_quantiles.mean(dim=1, keepdim=True).argmax(dim=2, keepdim=True).expand(size, n_quantiles, 1)
        target = rewards + (1 - dones) * theirs.gamma * next_quantiles.gather(2, best).squeeze(2)
    current = theirs.quantile_net(observations)
    current = current.gather(2, actions[..., None].expand(size, n_quantiles, 1)).squeeze(2)
    expected = quantile_huber_loss(current, target, sum_over_quantiles=True)
    expected.backward()

    batch = Batch(
        observations,
        actions.squeeze(1),
        rewards.squeeze(1),
        ((1 - dones) * ours.gamma).squeeze(1),
        next_observations,
        th.ones(size),
    )
    head, objective = ours.policy.head, ours._objective()
    target_fn = make_target(objective, ours.q_net, ours.q_net_target, head)
    loss = td_losses(batch, ours.q_net.outputs, target_fn, head, objective.loss).losses.mean()
    loss.backward()

    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for their_parameter, our_parameter in zip(theirs.quantile_net.parameters(), ours.q_net.parameters(), strict=True):
        gradient = their_parameter.grad[order] if len(their_parameter) == len(order) else their_parameter.grad
        assert gradient.abs().max() > 1e-3
        np.testing.assert_allclose(our_parameter.grad, gradient, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("c52", {}, "head='c52' is unknown: choose one of 'expected', 'c51', 'quantile', 'iqn'"),
        ("c51", {"atoms": 3}, "has the unknown name 'atoms'"),
        ("c51", {"n_atoms": 1}, "n_atoms=1 must be a whole number of at least 2"),
        ("c51", {"v_min": 1, "v_max": 1}, "v_min=1 must be below v_max=1"),
        ("c51", {"v_min": -1e39, "v_max": 1e39}, "v_min=-1e[+]39 and v_max=1e[+]39 must be between"),
        ("c51", {"v_min": math.nan}, "v_min=nan must be a finite number"),
        ("quantile", {"n_quantiles": 0}, "n_quantiles=0 must be"),
        ("iqn", {"n_tau": 0}, "n_tau=0 must be"),
        ("iqn", {"n_cos": 1.5}, "n_cos=1.5 must be"),
        ("expected", {"n_atoms": 3}, "has the unknown name 'n_atoms'"),
        ("iqn", 3, "head_kwargs=3 must be a dict"),
    ],
)
def test_wrong_heads_and_arguments_raise(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ScratchDQN("MlpPolicy", "CartPole-v1", policy_kwargs={"head": name, "head_kwargs": kwargs})


def test_atoms_follow_a_support_that_was_changed_before_their_first_use():
    head = CategoricalHead(3, -1.0, 1.0)
    head.v_max = 3.0
    assert head.q_values(th.tensor([[[-1e9, -1e9, 0.0]]])).item() == 3.0
