"""When the target network is updated."""


def sync_is_due(interval: int | tuple[int, str], n_envs: int, calls: int, episodes: int, ended: int) -> bool:
    """Return True if the target network must be updated after a call of ``env.step()``.

    :param interval: environment steps over all environments, as in SB3; or episodes, as ``(10, "episode")``
    :param n_envs: environment steps per call
    :param calls: calls of ``env.step()`` so far, including this one
    :param episodes: episodes finished so far, including those that this call ended
    :param ended: episodes that this call ended
    """
    if not isinstance(interval, tuple | list):
        return calls % max(interval // n_envs, 1) == 0
    frequency, _ = interval
    # With several environments one call may pass a multiple of the interval
    return episodes // frequency > (episodes - ended) // frequency
