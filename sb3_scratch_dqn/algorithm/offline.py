"""The loop of ``learn_offline()``: gradient steps on the replay buffer, with schedules, logs and callbacks."""

import time
from typing import Any

from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback, TrainFreq, TrainFrequencyUnit

from sb3_scratch_dqn.algorithm.gradient_steps import GradientStepAlgorithm
from sb3_scratch_dqn.algorithm.rollout import is_noop
from sb3_scratch_dqn.common import checks

# Gradient steps per call of train() without a callback: enough for engines that sample several batches at once
_STEPS_PER_CALL = 64


def target_interval(model: GradientStepAlgorithm, interval: Any) -> int:
    """Return the number of gradient steps between updates of the target network.

    :param model: the model, for its settings
    :param interval: the number that the caller chose; ``None`` for the number that ``learn()`` takes
    :raises ValueError: if it is not a count, or the model's setting counts episodes
    """
    if interval is not None:
        return checks.check_count("target_update_interval", interval)
    freq: TrainFreq = model.train_freq  # type: ignore[assignment]  # set up by now
    if isinstance(model.target_update_interval, tuple):
        raise ValueError(
            f"target_update_interval={model.target_update_interval!r} counts episodes, but learn_offline() "
            "has none: pass target_update_interval=, a number of gradient steps"
        )
    if freq.unit == TrainFrequencyUnit.EPISODE or model.gradient_steps < 0:
        return model.target_update_interval  # assume one gradient step per environment step
    calls = model.target_update_interval / (freq.frequency * model.n_envs)
    return max(1, round(calls * max(model.gradient_steps, 1)))


def learn(
    model: GradientStepAlgorithm,
    gradient_steps: int,
    callback: MaybeCallback,
    log_interval: int | None,
    progress_bar: bool,
    interval: int,
) -> None:
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.learn_offline`.

    :param model: the model, with transitions in its replay buffer
    :param gradient_steps: number of gradient steps
    :param callback: called after each of them
    :param log_interval: gradient steps between logs; ``None`` for no logs
    :param progress_bar: show a progress bar
    :param interval: gradient steps between updates of the target network
    """
    environment_steps, first = model.num_timesteps, model._n_updates
    model.num_timesteps = first
    callback = model._init_callback(callback, progress_bar=False)
    has_callback = not is_noop(callback)
    bar = _progress_bar(model, first + gradient_steps) if progress_bar else None
    # The local variables that callbacks see, as in learn()
    callback_locals: dict[str, Any] = {
        "self": model,
        "total_timesteps": first + gradient_steps,
        "log_interval": log_interval,
    }
    start, done, continue_training = time.monotonic(), 0, True
    model._update_current_progress_remaining(0, max(gradient_steps, 1))
    try:
        callback.on_training_start(callback_locals, globals())
        while continue_training and done < gradient_steps:
            steps = (
                1
                if has_callback
                else min(_STEPS_PER_CALL, gradient_steps - done, interval - model._n_updates % interval)
            )
            if log_interval is not None:
                steps = min(steps, log_interval - done % log_interval)
            model.train(gradient_steps=steps, batch_size=model.batch_size)
            done += steps
            model.num_timesteps = first + done
            model._update_current_progress_remaining(done, gradient_steps)
            if model._n_updates % interval == 0:
                model._current_engine().update_target(model.tau)
            if has_callback:
                callback.update_locals(callback_locals)
                continue_training = callback.on_step()
            if bar is not None:
                bar.pbar.update(steps)
            if log_interval is not None and done % log_interval == 0:
                _log(model, done, time.monotonic() - start)
        callback.on_training_end()
    finally:
        if bar is not None:
            bar.on_training_end()
        model.num_timesteps = environment_steps
        model._engine_checked = False


def _progress_bar(model: GradientStepAlgorithm, total: int) -> ProgressBarCallback:
    bar = ProgressBarCallback()
    bar.init_callback(model)
    bar.on_training_start({"total_timesteps": total}, {})
    return bar


def _log(model: GradientStepAlgorithm, done: int, seconds: float) -> None:
    model._log_metrics()
    model.logger.record("time/updates_per_second", int(done / max(seconds, 1e-9)))
    model.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
    model.logger.dump(step=model.num_timesteps)
