"""Training on what the replay buffer holds, without an environment step."""

import time
from typing import TYPE_CHECKING, Any

from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.type_aliases import MaybeCallback, TrainFreq, TrainFrequencyUnit

from sb3_scratch_dqn.algorithm.rollout import is_noop
from sb3_scratch_dqn.common import checks

if TYPE_CHECKING:
    from sb3_scratch_dqn.algorithm.dqn import ScratchDQN

# Gradient steps in one call where no callback is to see each: many enough for engines that draw batches ahead
_STEPS_AT_ONCE = 64


def target_interval(model: "ScratchDQN", interval: Any) -> int:
    """How many gradient steps there are between updates of the target network.

    :param model: whose settings count
    :param interval: what the caller wants; ``None`` for as many as in training with an environment
    :raises ValueError: if that is no count, or is counted in episodes
    """
    if interval is not None:
        return checks.check_count("target_update_interval", interval)
    freq: TrainFreq = model.train_freq  # type: ignore[assignment]  # set up by now
    if isinstance(model.target_update_interval, tuple):
        raise ValueError(
            f"target_update_interval={model.target_update_interval!r} counts episodes, which there are none of here: "
            "pass a number of gradient steps to learn_offline()"
        )
    if freq.unit == TrainFrequencyUnit.EPISODE or model.gradient_steps < 0:
        return model.target_update_interval  # one gradient step an environment step
    calls = model.target_update_interval / (freq.frequency * model.n_envs)
    return max(1, round(calls * max(model.gradient_steps, 1)))


def learn(
    model: "ScratchDQN",
    gradient_steps: int,
    callback: MaybeCallback,
    log_interval: int | None,
    progress_bar: bool,
    interval: int,
) -> None:
    """Implement :meth:`sb3_scratch_dqn.ScratchDQN.learn_offline`.

    :param model: whose replay buffer holds transitions
    :param gradient_steps: how many
    :param callback: called after each of them
    :param log_interval: gradient steps between logs; ``None`` for none
    :param progress_bar: show one
    :param interval: gradient steps between updates of the target network
    """
    environment_steps, first = model.num_timesteps, model._n_updates
    model.num_timesteps = first
    callback = model._init_callback(callback, progress_bar=False)
    watched = not is_noop(callback)
    bar = _progress_bar(model, first + gradient_steps) if progress_bar else None
    # What callbacks see, as from learn()
    seen: dict[str, Any] = {"self": model, "total_timesteps": first + gradient_steps, "log_interval": log_interval}
    begin, done, going_on = time.monotonic(), 0, True
    model._update_current_progress_remaining(0, max(gradient_steps, 1))
    try:
        callback.on_training_start(seen, globals())
        while going_on and done < gradient_steps:
            steps = 1 if watched else min(_STEPS_AT_ONCE, gradient_steps - done, interval - model._n_updates % interval)
            if log_interval is not None:
                steps = min(steps, log_interval - done % log_interval)
            model.train(gradient_steps=steps, batch_size=model.batch_size)
            done += steps
            model.num_timesteps = first + done
            model._update_current_progress_remaining(done, gradient_steps)
            if model._n_updates % interval == 0:
                model._current_engine().update_target(model.tau)
            if watched:
                callback.update_locals(seen)
                going_on = callback.on_step()
            if bar is not None:
                bar.pbar.update(steps)
            if log_interval is not None and done % log_interval == 0:
                _log(model, done, time.monotonic() - begin)
        callback.on_training_end()
    finally:
        if bar is not None:
            bar.on_training_end()
        model.num_timesteps = environment_steps
        model._engine_checked = False


def _progress_bar(model: "ScratchDQN", total: int) -> ProgressBarCallback:
    bar = ProgressBarCallback()
    bar.init_callback(model)
    bar.on_training_start({"total_timesteps": total}, {})
    return bar


def _log(model: "ScratchDQN", done: int, seconds: float) -> None:
    model._log_metrics()
    model.logger.record("time/updates_per_second", int(done / max(seconds, 1e-9)))
    model.logger.record("time/time_elapsed", int(seconds), exclude="tensorboard")
    model.logger.dump(step=model.num_timesteps)
