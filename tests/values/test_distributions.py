"""Distributional heads learn the mean and standard deviation of returns that are computed by hand."""

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3.common.utils import LinearSchedule

from sb3_scratch_dqn import ScratchDQN

GAMMA = 0.5


class TwoStates(gym.Env):
    """Two successive states: the first has no reward, the second ends the episode with a reward of 0 or 20.

    Both rewards are equally likely. Action 1 in the second state always has the reward 5.
    """

    observation_space = gym.spaces.Box(0, 1, (2,), np.float32)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return np.eye(2, dtype=np.float32)[0], {}

    def step(self, action):
        if self.state == 0:
            self.state = 1
            return np.eye(2, dtype=np.float32)[1], 0.0, False, False, {}
        reward = 5.0 if action == 1 else 20.0 * self.np_random.integers(2)
        return np.zeros(2, np.float32), float(reward), True, False, {}


# States by actions. The best action in the second state is 0: its mean is 10, and so is its standard deviation
MEANS = np.array([[5.0, 5.0], [10.0, 5.0]])
DEVIATIONS = np.array([[5.0, 5.0], [10.0, 0.0]])

HEADS = {
    "c51": {"n_atoms": 21, "v_min": -25, "v_max": 25},  # the returns are atoms, so the projection is exact
    "quantile": {"n_quantiles": 20},
    "iqn": {"n_tau": 16, "n_tau_prime": 16, "n_tau_act": 32, "n_cos": 16},
}


def distributions(model):
    """Means and standard deviations of the predicted returns, each (states, actions)."""
    with th.no_grad():
        observations = th.eye(2)
        if hasattr(model.q_net, "outputs_at"):
            fractions = (th.arange(100).expand(2, 100) + 0.5) / 100
            outputs = model.q_net.outputs_at(observations, fractions)
        else:
            outputs = model.q_net.outputs(observations)
        head, returns, discounts = model.policy.head, th.zeros(2), th.ones(2)
        targets = [head.backup(outputs[:, action], returns, discounts) for action in range(2)]
        moments = [head.moments(outputs[:, action], targets[action]) for action in range(2)]
    return (np.stack([moment[i].numpy() for moment in moments], axis=1) for i in (0, 2))


def trained(**settings):
    return ScratchDQN(
        "MlpPolicy",
        TwoStates(),
        learning_rate=LinearSchedule(1e-2, 0.0, 1.0),
        gamma=GAMMA,
        learning_starts=200,
        batch_size=64,
        train_freq=1,
        target_update_interval=50,
        exploration_final_eps=1.0,
        seed=1,
        **settings,
    ).learn(2500)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_learns_mean_and_standard_deviation(head):
    model = trained(policy_kwargs={"net_arch": [32], "head": head, "head_kwargs": HEADS[head]})
    means, deviations = distributions(model)
    # With seeds 1 to 3 the errors are at most 0.3 and 0.7, nearly all due to the Huber loss: near a return it is
    # squared
    np.testing.assert_allclose(means, MEANS, atol=0.8)
    np.testing.assert_allclose(deviations, DEVIATIONS, atol=1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"double_q": True},
        {"policy_kwargs": {"net_arch": [32], "dueling": True}},
        # Munchausen values include a bonus and an entropy. With alpha=0 and a low temperature they are the plain values
        {"munchausen": True, "munchausen_kwargs": {"tau": 0.01, "alpha": 0.0}},
    ],
)
def test_extras_learn_the_same_values(settings):
    model = trained(loss="mse", **{"policy_kwargs": {"net_arch": [32]}, **settings})
    np.testing.assert_allclose(model.q_values(np.eye(2, dtype=np.float32)), MEANS, atol=0.8)
