"""Action masks: which actions are allowed.

A mask is true where an action is allowed: ``(A,)`` for one state, ``(B, A)`` for several. An environment provides masks
by a method ``action_masks()``, as for sb3-contrib's ``MaskablePPO``, or by an attribute or property of that name that
holds such an array. Without it, or if it is ``None``, masks are ``None`` here and every action is allowed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from jaxtyping import Bool, Float, Int64, Shaped
from sb3_contrib.common.maskable.utils import is_masking_supported
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecEnvWrapper
from torch import Tensor

from sb3_scratch_dqn.common.checks import as_numeric_array

Masks = npt.NDArray[np.bool_]

# Key in ``info`` for the mask of an episode's last state: ``action_masks()`` can only be called after the reset
INFO_KEY = "action_masks"
_NAME = "action_masks"  # of the method, property or attribute

# Logit of a forbidden action: its probability is 0, and its log-probability times 0 is 0, not NaN
_FORBIDDEN_LOGIT = -1e30


def masked_argmax(values: Float[Tensor, "B A"], masks: Bool[Tensor, "B A"] | None) -> Int64[Tensor, "B"]:
    """Return the best allowed action of each state.

    :param values: action values
    :param masks: true where an action is allowed; ``None`` if all are
    :return: indices of the actions
    """
    if masks is not None:
        values = values.masked_fill(~masks, -th.inf)
    return values.argmax(dim=1)


def masked_log_softmax(logits: Float[Tensor, "B A"], masks: Bool[Tensor, "B A"] | None) -> Float[Tensor, "B A"]:
    """Compute the logarithm of the softmax over the allowed actions of each state.

    :param logits: logits of the actions
    :param masks: true where an action is allowed; ``None`` if all are
    :return: log-probabilities; those of forbidden actions are very low, but finite
    """
    if masks is not None:
        logits = logits.masked_fill(~masks, _FORBIDDEN_LOGIT)
    return logits.log_softmax(dim=1)


def check_masks(masks: Any, n_observations: int, n_actions: int) -> Bool[Masks, "{n_observations} {n_actions}"]:
    """Convert masks to an array of shape ``(n_observations, n_actions)``.

    :param masks: booleans or numbers of that shape, or a single row for one observation
    :param n_observations: number of observations
    :param n_actions: number of actions
    :return: true where an action is allowed
    :raises ValueError: if they have another shape, values that are not boolean, or a row that allows no action
    """
    array = as_numeric_array("action_masks", masks)
    if array.size != n_observations * n_actions or array.shape[-1:] != (n_actions,):
        raise ValueError(
            f"action_masks of shape {array.shape} must have the shape {(n_observations, n_actions)}: "
            "one boolean per observation and action"
        )
    checked: Masks = array.astype(bool)
    if not (checked == array).all():
        raise ValueError(f"action_masks={masks!r} must be true where an action is allowed and false elsewhere")
    checked = checked.reshape(n_observations, n_actions)
    if not checked.any(axis=1).all():
        raise ValueError(f"action_masks={masks!r} must allow at least one action in each observation")
    return checked


def has_masks(env: VecEnv) -> bool:
    """Return True if the environments have masks. Wrappers that cannot report attributes have none."""
    try:
        return is_masking_supported(env) and not (_in_this_process(env) and _all_none(env.get_attr(_NAME)))
    except NotImplementedError:  # raised by wrappers of vectorized environments that support only their own attributes
        return False


def find_masks(env: VecEnv, n_actions: int) -> Callable[[], Masks] | None:
    """Determine how to read the masks of environments, which must have been reset.

    :param env: the environments
    :param n_actions: ``A``
    :return: a function that returns the current masks, ``(n_envs, A)``, and raises ``ValueError`` if the environments
        provide something else; ``None`` if they have no masks
    """
    if not has_masks(env):
        return None
    # In another process it can only be called: reading a method would pickle its environment
    read: Callable[[], list[Any]] = partial(env.env_method, _NAME)
    if _in_this_process(env) and not all(map(callable, env.get_attr(_NAME))):

        def read() -> list[Any]:
            return [mask() if callable(mask) else mask for mask in env.get_attr(_NAME)]

    if _all_none(read()):
        return None
    return lambda: _stacked(read(), n_actions)


def _all_none(masks: list[Any]) -> bool:
    return all(mask is None for mask in masks)


def _in_this_process(env: VecEnv) -> bool:
    while isinstance(env, VecEnvWrapper):
        env = env.venv
    return isinstance(env, DummyVecEnv)


def _stacked(masks: list[Any], n_actions: int) -> Bool[Masks, "n_envs {n_actions}"]:
    """Stack the masks of all environments.

    :raises ValueError: names the environment whose mask has another shape
    """
    for number, mask in enumerate(masks):
        if mask is None or np.shape(mask) != (n_actions,):
            given = "None" if mask is None else f"of shape {np.shape(mask)}"
            raise ValueError(
                f"action_masks of environment {number} are {given}, but must have the shape {(n_actions,)}: one "
                "boolean per action. If all actions are allowed, they may be None from the beginning"
            )
    return check_masks(np.stack(masks), len(masks), n_actions)


def masks_of_next_states(
    masks_now: Bool[Masks, "n_envs A"], dones: Shaped[npt.NDArray[Any], "n_envs"], infos: list[dict[str, Any]]
) -> Bool[Masks, "n_envs A"]:
    """Return the masks of a step's next states, when environments whose episode ended have already been reset.

    :param masks_now: masks of the current states of the environments
    :param dones: whether the episode ended
    :param infos: infos of that step; ``info["action_masks"]`` is the mask of an episode's last state. Without it, all
        actions are considered allowed there, which matters if the episode was truncated
    """
    if not dones.any():
        return masks_now
    masks: Masks = masks_now.copy()
    for env in np.flatnonzero(dones):
        mask = infos[env].get(INFO_KEY)
        # A finished game may have no legal move; the value of its last state does not count
        missing = mask is None or not np.any(mask)
        masks[env] = True if missing else check_masks(mask, 1, masks.shape[1])[0]
    return masks


class MaskInInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Put the mask of an episode's last state into ``info``, because a vectorized environment resets right after it.

    Use it where episodes are truncated and not every action is always allowed.

    :param env: an environment with ``action_masks``
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step the environment; at the end of an episode, put the mask into ``info["action_masks"]``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            masks = self.env.get_wrapper_attr(_NAME)
            info = {**info, INFO_KEY: np.array(masks() if callable(masks) else masks)}
        return observation, reward, terminated, truncated, info
