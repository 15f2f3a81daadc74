r"""Multi-step returns (Sutton 1988; Hessel et al. 2018, https://arxiv.org/abs/1710.02298).

For a window that starts at step :math:`t` and has :math:`k \le n` steps of one episode,

.. math:: R_t = \sum_{i=0}^{k-1} \gamma^i r_{t+i}, \qquad
          \text{target} = R_t + \gamma^k (1 - \text{terminated}_{t+k-1}) V(s_{t+k}).

A window ends early at a termination, at a truncation, at a reset in the middle of an episode, and at the newest step of
the ring buffer, whose continuation is not known yet. Except after a termination, the return bootstraps from the next
observation of the window's last step. So every step of an episode can start a window, and no window reaches into
another episode.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sb3_scratch_dqn.replay.observations import Array, gather
from sb3_scratch_dqn.replay.stores import Store

Floats = npt.NDArray[np.float32]

# With more steps than this in all windows together, it is faster to find the longest window first, in chunks
_MANY_STEPS, _CHUNK_STEPS = 2**16, 256


class NStepReturns(NamedTuple):
    """The n-step returns of ``B`` windows of one or more steps.

    :param last_rows: row of the last step of each window, ``(B,)``
    :param returns: discounted sum of the rewards, ``(B,)``
    :param discounts: ``gamma**k``, ``k`` the length of the window, ``(B,)``; a scalar if all windows have one step
    :param terminated: 1 where the window ends in a terminal state, 0 elsewhere, ``(B,)``; truncations are
        terminal only with ``handle_timeout_termination=False``
    """

    last_rows: Array
    returns: Floats
    discounts: Floats | np.float32
    terminated: Floats


def one_step_returns(
    store: Store,
    rows: Array,
    envs: Array,
    gamma: float,
    normalize_reward: Callable[[Floats], Floats],
) -> NStepReturns:
    """Compute the returns of windows of one step; parameters as in :func:`n_step_returns`.

    :return: the returns, with ``rows`` as the last rows
    """
    return NStepReturns(
        last_rows=rows,
        returns=normalize_reward(gather(store.rewards, rows, envs)),
        discounts=np.float32(gamma),
        terminated=gather(store.dones, rows, envs) * (1 - gather(store.timeouts, rows, envs)),
    )


def _longest_window(store: Store, rows: Array, envs: Array, n_steps: int, newest_row: int) -> int:
    """Return the length of the longest window, searched in chunks; parameters as in :func:`n_step_returns`."""
    open_windows = np.arange(len(rows))
    for begin in range(0, min(n_steps, store.capacity), _CHUNK_STEPS):
        end = min(begin + _CHUNK_STEPS, n_steps)
        ends = _ends(store, rows[open_windows], envs[open_windows], np.arange(begin, end), newest_row)[1]
        open_windows = open_windows[~ends.any(axis=1)]
        if len(open_windows) == 0:
            return end
    return min(n_steps, store.capacity)


def _ends(store: Store, rows: Array, envs: Array, steps: Array, newest_row: int) -> tuple[Array, Array]:
    """Return the row of each step of the windows, and whether the window ends there, each ``(B, len(steps))``."""
    window = (rows[:, None] + steps) % store.capacity
    # Rows that are not allocated come after the newest row, beyond the end of every window: read any row instead
    window_rows = np.minimum(window, store.rows - 1)
    columns = envs[:, None]
    ends = np.logical_or(store.dones[window_rows, columns], store.timeouts[window_rows, columns])
    ends |= store.cuts[window_rows, columns]
    ends |= window == newest_row
    return window_rows, ends


def n_step_returns(
    store: Store,
    rows: Array,
    envs: Array,
    gamma: float,
    normalize_reward: Callable[[Floats], Floats],
    n_steps: int,
    newest_row: int,
) -> NStepReturns:
    """Compute the returns of windows of up to ``n_steps`` steps.

    :param store: the store that holds the steps
    :param rows: row of the first step of each window, ``(B,)``
    :param envs: environment of each window, ``(B,)``
    :param gamma: discount of one step
    :param normalize_reward: applied to each reward before the sum
    :param n_steps: maximum length of a window
    :param newest_row: the row that was written last, where every window ends
    :return: the returns of the windows
    """
    if n_steps * len(rows) > _MANY_STEPS:
        n_steps = _longest_window(store, rows, envs, n_steps, newest_row)
    steps = np.arange(n_steps)
    window_rows, ends = _ends(store, rows, envs, steps, newest_row)  # (B, n_steps)
    last = np.where(ends.any(axis=1), ends.argmax(axis=1), n_steps - 1)  # (B,)
    inside = steps <= last[:, None]  # (B, n_steps)

    rewards = normalize_reward(store.rewards[window_rows, envs[:, None]])
    step_discounts = gamma ** steps.astype(np.float32)
    last_rows = (rows + last) % store.capacity
    return NStepReturns(
        last_rows=last_rows,
        returns=(rewards * step_discounts * inside).sum(axis=1),
        discounts=gamma ** inside.sum(axis=1).astype(np.float32),
        terminated=gather(store.dones, last_rows, envs) * (1 - gather(store.timeouts, last_rows, envs)),
    )
