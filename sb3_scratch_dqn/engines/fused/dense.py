r"""Forward and backward pass of networks of linear layers, without autograd.

A layer with inputs :math:`X` ``(B, K)``, weights :math:`W` ``(N, K)`` and bias :math:`b` computes

.. math:: Z = X W^\top + b, \qquad H = f(Z),

where :math:`f` is the identity, ReLU or tanh. The gradient :math:`\bar H` of the loss with respect to :math:`H` gives

.. math:: \bar Z = \bar H \odot f'(Z), \qquad \bar W = \bar Z^\top X, \qquad \bar b = \bar Z^\top 1,
          \qquad \bar X = \bar Z W,

with :math:`f'(Z) = [H > 0]` for ReLU and :math:`1 - H^2` for tanh.

Noisy layers (:mod:`sb3_scratch_dqn.networks.noisy`) have the weights :math:`W + \Sigma \odot \varepsilon \eta^\top` and
the bias :math:`b + \sigma \odot \varepsilon`. Then :math:`\bar \Sigma = \bar W \odot \varepsilon \eta^\top` and
:math:`\bar \sigma = \bar b \odot \varepsilon`.

Dueling streams compute :math:`Q_a = V + A_a - \frac{1}{|A|} \sum_{a'} A_{a'}`, so :math:`\bar V = \sum_a \bar Q_a` and
:math:`\bar A_a = \bar Q_a - \frac{1}{|A|} \sum_{a'} \bar Q_{a'}`.

All memory is allocated once per number of rows ``B``, in a :class:`NetworkPass`. A pass is a list of calls with fixed
arguments; executing it makes the calls.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from torch import nn

from sb3_scratch_dqn.engines.fused.products import Call, Floats, NumpyTensor, empty, numpy_tensor, products_for, run
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.networks.q_network import DuelingStreams

ACTIVATIONS: dict[type[nn.Module], str] = {nn.ReLU: "relu", nn.Tanh: "tanh"}

_ONE = np.float32(1)

# Elements up to which NumPy computes ReLU and its gradient: its calls have less overhead than PyTorch's, whose loops
# over the elements are faster. Measured, NumPy takes 0.7 of PyTorch's time for 2,048 elements, 0.9 for 4,096 and 1.1
# for 8,192 (benchmarks/engine_thresholds.py, one thread of an AMD EPYC, Zen 3, as all figures in engines)
_NUMPY_RELU_MAX_SIZE = 4096

# Rows up to which noise is added to the outputs of a layer, with a second product of that many rows, instead of to its
# weights, which takes the same time for any number of rows. Measured for 256 x 256, it takes 0.4 of that time with 1
# row, 0.9 with 8, 1.1 with 16 and 1.3 with 32; for 64 x 64, 0.9, 1.1, 1.1 and 1.3
_OUTPUT_NOISE_MAX_ROWS = 16

# Passes that a network keeps, one per number of rows: training and acting need few, and each has memory of its own, 0.3
# MiB for 128 rows of 256 x 256 and 2 MiB for 1,024. To create one takes as long as two forward passes of 32 rows of 64
# x 64
_MAX_PASSES = 16


def _activation_forward(activation: str | None, h: NumpyTensor) -> list[Call]:
    """Return the calls that apply an activation in place."""
    if activation == "tanh":
        return [(np.tanh, (h.array, h.array))]
    if activation == "relu":
        if h.array.size > _NUMPY_RELU_MAX_SIZE:
            return [(th.relu_, (h.tensor,))]
        # An array of zeros, because NumPy takes three times as long with a scalar
        return [(partial(np.maximum, out=h.array), (h.array, np.zeros_like(h.array)))]
    return []


def _activation_backward(activation: str | None, h: NumpyTensor, g: NumpyTensor) -> list[Call]:
    """Return the calls that turn the gradient of an activation's outputs ``h`` into that of its inputs, in place."""
    if activation is None:
        return []
    if activation == "relu" and h.array.size > _NUMPY_RELU_MAX_SIZE:
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
    """The noise of a noisy layer, and the layer's perturbed weights and bias.

    :param layer: the layer, whose parameters are read
    :param gradients: memory for the gradients of ``weight_sigma`` and ``bias_sigma``
    """

    def __init__(self, layer: NoisyLinear, gradients: tuple[NumpyTensor, NumpyTensor] | None) -> None:
        self.weight_sigma = numpy_tensor(layer.weight_sigma.detach())
        self.bias_sigma = numpy_tensor(layer.bias_sigma.detach())
        self.gradients = gradients
        n_outputs, n_inputs = layer.out_features, layer.in_features
        self.weight, self.bias = empty(n_outputs, n_inputs), empty(n_outputs)
        drawn, scaled = empty(n_outputs + n_inputs), empty(n_outputs + n_inputs)
        self.outputs, self.inputs = scaled.array[:n_outputs], scaled.array[n_outputs:]
        self.draw_calls: list[Call] = [  # the numbers that NoisyLinear.sample_parameters() draws
            (drawn.tensor.normal_, ()),
            (np.abs, (drawn.array, scaled.array)),
            (np.sqrt, (scaled.array, scaled.array)),
            (np.copysign, (scaled.array, drawn.array, scaled.array)),
        ]
        self.perturb_calls: list[Call] = [  # write weight and bias
            (np.multiply, (self.weight_sigma.array, self.outputs[:, None], self.weight.array)),
            (np.multiply, (self.weight.array, self.inputs, self.weight.array)),
            (np.add, (self.weight.array, layer.weight.detach().numpy(), self.weight.array)),
            (np.multiply, (self.bias_sigma.array, self.outputs, self.bias.array)),
            (np.add, (self.bias.array, layer.bias.detach().numpy(), self.bias.array)),
        ]

    def add_to_outputs(self, x: Floats, out: Floats) -> list[Call]:
        r"""Return the calls that add noise to outputs: :math:`\varepsilon \odot (\Sigma (\eta \odot x) + \sigma)`."""
        noisy_x, noise = np.empty_like(x), np.empty_like(out)
        return [
            (np.multiply, (x, self.inputs, noisy_x)),
            (np.dot, (noisy_x, self.weight_sigma.array.T, noise)),
            (np.add, (noise, self.bias_sigma.array, noise)),
            (np.multiply, (noise, self.outputs, noise)),
            (np.add, (out, noise, out)),
        ]

    def backward(self, weight_gradient: Floats, bias_gradient: Floats) -> list[Call]:
        """Return the calls that compute the gradients of the sigmas from those of weights and bias."""
        assert self.gradients is not None
        weight_sigma, bias_sigma = (gradient.array for gradient in self.gradients)
        return [
            (np.multiply, (weight_gradient, self.outputs[:, None], weight_sigma)),
            (np.multiply, (weight_sigma, self.inputs, weight_sigma)),
            (np.multiply, (bias_gradient, self.outputs, bias_sigma)),
        ]


class Layer:
    """A linear layer and the activation after it.

    :param layer: the module; its parameters are read in place
    :param activation: ``"relu"``, ``"tanh"``, or ``None``
    :param trains: True if gradients will be computed; the parameters must have ``grad`` then
    """

    def __init__(self, layer: nn.Linear | NoisyLinear, activation: str | None, trains: bool) -> None:
        def gradient(parameter: th.Tensor) -> NumpyTensor:
            assert parameter.grad is not None
            return numpy_tensor(parameter.grad)

        self.weight, self.bias = numpy_tensor(layer.weight.detach()), numpy_tensor(layer.bias.detach())
        self.activation = activation
        self.gradients = (gradient(layer.weight), gradient(layer.bias)) if trains else None
        self.noise: Noise | None = None
        if isinstance(layer, NoisyLinear):
            sigma_gradients = (gradient(layer.weight_sigma), gradient(layer.bias_sigma)) if trains else None
            self.noise = Noise(layer, sigma_gradients)
        self.n_outputs, self.n_inputs = self.weight.array.shape

    def forward(self, x: NumpyTensor, noisy: bool) -> tuple[NumpyTensor, list[Call]]:
        """Return memory for the outputs, ``(B, N)``, and the calls that compute them from ``(B, K)``."""
        rows = len(x.array)
        out = empty(rows, self.n_outputs)
        noise = self.noise if noisy else None
        in_weights = noise is not None and rows > _OUTPUT_NOISE_MAX_ROWS
        weight, bias = (noise.weight, noise.bias) if noise is not None and in_weights else (self.weight, self.bias)
        calls = products_for(rows, self.n_inputs, self.n_outputs).outputs(x, weight, bias, out)
        if noise is not None and not in_weights:
            calls += noise.add_to_outputs(x.array, out.array)
        return out, calls + _activation_forward(self.activation, out)

    def backward(
        self, x: NumpyTensor, out: NumpyTensor, g: NumpyTensor, noisy: bool, x_gradient: NumpyTensor | None
    ) -> list[Call]:
        """Return the calls that write the gradients of the parameters.

        :param x: inputs of :meth:`forward`
        :param out: outputs of :meth:`forward`
        :param g: gradient of the outputs, ``(B, N)``, which is overwritten
        :param noisy: as for :meth:`forward`
        :param x_gradient: memory for the gradient of the inputs, ``(B, K)``; ``None`` if it is not needed
        """
        assert self.gradients is not None
        rows, (weight_gradient, bias_gradient) = len(x.array), self.gradients
        products = products_for(rows, self.n_inputs, self.n_outputs)
        ones = np.ones(rows, dtype=np.float32)
        calls: list[Call] = [
            *_activation_backward(self.activation, out, g),
            products.weight_gradient(g, x, weight_gradient),
            (np.dot, (ones, g.array, bias_gradient.array)),
        ]
        weight = self.weight
        if noisy and self.noise is not None:
            calls += self.noise.backward(weight_gradient.array, bias_gradient.array)
            weight = self.noise.weight
        return calls if x_gradient is None else [*calls, products.input_gradient(g, weight, x_gradient)]


class _LayerSequence:
    """A sequence of layers on given inputs."""

    def __init__(self, layers: Sequence[Layer], x: NumpyTensor, noisy: bool) -> None:
        self._layers, self._noisy = layers, noisy
        self._activations = [x]
        self.forward: list[Call] = []
        for layer in layers:
            out, calls = layer.forward(self._activations[-1], noisy)
            self._activations.append(out)
            self.forward += calls
        self.out = self._activations[-1]

    def backward(self, g: NumpyTensor, x_gradient: NumpyTensor | None) -> list[Call]:
        """Return the calls that write the gradients of the parameters; parameters as in :meth:`Layer.backward`."""
        calls: list[Call] = []
        for index in range(len(self._layers) - 1, -1, -1):
            x, out = self._activations[index : index + 2]
            input_gradient = x_gradient if index == 0 else empty(*x.array.shape)
            calls += self._layers[index].backward(x, out, g, self._noisy, input_gradient)
            if input_gradient is not None:
                g = input_gradient
        return calls


class DenseNetwork:
    """The layers of a network, in the order in which noise is drawn for them.

    :param modules: linear layers and activations, optionally followed by dueling streams
    :param trains: True if gradients will be computed
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
        self._draw_calls = [call for noise in noises for call in noise.draw_calls]
        self._perturb_calls = [call for noise in noises for call in noise.perturb_calls]
        self._passes: dict[tuple[int, bool], NetworkPass] = {}

    def pass_for(self, rows: int, noisy: bool) -> "NetworkPass":
        """Return the pass for this number of rows; create it at the first call.

        :param rows: ``B``
        :param noisy: True for noise in noisy layers
        """
        network_pass = self._passes.get((rows, noisy))
        if network_pass is None:
            while len(self._passes) >= _MAX_PASSES:
                del self._passes[next(iter(self._passes))]
            network_pass = self._passes[rows, noisy] = NetworkPass(self, rows, noisy)
        return network_pass

    def draw_noise(self, rows: int, trains: bool) -> None:
        """Draw new noise for noisy layers; do nothing without them.

        :param rows: ``B`` of the passes that will use it
        :param trains: True if :meth:`NetworkPass.backward` will be called
        """
        if self.noisy:
            run(self._draw_calls)
            if trains or rows > _OUTPUT_NOISE_MAX_ROWS:
                run(self._perturb_calls)


class NetworkPass:
    """Forward and backward pass of a network for a fixed number of rows.

    :param network: the network
    :param rows: ``B``
    :param noisy: True for noise in noisy layers

    It reads ``x``, ``(B, n_inputs)``, and writes ``out``, ``(B, A * K)``. To train, write the gradient of ``out`` into
    ``gradient`` after :meth:`forward`; :meth:`backward` overwrites it.
    """

    def __init__(self, network: DenseNetwork, rows: int, noisy: bool) -> None:
        self.x = empty(rows, network.n_inputs)
        trunk = _LayerSequence(network.trunk, self.x, noisy)
        streams = [_LayerSequence(layers, trunk.out, noisy) for layers in network.streams or ()]
        self._forward = [*trunk.forward, *(call for stream in streams for call in stream.forward)]
        self.out = trunk.out
        if streams:
            self.out = empty(rows, network.n_outputs)
            self._forward += _dueling_forward(streams[0].out.array, streams[1].out.array, self.out.array, network.shape)
        self.gradient, self._backward = self.out, []
        if network.trains:
            self.gradient = empty(rows, network.n_outputs)
            self._backward = self._make_backward(network, trunk, streams)

    def _make_backward(self, network: DenseNetwork, trunk: _LayerSequence, streams: list[_LayerSequence]) -> list[Call]:
        if not streams:
            return trunk.backward(self.gradient, x_gradient=None)
        stream_gradients = [empty(*stream.out.array.shape) for stream in streams]
        value_gradient, advantage_gradient = stream_gradients
        calls = _dueling_backward(self.gradient.array, value_gradient.array, advantage_gradient.array, network.shape)
        has_trunk = bool(network.trunk)
        trunk_gradients = [empty(*trunk.out.array.shape) if has_trunk else None for _ in streams]
        for stream, gradient, trunk_gradient in zip(streams, stream_gradients, trunk_gradients, strict=True):
            calls += stream.backward(gradient, trunk_gradient)
        first, second = trunk_gradients
        if first is not None and second is not None:
            calls += [(np.add, (first.array, second.array, first.array)), *trunk.backward(first, x_gradient=None)]
        return calls

    def forward(self, observations: npt.NDArray[Any]) -> Floats:
        """Return the outputs, ``(B, A * K)``, in memory that the next call overwrites.

        :param observations: ``(B, n_inputs)``, of any dtype
        """
        np.copyto(self.x.array, observations, casting="unsafe")
        run(self._forward)
        return self.out.array

    def backward(self) -> None:
        """Write the gradients of all parameters."""
        run(self._backward)


def _dueling_forward(value: Floats, advantage: Floats, out: Floats, shape: tuple[int, int]) -> list[Call]:
    r"""Return the calls that write :math:`V + A_a - \frac{1}{|A|} \sum_{a'} A_{a'}`."""
    by_action = (len(out), *shape)
    advantages, outs, offset = advantage.reshape(by_action), out.reshape(by_action), np.empty_like(value)
    return [
        (np.add.reduce, (advantages, 1, None, offset)),
        (np.multiply, (offset, np.float32(-1 / shape[0]), offset)),
        (np.add, (offset, value, offset)),
        (np.add, (advantages, offset[:, None], outs)),
    ]


def _dueling_backward(
    g: Floats, value_gradient: Floats, advantage_gradient: Floats, shape: tuple[int, int]
) -> list[Call]:
    """Return the calls that write the gradients of the streams' outputs."""
    by_action = (len(g), *shape)
    gradients, mean = g.reshape(by_action), np.empty_like(value_gradient)
    return [
        (np.add.reduce, (gradients, 1, None, value_gradient)),
        (np.multiply, (value_gradient, np.float32(1 / shape[0]), mean)),
        (np.subtract, (gradients, mean[:, None], advantage_gradient.reshape(by_action))),
    ]


def linear_layers(modules: Sequence[nn.Module]) -> Iterator[tuple[nn.Module, type[nn.Module] | None]]:
    """Yield each linear layer and the class of the activation after it, or ``None``.

    :param modules: in the order of the forward pass
    """
    for index, module in enumerate(modules):
        if isinstance(module, nn.Linear | NoisyLinear):
            following: Any = modules[index + 1] if index + 1 < len(modules) else None
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
