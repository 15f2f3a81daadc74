"""What a model consists of, declared once. Saving, loading and pickling follow from it.

============== ===================================================== ======== ======== ================================
group          what it holds                                         saved    pickled  restored by
============== ===================================================== ======== ======== ================================
``SETTINGS``   arguments of the constructor, spaces                  yes      yes      the file
``PROGRESS``   counters, statistics, last observation                yes      yes      the file
``CONTENT``    parameters, optimiser state, transitions              apart    yes      ``set_parameters()``,
                                                                                       ``load_replay_buffer()``
``RESOURCES``  environments, device, logger, monitors                no       yes      arguments of ``load()``
``DERIVED``    functions of the above                                no       no       ``_make_derived()``
``TRANSIENT``  what a call of ``learn()`` needs                      no       no       ``learn()``
============== ===================================================== ======== ======== ================================

An attribute that is in no group, such as one of a subclass, is saved and pickled, as SB3 does.
"""

from typing import Any

from sb3_scratch_dqn.algorithm.settings import PARSERS

SETTINGS = (
    *PARSERS,
    "policy_class",
    "replay_buffer_class",
    "observation_space",
    "action_space",
    "n_envs",
    "lr_schedule",  # built from learning_rate, unless the user assigned another one
    # Arguments of OffPolicyAlgorithm that ScratchDQN does not offer
    "action_noise",
    "use_sde",
    "sde_sample_freq",
    "use_sde_at_warmup",
)

PROGRESS = (
    "num_timesteps",
    "start_time",
    "_total_timesteps",
    "_num_timesteps_at_start",
    "_current_progress_remaining",
    "_n_updates",
    "_n_calls",
    "_env_steps",
    "_episode_num",
    "_episodes_finished",
    "_episodes_ended_now",
    "exploration_rate",
    "ep_info_buffer",
    "ep_success_buffer",
    "_last_obs",
    "_last_original_obs",
    "_last_episode_starts",
    "_mid_step",
)

CONTENT = ("policy", "replay_buffer")

RESOURCES = ("env", "_vec_normalize_env", "device", "_logger", "_custom_logger", "_support_monitor")

DERIVED = (
    "_stats_window_size",
    "_epsilon_schedule",
    "_epsilon_schedule_source",
    "_engine",
    "_engine_settings",
    "batch_norm_stats",
    "batch_norm_stats_target",
    "_matches_sb3",
    "_checks_finite",
)

TRANSIENT = (
    "_masks",
    "_read_masks",
    "_fast_actor",
    "_adds_directly",
    "_engine_checked",
    "_interrupts",
)

NOT_SAVED = (*CONTENT, *RESOURCES, *DERIVED, *TRANSIENT)
NOT_PICKLED = frozenset({*DERIVED, *TRANSIENT})


def pickled_attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes of a model that a pickle or a copy of it holds.

    :param attributes: all of them, by name
    """
    return {name: value for name, value in attributes.items() if name not in NOT_PICKLED}
