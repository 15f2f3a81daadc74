"""How actions are chosen: greedily, or at random with probability epsilon, and only among those that are allowed."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import Schedule

from sb3_scratch_dqn.algorithm.exploration import Actions, Envs, epsilon_greedy, make_epsilon_schedule
from sb3_scratch_dqn.algorithm.finite import check_observations, check_rewards, look_finite
from sb3_scratch_dqn.algorithm.persistence import CheckedOffPolicyAlgorithm
from sb3_scratch_dqn.common.checks import check_observation
from sb3_scratch_dqn.common.interrupts import Interrupts
from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.networks.policies import DQNPolicy
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.observations import Array, Observation
from sb3_scratch_dqn.values.masks import Masks, check_masks, find_masks, masks_of_next_states
from sb3_scratch_dqn.values.support import SupportMonitor


class GreedyActor(Protocol):
    """Gives greedy actions, with noise in noisy layers."""

    def __call__(self, observation: Observation, envs: Envs | None = None) -> Array:
        """What all environments show, ``(n_envs, ...)`` -> actions of those in ``envs``; of all for ``None``."""


class EpsilonGreedyAlgorithm(CheckedOffPolicyAlgorithm):
    """The part of ``ScratchDQN`` that acts, and that keeps track of epsilon and of masks.

    An environment without ``action_masks()`` is asked for it once, when training begins.
    """

    policy: DQNPolicy
    exploration_rate: float
    exploration_schedule: str | Schedule
    exploration_initial_eps: float
    exploration_final_eps: float
    exploration_fraction: float
    exploration_decay: float
    exploration_steps: int | None
    _env_steps: int  # over all calls of learn()
    _episodes_finished: int  # since learn() last set the counters back
    _episodes_ended_now: int  # by the last call of env.step()
    _read_masks: Callable[[], Masks] | None = None  # of the environments; None if they have no masks
    _masks: Masks | None = None  # of the states that the environments are in
    _act: GreedyActor | None = None
    _adds_directly: bool = False
    _engine_checked: bool = False  # and nobody could have changed anything since that acting depends on
    _mid_step: bool = False  # the environments may be ahead of the last observation
    _is_reference: bool = False  # trains exactly as SB3's DQN does
    _checks_finite: bool = True
    _support_monitor: SupportMonitor | None = None
    _interrupts = Interrupts()  # while training, those of learn()

    def predict(
        self,
        observation: Observation,
        state: tuple[Array, ...] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
        action_masks: Masks | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Choose actions: the greedy ones, or random ones with probability ``exploration_rate``.

        :param observation: one observation, or ``B`` of them
        :param state: passed through; DQN has no memory
        :param episode_start: not used
        :param deterministic: always the greedy action, without the noise of noisy layers
        :param action_masks: true where an action is allowed, ``(A,)`` or ``(B, A)``
        :return: an action for each observation, and ``state``
        :raises ValueError: if ``action_masks`` have another shape, or allow nothing
        """
        if isinstance(observation, tuple):  # a mistake that the policy explains
            return self.policy.predict(observation, state, episode_start, deterministic)
        check_observation(observation, self.observation_space)
        if isinstance(observation, dict):
            observation = {key: np.asarray(part) for key, part in observation.items()}
        else:
            observation = np.asarray(observation)
        masks = None
        if action_masks is not None:
            masks = check_masks(action_masks, self._count(observation) or 1, self._n_actions)
        # Policies of users may not know of masks
        told = {} if masks is None else {"action_masks": masks}
        if deterministic:
            return self.policy.predict(observation, state, episode_start, True, **told)
        n_observations = self._count(observation)
        if n_observations is None:
            if np.random.rand() < self.exploration_rate:
                return np.array(self._random_action(0, masks)), state
            return self.policy.predict(observation, state, episode_start, False, **told)

        def greedy_actions(envs: Envs | None) -> Actions:
            # Of all, because a policy of users may want to see all
            actions: Actions = self.policy.predict(observation, state, episode_start, False, **told)[0]
            return actions if envs is None else actions[envs]

        def random_action(env: int) -> np.generic:
            return self._random_action(env, masks)

        return epsilon_greedy(self.exploration_rate, n_observations, random_action, greedy_actions), state

    def q_values(self, observation: Observation) -> Array:
        """The value of each action.

        :param observation: one observation, or ``B`` of them
        :return: ``(B, A)``, with ``B = 1`` for one observation
        """
        return self.policy.q_values(observation)

    @property
    def _n_actions(self) -> int:
        return int(self.policy.action_space.n)

    def _random_action(self, env: int, masks: Masks | None) -> np.generic:
        action: np.generic = self.action_space.sample(None if masks is None else masks[env].astype(np.int8))
        return action

    def _count(self, observation: Observation) -> int | None:
        """The number of observations in a batch of them; ``None`` for a single one."""
        if isinstance(observation, dict):
            first = next(iter(observation.values()))
        elif observation.ndim > 0 and observation.shape[1:] == self.observation_space.shape:
            return len(observation)  # the common case, sparing the policy's thorough look
        else:
            first = observation
        return len(first) if self.policy.is_vectorized_observation(observation) else None

    # In training

    def _make_epsilon_schedule(self) -> None:
        self._epsilon_schedule_source = self.exploration_schedule
        self._epsilon_schedule = make_epsilon_schedule(
            self.exploration_schedule,
            self.exploration_initial_eps,
            self.exploration_final_eps,
            self.exploration_fraction,
            self.exploration_decay,
            self.exploration_steps,
        )

    def _update_exploration_rate(self) -> None:
        if self._epsilon_schedule_source is not self.exploration_schedule:  # a callback changed it
            self._make_epsilon_schedule()
        self.exploration_rate = self._epsilon_schedule(
            self._current_progress_remaining, self._episodes_finished, self._env_steps
        )
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _find_masks(self) -> None:
        """See whether the environments, which have been reset, have masks.

        :raises ValueError: if what they give is no mask
        """
        assert self.env is not None
        self._read_masks = find_masks(self.env, self._n_actions)
        self._masks = None if self._read_masks is None else self._read_masks()

    def _greedy_actor(self) -> GreedyActor | None:
        """A short cut to greedy actions, past :meth:`predict`; ``None`` if there is none.

        It gets what all environments of a training show, and its noisy layers have noise.
        """
        return None

    def _choose_how_to_act(self) -> None:
        """Find the short cuts that nobody stands in the way of, for the steps to come."""
        plain = self._masks is None and not replaced(self, EpsilonGreedyAlgorithm, "predict")
        self._act = self._greedy_actor() if plain else None
        self._adds_directly = (
            self._vec_normalize_env is None
            and type(self.replay_buffer) is ScratchReplayBuffer
            and not replaced(self.replay_buffer, ScratchReplayBuffer, "add")
        )

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Array, Array]:
        act, observation = self._act, self._last_obs
        assert observation is not None
        actions: Array
        if self.num_timesteps < learning_starts:
            actions = np.array([self._random_action(env, self._masks) for env in range(n_envs)])
        elif act is None:
            # A predict() of users may not know of masks
            told: dict[str, Any] = {} if self._masks is None else {"action_masks": self._masks}
            actions, _ = self.predict(observation, deterministic=False, **told)
        elif n_envs == 1:
            # As epsilon_greedy() has it, for one coin
            explores = np.random.rand() < self.exploration_rate
            actions = np.array([self._random_action(0, None)]) if explores else act(observation)
        else:
            actions = epsilon_greedy(
                self.exploration_rate,
                n_envs,
                lambda env: self._random_action(env, None),
                lambda envs: act(observation, envs),
            )
        return actions, actions

    def _check_finite(self, new_obs: Observation, rewards: Array, infos: Sequence[dict[str, Any]]) -> None:
        """Refuse what the environments gave if some of it is no finite number.

        :param new_obs: ``(n_envs, ...)``
        :param rewards: ``(n_envs,)``
        :param infos: those of environments whose episode ended are looked into
        """
        if self._vec_normalize_env is not None:  # replay keeps what it was before
            new_obs, rewards = self._vec_normalize_env.get_original_obs(), self._vec_normalize_env.get_original_reward()
        check_rewards(rewards, self.num_timesteps)
        check_observations(new_obs, self.num_timesteps)
        for env, info in enumerate(infos):
            if "terminal_observation" in info:
                check_observations(info["terminal_observation"], self.num_timesteps, env)

    def _check_first_observations(self) -> None:
        """Refuse what the environments gave when they were reset if it is not finite."""
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
        if self._checks_finite and (ended or self._vec_normalize_env is not None or not look_finite(new_obs, reward)):
            self._check_finite(new_obs, reward, infos if ended else ())
        if self._masks is not None:
            assert self._read_masks is not None
            masks_now = self._read_masks()
            next_masks = masks_of_next_states(masks_now, dones, infos)
            infos = [
                {**info, "action_masks": mask, "next_action_masks": next_mask}
                for info, mask, next_mask in zip(infos, self._masks, next_masks, strict=True)
            ]
            self._masks = masks_now
        if self._adds_directly and not ended:
            # SB3 copies the observations, into which it writes those that episodes ended with; here are none, and the
            # buffer makes copies of its own
            replay_buffer.add(self._last_obs, new_obs, buffer_action, reward, dones, infos)  # type: ignore[arg-type]  # dicts too
            self._last_original_obs, self._last_obs = self._last_obs, new_obs
        else:
            super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)
        if self._support_monitor is not None:
            self._support_monitor.step(reward, dones, self.gamma)
        self._episodes_ended_now = int(np.count_nonzero(dones)) if ended else 0
        self._episodes_finished += self._episodes_ended_now
