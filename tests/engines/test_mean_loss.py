"""The mean loss of the eager engine against the naive version, to the last bit."""

import pytest
import torch as th

from sb3_scratch_dqn.engines.eager import mean_loss
from sb3_scratch_dqn.values.heads import HEADS, ExpectedHead, make_head
from sb3_scratch_dqn.values.losses import LOSSES


@pytest.mark.parametrize("n_samples", [1, 32, 100])
@pytest.mark.parametrize(("name", "loss"), [(name, loss) for name in HEADS for loss in HEADS[name].supported_losses])
def test_the_mean_loss_and_its_gradient_are_those_of_the_losses(name, loss, n_samples):
    head = make_head(name, None)
    generator = th.Generator().manual_seed(0)
    flat = 3 * th.randn(n_samples, head.n_outputs, generator=generator)
    outputs = th.cat([flat, th.rand(n_samples, head.n_outputs, generator=generator)], dim=1) if name == "iqn" else flat
    target = 3 * th.randn(head.backup(outputs, *th.ones(2, n_samples)).shape, generator=generator)
    if name == "c51":
        target = target.softmax(dim=1)

    def gradient(of):
        leaf = outputs.clone().requires_grad_()
        loss = of(leaf)
        loss.backward()
        return loss.detach(), leaf.grad

    mean, gradient_of_mean = gradient(lambda leaf: mean_loss(leaf, target, head, LOSSES[loss]))
    naive, naive_gradient = gradient(lambda leaf: head.losses(leaf, target, LOSSES[loss])[0].mean())
    assert th.equal(mean, naive)
    assert th.equal(gradient_of_mean, naive_gradient)


def test_the_mean_loss_uses_overridden_and_patched_losses_of_a_head():
    class Doubled(ExpectedHead):
        def losses(self, outputs, target, loss):
            losses, priorities = super().losses(outputs, target, loss)
            return 2 * losses, priorities

    patched = ExpectedHead()
    patched.losses = Doubled().losses
    outputs, target = th.arange(8.0)[:, None], th.ones(8)
    plain = mean_loss(outputs, target, ExpectedHead(), LOSSES["mse"])
    assert mean_loss(outputs, target, Doubled(), LOSSES["mse"]) == 2 * plain
    assert mean_loss(outputs, target, patched, LOSSES["mse"]) == 2 * plain
    absolute = mean_loss(outputs, target, ExpectedHead(), lambda prediction, target: (prediction - target).abs())
    assert absolute == (outputs[:, 0] - target).abs().mean()
