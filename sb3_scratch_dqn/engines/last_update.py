"""Outputs, target and gradient norm of the last update, for logging."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch as th

from sb3_scratch_dqn.values.heads import ValueHead


class LastUpdate(NamedTuple):
    """The last gradient step. Metrics are computed only when they are logged.

    :param head: interprets the outputs
    :param outputs: outputs of the online network for the actions taken, ``(B, K)``
    :param target: target for the outputs, as ``head.backup`` returned it
    :param grad_norm: norm of the gradient before clipping, a scalar
    """

    head: ValueHead
    outputs: th.Tensor | npt.NDArray[np.float32]
    target: th.Tensor | npt.NDArray[np.float32]
    grad_norm: th.Tensor | float

    def metrics(self) -> dict[str, float]:
        """Return means over the mini-batch, by the names that they are logged under."""
        outputs, target = th.as_tensor(self.outputs), th.as_tensor(self.target)
        means, target_means, deviations = self.head.moments(outputs, target)
        metrics = {
            "train/q_mean": means.mean().item(),
            "train/target_mean": target_means.mean().item(),
            "train/td_error": (target_means - means).abs().mean().item(),
            "train/grad_norm": float(self.grad_norm),
        }
        if deviations is not None:
            metrics["train/q_std"] = deviations.mean().item()
        return metrics
