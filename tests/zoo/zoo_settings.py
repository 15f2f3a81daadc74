"""Settings files as the Zoo reads them."""

from stable_baselines3.common.utils import LinearSchedule


def built(settings):
    """The algorithm that the Zoo would make of these settings, and the rest of them."""
    settings = dict(settings)
    rest = {name: settings.pop(name) for name in ("n_timesteps", "callback", "search_space") if name in settings}
    for name in ("policy_kwargs", "replay_buffer_kwargs"):
        if name in settings:
            settings[name] = eval(settings[name])
    if isinstance(settings.get("learning_rate"), str):
        settings["learning_rate"] = LinearSchedule(float(settings["learning_rate"].removeprefix("lin_")), 0.0, 1.0)
    return settings, rest
