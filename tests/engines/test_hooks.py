"""Overrides, patches and modifications that work with SB3's DQN take effect here too."""

from copy import deepcopy

import numpy as np
import pytest
import torch as th
from configurations import SMALL
from helpers import NormedExtractor, TimeoutEnv, assert_same_training, parity_settings
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.utils import LinearSchedule

from sb3_scratch_dqn import DQNPolicy, ScratchDQN, ScratchReplayBuffer
from sb3_scratch_dqn.networks.q_network import QNetwork


def test_an_overridden_predict_chooses_the_actions():
    def biased(algorithm):
        class Biased(algorithm):
            def predict(self, observation, state=None, episode_start=None, deterministic=False):
                if np.random.rand() < 0.5:
                    return np.array([1]), state
                return super().predict(observation, state, episode_start, deterministic)

        return Biased("MlpPolicy", TimeoutEnv(), **SMALL, **parity_settings(algorithm)).learn(200)

    assert_same_training(biased(DQN), biased(ScratchDQN))


class ChangeEverything(BaseCallback):
    def _on_step(self):
        if self.n_calls == 80:
            self.model.gamma = 0.5
            self.model.tau = 0.3
            self.model.max_grad_norm = 0.01
            self.model.batch_size = 9
            self.model.target_update_interval = np.int64(7)
            self.model.exploration_schedule = LinearSchedule(0.9, 0.4, 0.9)
            self.model.lr_schedule = lambda _: 1e-2
        if self.n_calls == 120:
            self.model.target_update_interval = 11.0
            self.model.replay_buffer.rewards *= 0.5
        return True


def test_settings_modified_by_a_callback_take_effect():
    assert_same_training(
        *(
            algorithm("MlpPolicy", TimeoutEnv(), **SMALL, **parity_settings(algorithm)).learn(250, ChangeEverything())
            for algorithm in (DQN, ScratchDQN)
        )
    )


def test_a_replaced_policy_is_trained():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL)
    old_policy = model.policy
    before = [parameter.clone() for parameter in old_policy.parameters()]
    model.policy = DQNPolicy(model.observation_space, model.action_space, model.lr_schedule, net_arch=[9])
    model._create_aliases()
    start = model.policy.q_net.q_net[0].weight.clone()
    model.learn(150)
    assert not th.equal(start, model.policy.q_net.q_net[0].weight)
    assert all(th.equal(a, b) for a, b in zip(before, old_policy.parameters(), strict=True))


class TimesThousand(ScratchReplayBuffer):
    def sample(self, batch_size, env=None):
        samples = super().sample(batch_size, env)
        return samples._replace(rewards=1000 * samples.rewards)


def test_training_uses_an_overridden_or_patched_sample():
    plain = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL).learn(150)
    derived = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL, replay_buffer_class=TimesThousand).learn(150)
    patched = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL)
    own_sample = patched.replay_buffer.sample

    def sample(batch_size, env=None):
        samples = own_sample(batch_size, env)
        return samples._replace(rewards=1000 * samples.rewards)

    patched.replay_buffer.sample = sample
    patched.learn(150)
    assert_same_training(derived, patched)
    assert plain.logger.name_to_value["train/loss"] < derived.logger.name_to_value["train/loss"] / 50


class Scaled(QNetwork):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scale = th.nn.Parameter(th.ones(1))

    def outputs(self, obs):
        return self.scale * super().outputs(obs) + 1


class ScaledPolicy(DQNPolicy):
    def make_q_net(self):
        return Scaled(**self._update_features_extractor(self.net_args)).to(self.device)


def test_a_custom_network_uses_the_same_outputs_for_acting_and_learning():
    model = ScratchDQN(ScaledPolicy, TimeoutEnv(), **SMALL).learn(150)
    assert model.q_net.scale != 1
    obs = th.ones(1, 3)
    assert th.equal(model.q_net(obs), model.q_net.outputs(obs).squeeze(2))


def test_a_network_with_different_functions_for_acting_and_learning_raises_an_error():
    with pytest.raises(TypeError, match=r"Odd must override outputs\(\), which acting and training both call"):

        class Odd(QNetwork):
            def forward(self, obs):
                return 2 * super().forward(obs)


def test_observations_may_be_lists():
    model = ScratchDQN("MlpPolicy", TimeoutEnv(), seed=0)
    for epsilon in (0.0, 1.0):
        model.exploration_rate = epsilon
        assert model.predict([0.1, 0.2, 0.3])[0].shape == ()
        assert model.predict([[0.1, 0.2, 0.3]] * 4)[0].shape == (4,)


def test_mixing_gymnasium_and_sb3_raises_the_error_of_sb3():
    env = TimeoutEnv()
    with pytest.raises(ValueError, match="mixing Gym API with SB3 VecEnv API"):
        ScratchDQN("MlpPolicy", env).predict(env.reset(seed=0))


def test_replay_arrays_can_be_modified_but_not_replaced_by_another_shape():
    buffer = ScratchDQN("MlpPolicy", TimeoutEnv(), **SMALL).learn(50).replay_buffer
    before = buffer.rewards.copy()
    buffer.rewards *= 2
    np.testing.assert_array_equal(buffer.rewards, 2 * before)
    buffer.next_observations = buffer.next_observations + 1
    with pytest.raises(ValueError, match=r"rewards must be replaced by an array of the same shape, \(489, 1\)"):
        buffer.rewards = np.zeros(3)


def test_environments_can_be_set_by_name(tmp_path):
    ScratchDQN("MlpPolicy", "CartPole-v1").save(tmp_path / "model.zip")
    model = ScratchDQN.load(tmp_path / "model.zip", env="CartPole-v1")
    model.set_env("CartPole-v1")
    model.learn(10)


class PatchDuringRollout(BaseCallback):
    """Patches predict() of the model and step() of the environment, during a rollout."""

    def _on_rollout_start(self):
        model = self.model
        predict, step = model.predict, self.training_env.step
        model.predict = lambda *args, **kwargs: (np.array([2]), predict(*args, **kwargs)[1])
        self.training_env.step = lambda actions: step(2 - actions)

    def _on_rollout_end(self):
        del self.model.predict, self.training_env.step

    def _on_step(self):
        return True


class SetTrainingMode(BaseCallback):
    def _on_rollout_start(self):
        self.model.q_net.features_extractor.train()

    def _on_step(self):
        self.model.q_net.features_extractor.train()
        return True


class ReplaceTarget(BaseCallback):
    """Replaces the target network in the model, which in SB3 is an attribute besides that of the policy."""

    def _on_step(self):
        if self.n_calls == 60:
            self.model.q_net_target = deepcopy(self.model.q_net)
            self.model.policy.q_net_target = self.model.q_net_target
        if self.n_calls == 110:
            self.model.q_net_target = deepcopy(self.model.q_net)
        return True


class Augmenting(BaseFeaturesExtractor):
    """Draws from NumPy's global generator, as replay does."""

    def __init__(self, observation_space):
        super().__init__(observation_space, 3)

    def forward(self, observations):
        return observations * float(np.random.uniform(0.9, 1.1))


@pytest.mark.parametrize("callback", [PatchDuringRollout, SetTrainingMode, ReplaceTarget])
def test_modifications_by_every_method_of_a_callback_take_effect(callback):
    def learn(algorithm):
        kwargs = {"features_extractor_class": NormedExtractor} if callback is SetTrainingMode else {}
        settings = {**SMALL, "train_freq": 1, "target_update_interval": 10_000, **parity_settings(algorithm)}
        return algorithm("MlpPolicy", TimeoutEnv(), policy_kwargs=kwargs, **settings).learn(150, callback())

    reference, model = learn(DQN), learn(ScratchDQN)
    if callback is ReplaceTarget:  # SB3 forgets to save it
        reference.policy.q_net_target = reference.q_net_target
    assert_same_training(reference, model)


@pytest.mark.parametrize("by", ["class", "hook", "patch"])
def test_networks_that_draw_random_numbers_do_so_in_the_same_order(by):
    def learn(algorithm):
        kwargs = {"features_extractor_class": Augmenting} if by == "class" else {}
        settings = {**SMALL, "gradient_steps": 3, **parity_settings(algorithm)}
        model = algorithm("MlpPolicy", TimeoutEnv(), policy_kwargs=kwargs, **settings)
        extractor = model.q_net.features_extractor
        own = extractor.forward
        if by == "hook":
            extractor.register_forward_pre_hook(lambda _, args: (args[0] * float(np.random.uniform(0.9, 1.1)),))
        elif by == "patch":
            extractor.forward = lambda x: own(x) * float(np.random.uniform(0.9, 1.1))
        model.learn(100)
        vars(extractor).pop("forward", None)
        return model

    assert_same_training(learn(DQN), learn(ScratchDQN))


def test_target_updates_copy_the_statistics_of_a_replaced_network():
    model = ScratchDQN(
        "MlpPolicy",
        TimeoutEnv(),
        policy_kwargs={"features_extractor_class": NormedExtractor},
        **{**SMALL, "target_update_interval": 10},
    )
    model.q_net = deepcopy(model.q_net)
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters())
    model.learn(120)
    model._engine.update_target(1.0)
    online, target = model.q_net.state_dict(), model.q_net_target.state_dict()
    names = [name for name in online if "running_" in name]
    assert names
    assert all(th.equal(online[name], target[name]) for name in names)


def test_subclasses_may_create_further_aliases():
    class Own(ScratchDQN):
        def _create_aliases(self):
            super()._create_aliases()
            self.layers = self.policy.q_net.q_net

    assert Own("MlpPolicy", TimeoutEnv()).layers is not None
