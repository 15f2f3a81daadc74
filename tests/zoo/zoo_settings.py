"""Read hyperparameters as the Zoo does."""

from stable_baselines3.common.utils import LinearSchedule


def parse_settings(settings):
    """Return the keyword arguments that the Zoo would pass to the algorithm, and the settings that it uses itself."""
    settings = dict(settings)
    rest = {name: settings.pop(name) for name in ("n_timesteps", "callback", "search_space") if name in settings}
    for name in ("policy_kwargs", "replay_buffer_kwargs"):
        if name in settings:
            settings[name] = eval(settings[name])
    if isinstance(settings.get("learning_rate"), str):
        settings["learning_rate"] = LinearSchedule(float(settings["learning_rate"].removeprefix("lin_")), 0.0, 1.0)
    return settings, rest
