"""Epsilon-greedy actions with action masks: in predictions, and in rollouts."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from stable_baselines3.common.noise import ActionNoise

from sb3_scratch_dqn.algorithm.exploration import Actions, Envs, epsilon_greedy, make_epsilon_schedule
from sb3_scratch_dqn.algorithm.persistence import PersistentAlgorithm
from sb3_scratch_dqn.common.check_spaces import check_observation
from sb3_scratch_dqn.common.interrupts import Interrupts
from sb3_scratch_dqn.common.overrides import is_overridden
from sb3_scratch_dqn.replay import ScratchReplayBuffer
from sb3_scratch_dqn.replay.observations import Array, Observation
from sb3_scratch_dqn.values.masks import Masks, check_masks, find_masks
from sb3_scratch_dqn.values.support_monitor import SupportMonitor


class GreedyActor(Protocol):
    """Chooses greedy actions for the rollout, with noise in noisy layers."""

    def __call__(self, observation: Observation, envs: Envs | None = None) -> Array:
        """Return greedy actions.

        :param observation: of all environments, ``(n_envs, ...)``
        :param envs: indices of the environments to choose for, ``(N,)``; ``None`` for all
        :return: ``(N,)``
        """


class EpsilonGreedyAlgorithm(PersistentAlgorithm):
    """The part of ``ScratchDQN`` that chooses actions, and keeps epsilon and the action masks up to date.

    Whether environments have action masks is determined once, when training begins; masks are read after every step.
    """

    _read_masks: Callable[[], Masks] | None = None  # reads the masks of the environments; None if they have no masks
    _masks: Masks | None = None  # in the current states, (n_envs, A)
    _fast_actor: GreedyActor | None = None  # bypasses predict(); None where it must be called
    _adds_directly: bool = False  # transitions go to the buffer without the copies that SB3 makes
    _engine_checked: bool = False  # no user code ran since the engine was last checked
    _support_monitor: SupportMonitor | None = None
    _interrupts = Interrupts()  # learn() replaces it by one that is active

    def predict(
        self,
        observation: Observation,
        state: tuple[Array, ...] | None = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
        action_masks: Masks | None = None,
    ) -> tuple[Array, tuple[Array, ...] | None]:
        """Choose greedy actions, or random ones with probability ``exploration_rate``.

        :param observation: one observation, or ``B`` of them
        :param state: returned unchanged; DQN has no recurrent state
        :param episode_start: unused
        :param deterministic: always choose the greedy action, without the noise of noisy layers
        :param action_masks: True where an action is allowed, ``(A,)`` or ``(B, A)``
        :return: an action for each observation, and ``state``
        :raises ValueError: if ``action_masks`` have another shape, or allow no action
        """
        if isinstance(observation, tuple):  # the result of env.reset(): the policy raises an error that explains it
            return self.policy.predict(observation, state, episode_start, deterministic)
        check_observation(observation, self.observation_space)
        if isinstance(observation, dict):
            observation = {key: np.asarray(part) for key, part in observation.items()}
        else:
            observation = np.asarray(observation)
        masks = None
        if action_masks is not None:
            masks = check_masks(action_masks, self._count(observation) or 1, self._n_actions)
        # A user-defined policy might not have the argument
        kwargs = {} if masks is None else {"action_masks": masks}
        if deterministic:
            return self.policy.predict(observation, state, episode_start, True, **kwargs)
        n_observations = self._count(observation)
        if n_observations is None:
            if np.random.rand() < self.exploration_rate:
                return np.array(self._random_action(0, masks)), state
            return self.policy.predict(observation, state, episode_start, False, **kwargs)

        def greedy_actions(envs: Envs | None) -> Actions:
            # For all observations, as a user-defined policy may depend on all of them
            actions: Actions = self.policy.predict(observation, state, episode_start, False, **kwargs)[0]
            return actions if envs is None else actions[envs]

        def random_action(env: int) -> np.generic:
            return self._random_action(env, masks)

        return epsilon_greedy(self.exploration_rate, n_observations, random_action, greedy_actions), state

    def q_values(self, observation: Observation) -> Array:
        """Return the value of each action.

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
        """Return the number of observations in a batch; ``None`` for a single observation."""
        if isinstance(observation, dict):
            first = next(iter(observation.values()))
        elif observation.ndim > 0 and observation.shape[1:] == self.observation_space.shape:
            return len(observation)  # the common case, without the policy's slower check
        else:
            first = observation
        return len(first) if self.policy.is_vectorized_observation(observation) else None

    # Rollouts

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
        if (
            self._epsilon_schedule_source is not self.exploration_schedule
        ):  # assigned through __dict__, which bypasses Setting
            self._make_epsilon_schedule()
        self.exploration_rate = self._epsilon_schedule(
            self._current_progress_remaining, self._episodes_finished, self._env_steps
        )
        self.logger.record("rollout/exploration_rate", self.exploration_rate)

    def _find_masks(self) -> None:
        """Read the masks of the environments, which must have been reset; find out whether there are any.

        :raises ValueError: if they return something else than a mask
        """
        assert self.env is not None
        self._read_masks = find_masks(self.env, self._n_actions)
        self._masks = None if self._read_masks is None else self._read_masks()

    def _find_fast_actor(self) -> GreedyActor | None:
        """Return a faster way to greedy actions than :meth:`predict`; ``None`` if there is none."""
        return None

    def _select_fast_paths(self) -> None:
        """Select the fast paths for the next steps: those that bypass no user code."""
        uses_own_predict = self._masks is None and not is_overridden(self, EpsilonGreedyAlgorithm, "predict")
        self._fast_actor = self._find_fast_actor() if uses_own_predict else None
        self._adds_directly = (
            self._vec_normalize_env is None
            and type(self.replay_buffer) is ScratchReplayBuffer
            and not is_overridden(self.replay_buffer, ScratchReplayBuffer, "add")
        )

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Array, Array]:
        act, observation = self._fast_actor, self._last_obs
        assert observation is not None
        actions: Array
        if self.num_timesteps < learning_starts:
            actions = np.array([self._random_action(env, self._masks) for env in range(n_envs)])
        elif act is None:
            # An overridden predict() might not have the argument
            kwargs: dict[str, Any] = {} if self._masks is None else {"action_masks": self._masks}
            actions, _ = self.predict(observation, deterministic=False, **kwargs)
        elif n_envs == 1:
            # What epsilon_greedy() does for one environment
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
