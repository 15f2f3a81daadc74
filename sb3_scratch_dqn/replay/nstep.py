r"""Folding several steps into one transition (Sutton 1988; Hessel et al. 2018, https://arxiv.org/abs/1710.02298).

From a step :math:`t` onwards, with :math:`k \le n` steps that belong to one episode,

.. math:: R_t = \sum_{i=0}^{k-1} \gamma^i r_{t+i}, \qquad
          \text{target} = R_t + \gamma^k (1 - \text{terminated}_{t+k-1}) V(s_{t+k}).

A window ends early at a termination, at a truncation (which bootstraps from the observation the truncated episode
ended with), where the environment was reset in the middle of an episode (likewise) and at the newest step of the ring,
whose continuation is not known yet. So every step of an episode can be a start, and no window reaches into another
episode.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.observations import Array, gather
from sb3_scratch_dqn.replay.stores import Store

Floats = npt.NDArray[np.float32]

# Steps of all windows together from which on it pays to look for the longest window first, and steps of each look
_MANY_STEPS, _STEPS_AT_ONCE = 2**16, 256


class Fold(NamedTuple):
    """``B`` windows of one or more steps, each array ``(B,)``.

    :param last_rows: the row of the last step of each window
    :param returns: discounted sum of the rewards
    :param discounts: ``gamma**k``, ``k`` the length of the window; one number where all are of one step
    :param terminated: 1 where the window ends in a terminal state, 0 elsewhere, truncations included
    """

    last_rows: Array
    returns: Floats
    discounts: Floats | np.float32
    terminated: Floats


def fold_one_step(
    store: Store,
    rows: Array,
    envs: Array,
    gamma: float,
    normalize_reward: Callable[[Floats], Floats],
) -> Fold:
    """Windows of one step; the parameters are those of :func:`fold_n_steps`."""
    return Fold(
        last_rows=rows,
        returns=normalize_reward(gather(store.rewards, rows, envs)),
        discounts=np.float32(gamma),
        terminated=gather(store.dones, rows, envs) * (1 - gather(store.timeouts, rows, envs)),
    )


def _longest_window(store: Store, rows: Array, envs: Array, n_steps: int, newest_row: int) -> int:
    """Return the length of the longest window, found piece by piece; parameters as in :func:`fold_n_steps`."""
    going_on = np.arange(len(rows))
    for begin in range(0, min(n_steps, store.capacity), _STEPS_AT_ONCE):
        end = min(begin + _STEPS_AT_ONCE, n_steps)
        ends = _ends(store, rows[going_on], envs[going_on], np.arange(begin, end), newest_row)[1]
        going_on = going_on[~ends.any(axis=1)]
        if len(going_on) == 0:
            return end
    return min(n_steps, store.capacity)


def _ends(store: Store, rows: Array, envs: Array, steps: Array, newest_row: int) -> tuple[Array, Array]:
    """Rows that hold the steps of windows, and whether the window ends with a step, each ``(B, len(steps))``."""
    window = (rows[:, None] + steps) % store.capacity
    # Rows that never held a step lie behind the newest one, where no window goes; any row may stand for them
    readable = np.minimum(window, store.rows - 1)
    columns = envs[:, None]
    ends = np.logical_or(store.dones[readable, columns], store.timeouts[readable, columns])
    ends |= store.cuts[readable, columns]
    ends |= window == newest_row
    return readable, ends


def fold_n_steps(
    store: Store,
    rows: Array,
    envs: Array,
    gamma: float,
    normalize_reward: Callable[[Floats], Floats],
    n_steps: int,
    newest_row: int,
) -> Fold:
    """Windows of up to ``n_steps`` steps.

    :param store: where the steps lie
    :param rows: the row of the first step of each window, ``(B,)``
    :param envs: the environment of each window, ``(B,)``
    :param gamma: the discount of one step
    :param normalize_reward: applied to every single reward before it is summed
    :param n_steps: the longest window
    :param newest_row: the row that was written last, where every window ends
    """
    if n_steps * len(rows) > _MANY_STEPS:
        n_steps = _longest_window(store, rows, envs, n_steps, newest_row)
    steps = np.arange(n_steps)
    readable, ends = _ends(store, rows, envs, steps, newest_row)  # (B, n_steps)
    last = np.where(ends.any(axis=1), ends.argmax(axis=1), n_steps - 1)  # (B,)
    inside = steps <= last[:, None]  # (B, n_steps)

    rewards = normalize_reward(store.rewards[readable, envs[:, None]])
    step_discounts = gamma ** steps.astype(np.float32)
    last_rows = (rows + last) % store.capacity
    return Fold(
        last_rows=last_rows,
        returns=(rewards * step_discounts * inside).sum(axis=1),
        discounts=gamma ** inside.sum(axis=1).astype(np.float32),
        terminated=gather(store.dones, last_rows, envs) * (1 - gather(store.timeouts, last_rows, envs)),
    )
