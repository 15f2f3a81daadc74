"""Rollouts: SB3's ``collect_rollouts`` without avoidable overhead.

It takes the same steps in the same order, draws the same random numbers, and calls callbacks as SB3 does, with the same
local variables. It omits

- copies that nothing else references (``DummyVecEnv`` deep-copies the infos, which mostly hold a few numbers);
- checks whose result cannot have changed since the last step, such as whether observations are batched;
- calls of an empty callback.

Each fast path bypasses only SB3's own code: methods that users override or patch are called.
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
from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.replay.observations import Array

# Actions -> observations, rewards, dones, infos, each (n_envs, ...)
Step = Callable[[Array], Any]

# Types of which deepcopy() returns the object itself or an equal immutable one
_IMMUTABLE = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int64})

# Methods that a lean step bypasses, to detect that the class was patched
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
        """Step the environments and store the transitions.

        :param env: the environments
        :param callback: called at the beginning, at each step, and at the end
        :param train_freq: number of steps or episodes
        :param replay_buffer: stores the transitions
        :param action_noise: unused, as actions are ``Discrete``
        :param learning_starts: environment steps with random actions before the first update
        :param log_interval: episodes between logs; ``None`` for no logs
        :return: the number of environment steps and episodes, and whether training continues
        """
        assert isinstance(env, VecEnv), "env must be a VecEnv"
        assert train_freq.frequency > 0, "train_freq must be at least one step or episode"
        if env.num_envs > 1:
            assert train_freq.unit == TrainFrequencyUnit.STEP, "episodes can be counted with one environment only"
        if self.policy.training or self.policy.q_net.training:  # batch normalisation and dropout
            self.policy.set_training_mode(False)
        watched, n_envs = not is_noop(callback), env.num_envs

        # The local variables that callbacks see, with SB3's names; each step adds its own
        callback_locals: dict[str, Any] = {
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
        self._select_fast_paths()
        self._engine_checked = False
        step, interrupts = lean_step(env), self._interrupts
        while should_collect_more_steps(train_freq, num_collected_steps, num_collected_episodes):
            actions, buffer_actions = self._sample_action(learning_starts, action_noise, n_envs)
            self._mid_step = True
            new_obs, rewards, dones, infos = step(actions)
            self.num_timesteps += n_envs
            num_collected_steps += 1

            if watched:
                callback_locals.update(
                    num_collected_steps=num_collected_steps,
                    num_collected_episodes=num_collected_episodes,
                    actions=actions,
                    buffer_actions=buffer_actions,
                    new_obs=new_obs,
                    rewards=rewards,
                    dones=dones,
                    infos=infos,
                )
                callback.update_locals(callback_locals)
                if not callback.on_step():
                    if not self._is_reference:  # SB3 drops this step, and continues from the observation before it
                        self._update_info_buffer(infos, dones)
                        self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
                    self._mid_step = False
                    return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=False)
                # The callback may have changed which fast paths apply
                self._select_fast_paths()
                step = lean_step(env)

            self._update_info_buffer(infos, dones)
            interrupts.blocked = True
            self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
            self._mid_step = interrupts.blocked = False
            if interrupts.pending is not None:
                interrupts.unblock()
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
                callback_locals.update(idx=idx, done=dones[idx])
        callback.on_rollout_end()
        return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=True)


def is_noop(callback: BaseCallback) -> bool:
    """Return True for the callback that SB3 creates for ``callback=None``."""
    return type(callback) is ConvertCallback and callback.callback is None


def lean_step(env: VecEnv) -> Step:
    """Return ``env.step``, or a faster equivalent for an unmodified ``DummyVecEnv``.

    :param env: vectorised environments
    """
    patched = any(getattr(DummyVecEnv, name) is not method for name, method in _METHODS.items())
    if type(env) is not DummyVecEnv or env.keys != [None] or patched or is_overridden(env, DummyVecEnv, *_METHODS):
        return env.step
    observations = env.buf_obs[None]  # type: ignore[index]  # the key of observations that are not a dict

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
    """Return an equal of ``deepcopy(infos)``."""
    for info in infos:
        for value in info.values():
            if type(value) not in _IMMUTABLE:
                return deepcopy(infos)
    return [info.copy() for info in infos]
