"""The replay buffer, with SB3's interface and with the one that updates use."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch
from sb3_scratch_dqn.replay.frame_layout import Stacking
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.nstep import Floats, NStepReturns, n_step_returns, one_step_returns
from sb3_scratch_dqn.replay.observations import (
    Array,
    DenseObservations,
    Observation,
    ObservationStore,
    SharedObservations,
    Space,
    gather,
)
from sb3_scratch_dqn.replay.sampler_interface import Sampler
from sb3_scratch_dqn.replay.samplers import make_sampler
from sb3_scratch_dqn.replay.stores import Store


def _stored_array(name: str) -> Any:
    """Return a property for an array of the store, which replaces its arrays as it grows."""

    def get(self: "ScratchReplayBuffer") -> Any:
        self.store.n_edits += 1  # the caller may write into the array
        return getattr(self.store, name)

    return property(get, lambda self, value: self.store.replace(name, value))


class ScratchReplayBuffer(ReplayBuffer):
    """A ring buffer of transitions, for array and ``Dict`` observations, several environments and n-step returns.

    It replaces SB3's ``ReplayBuffer``, ``DictReplayBuffer`` and ``NStepReplayBuffer``: given the same random state it
    samples the same transitions, and its arrays have the same contents. They only have the rows filled so far: memory
    is allocated as transitions arrive.

    :param buffer_size: maximum number of transitions, over all environments
    :param observation_space: observation space
    :param action_space: action space
    :param device: device of sampled tensors
    :param n_envs: number of environments
    :param optimize_memory_usage: store each observation once; requires ``handle_timeout_termination=False``
    :param handle_timeout_termination: bootstrap where a time limit truncated an episode
    :param n_steps: maximum number of steps in the return of each sampled transition
    :param gamma: default discount of one step
    :param prioritized: sample with a :class:`~sb3_scratch_dqn.replay.samplers.PrioritizedSampler`
    :param alpha: exponent of the priorities
    :param beta: exponent of the importance weights at the beginning of training
    :param beta_final: exponent of the importance weights at the end of training
    :param epsilon: added to every priority
    :param stacking: how observations are made of frames; each frame is then stored once
    :raises ValueError: if ``optimize_memory_usage`` is combined with ``handle_timeout_termination`` or ``stacking``, or
        with a ``buffer_size`` of less than two rows, or if a setting of the sampler is invalid
    :raises NotStackedError: if observations of ``observation_space`` cannot be such stacks
    """

    observations = _stored_array("observations")
    actions = _stored_array("actions")
    rewards = _stored_array("rewards")
    dones = _stored_array("dones")
    timeouts = _stored_array("timeouts")

    def __init__(
        self,
        buffer_size: int,
        observation_space: Space,
        action_space: Space,
        device: th.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        n_steps: int = 1,
        gamma: float = 0.99,
        prioritized: bool = False,
        alpha: float = 0.6,
        beta: float = 0.4,
        beta_final: float = 1.0,
        epsilon: float = 1e-6,
        stacking: Stacking | None = None,
    ) -> None:
        # Not ReplayBuffer.__init__, which allocates the whole buffer
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage and handle_timeout_termination:
            raise ValueError(
                "optimize_memory_usage=True needs replay_buffer_kwargs=dict(handle_timeout_termination=False): "
                "it does not store the last observation of an episode that a time limit truncated"
            )
        self.buffer_size = max(buffer_size // n_envs, 1)
        if optimize_memory_usage and self.buffer_size < 2:
            raise ValueError(
                f"buffer_size={buffer_size} must be at least {2 * n_envs} with optimize_memory_usage=True: "
                "the next observation takes another row in each environment"
            )
        if optimize_memory_usage and stacking is not None:
            raise ValueError("optimize_memory_usage=True needs frames=False: the two cannot be combined")
        self.optimize_memory_usage = optimize_memory_usage
        self.handle_timeout_termination = handle_timeout_termination
        self.n_steps = n_steps
        self.gamma = gamma
        self.sampler = make_sampler(n_envs, prioritized, alpha, beta, beta_final, epsilon)
        self.stacking = stacking
        self.store = self._make_store()

    def _make_store(self) -> Store:
        obs_store: ObservationStore
        if self.stacking is not None:
            obs_store = StackedFrames(self.buffer_size, self.n_envs, self.observation_space, self.stacking)
        elif self.optimize_memory_usage:
            obs_store = SharedObservations(self.buffer_size, self.n_envs, self.observation_space)
        else:
            obs_store = DenseObservations(self.buffer_size, self.n_envs, self.observation_space)
        action_dtype = np.dtype(self._maybe_cast_dtype(self.action_space.dtype))
        return Store(self.buffer_size, self.n_envs, obs_store, self.action_dim, action_dtype)

    def reset(self) -> None:
        """Remove all transitions and their priorities."""
        super().reset()
        self.store = self._make_store()
        self.sampler = self.sampler.empty_copy()

    def use_sampler(self, sampler: Sampler) -> None:
        """Replace the sampler; it copies the priorities of the current one."""
        sampler.copy_priorities_from(self.sampler, self)
        self.sampler = sampler

    @property  # type: ignore[override]  # SB3 has another class for dicts
    def next_observations(self) -> Observation:
        """The next observations, ``(rows, n_envs, ...)``.

        :raises AttributeError: with ``optimize_memory_usage``, which stores them among ``observations``
        """
        self.store.n_edits += 1
        return self.store.next_observations

    @next_observations.setter
    def next_observations(self, value: Observation) -> None:
        self.store.replace("next_observations", value)

    def add(
        self,
        obs: Observation,
        next_obs: Observation,
        action: Array,
        reward: Array,
        done: Array,
        infos: list[dict[str, Any]],
    ) -> None:
        """Add one step of every environment.

        :param obs: ``(n_envs, *observation_shape)``, or a dict of such arrays
        :param next_obs: the same after the step
        :param action: ``(n_envs,)`` or ``(n_envs, 1)``
        :param reward: ``(n_envs,)``
        :param done: true where the episode terminated or was truncated, ``(n_envs,)``
        :param infos: one dict for each environment; ``TimeLimit.truncated`` marks truncations, and ``action_masks`` and
            ``next_action_masks``, ``(A,)`` each, are stored if present
        """
        timeout: Array | float = 0.0
        if self.handle_timeout_termination:
            timeout = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self.store.write(self.pos, obs, next_obs, action, reward, done, timeout)
        if infos and "next_action_masks" in infos[0]:
            self.store.write_masks(self.pos, *(np.array([info[name] for info in infos]) for name in self.store.MASKS))
        elif self.store.action_masks is not None:
            self.store.write_masks(self.pos, True, True)
        self.sampler.on_write(self, self.pos)
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    def sample_batch(
        self, batch_size: int, env: VecNormalize | None = None, gamma: float | None = None, n_batches: int = 1
    ) -> Batch:
        """Sample one or several mini-batches.

        :param batch_size: transitions in a mini-batch
        :param env: normalises observations and rewards
        :param gamma: discount of one step; ``None`` for that of the buffer
        :param n_batches: number of mini-batches, concatenated; the same as that many calls would sample. Must be 1 if
            the sampler uses priorities
        :return: ``B = n_batches * batch_size`` transitions
        :raises ValueError: if the buffer is empty
        """
        return self.sample_arrays(batch_size, env, gamma, n_batches).tensors(self.device)

    def sample_arrays(
        self, batch_size: int, env: VecNormalize | None = None, gamma: float | None = None, n_batches: int = 1
    ) -> ArrayBatch:
        """Sample as :meth:`sample_batch`, but return arrays; parameters as there."""
        store = self.store
        rows, envs, weights = self.sampler.draw(self, batch_size, n_batches)
        windows = self._n_step_returns(rows, envs, env, self.gamma if gamma is None else gamma)
        observations, next_observations = store.read_both(rows, windows.last_rows, envs)
        return ArrayBatch(
            self._normalize_obs(observations, env),
            gather(store.actions, rows, envs)[:, 0].astype(np.int64, copy=False),
            windows.returns,
            (1 - windows.terminated) * windows.discounts,
            self._normalize_obs(next_observations, env),
            weights,
            None if store.action_masks is None else gather(store.action_masks, rows, envs),
            None if store.next_action_masks is None else gather(store.next_action_masks, windows.last_rows, envs),
            (rows, envs),
        )

    def update_priorities(self, batch: Batch | ArrayBatch, priorities: th.Tensor) -> None:
        """Set the priorities of the transitions of a batch.

        :param batch: a batch from :meth:`sample_batch` or :meth:`sample_arrays`
        :param priorities: ``(B,)``
        :raises ValueError: if a prioritized buffer gets a priority that is not finite
        """
        assert batch.indices is not None
        rows, envs = batch.indices
        self.sampler.update(rows, envs, priorities)

    def sample(  # type: ignore[override]  # SB3 has another class for dicts
        self, batch_size: int, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """Sample transitions in SB3's form.

        :param batch_size: number of transitions
        :param env: normalises observations and rewards
        :return: actions, rewards, dones and discounts have shape ``(batch_size, 1)``
        :raises ValueError: if the buffer is empty
        """
        rows, envs, _ = self.sampler.draw(self, batch_size)
        return self._samples(rows, envs, env)

    def _get_samples(  # type: ignore[override]  # SB3 has another class for dicts
        self, batch_inds: Array, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        return self._samples(batch_inds, self.sampler.draw_envs(self, len(batch_inds)), env)

    def _samples(
        self, rows: Array, envs: Array, env: VecNormalize | None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        windows = self._n_step_returns(rows, envs, env, self.gamma)
        observations, next_observations = self.store.read_both(rows, windows.last_rows, envs)
        discounts = None
        if isinstance(windows.discounts, np.ndarray):  # in SB3, None for windows of one step
            discounts = self._tensor(windows.discounts[:, None])
        columns: type[Any] = ReplayBufferSamples
        if isinstance(self.observation_space, spaces.Dict):
            columns = DictReplayBufferSamples
        samples: ReplayBufferSamples | DictReplayBufferSamples = columns(
            observations=self._observation_tensor(observations, env),
            actions=self._tensor(gather(self.store.actions, rows, envs)),
            next_observations=self._observation_tensor(next_observations, env),
            dones=self._tensor(windows.terminated[:, None]),
            rewards=self._tensor(windows.returns[:, None]),
            discounts=discounts,
        )
        return samples

    def _n_step_returns(self, rows: Array, envs: Array, env: VecNormalize | None, gamma: float) -> NStepReturns:
        normalize_reward: Callable[[Floats], Floats] = partial(self._normalize_reward, env=env)
        if self.n_steps == 1:
            return one_step_returns(self.store, rows, envs, gamma, normalize_reward)
        newest_row = (self.pos - 1) % self.buffer_size
        return n_step_returns(self.store, rows, envs, gamma, normalize_reward, self.n_steps, newest_row)

    def _tensor(self, array: Array) -> th.Tensor:
        # Arrays read from the store are copies already
        return th.from_numpy(array) if self.device.type == "cpu" else self.to_torch(array, copy=False)

    def _observation_tensor(self, observation: Observation, env: VecNormalize | None) -> PyTorchObs:
        normalized = self._normalize_obs(observation, env)
        if isinstance(normalized, dict):
            return {key: self._tensor(value) for key, value in normalized.items()}
        return self._tensor(normalized)

    def end_trajectories(self) -> None:
        """Cut all current trajectories: steps added later do not continue those added before.

        N-step returns end at the cut. With ``optimize_memory_usage``, the next step overwrites the newest next
        observation, so the newest steps count as terminal, as in SB3.
        """
        if self.size() > 0:
            newest = (self.pos - 1) % self.buffer_size
            self.store.cut(newest, self.store.dones[newest] == 0)
            if self.optimize_memory_usage:
                self.store.dones[newest] = 1

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy only the filled rows."""
        state = self.__dict__.copy()
        state["store"] = self.store.trimmed(self.used_rows)
        return state

    @property
    def used_rows(self) -> int:
        """The number of filled rows, including a row that only has a next observation."""
        if self.full or self.pos == 0:
            return self.size()
        # With optimize_memory_usage, the newest transition needs the following row
        return min(self.pos + self.optimize_memory_usage, self.buffer_size)
