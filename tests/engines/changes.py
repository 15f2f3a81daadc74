"""Modifications of a model by users, which must take effect in every engine."""

from copy import deepcopy

import torch as th
from torch import nn


def replace_target(model):
    model.policy.q_net_target = model.policy.make_q_net()
    model._create_aliases()


def replace_layer(model):
    for network in (model.q_net, model.q_net_target):
        network.q_net[1] = nn.Tanh()


def replace_memory(model):
    for parameter in model.q_net.parameters():
        parameter.data = parameter.data * 0.5


def write(model):
    with th.no_grad():
        for parameter in model.q_net.parameters():
            parameter.mul_(0.5)


def load_parameters(model):
    parameters = deepcopy(model.get_parameters())
    for value in parameters["policy.optimizer"]["state"].values():
        value["exp_avg"] *= 0.5
    for value in parameters["policy"].values():
        value *= 0.5
    model.set_parameters(parameters)


def clear_state(model):
    model.policy.optimizer.state.clear()


def replace_average(model):
    for state in model.policy.optimizer.state.values():
        state["exp_avg"] = th.zeros_like(state["exp_avg"])


def change_betas(model):
    model.policy.optimizer.param_groups[0]["betas"] = (0.5, 0.9)


def replace_optimizer(model):
    model.policy.optimizer = th.optim.Adam(model.q_net.parameters(), eps=1e-4)


def freeze(model):
    model.q_net.q_net[0].weight.requires_grad_(False)


def patch_loss(model):
    own = model.policy.head.losses
    model.policy.head.losses = lambda outputs, target, loss: own(outputs, 2 * target, loss)


def patch_outputs(model):
    own = model.q_net.outputs
    model.q_net.outputs = lambda obs: 2 * own(obs)


def no_gradients(model):
    model.policy.optimizer.zero_grad()


def change_settings(model):
    model.max_grad_norm, model.gamma, model.loss = 0.01, 0.5, "mse"


def change_rate(model):
    model.learning_rate = 1e-4
    model._setup_lr_schedule()


def edit_replay(model):
    model.replay_buffer.rewards[:] = 3.0


def other_replay(model):
    model.replay_buffer = deepcopy(model.replay_buffer)
    model.replay_buffer.rewards[:] = 3.0


def several_steps(model):
    model.replay_buffer.n_steps = 3
