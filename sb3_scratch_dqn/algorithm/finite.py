"""Whether what environments give is finite: one NaN in replay ends a training in NaN weights, long after its cause.

The checks run at every environment step, so they must cost next to nothing.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.observations import Array, Observation

# Up to so many numbers their sum in Python takes less time than np.isfinite(array).all(): for 4 of them 0.3 us, not 2
_FEW_NUMBERS = 64


def all_finite(array: Array) -> bool:
    """Return True if no number is NaN or infinite."""
    if array.dtype.kind != "f":  # whole numbers always are finite
        return True
    # Adding NaN or infinity never gives a finite number; a sum that overflows is looked at again
    if array.size <= _FEW_NUMBERS and math.isfinite(sum(array.ravel().tolist())):
        return True
    return bool(np.isfinite(array).all())


def look_finite(observation: Observation, rewards: Array) -> bool:
    """Return True if a glance shows that all numbers are finite; False if they must be looked at one by one.

    :param observation: ``(n_envs, ...)``, or a dict of such arrays
    :param rewards: ``(n_envs,)``
    """
    if type(observation) is not np.ndarray or observation.size > _FEW_NUMBERS:
        return False
    return math.isfinite(sum(observation.ravel().tolist(), sum(rewards.tolist())))


def check_observations(observations: Observation, step: int, env: int | None = None) -> None:
    """Refuse observations that are not finite.

    :param observations: ``(n_envs, ...)``, or a dict of such arrays; of one environment if ``env`` is given
    :param step: environment steps of the training so far, for the message
    :param env: the number of that environment
    :raises ValueError: naming the environment, the step, and the numbers
    """
    parts = observations.items() if isinstance(observations, dict) else [("", observations)]
    for key, part in parts:
        if not (isinstance(part, np.ndarray) and all_finite(part)):
            part = np.asarray(part)  # which may be a number, the observation of a Discrete space
            row = _first_bad_row(part.reshape(len(part) if env is None else 1, -1))
            if row is not None:
                of_key = f" whose {key!r}" if key else " that"
                raise _error(f"an observation{of_key} is not finite", row if env is None else env, step)


def check_rewards(rewards: npt.NDArray[np.floating[Any]], step: int) -> None:
    """Refuse rewards that are not finite.

    :param rewards: ``(n_envs,)``
    :param step: environment steps of the training so far, for the message
    :raises ValueError: naming the environment, the step and the reward
    """
    if not all_finite(rewards):
        env = _first_bad_row(rewards.reshape(-1, 1))
        raise _error(f"the reward {rewards[env]}", env, step)


def _first_bad_row(numbers: Array) -> int | None:
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    return int(bad[0]) if len(bad) else None


def _error(what: str, env: int | None, step: int) -> ValueError:
    return ValueError(
        f"env gave {what}, in environment {env} at step {step:,}: mend env, or wrap it, so that rewards and "
        "observations are finite numbers; check_finite=False trains on them, as SB3's DQN does"
    )
