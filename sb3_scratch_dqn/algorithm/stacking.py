"""Detects frame stacking in the wrappers of an environment.

Further wrappers may change the observations, so the replay buffer verifies the result against what it stores.
"""

from gymnasium import spaces
from gymnasium.wrappers import FrameStackObservation
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper, VecFrameStack, VecTransposeImage

from sb3_scratch_dqn.replay import Stacking


def find_stacking(env: VecEnv) -> Stacking | None:
    """Return how SB3's ``VecFrameStack`` or gymnasium's ``FrameStackObservation`` stacks the observations of ``env``.

    :param env: the environments, with all wrappers
    :return: ``None`` without such a wrapper, or if it pads with an observation of the user's choice
    """
    transposer: VecTransposeImage | None = None
    while isinstance(env, VecEnvWrapper):
        if isinstance(env, VecFrameStack):
            return Stacking(env.stacked_obs.n_stack, _axes(env, transposer), "zero")
        if isinstance(env, VecTransposeImage) and not env.skip:
            transposer = env
        env = env.venv
    try:
        wrapped = all(env.env_is_wrapped(FrameStackObservation))
    except (NotImplementedError, AttributeError):  # not an environment of Python objects
        return None
    if not wrapped:
        return None
    n_stacks, paddings = set(env.get_attr("stack_size")), set(env.get_attr("padding_type"))
    if len(n_stacks) != 1 or len(paddings) != 1 or not paddings <= {"reset", "zero"}:
        return None
    keys = env.observation_space.spaces if isinstance(env.observation_space, spaces.Dict) else None
    axes = 0 if keys is None else dict.fromkeys(keys, 0)
    return Stacking(n_stacks.pop(), axes, "first" if paddings == {"reset"} else "zero")


def _axes(env: VecFrameStack, transposer: VecTransposeImage | None) -> int | dict[str, int]:
    """Return the axis of the frames: the first one for images whose channels are transposed from last to first."""
    if not isinstance(env.observation_space, spaces.Dict):
        return env.stacked_obs.repeat_axis if transposer is None else 0
    transposed = [] if transposer is None else transposer.image_space_keys
    parts = env.stacked_obs.sub_stacked_observations
    return {key: 0 if key in transposed else part.repeat_axis for key, part in parts.items()}
