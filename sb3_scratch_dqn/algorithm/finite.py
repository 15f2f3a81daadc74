"""Checks that rewards and observations are finite: one NaN in the replay buffer later turns all weights into NaN.

The checks run at every environment step, so they must be fast.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.observations import Array, Observation

# Number of elements up to which a sum in Python is faster than np.isfinite(array).all(): 0.3 us instead of 2 us for 4
_FEW_ELEMENTS = 64


def all_finite(array: Array) -> bool:
    """Return True if no element is NaN or infinite."""
    if array.dtype.kind != "f":  # integers and booleans
        return True
    # A sum with NaN or infinity is never finite; the second check is for finite elements whose sum overflows
    if array.size <= _FEW_ELEMENTS and math.isfinite(sum(array.ravel().tolist())):
        return True
    return bool(np.isfinite(array).all())


def fast_all_finite(observation: Observation, rewards: Array) -> bool:
    """Return True if a fast check shows that all elements are finite; False if the full checks below are needed.

    :param observation: ``(n_envs, ...)``, or a dict of such arrays
    :param rewards: ``(n_envs,)``
    """
    if type(observation) is not np.ndarray or observation.size > _FEW_ELEMENTS:
        return False
    return math.isfinite(sum(observation.ravel().tolist(), sum(rewards.tolist())))


def check_observations(observations: Observation, step: int, env: int | None = None) -> None:
    """Raise ValueError unless observations are finite.

    :param observations: ``(n_envs, ...)``, or a dict of such arrays; a single observation if ``env`` is given
    :param step: environment steps so far, for the message
    :param env: index of the environment of a single observation
    :raises ValueError: with the environment and the step
    """
    parts = observations.items() if isinstance(observations, dict) else [("", observations)]
    for key, part in parts:
        if not (isinstance(part, np.ndarray) and all_finite(part)):
            part = np.asarray(part)  # an observation of a Discrete space may be a number
            row = _first_bad_row(part.reshape(len(part) if env is None else 1, -1))
            if row is not None:
                of_key = f" whose {key!r}" if key else " that"
                raise _error(f"an observation{of_key} is not finite", row if env is None else env, step)


def check_rewards(rewards: npt.NDArray[np.floating[Any]], step: int) -> None:
    """Raise ValueError unless rewards are finite.

    :param rewards: ``(n_envs,)``
    :param step: environment steps so far, for the message
    :raises ValueError: with the environment, the step and the reward
    """
    if not all_finite(rewards):
        env = _first_bad_row(rewards.reshape(-1, 1))
        raise _error(f"the reward {rewards[env]}", env, step)


def _first_bad_row(numbers: Array) -> int | None:
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    return int(bad[0]) if len(bad) else None


def _error(what: str, env: int | None, step: int) -> ValueError:
    return ValueError(
        f"env gave {what}, in environment {env} at step {step:,}: fix env, or wrap it, so that rewards and "
        "observations are finite; check_finite=False trains on them, as SB3's DQN does"
    )
