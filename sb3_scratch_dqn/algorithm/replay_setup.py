"""Builds the replay buffer of a model, and adapts loaded ones."""

import warnings
from inspect import Parameter, signature

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_scratch_dqn.algorithm.base import DQNBase
from sb3_scratch_dqn.algorithm.stacking import find_stacking
from sb3_scratch_dqn.common.checks import short_repr
from sb3_scratch_dqn.common.memory import available_memory
from sb3_scratch_dqn.replay import NotStackedError, ScratchReplayBuffer, Stacking
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS, make_sampler
from sb3_scratch_dqn.replay.sb3_buffers import SB3_BUFFERS, from_sb3_buffer


def make_replay_buffer(model: DQNBase, env: VecEnv | None) -> ReplayBuffer:
    """Build the replay buffer that a model's settings describe.

    :param model: the model
    :param env: its environment
    :raises ValueError: for a ``HerReplayBuffer`` without an environment, or ``frames=True`` with one that does not
        stack frames
    """
    buffer_class, kwargs = model.replay_buffer_class or ScratchReplayBuffer, dict(model.replay_buffer_kwargs)
    if issubclass(buffer_class, ScratchReplayBuffer):
        # A subclass might not accept these
        kwargs.update({name: getattr(model, name) for name in ("n_steps", "gamma") if _takes(buffer_class, name)})
        stacking = _stacking(model, env, kwargs.pop("frames", "auto"))
        if stacking is not None and _takes(buffer_class, "stacking"):
            kwargs["stacking"] = stacking
    elif model.n_steps > 1:
        warnings.warn(
            f"`n_steps={model.n_steps}` is ignored because `replay_buffer_class={buffer_class.__name__}` was given: "
            "configure that buffer by `replay_buffer_kwargs` instead, if it supports n-step returns",
            stacklevel=3,
        )
    if issubclass(buffer_class, HerReplayBuffer):
        if env is None:
            raise ValueError(f"env=None: a {buffer_class.__name__} needs env to compute rewards, so pass one")
        kwargs["env"] = env
    try:
        return buffer_class(
            model.buffer_size,
            model.observation_space,
            model.action_space,
            device=model.device,
            n_envs=model.n_envs,
            optimize_memory_usage=model.optimize_memory_usage,
            **kwargs,
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"replay_buffer_class={buffer_class.__name__} cannot be created with "
            f"replay_buffer_kwargs={short_repr(model.replay_buffer_kwargs)}: {type(error).__name__}: {error}"
        ) from error


def _takes(function: type, name: str) -> bool:
    parameters = signature(function).parameters
    return name in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())


def _stacking(model: DQNBase, env: VecEnv | None, frames: object) -> Stacking | None:
    """Return the stacking of frames if the buffer is to keep each frame once, ``None`` if it keeps whole observations.

    :param model: the model
    :param env: its environment
    :param frames: the setting ``frames``
    """
    if not isinstance(frames, bool) and not (isinstance(frames, str) and frames == "auto"):
        raise ValueError(f"frames={short_repr(frames)} must be 'auto', True or False")
    if frames is False or (frames == "auto" and model.optimize_memory_usage):
        return None
    stacking = None if env is None else find_stacking(env)
    if stacking is not None:
        try:
            StackedFrames(1, 1, model.observation_space, stacking)
        except NotStackedError as reason:
            if frames is True:
                raise
            warnings.warn(
                f"the replay buffer stores each observation in full: env stacks frames, but {reason}", stacklevel=4
            )
            return None
    elif frames is True and env is not None:
        raise ValueError(
            "frames=True needs an env that stacks its frames by VecFrameStack, or by FrameStackObservation "
            "padded with zeros or the first frame"
        )
    return stacking


def buffer_for_environment(model: DQNBase, env: VecEnv) -> ReplayBuffer | None:
    """Return the replay buffer for a model that continues in another environment.

    :param model: the model
    :param env: the new environment
    :return: the model's buffer, or a new one if that is empty and the new environment stacks frames differently
    :raises ValueError: for ``frames=True`` with an environment that does not stack frames
    """
    buffer = model.replay_buffer
    if type(buffer) is ScratchReplayBuffer and buffer.size() == 0:
        replacement = make_replay_buffer(model, env)
        assert isinstance(replacement, ScratchReplayBuffer)
        if replacement.stacking != buffer.stacking:
            return replacement
    return buffer


def warn_of_memory(buffer: ReplayBuffer, env: VecEnv | None) -> None:
    """Warn if the full buffer would not fit into memory. SB3's own buffers warn by themselves.

    :param buffer: the buffer
    :param env: the environment that fills it
    """
    if not isinstance(buffer, ScratchReplayBuffer):
        return
    store, available = buffer.store, available_memory()
    transitions = store.capacity * buffer.n_envs
    needed = store.bytes_of(store.capacity) + buffer.sampler.bytes_of(transitions)
    held = store.bytes_of(store.rows) + buffer.sampler.bytes_of(store.rows * buffer.n_envs)
    if needed - held <= available:
        return
    fitting = int(transitions * (held + available) / needed)
    ways = [f"lower buffer_size ({fitting:,} transitions would fit)"]
    if isinstance(store.obs_store, DenseObservations) and not buffer.optimize_memory_usage:
        if _can_stack_frames(buffer, env):
            ways.append("store each frame once by replay_buffer_kwargs=dict(frames=True)")
        ways.append(
            "store each observation once by optimize_memory_usage=True and "
            "replay_buffer_kwargs=dict(handle_timeout_termination=False)"
        )
    warnings.warn(
        f"a full replay buffer of buffer_size={transitions:,} takes {needed / 1e9:.1f} GB, but only "
        f"{(held + available) / 1e9:.1f} GB of memory are available: {', or '.join(ways)}",
        stacklevel=4,
    )


def _can_stack_frames(buffer: ScratchReplayBuffer, env: VecEnv | None) -> bool:
    stacking = None if env is None else find_stacking(env)
    if stacking is None or buffer.stacking is not None:
        return False
    try:
        StackedFrames(1, 1, buffer.observation_space, stacking)
    except NotStackedError:
        return False
    return True


def adapt_replay_buffer(buffer: ReplayBuffer, model: DQNBase) -> ReplayBuffer:
    """Apply a model's n-step, discount and sampling settings to a loaded buffer.

    :param buffer: a buffer of this package, or of SB3. One of SB3 is copied into a :class:`ScratchReplayBuffer`, unless
        the model has another ``replay_buffer_class``
    :param model: the model
    :return: the buffer, or the copy
    """
    if (model.replay_buffer_class or ScratchReplayBuffer) is not ScratchReplayBuffer:
        return buffer
    if type(buffer) in SB3_BUFFERS:
        buffer = from_sb3_buffer(buffer, model.n_steps, model.gamma)
    if isinstance(buffer, ScratchReplayBuffer):
        buffer.n_steps, buffer.gamma = model.n_steps, model.gamma
        kwargs = model.replay_buffer_kwargs
        settings = {name: kwargs[name] for name in SAMPLER_SETTINGS if name in kwargs}
        buffer.use_sampler(make_sampler(buffer.n_envs, **settings))
    return buffer
