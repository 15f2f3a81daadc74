"""When the target network follows the online one."""


def sync_is_due(interval: int | tuple[int, str], n_envs: int, calls: int, episodes: int, ended: int) -> bool:
    """Whether the target network is to be updated after a call of ``env.step()``.

    :param interval: environment steps, counted over all environments as in SB3; or episodes, as ``(10, "episode")``
    :param n_envs: environment steps in one call
    :param calls: calls of ``env.step()`` so far, this one included
    :param episodes: episodes finished so far, those that this call ended included
    :param ended: episodes that this call ended
    """
    if not isinstance(interval, tuple | list):
        return calls % max(interval // n_envs, 1) == 0
    frequency, _ = interval
    # Several environments may take the count past a multiple in one call
    return episodes // frequency > (episodes - ended) // frequency
