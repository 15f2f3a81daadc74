"""Collecting experience: SB3's ``collect_rollouts``, with nothing in it that nobody needs.

It takes the same steps in the same order, draws the same random numbers and calls callbacks as SB3 does, with the same
local variables. What it leaves out:

- copies of what nothing else holds (``DummyVecEnv`` copies whole infos deeply, which mostly are a few numbers);
- looks at what cannot have changed since the last step, such as whether observations have a leading axis;
- calls of a callback that is none.

Each short cut is taken only past code that is SB3's own: a method that somebody overrides or patches is called.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback, ConvertCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import RolloutReturn, TrainFreq, TrainFrequencyUnit
from stable_baselines3.common.utils import should_collect_more_steps
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_scratch_dqn.algorithm.acting import EpsilonGreedyAlgorithm
from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.replay.observations import Array

# Actions -> observations, rewards, whether episodes ended, infos; each with a leading axis n_envs
Step = Callable[[Array], Any]

# What deepcopy() would give back as it is, or as an equal that cannot change either
_IMMUTABLE = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int64})

# What a lean step goes past, as it was when nobody had patched it yet
_METHODS = {
    name: getattr(DummyVecEnv, name) for name in ("step", "step_async", "step_wait", "_save_obs", "_obs_from_buf")
}


class LeanRollouts(EpsilonGreedyAlgorithm):
    """The part of ``ScratchDQN`` that steps the environments."""

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Step the environments and store what happens.

        :param env: the environments
        :param callback: called at each step, and at the beginning and the end
        :param train_freq: how many steps or episodes to take
        :param replay_buffer: where transitions go
        :param action_noise: not used, as actions are ``Discrete``
        :param learning_starts: environment steps that are taken at random first
        :param log_interval: episodes between logs; ``None`` for none
        :return: environment steps and episodes, and whether the callback wants to go on
        """
        assert isinstance(env, VecEnv), "env must be a VecEnv"
        assert train_freq.frequency > 0, "train_freq must be at least one step or episode"
        if env.num_envs > 1:
            assert train_freq.unit == TrainFrequencyUnit.STEP, "episodes can be counted with one environment only"
        if self.policy.training or self.policy.q_net.training:  # batch normalisation and dropout
            self.policy.set_training_mode(False)
        watched, n_envs = not is_noop(callback), env.num_envs

        # What callbacks see, by the names that it has in SB3; those of the steps come with them
        seen: dict[str, Any] = {
            "self": self,
            "env": env,
            "callback": callback,
            "train_freq": train_freq,
            "replay_buffer": replay_buffer,
            "action_noise": action_noise,
            "learning_starts": learning_starts,
            "log_interval": log_interval,
            "continue_training": True,
        }
        num_collected_steps, num_collected_episodes = 0, 0
        callback.on_rollout_start()
        self._engine_checked = self._engine_checked and not watched
        self._choose_how_to_act()
        self._engine_checked = False
        step, interrupts = lean_step(env), self._interrupts
        while should_collect_more_steps(train_freq, num_collected_steps, num_collected_episodes):
            actions, buffer_actions = self._sample_action(learning_starts, action_noise, n_envs)
            self._mid_step = True
            new_obs, rewards, dones, infos = step(actions)
            self.num_timesteps += n_envs
            num_collected_steps += 1

            if watched:
                seen.update(
                    num_collected_steps=num_collected_steps,
                    num_collected_episodes=num_collected_episodes,
                    actions=actions,
                    buffer_actions=buffer_actions,
                    new_obs=new_obs,
                    rewards=rewards,
                    dones=dones,
                    infos=infos,
                )
                callback.update_locals(seen)
                if not callback.on_step():
                    if not self._is_reference:  # SB3 forgets this step, and would go on from the observation before it
                        self._update_info_buffer(infos, dones)
                        self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
                    self._mid_step = False
                    return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=False)
                # The callback may have changed what stands in the way
                self._choose_how_to_act()
                step = lean_step(env)

            self._update_info_buffer(infos, dones)
            interrupts.held = True
            self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
            self._mid_step = interrupts.held = False
            if interrupts.waiting is not None:
                interrupts.release()
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()

            for idx, done in enumerate(dones):
                if done:
                    num_collected_episodes += 1
                    self._episode_num += 1
                    if action_noise is not None:
                        action_noise.reset(**({"indices": [idx]} if n_envs > 1 else {}))
                    if log_interval is not None and self._episode_num % log_interval == 0:
                        self.dump_logs()
            if watched:
                seen.update(idx=idx, done=dones[idx])
        callback.on_rollout_end()
        return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=True)


def is_noop(callback: BaseCallback) -> bool:
    """Whether a callback is what SB3 makes of ``callback=None``, which nobody else holds."""
    return type(callback) is ConvertCallback and callback.callback is None


def lean_step(env: VecEnv) -> Step:
    """Something that does what ``env.step`` does, faster where that is possible.

    :param env: vectorised environments
    """
    patched = any(getattr(DummyVecEnv, name) is not method for name, method in _METHODS.items())
    if type(env) is not DummyVecEnv or env.keys != [None] or patched or replaced(env, DummyVecEnv, *_METHODS):
        return env.step
    observations = env.buf_obs[None]  # type: ignore[index]  # the key of observations that are no dict

    def step(actions: Array) -> Any:
        env.actions = actions
        rewards, dones, infos = env.buf_rews, env.buf_dones, env.buf_infos
        for index, single in enumerate(env.envs):
            observation, rewards[index], terminated, truncated, info = single.step(actions[index])
            done = terminated or truncated
            infos[index], dones[index] = info, done
            info["TimeLimit.truncated"] = truncated and not terminated
            if done:
                info["terminal_observation"] = observation
                observation, env.reset_infos[index] = single.reset()
            observations[index] = observation
        return observations.copy(), rewards.copy(), dones.copy(), _copied(infos)

    return step


def _copied(infos: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``deepcopy`` gives."""
    for info in infos:
        for value in info.values():
            if type(value) not in _IMMUTABLE:
                return deepcopy(infos)
    return [info.copy() for info in infos]
