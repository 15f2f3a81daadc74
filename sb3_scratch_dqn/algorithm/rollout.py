"""Rollouts: SB3's ``collect_rollouts`` without avoidable overhead.

It takes the same steps in the same order, draws the same random numbers, and calls callbacks as SB3 does, with the same
local variables. It omits

- copies that nothing else references (``DummyVecEnv`` deep-copies the infos, which mostly hold a few numbers);
- checks whose result cannot have changed since the last step, such as whether observations are batched;
- calls of an empty callback.

Each fast path bypasses only SB3's own code: methods that users override or patch are called.
"""

from collections.abc import Callable, Sequence
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
from sb3_scratch_dqn.algorithm.finite import check_observations, check_rewards, fast_all_finite
from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.replay.observations import Array, Observation
from sb3_scratch_dqn.values.masks import masks_of_next_states

# Actions -> observations, rewards, dones, infos, each (n_envs, ...)
Step = Callable[[Array], Any]

# Types of which deepcopy() returns the object itself or an equal immutable one
_IMMUTABLE = frozenset({bool, int, float, str, type(None), np.bool_, np.float32, np.float64, np.int64})

# Methods that a lean step bypasses, to detect that the class was patched
_METHODS = {
    name: getattr(DummyVecEnv, name) for name in ("step", "step_async", "step_wait", "_save_obs", "_obs_from_buf")
}


class RolloutAlgorithm(EpsilonGreedyAlgorithm):
    """The part of ``ScratchDQN`` that steps the environments and stores the transitions."""

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
        :param learning_starts: environment steps with random actions before the first gradient step
        :param log_interval: episodes between logs; ``None`` for no logs
        :return: the number of environment steps and episodes, and whether training continues
        """
        assert isinstance(env, VecEnv), "env must be a VecEnv"
        assert train_freq.frequency > 0, "train_freq must be at least one step or episode"
        if env.num_envs > 1:
            assert train_freq.unit == TrainFrequencyUnit.STEP, "episodes can be counted with one environment only"
        if self.policy.training or self.policy.q_net.training:  # batch normalisation and dropout
            self.policy.set_training_mode(False)
        has_callback, n_envs = not is_noop(callback), env.num_envs

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
        self._engine_checked = self._engine_checked and not has_callback
        self._select_fast_paths()
        self._engine_checked = False
        step, interrupts = fast_step(env), self._interrupts
        while should_collect_more_steps(train_freq, num_collected_steps, num_collected_episodes):
            actions, buffer_actions = self._sample_action(learning_starts, action_noise, n_envs)
            self._mid_step = True
            new_obs, rewards, dones, infos = step(actions)
            self.num_timesteps += n_envs
            num_collected_steps += 1

            if has_callback:
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
                    if not self._matches_sb3:  # SB3 drops this step, and continues from the observation before it
                        self._update_info_buffer(infos, dones)
                        self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
                    self._mid_step = False
                    return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=False)
                # The callback may have changed which fast paths apply
                self._select_fast_paths()
                step = fast_step(env)

            self._update_info_buffer(infos, dones)
            interrupts.blocked = True
            self._store_transition(replay_buffer, buffer_actions, new_obs, rewards, dones, infos)
            self._mid_step = interrupts.blocked = False
            if interrupts.pending is not None:
                interrupts.unblock()
            self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
            self._on_step()  # target network and epsilon

            for idx, done in enumerate(dones):
                if done:
                    num_collected_episodes += 1
                    self._episode_num += 1
                    if action_noise is not None:
                        action_noise.reset(**({"indices": [idx]} if n_envs > 1 else {}))
                    if log_interval is not None and self._episode_num % log_interval == 0:
                        self.dump_logs()
            if has_callback:
                callback_locals.update(idx=idx, done=dones[idx])
        callback.on_rollout_end()
        return RolloutReturn(num_collected_steps * n_envs, num_collected_episodes, continue_training=True)

    # Storing

    def _check_finite(self, new_obs: Observation, rewards: Array, infos: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError unless the rewards and observations of a step are finite.

        :param new_obs: ``(n_envs, ...)``
        :param rewards: ``(n_envs,)``
        :param infos: of the environments; checked for the last observations of episodes
        """
        if self._vec_normalize_env is not None:  # the buffer stores values before normalisation
            new_obs, rewards = self._vec_normalize_env.get_original_obs(), self._vec_normalize_env.get_original_reward()
        check_rewards(rewards, self.num_timesteps)
        check_observations(new_obs, self.num_timesteps)
        for env, info in enumerate(infos):
            if "terminal_observation" in info:
                check_observations(info["terminal_observation"], self.num_timesteps, env)

    def _check_first_observations(self) -> None:
        """Raise ValueError unless the observations of the reset environments are finite."""
        first = self._last_obs if self._vec_normalize_env is None else self._last_original_obs
        assert first is not None
        check_observations(first, self.num_timesteps)

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: Array,
        new_obs: Observation,
        reward: Array,
        dones: Array,
        infos: list[dict[str, Any]],
    ) -> None:
        ended = any(dones)
        if self._checks_finite and (
            ended or self._vec_normalize_env is not None or not fast_all_finite(new_obs, reward)
        ):
            self._check_finite(new_obs, reward, infos if ended else ())
        if self._masks is not None:
            assert self._read_masks is not None
            masks_now = self._read_masks()
            next_masks = masks_of_next_states(masks_now, dones, infos)  # reads those of last states in infos
            infos = [
                {**info, "action_masks": mask, "next_action_masks": next_mask}
                for info, mask, next_mask in zip(infos, self._masks, next_masks, strict=True)
            ]
            self._masks = masks_now
        if self._adds_directly and not ended:
            # SB3 copies the observations to write the last ones of episodes into the copy. No episode ended here, and
            # the buffer copies what it stores
            replay_buffer.add(self._last_obs, new_obs, buffer_action, reward, dones, infos)  # type: ignore[arg-type]  # dicts too
            self._last_original_obs, self._last_obs = self._last_obs, new_obs
        else:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self._support_monitor is not None:
            self._support_monitor.step(reward, dones, self.gamma)
        self._episodes_ended_now = int(np.count_nonzero(dones)) if ended else 0
        self._episodes_finished += self._episodes_ended_now


def is_noop(callback: BaseCallback) -> bool:
    """Return True for the callback that SB3 creates for ``callback=None``."""
    return type(callback) is ConvertCallback and callback.callback is None


def fast_step(env: VecEnv) -> Step:
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
