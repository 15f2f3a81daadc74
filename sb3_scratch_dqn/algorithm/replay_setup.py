"""Which replay buffer a model gets, and what becomes of one that it loads."""

import warnings
from inspect import Parameter, signature
from typing import TYPE_CHECKING

from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.her.her_replay_buffer import HerReplayBuffer

from sb3_scratch_dqn.algorithm.conversion import PLAIN_BUFFERS, to_scratch_buffer
from sb3_scratch_dqn.algorithm.stacking import find_stacking
from sb3_scratch_dqn.common.checks import brief
from sb3_scratch_dqn.common.memory import available_memory
from sb3_scratch_dqn.replay import NotStackedError, ScratchReplayBuffer, Stacking
from sb3_scratch_dqn.replay.frames import StackedFrames
from sb3_scratch_dqn.replay.observations import DenseObservations
from sb3_scratch_dqn.replay.samplers import SAMPLER_SETTINGS, make_sampler

if TYPE_CHECKING:
    from sb3_scratch_dqn.algorithm.dqn import ScratchDQN


def make_replay_buffer(model: "ScratchDQN", env: VecEnv | None) -> ReplayBuffer:
    """Make the buffer that a model's settings ask for.

    :param model: whose settings are its attributes
    :param env: its environment
    :raises ValueError: for a ``HerReplayBuffer`` without an environment, or ``frames=True`` with one that stacks none
    """
    buffer_class, kwargs = model.replay_buffer_class or ScratchReplayBuffer, dict(model.replay_buffer_kwargs)
    if issubclass(buffer_class, ScratchReplayBuffer):
        kwargs.update(
            {name: getattr(model, name) for name in ("n_steps", "gamma") if _takes(buffer_class, name)}  # subclasses
        )
        stacking = _stacking(model, env, kwargs.pop("frames", "auto"))
        if stacking is not None and _takes(buffer_class, "stacking"):
            kwargs["stacking"] = stacking
    elif model.n_steps > 1:
        warnings.warn(
            f"`n_steps={model.n_steps}` is ignored because `replay_buffer_class={buffer_class.__name__}` was given: "
            "configure that buffer by `replay_buffer_kwargs` instead, if it can fold several steps",
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
            f"replay_buffer_class={buffer_class.__name__} cannot be made with "
            f"replay_buffer_kwargs={brief(model.replay_buffer_kwargs)}: {type(error).__name__}: {error}"
        ) from error


def _takes(function: type, name: str) -> bool:
    parameters = signature(function).parameters
    return name in parameters or any(one.kind is Parameter.VAR_KEYWORD for one in parameters.values())


def _stacking(model: "ScratchDQN", env: VecEnv | None, frames: object) -> Stacking | None:
    """How replay is to keep frames once; ``None`` for each observation in full.

    :param model: whose spaces and settings count
    :param env: its environment
    :param frames: the setting
    """
    if not isinstance(frames, bool) and not (isinstance(frames, str) and frames == "auto"):
        raise ValueError(f"frames={brief(frames)} must be 'auto', True or False")
    if frames is False or (frames == "auto" and model.optimize_memory_usage):
        return None
    stacking = None if env is None else find_stacking(env)
    if stacking is not None:
        try:
            StackedFrames(1, 1, model.observation_space, stacking)
        except NotStackedError as reason:
            if frames is True:
                raise
            warnings.warn(f"replay keeps each observation in full: env stacks frames, but {reason}", stacklevel=4)
            return None
    elif frames is True and env is not None:
        raise ValueError(
            "frames=True needs an env that stacks its frames by VecFrameStack, or by FrameStackObservation "
            "padded with zeros or the first frame"
        )
    return stacking


def buffer_for_environment(model: "ScratchDQN", env: VecEnv) -> ReplayBuffer | None:
    """What is to keep the transitions of a model in another environment.

    :param model: whose settings are its attributes
    :param env: the environment that it is to go on in
    :return: the model's buffer; or, if that is empty and would be made otherwise for the environment, a new one
    :raises ValueError: for ``frames=True`` with an environment that stacks none
    """
    buffer = model.replay_buffer
    if type(buffer) is ScratchReplayBuffer and buffer.size() == 0:
        replacement = make_replay_buffer(model, env)
        assert isinstance(replacement, ScratchReplayBuffer)
        if replacement.stacking != buffer.stacking:
            return replacement
    return buffer


def warn_of_memory(buffer: ReplayBuffer, env: VecEnv | None) -> None:
    """Say so if a full buffer would not fit into memory; SB3's buffers say it themselves.

    :param buffer: the buffer
    :param env: the environment that it is filled from
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
        if _could_keep_frames(buffer, env):
            ways.append("keep each frame once by replay_buffer_kwargs=dict(frames=True)")
        ways.append(
            "keep each observation once by optimize_memory_usage=True and "
            "replay_buffer_kwargs=dict(handle_timeout_termination=False)"
        )
    warnings.warn(
        f"a full replay buffer of buffer_size={transitions:,} takes {needed / 1e9:.1f} GB, but only "
        f"{(held + available) / 1e9:.1f} GB of memory are available: {', or '.join(ways)}",
        stacklevel=4,
    )


def _could_keep_frames(buffer: ScratchReplayBuffer, env: VecEnv | None) -> bool:
    stacking = None if env is None else find_stacking(env)
    if stacking is None or buffer.stacking is not None:
        return False
    try:
        StackedFrames(1, 1, buffer.observation_space, stacking)
    except NotStackedError:
        return False
    return True


def adapt_replay_buffer(buffer: ReplayBuffer, model: "ScratchDQN") -> ReplayBuffer:
    """Make a loaded buffer fold and sample as a model's settings say.

    :param buffer: this package's; or SB3's, of which a copy in this package's class is returned, unless
        ``replay_buffer_class`` asks for another class
    :param model: whose settings are its attributes
    """
    if (model.replay_buffer_class or ScratchReplayBuffer) is not ScratchReplayBuffer:
        return buffer
    if type(buffer) in PLAIN_BUFFERS:
        buffer = to_scratch_buffer(buffer, model.n_steps, model.gamma)
    if isinstance(buffer, ScratchReplayBuffer):
        buffer.n_steps, buffer.gamma = model.n_steps, model.gamma
        kwargs = model.replay_buffer_kwargs
        settings = {name: kwargs[name] for name in SAMPLER_SETTINGS if name in kwargs}
        buffer.use_sampler(make_sampler(buffer.n_envs, **settings))
    return buffer
