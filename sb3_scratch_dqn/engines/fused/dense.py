r"""Networks of linear layers without autograd.

A layer with inputs :math:`X` ``(B, K)``, weights :math:`W` ``(N, K)`` and bias :math:`b` computes

.. math:: Z = X W^\top + b, \qquad H = f(Z),

where :math:`f` is the identity, ReLU or tanh. From the gradient :math:`\bar H` of the loss with respect to :math:`H`
follow

.. math:: \bar Z = \bar H \odot f'(Z), \qquad \bar W = \bar Z^\top X, \qquad \bar b = \bar Z^\top 1,
          \qquad \bar X = \bar Z W,

with :math:`f'(Z) = [H > 0]` for ReLU and :math:`1 - H^2` for tanh.

Noisy layers (:mod:`sb3_scratch_dqn.networks.noisy`) use :math:`W + \Sigma \odot \varepsilon \eta^\top` in the place of
:math:`W` and :math:`b + \sigma \odot \varepsilon` in that of :math:`b`. Then
:math:`\bar \Sigma = \bar W \odot \varepsilon \eta^\top` and :math:`\bar \sigma = \bar b \odot \varepsilon`.

Dueling streams compute :math:`Q_a = V + A_a - \frac{1}{|A|} \sum_{a'} A_{a'}`, so :math:`\bar V = \sum_a \bar Q_a` and
:math:`\bar A_a = \bar Q_a - \frac{1}{|A|} \sum_{a'} \bar Q_{a'}`.

Everything lies in memory that is allocated once: one set for each number of rows ``B``, which a *pass* holds. So a pass
is a list of calls with arguments that never change (:class:`NetworkPass`); making them is all that is left to do.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn

from sb3_scratch_dqn.engines.fused.products import Both, Call, Floats, both, empty, products_for, run
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.networks.q_network import DuelingStreams

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}

_ONE = np.float32(1)

# Up to about so many numbers NumPy's ReLU takes less time than PyTorch's, whose calls cost more
_FEW_NUMBERS = 4096

# Up to so many rows it is cheaper to bring noise to the inputs and outputs of a layer than to its weights
_FEW_ROWS = 16

# Numbers of rows for which a network keeps memory
_PASSES_KEPT = 16


def _activate(activation: str | None, h: Both) -> list[Call]:
    """Apply an activation in place."""
    if activation == "tanh":
        return [(np.tanh, (h.array, h.array))]
    if activation == "relu":
        if h.array.size > _FEW_NUMBERS:
            return [(th.relu_, (h.tensor,))]
        # An array of zeros, because NumPy takes three times as long with a single one
        return [(partial(np.maximum, out=h.array), (h.array, np.zeros_like(h.array)))]
    return []


def _back_through(activation: str | None, h: Both, g: Both) -> list[Call]:
    """Turn the gradient of an activation's outputs ``h`` into that of its inputs, in place."""
    if activation is None:
        return []
    if activation == "relu" and h.array.size > _FEW_NUMBERS:
        return [(partial(th.ops.aten.threshold_backward.grad_input, grad_input=g.tensor), (g.tensor, h.tensor, 0))]
    factor, outputs, gradients = np.empty_like(h.array), h.array, g.array
    if activation == "relu":
        return [(np.sign, (outputs, factor)), (np.multiply, (gradients, factor, gradients))]
    return [
        (np.multiply, (outputs, outputs, factor)),
        (np.subtract, (_ONE, factor, factor)),
        (np.multiply, (gradients, factor, gradients)),
    ]


class Noise:
    """What a noisy layer has besides weights and bias, and both with the noise of now.

    :param layer: the layer, whose parameters are read
    :param gradients: memory for the gradients of ``weight_sigma`` and ``bias_sigma``
    """

    def __init__(self, layer: NoisyLinear, gradients: tuple[Both, Both] | None) -> None:
        self.weight_sigma, self.bias_sigma = both(layer.weight_sigma.detach()), both(layer.bias_sigma.detach())
        self.gradients = gradients
        n_outputs, n_inputs = layer.out_features, layer.in_features
        self.weight, self.bias = empty(n_outputs, n_inputs), empty(n_outputs)
        drawn, scaled = empty(n_outputs + n_inputs), empty(n_outputs + n_inputs)
        self.outputs, self.inputs = scaled.array[:n_outputs], scaled.array[n_outputs:]
        self.draw: list[Call] = [  # the numbers that NoisyLinear.draw_noise() draws
            (drawn.tensor.normal_, ()),
            (np.abs, (drawn.array, scaled.array)),
            (np.sqrt, (scaled.array, scaled.array)),
            (np.copysign, (scaled.array, drawn.array, scaled.array)),
        ]
        self.bring_to_weights: list[Call] = [
            (np.multiply, (self.weight_sigma.array, self.outputs[:, None], self.weight.array)),
            (np.multiply, (self.weight.array, self.inputs, self.weight.array)),
            (np.add, (self.weight.array, layer.weight.detach().numpy(), self.weight.array)),
            (np.multiply, (self.bias_sigma.array, self.outputs, self.bias.array)),
            (np.add, (self.bias.array, layer.bias.detach().numpy(), self.bias.array)),
        ]

    def on_outputs(self, x: Floats, out: Floats) -> list[Call]:
        r"""Bring noise to the outputs of a layer: :math:`\varepsilon \odot (\Sigma (\eta \odot x) + \sigma)`."""
        noisy_x, noise = np.empty_like(x), np.empty_like(out)
        return [
            (np.multiply, (x, self.inputs, noisy_x)),
            (np.dot, (noisy_x, self.weight_sigma.array.T, noise)),
            (np.add, (noise, self.bias_sigma.array, noise)),
            (np.multiply, (noise, self.outputs, noise)),
            (np.add, (out, noise, out)),
        ]

    def back(self, weight_gradient: Floats, bias_gradient: Floats) -> list[Call]:
        """Gradients of the sigmas from those of weights and bias."""
        assert self.gradients is not None
        weight_sigma, bias_sigma = (gradient.array for gradient in self.gradients)
        return [
            (np.multiply, (weight_gradient, self.outputs[:, None], weight_sigma)),
            (np.multiply, (weight_sigma, self.inputs, weight_sigma)),
            (np.multiply, (bias_gradient, self.outputs, bias_sigma)),
        ]


class Layer:
    """A linear layer and the activation behind it.

    :param layer: its parameters are read where they lie
    :param activation: ``"relu"``, ``"tanh"``, or ``None``
    :param trains: whether there will be gradients, for which the parameters have ``grad``
    """

    def __init__(self, layer: nn.Linear | NoisyLinear, activation: str | None, trains: bool) -> None:
        def gradient(parameter: th.Tensor) -> Both:
            assert parameter.grad is not None
            return both(parameter.grad)

        self.weight, self.bias = both(layer.weight.detach()), both(layer.bias.detach())
        self.activation = activation
        self.gradients = (gradient(layer.weight), gradient(layer.bias)) if trains else None
        self.noise: Noise | None = None
        if isinstance(layer, NoisyLinear):
            own = (gradient(layer.weight_sigma), gradient(layer.bias_sigma)) if trains else None
            self.noise = Noise(layer, own)
        self.n_outputs, self.n_inputs = self.weight.array.shape

    def forward(self, x: Both, noisy: bool) -> tuple[Both, list[Call]]:
        """Outputs ``(B, N)``, and the calls that compute them from ``(B, K)``."""
        rows = len(x.array)
        out = empty(rows, self.n_outputs)
        noise = self.noise if noisy else None
        in_weights = noise is not None and rows > _FEW_ROWS
        weight, bias = (noise.weight, noise.bias) if noise is not None and in_weights else (self.weight, self.bias)
        calls = products_for(rows, self.n_inputs, self.n_outputs).outputs(x, weight, bias, out)
        if noise is not None and not in_weights:
            calls += noise.on_outputs(x.array, out.array)
        return out, calls + _activate(self.activation, out)

    def backward(self, x: Both, out: Both, g: Both, noisy: bool, to: Both | None) -> list[Call]:
        """The calls that write the gradients of the parameters.

        :param x: what :meth:`forward` got
        :param out: and gave
        :param g: the gradient of the outputs, ``(B, N)``, which is overwritten
        :param noisy: as for :meth:`forward`
        :param to: memory for the gradient of the inputs, ``(B, K)``; ``None`` if nobody wants it
        """
        assert self.gradients is not None
        rows, (weight_gradient, bias_gradient) = len(x.array), self.gradients
        products = products_for(rows, self.n_inputs, self.n_outputs)
        ones = np.ones(rows, dtype=np.float32)
        calls: list[Call] = [
            *_back_through(self.activation, out, g),
            products.weight_gradient(g, x, weight_gradient),
            (np.dot, (ones, g.array, bias_gradient.array)),
        ]
        weight = self.weight
        if noisy and self.noise is not None:
            calls += self.noise.back(weight_gradient.array, bias_gradient.array)
            weight = self.noise.weight
        return calls if to is None else [*calls, products.input_gradient(g, weight, to)]


class _Chain:
    """Layers one behind the other, on given inputs."""

    def __init__(self, layers: Sequence[Layer], x: Both, noisy: bool) -> None:
        self._layers, self._noisy = layers, noisy
        self._between = [x]
        self.forward: list[Call] = []
        for layer in layers:
            out, calls = layer.forward(self._between[-1], noisy)
            self._between.append(out)
            self.forward += calls
        self.out = self._between[-1]

    def backward(self, g: Both, to: Both | None) -> list[Call]:
        """The calls that write the gradients of the parameters; parameters as in :meth:`Layer.backward`."""
        calls: list[Call] = []
        for number in range(len(self._layers) - 1, -1, -1):
            x, out = self._between[number : number + 2]
            inputs = to if number == 0 else empty(*x.array.shape)
            calls += self._layers[number].backward(x, out, g, self._noisy, inputs)
            if inputs is not None:
                g = inputs
        return calls


class DenseNetwork:
    """The layers of a network, in the order in which noise is drawn for them.

    :param modules: linear layers, activations, and at the end perhaps dueling streams
    :param trains: whether there will be gradients
    """

    def __init__(self, modules: Sequence[nn.Module], trains: bool) -> None:
        self.trains = trains
        self.streams: tuple[list[Layer], list[Layer]] | None = None
        if type(modules[-1]) is DuelingStreams:
            streams = modules[-1]
            self.shape: tuple[int, int] = streams.shape
            self.trunk = _layers(modules[:-1], trains)
            self.streams = (_layers(list(streams.value), trains), _layers(list(streams.advantage), trains))
        else:
            self.trunk = _layers(modules, trains)
        layers = [*self.trunk, *(self.streams[0] if self.streams else []), *(self.streams[1] if self.streams else [])]
        self.n_outputs = int(np.prod(self.shape)) if self.streams else layers[-1].n_outputs
        first = layers[0] if self.streams is None or self.trunk else self.streams[0][0]
        self.n_inputs = first.n_inputs
        noises = [layer.noise for layer in layers if layer.noise is not None]
        self.noisy = bool(noises)
        self._draw = [call for noise in noises for call in noise.draw]
        self._bring_to_weights = [call for noise in noises for call in noise.bring_to_weights]
        self._passes: dict[tuple[int, bool], NetworkPass] = {}

    def passing(self, rows: int, noisy: bool) -> "NetworkPass":
        """A pass for so many rows.

        :param rows: ``B``
        :param noisy: whether noisy layers have noise
        """
        one = self._passes.get((rows, noisy))
        if one is None:
            while len(self._passes) >= _PASSES_KEPT:
                del self._passes[next(iter(self._passes))]
            one = self._passes[rows, noisy] = NetworkPass(self, rows, noisy)
        return one

    def draw_noise(self, rows: int, trains: bool) -> None:
        """Have other noise from now on.

        :param rows: of the passes that it is for
        :param trains: whether :meth:`NetworkPass.backward` will be called
        """
        if self.noisy:
            run(self._draw)
            if trains or rows > _FEW_ROWS:
                run(self._bring_to_weights)


class NetworkPass:
    """A network on so many rows.

    :param network: the network
    :param rows: ``B``
    :param noisy: whether noisy layers have noise

    It reads ``x``, ``(B, n_inputs)``, and writes ``out``, ``(B, A * K)``. To train, put the gradient of ``out`` into
    ``gradient`` after :meth:`forward`, which :meth:`backward` overwrites.
    """

    def __init__(self, network: DenseNetwork, rows: int, noisy: bool) -> None:
        self.x = empty(rows, network.n_inputs)
        trunk = _Chain(network.trunk, self.x, noisy)
        streams = [_Chain(layers, trunk.out, noisy) for layers in network.streams or ()]
        self._forward = [*trunk.forward, *(call for stream in streams for call in stream.forward)]
        self.out = trunk.out
        if streams:
            self.out = empty(rows, network.n_outputs)
            self._forward += _combine(streams[0].out.array, streams[1].out.array, self.out.array, network.shape)
        self.gradient, self._backward = self.out, []
        if network.trains:
            self.gradient = empty(rows, network.n_outputs)
            self._backward = self._make_backward(network, trunk, streams)

    def _make_backward(self, network: DenseNetwork, trunk: _Chain, streams: list[_Chain]) -> list[Call]:
        if not streams:
            return trunk.backward(self.gradient, to=None)
        of_outs = [empty(*stream.out.array.shape) for stream in streams]
        calls = _combine_back(self.gradient.array, of_outs[0].array, of_outs[1].array, network.shape)
        goes_on = bool(network.trunk)
        to = [empty(*trunk.out.array.shape) if goes_on else None for _ in streams]
        for stream, gradient, inputs in zip(streams, of_outs, to, strict=True):
            calls += stream.backward(gradient, inputs)
        first, second = to
        if first is not None and second is not None:
            calls += [(np.add, (first.array, second.array, first.array)), *trunk.backward(first, to=None)]
        return calls

    def forward(self, observations: npt.NDArray[Any]) -> Floats:
        """Outputs, ``(B, A * K)``, in memory that the next call overwrites.

        :param observations: ``(B, n_inputs)``, of any dtype
        """
        np.copyto(self.x.array, observations, casting="unsafe")
        run(self._forward)
        return self.out.array

    def backward(self) -> None:
        """Write the gradients of all parameters."""
        run(self._backward)


def _combine(value: Floats, advantage: Floats, out: Floats, shape: tuple[int, int]) -> list[Call]:
    r"""Dueling: :math:`V + A_a - \frac{1}{|A|} \sum_{a'} A_{a'}`."""
    by_action = (len(out), *shape)
    advantages, outs, offset = advantage.reshape(by_action), out.reshape(by_action), np.empty_like(value)
    return [
        (np.add.reduce, (advantages, 1, None, offset)),
        (np.multiply, (offset, np.float32(-1 / shape[0]), offset)),
        (np.add, (offset, value, offset)),
        (np.add, (advantages, offset[:, None], outs)),
    ]


def _combine_back(g: Floats, of_value: Floats, of_advantage: Floats, shape: tuple[int, int]) -> list[Call]:
    """Gradients of the streams' outputs."""
    by_action = (len(g), *shape)
    gradients, mean = g.reshape(by_action), np.empty_like(of_value)
    return [
        (np.add.reduce, (gradients, 1, None, of_value)),
        (np.multiply, (of_value, np.float32(1 / shape[0]), mean)),
        (np.subtract, (gradients, mean[:, None], of_advantage.reshape(by_action))),
    ]


def linear_layers(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, type[nn.Module] | None]]:
    """Each layer and the class of the activation behind it.

    :param modules: in their order
    """
    for number, module in enumerate(modules):
        if isinstance(module, nn.Linear | NoisyLinear):
            following: Any = modules[number + 1] if number + 1 < len(modules) else None
            is_activation = following is not None and not isinstance(
                following, nn.Linear | NoisyLinear | DuelingStreams
            )
            yield module, type(following) if is_activation else None


def _layers(modules: Sequence[nn.Module], trains: bool) -> list[Layer]:
    layers = []
    for module, activation in linear_layers(modules):
        assert isinstance(module, nn.Linear | NoisyLinear)
        layers.append(Layer(module, None if activation is None else ACTIVATIONS[activation], trains))
    return layers
