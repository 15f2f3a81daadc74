"""How network outputs are interpreted and which targets they learn.

- ``heads``: what the outputs of an action mean, and their losses; ``losses``: the elementwise ones
- ``td``: targets, and the TD losses of a batch
- ``masks``: action masks
- ``support_monitor``: warns if the support of C51 does not contain the returns
"""

from sb3_scratch_dqn.values.heads import (
    HEADS,
    CategoricalHead,
    ExpectedHead,
    ImplicitQuantileHead,
    ImplicitQuantiles,
    QuantileHead,
    ValueHead,
    make_head,
)
from sb3_scratch_dqn.values.losses import LOSSES, Loss, huber, quantile_regression, squared
from sb3_scratch_dqn.values.masks import (
    INFO_KEY,
    MaskInInfo,
    Masks,
    check_masks,
    find_masks,
    has_masks,
    masked_argmax,
    masked_log_softmax,
    masks_of_next_states,
)
from sb3_scratch_dqn.values.support_monitor import SupportMonitor
from sb3_scratch_dqn.values.td import (
    GreedyTarget,
    MunchausenSettings,
    MunchausenTarget,
    Objective,
    Target,
    TargetNetwork,
    TDLosses,
    at_actions,
    make_target,
    predict,
    td_losses,
)

__all__ = [
    "HEADS",
    "INFO_KEY",
    "LOSSES",
    "CategoricalHead",
    "ExpectedHead",
    "GreedyTarget",
    "ImplicitQuantileHead",
    "ImplicitQuantiles",
    "Loss",
    "MaskInInfo",
    "Masks",
    "MunchausenSettings",
    "MunchausenTarget",
    "Objective",
    "QuantileHead",
    "SupportMonitor",
    "TDLosses",
    "Target",
    "TargetNetwork",
    "ValueHead",
    "at_actions",
    "check_masks",
    "find_masks",
    "has_masks",
    "huber",
    "make_head",
    "make_target",
    "masked_argmax",
    "masked_log_softmax",
    "masks_of_next_states",
    "predict",
    "quantile_regression",
    "squared",
    "td_losses",
]
