"""Which actions are allowed.

A mask is true where an action is allowed: ``(A,)`` for one state, ``(B, A)`` for several. An environment offers masks
by a method ``action_masks()``, as sb3-contrib's ``MaskablePPO`` expects it. Where it has none, masks are ``None`` here,
and every action is allowed.
"""

from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.vec_env import VecEnv

Masks = npt.NDArray[np.bool_]

# Where the last state of an episode tells its mask, since the environment has been reset when it could be asked
INFO_KEY = "action_masks"

# The logit of an action that is not allowed: its probability is 0, and 0 times it is 0 rather than nan
_FORBIDDEN_LOGIT = -1e30


def masked_argmax(values: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """The best allowed action of each state, ``(B, A)`` to ``(B,)``."""
    if masks is not None:
        values = values.masked_fill(~masks, -th.inf)
    return values.argmax(dim=1)


def masked_log_softmax(logits: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
    """Logarithms of the probabilities of actions, ``(B, A)``; very low where an action is not allowed."""
    if masks is not None:
        logits = logits.masked_fill(~masks, _FORBIDDEN_LOGIT)
    return logits.log_softmax(dim=1)


def check_masks(masks: Any, n_observations: int, n_actions: int) -> Masks:
    """Bring masks into the shape ``(n_observations, n_actions)``.

    :raises ValueError: if they have another shape or other values than true and false, or allow nothing
    """
    array = np.asarray(masks)
    if array.size != n_observations * n_actions or array.shape[-1:] != (n_actions,):
        raise ValueError(
            f"action_masks of shape {array.shape} must have the shape {(n_observations, n_actions)}: "
            "one truth value for each action of each observation"
        )
    checked: Masks = array.astype(bool)
    if not (checked == array).all():
        raise ValueError(f"action_masks={masks!r} must be true where an action is allowed and false elsewhere")
    checked = checked.reshape(n_observations, n_actions)
    if not checked.any(axis=1).all():
        raise ValueError(f"action_masks={masks!r} must allow at least one action in each observation")
    return checked


def has_masks(env: VecEnv) -> bool:
    """Whether the environments have masks; one that does not answer such questions has none."""
    try:
        return is_masking_supported(env)
    except NotImplementedError:  # raised by wrappers of vectorised environments that know only their own attributes
        return False


def read_masks(env: VecEnv, n_actions: int) -> Masks:
    """Ask the environments which actions they allow now, ``(n_envs, A)``.

    :raises ValueError: if they answer something else
    """
    return check_masks(get_action_masks(env), env.num_envs, n_actions)


def masks_of_next_states(masks_now: Masks, dones: npt.NDArray[Any], infos: list[dict[str, Any]]) -> Masks:
    """Masks of the states that a step led to, when environments whose episode ended have been reset already.

    :param masks_now: masks of the states that the environments are in, ``(n_envs, A)``
    :param dones: whose episode ended, ``(n_envs,)``
    :param infos: of that step; ``info["action_masks"]`` is the mask of an episode's last state. Without it every action
        is taken for allowed there, which matters if the episode was truncated
    :return: ``(n_envs, A)``
    """
    if not dones.any():
        return masks_now
    masks: Masks = masks_now.copy()
    for env in np.flatnonzero(dones):
        told = infos[env].get(INFO_KEY)
        # An ended game may have no legal move; what follows it counts for nothing
        nothing = told is None or not np.any(told)
        masks[env] = True if nothing else check_masks(told, 1, masks.shape[1])[0]
    return masks


class MaskInInfo(gym.Wrapper[Any, Any, Any, Any]):
    """Tells the mask of an episode's last state, which cannot be asked for behind a vectorised environment.

    Worth having where episodes are truncated and not every action is allowed everywhere.

    :param env: an environment with ``action_masks()``
    """

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Step, and at the end of an episode put the mask into ``info["action_masks"]``."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info = {**info, INFO_KEY: np.array(self.env.get_wrapper_attr("action_masks")())}
        return observation, reward, terminated, truncated, info


__all__ = [
    "INFO_KEY",
    "MaskInInfo",
    "Masks",
    "check_masks",
    "has_masks",
    "masked_argmax",
    "masked_log_softmax",
    "masks_of_next_states",
    "read_masks",
]
