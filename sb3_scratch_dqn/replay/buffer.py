"""The replay buffer as SB3 sees it, and as the update does."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import BaseBuffer, ReplayBuffer
from stable_baselines3.common.type_aliases import DictReplayBufferSamples, PyTorchObs, ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize

from sb3_scratch_dqn.common.overriding import replaced
from sb3_scratch_dqn.replay.batch import ArrayBatch, Batch, arrays_of, batch_from_samples
from sb3_scratch_dqn.replay.frames import StackedFrames, Stacking
from sb3_scratch_dqn.replay.nstep import Floats, Fold, fold_n_steps, fold_one_step
from sb3_scratch_dqn.replay.observations import (
    Array,
    DenseObservations,
    Observation,
    ObservationStore,
    SharedObservations,
    Space,
    gather,
)
from sb3_scratch_dqn.replay.samplers import PrioritizedSampler, Sampler, UniformSampler, make_sampler
from sb3_scratch_dqn.replay.stores import Store


def _in_store(name: str) -> Any:
    """An attribute that lives in the store, which replaces its arrays as it grows."""

    def get(self: "ScratchReplayBuffer") -> Any:
        self.store.edits += 1  # whoever asks may write into it
        return getattr(self.store, name)

    return property(get, lambda self, value: self.store.replace(name, value))


class ScratchReplayBuffer(ReplayBuffer):
    """A ring of transitions, for array and ``Dict`` observations, one or several environments, one or several steps.

    It takes the place of SB3's ``ReplayBuffer``, ``DictReplayBuffer`` and ``NStepReplayBuffer``: given the same
    random state it samples the same transitions, and its arrays hold the same numbers. They hold them only as far
    as the buffer has filled: memory is asked for as transitions arrive.

    :param buffer_size: transitions kept, over all environments
    :param observation_space: what the environments observe
    :param action_space: what they accept
    :param device: where sampled tensors go
    :param n_envs: number of environments
    :param optimize_memory_usage: keep each observation once, which needs ``handle_timeout_termination=False``
    :param handle_timeout_termination: bootstrap where an episode was cut by a time limit
    :param n_steps: fold up to this many steps into each sampled transition
    :param gamma: discount of one step, used where sampling is not told another one
    :param prioritized: sample what there is most to learn from more often, as :class:`PrioritizedSampler` says
    :param alpha: of :class:`PrioritizedSampler`, as are the other three
    :param beta: at the beginning of training
    :param beta_final: at its end
    :param epsilon: added to every priority
    :param stacking: how observations are stacked of frames, each of which is then kept once
    :raises ValueError: if ``optimize_memory_usage`` comes with ``handle_timeout_termination`` or ``stacking``, or with
        a ``buffer_size`` of less than two rows
    :raises NotStackedError: if the observations have no room for such a stack
    """

    observations = _in_store("observations")
    actions = _in_store("actions")
    rewards = _in_store("rewards")
    dones = _in_store("dones")
    timeouts = _in_store("timeouts")

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
        # ReplayBuffer.__init__ would allocate the whole buffer
        BaseBuffer.__init__(self, buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if optimize_memory_usage and handle_timeout_termination:
            raise ValueError(
                "optimize_memory_usage=True needs replay_buffer_kwargs=dict(handle_timeout_termination=False): "
                "an observation that is kept once has no room for the one a time limit ended the episode with"
            )
        self.buffer_size = max(buffer_size // n_envs, 1)
        if optimize_memory_usage and self.buffer_size < 2:
            raise ValueError(
                f"buffer_size={buffer_size} must be at least {2 * n_envs} with optimize_memory_usage=True: "
                "what came next takes a row of its own in each environment"
            )
        if optimize_memory_usage and stacking is not None:
            raise ValueError("optimize_memory_usage=True needs frames=False: frames are kept once in another way")
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
        """Forget all transitions, and their priorities."""
        super().reset()
        self.store = self._make_store()
        self.sampler = self.sampler.empty_copy()

    def use_sampler(self, sampler: Sampler) -> None:
        """Sample in another way from now on; priorities, if there were any, are kept."""
        sampler.inherit(self.sampler, self)
        self.sampler = sampler

    @property  # type: ignore[override]  # SB3 declares arrays alone, and has another class for dicts of them
    def next_observations(self) -> Observation:
        """What came next, ``(rows, n_envs, ...)``.

        :raises AttributeError: with ``optimize_memory_usage``, which keeps it in ``observations`` alone
        """
        self.store.edits += 1
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
        """Store one step of every environment; each argument has a leading axis ``n_envs``.

        Where ``infos`` have ``action_masks`` and ``next_action_masks``, ``(A,)`` each, these are stored too.
        """
        timeout: Array | float = 0.0
        if self.handle_timeout_termination:
            timeout = np.array([info.get("TimeLimit.truncated", False) for info in infos])
        self.store.write(self.pos, obs, next_obs, action, reward, done, timeout)
        if infos and "next_action_masks" in infos[0]:
            self.store.write_masks(self.pos, *(np.array([info[name] for info in infos]) for name in self.store.MASKS))
        elif self.store.action_masks is not None:
            self.store.write_masks(self.pos, True, True)
        self.sampler.written(self, self.pos)
        self.pos += 1
        if self.pos == self.buffer_size:
            self.full = True
            self.pos = 0

    def sample_batch(
        self, batch_size: int, env: VecNormalize | None = None, gamma: float | None = None, n_batches: int = 1
    ) -> Batch:
        """Draw what one update learns from, or several of them.

        :param batch_size: number of transitions of an update
        :param env: normalises observations and rewards
        :param gamma: discount of one step; by default the buffer's own
        :param n_batches: for so many updates, whose batches lie one behind the other; what as many calls would draw.
            More than 1 only where the sampler learns nothing from one batch that changes the next
        :return: ``B = n_batches * batch_size`` transitions
        :raises ValueError: if the buffer is empty
        """
        return self.sample_arrays(batch_size, env, gamma, n_batches).tensors(self.device)

    def sample_arrays(
        self, batch_size: int, env: VecNormalize | None = None, gamma: float | None = None, n_batches: int = 1
    ) -> ArrayBatch:
        """Draw what :meth:`sample_batch` would, and leave it in arrays; the parameters are the same."""
        store = self.store
        rows, envs, weights = self.sampler.draw(self, batch_size, n_batches)
        fold = self._fold(rows, envs, env, self.gamma if gamma is None else gamma)
        observations, next_observations = store.read_both(rows, fold.last_rows, envs)
        return ArrayBatch(
            self._normalize_obs(observations, env),
            gather(store.actions, rows, envs)[:, 0].astype(np.int64, copy=False),
            fold.returns,
            (1 - fold.terminated) * fold.discounts,
            self._normalize_obs(next_observations, env),
            weights,
            None if store.action_masks is None else gather(store.action_masks, rows, envs),
            None if store.next_action_masks is None else gather(store.next_action_masks, fold.last_rows, envs),
            (rows, envs),
        )

    def update_priorities(self, batch: Batch | ArrayBatch, priorities: th.Tensor) -> None:
        """Say how much there was to learn from a batch.

        :param batch: as :meth:`sample_batch` gave it
        :param priorities: ``(B,)``
        """
        assert batch.places is not None
        rows, envs = batch.places
        self.sampler.update(rows, envs, priorities)

    def sample(  # type: ignore[override]  # one class for arrays and dicts, where SB3 has two
        self, batch_size: int, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        """Draw transitions in SB3's form, each column ``(batch_size, 1)``.

        :raises ValueError: if the buffer is empty
        """
        rows, envs, _ = self.sampler.draw(self, batch_size)
        return self._samples(rows, envs, env)

    def _get_samples(  # type: ignore[override]  # likewise
        self, batch_inds: Array, env: VecNormalize | None = None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        return self._samples(batch_inds, self.sampler.draw_envs(self, len(batch_inds)), env)

    def _samples(
        self, rows: Array, envs: Array, env: VecNormalize | None
    ) -> ReplayBufferSamples | DictReplayBufferSamples:
        fold = self._fold(rows, envs, env, self.gamma)
        observations, next_observations = self.store.read_both(rows, fold.last_rows, envs)
        discounts = None
        if isinstance(fold.discounts, np.ndarray):  # SB3 has none where all windows are of one step
            discounts = self._tensor(fold.discounts[:, None])
        columns: type[Any] = ReplayBufferSamples
        if isinstance(self.observation_space, spaces.Dict):
            columns = DictReplayBufferSamples
        samples: ReplayBufferSamples | DictReplayBufferSamples = columns(
            observations=self._observation_tensor(observations, env),
            actions=self._tensor(gather(self.store.actions, rows, envs)),
            next_observations=self._observation_tensor(next_observations, env),
            dones=self._tensor(fold.terminated[:, None]),
            rewards=self._tensor(fold.returns[:, None]),
            discounts=discounts,
        )
        return samples

    def _fold(self, rows: Array, envs: Array, env: VecNormalize | None, gamma: float) -> Fold:
        normalize_reward: Callable[[Floats], Floats] = partial(self._normalize_reward, env=env)
        if self.n_steps == 1:
            return fold_one_step(self.store, rows, envs, gamma, normalize_reward)
        newest_row = (self.pos - 1) % self.buffer_size
        return fold_n_steps(self.store, rows, envs, gamma, normalize_reward, self.n_steps, newest_row)

    def _tensor(self, array: Array) -> th.Tensor:
        # What was gathered from the store is a copy already
        return th.from_numpy(array) if self.device.type == "cpu" else self.to_torch(array, copy=False)

    def _observation_tensor(self, observation: Observation, env: VecNormalize | None) -> PyTorchObs:
        normalized = self._normalize_obs(observation, env)
        if isinstance(normalized, dict):
            return {key: self._tensor(value) for key, value in normalized.items()}
        return self._tensor(normalized)

    def end_trajectories(self) -> None:
        """Let no step that is added from now on count as the continuation of one that was added before.

        Returns of several steps end there. Where observations are kept once, what came next is lost with the next step,
        so that the newest steps count as terminal, as SB3 has it.
        """
        if self.size() > 0:
            newest = (self.pos - 1) % self.buffer_size
            self.store.cut(newest, self.store.dones[newest] == 0)
            if self.optimize_memory_usage:
                self.store.dones[newest] = 1

    def __getstate__(self) -> dict[str, Any]:
        """Pickle and copy what was filled, not what was reserved."""
        state = self.__dict__.copy()
        state["store"] = self.store.trimmed(self.used_rows)
        return state

    @property
    def used_rows(self) -> int:
        """Rows that hold something."""
        if self.full or self.pos == 0:
            return self.size()
        # With shared observations the newest transition needs the row that follows it
        return min(self.pos + self.optimize_memory_usage, self.buffer_size)


@dataclass(frozen=True)
class BatchSource:
    """Where an engine gets its batches.

    :param sample: gives the next ones, as many as it is asked for, one behind the other in one :class:`Batch`
    :param sample_arrays: the same, as an :class:`ArrayBatch`; on the CPU only
    :param update_priorities: takes the priorities of the transitions of one batch, ``(B,)``
    :param ahead: whether ``sample`` can be asked for more than one batch at a time, before any priorities are known
    :param batch_size: transitions of one batch
    :param weighted: whether weights of losses may be other than 1, and priorities are asked for
    :param buffer: the buffer, if all that ``sample`` does is to sample from it in the known way, with the discount
        ``gamma``, so that somebody else may do it elsewhere
    :param gamma: discount of one step
    """

    sample: Callable[[int], Batch]
    sample_arrays: Callable[[int], ArrayBatch]
    update_priorities: Callable[[Batch | ArrayBatch, th.Tensor], None]
    can_prefetch: bool
    batch_size: int
    weighted: bool = True
    buffer: ScratchReplayBuffer | None = None
    gamma: float = 0.0


def _ignore(batch: Batch | ArrayBatch, priorities: th.Tensor) -> None:
    """Where all transitions are sampled alike, nobody asks for priorities."""


def batch_source(buffer: Any, batch_size: int, env: VecNormalize | None, gamma: float) -> BatchSource:
    """Draw from a replay buffer, whatever its kind.

    :param buffer: a :class:`ScratchReplayBuffer`, a proxy of one, or any replay buffer of SB3's kind
    :param batch_size: transitions in a batch
    :param env: normalises observations and rewards
    :param gamma: discount of one step
    """
    if not _samples_batches(buffer):
        foreign = partial(buffer.sample, batch_size, env=env)

        def draw(_: int) -> Batch:
            return batch_from_samples(foreign(), gamma)

        return BatchSource(draw, lambda _: arrays_of(draw(1)), _ignore, False, batch_size, weighted=False)
    give_back = _ignore if isinstance(buffer.sampler, UniformSampler) else buffer.update_priorities
    if replaced(buffer, ScratchReplayBuffer, "sample_batch"):
        own = partial(buffer.sample_batch, batch_size, env, gamma)
        return BatchSource(lambda _: own(), lambda _: arrays_of(own()), give_back, False, batch_size)
    return BatchSource(
        partial(buffer.sample_batch, batch_size, env, gamma),
        partial(buffer.sample_arrays, batch_size, env, gamma),
        give_back,
        not buffer.sampler.learns,
        batch_size,
        not isinstance(buffer.sampler, UniformSampler),
        buffer if env is None and _is_plain(buffer) else None,
        gamma,
    )


# Classes whose ways are known, so that somebody else can go them
_PLAIN_SAMPLERS = (UniformSampler, PrioritizedSampler)
_PLAIN_KEEPERS = (DenseObservations, SharedObservations, StackedFrames)


def _is_plain(buffer: ScratchReplayBuffer) -> bool:
    """Whether nobody changed how a buffer stores, samples and folds."""
    sampler, store = buffer.sampler, buffer.store
    return (
        type(buffer) is ScratchReplayBuffer
        and type(sampler) in _PLAIN_SAMPLERS
        and type(store) is Store
        and type(store.obs_store) in _PLAIN_KEEPERS
        # A method that was patched
        and not any(map(callable, chain(*(vars(one).values() for one in (buffer, sampler, store, store.obs_store)))))
    )


def check_sampling(buffer: ReplayBuffer, masked: bool) -> None:
    """Refuse a buffer that would lose masks or priorities on the way.

    :param buffer: any replay buffer
    :param masked: whether the environments have action masks
    """
    name = type(buffer).__name__
    own = _samples_batches(buffer)
    if masked and not own:
        raise ValueError(
            f"replay_buffer_class={name} samples no action masks, but env has them: "
            "leave replay_buffer_class out, or hide action_masks() of env"
        )
    if isinstance(buffer, ScratchReplayBuffer) and not own and not isinstance(buffer.sampler, UniformSampler):
        raise ValueError(
            f"replay_buffer_class={name} overrides how transitions are sampled, "
            "so prioritized=True would have no effect: override sample_batch() instead"
        )


def _samples_batches(buffer: Any) -> bool:
    """Return True if a buffer has ``sample_batch()``, and nothing that SB3's users override to change what is sampled.

    A proxy of a :class:`ScratchReplayBuffer` has what it passes on and what it defines itself.
    """
    if isinstance(buffer, ScratchReplayBuffer) and issubclass(type(buffer), ScratchReplayBuffer):
        return not replaced(buffer, ScratchReplayBuffer, "sample", "_get_samples")
    own = {name for one in type(buffer).__mro__ for name in vars(one)} | vars(buffer).keys()
    return own.isdisjoint({"sample", "_get_samples"}) and hasattr(buffer, "sample_batch")
