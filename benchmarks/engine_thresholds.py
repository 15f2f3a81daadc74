"""Measure both sides of each threshold of the engines, on the CPU.

Run it on an idle machine: ``python benchmarks/engine_thresholds.py [TABLE ...]``. A table takes a few seconds,
``targets`` about 20. Times are microseconds per call: the fastest tenth of the rounds. In each round all alternatives
take turns.
"""

import statistics
import sys
import time
from functools import partial

import numpy as np
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_scratch_dqn.engines.fused import dense, flat, products
from sb3_scratch_dqn.engines.fused.dense import DenseNetwork, Layer
from sb3_scratch_dqn.engines.fused.products import empty, numpy_tensor, run
from sb3_scratch_dqn.networks.noisy import NoisyLinear
from sb3_scratch_dqn.replay import ScratchReplayBuffer, batch_source

th.set_num_threads(1)

SCALE = 1.0  # of the time that measurements take


def quick(functions, seconds=0.25):
    """Return the 10th percentile of the time of each function in microseconds; each gets about ``seconds``."""
    repeats = []
    for function in functions:
        function()
        begin = time.perf_counter()
        function()
        seconds_per_call = max(time.perf_counter() - begin, 1e-7)
        repeats.append(max(1, int(SCALE * 5e-4 / seconds_per_call)))  # about 0.5 ms between two reads of the clock
    times = [[] for _ in functions]
    end = time.perf_counter() + SCALE * seconds * len(functions)
    while time.perf_counter() < end or len(times[0]) < 3:
        for function, repeat, record in zip(functions, repeats, times, strict=True):
            begin = time.perf_counter()
            for _ in range(repeat):
                function()
            record.append((time.perf_counter() - begin) / repeat * 1e6)
    return [sorted(record)[len(record) // 10] for record in times]


def table(title, columns, rows):
    print(f"\n{title}")
    print("  ".join(f"{column:>14}" for column in columns))
    for row in rows:
        print("  ".join(f"{cell:>14.2f}" if isinstance(cell, float) else f"{cell!s:>14}" for cell in row), flush=True)


def calls(*lists):
    """One function that makes all calls of some lists."""
    return partial(run, [call for part in lists for call in part])


def relu():
    """dense._NUMPY_RELU_MAX_SIZE = 4096 elements."""
    rows = []
    threshold = dense._NUMPY_RELU_MAX_SIZE
    for size in (1024, 2048, 4096, 8192, 16384, 65536):
        functions = []
        for limit in (10**9, 0):  # NumPy, PyTorch
            dense._NUMPY_RELU_MAX_SIZE = limit
            h, g = (numpy_tensor(th.randn(1, size)) for _ in range(2))
            functions += [
                calls(dense._activation_forward("relu", h)),
                calls(dense._activation_backward("relu", h, g)),
            ]
        f_np, b_np, f_th, b_th = quick(functions)
        rows.append((size, f_np, f_th, b_np, b_th, (f_np + b_np) / (f_th + b_th)))
    dense._NUMPY_RELU_MAX_SIZE = threshold
    table(
        f"ReLU: NumPy up to {threshold} elements, else PyTorch (us)",
        ("elements", "fwd numpy", "fwd torch", "bwd numpy", "bwd torch", "numpy/torch"), rows,
    )  # fmt: skip


def noise():
    """dense._OUTPUT_NOISE_MAX_ROWS = 16 rows: one forward pass with new noise."""
    threshold, rows = dense._OUTPUT_NOISE_MAX_ROWS, []
    for width in (64, 256):
        for n in (1, 2, 4, 8, 16, 32, 64):
            functions = []
            for limit in (10**9, 0):  # at the outputs, in the weights
                dense._OUTPUT_NOISE_MAX_ROWS = limit
                layer = Layer(NoisyLinear(width, width), "relu", trains=False)
                x = numpy_tensor(th.randn(n, width))
                _, forward = layer.forward(x, noisy=True)
                functions.append(
                    calls(layer.noise.draw_calls, layer.noise.perturb_calls if limit == 0 else [], forward)
                )
            outputs, weights = quick(functions, 0.1)
            rows.append((f"{width}x{width}", n, outputs, weights, outputs / weights))
    dense._OUTPUT_NOISE_MAX_ROWS = threshold
    table(
        f"Noise: at the outputs up to {threshold} rows, else in the weights (us per layer, noise drawn anew)",
        ("layer", "rows", "at outputs", "in weights", "out/weights"), rows,
    )  # fmt: skip


def mlp(n_inputs, width, n_actions=4):
    return [
        nn.Linear(n_inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_actions),
    ]  # fmt: skip


def passes():
    """dense._MAX_PASSES = 16 passes: creating one against using one, and the memory of one."""
    rows = []
    for width, n in ((64, 32), (256, 128), (256, 1024)):
        network = DenseNetwork(mlp(8, width), trains=False)
        observations = np.random.rand(n, 8).astype(np.float32)
        kept = network.pass_for(n, False)

        create = partial(dense.NetworkPass, network, n, False)
        create_us, use_us = quick([create, partial(kept.forward, observations)])
        floats = n * (8 + 2 * width + 4)
        rows.append((f"{width}x{width}", n, create_us, use_us, create_us / use_us, floats * 4 / 2**20))
    table(
        f"Passes: up to {dense._MAX_PASSES} kept (us; memory of one, without gradients)",
        ("network", "rows", "create", "forward", "create/fwd", "MiB"), rows,
    )  # fmt: skip


def targets():
    """fused.engine._MAX_TARGET_ROWS = 1024 rows and _MAX_TARGET_BYTES = 4 MiB: forward pass of the target network."""
    for n_inputs, width in ((8, 64), (8, 256), (1024, 256), (8192, 256)):
        rows, networks, ns = [], [], (128, 256, 512, 1024, 2048, 4096, 8192)
        for n in ns:
            if n * n_inputs > 2**23:
                continue
            network = DenseNetwork(mlp(n_inputs, width), trains=False)
            networks.append((n, network, np.random.rand(n, n_inputs).astype(np.float32)))
        functions = [partial(network.pass_for(n, False).forward, x) for n, network, x in networks]
        for (n, _, _), us in zip(networks, quick(functions, 0.12), strict=True):
            rows.append((n, n * n_inputs * 4 / 2**20, us, us / n))
        best = min(row[3] for row in rows)
        rows = [(*row, row[3] / best) for row in rows]
        table(
            f"Targets in one pass: {n_inputs} inputs, {width}x{width} (1024 rows or 4 MiB of inputs)",
            ("rows", "MiB of inputs", "us", "us per row", "vs best"), rows,
        )  # fmt: skip


def multiply():
    """products._NUMPY_MAX_MULTIPLICATIONS = 2**18."""
    rows = []
    for n, k, m in (
        (1, 64, 64), (8, 32, 32), (16, 64, 32), (32, 64, 64), (32, 64, 128), (64, 64, 64), (64, 128, 128),
        (64, 256, 256), (128, 256, 256), (128, 512, 512),
    ):  # fmt: skip
        x, w, b, g = (numpy_tensor(th.randn(size)) for size in ((n, k), (m, k), (m,), (n, m)))
        out, w_gradient, x_gradient = empty(n, m), empty(m, k), empty(n, k)
        functions = []
        for library in (products.NUMPY, products.TORCH, products.ONEDNN):
            if library is products.ONEDNN and not products._has_onednn():
                functions.append(lambda: time.sleep(1e-3))
                continue
            functions.append(
                calls(
                    library.outputs(x, w, b, out),
                    [library.weight_gradient(g, x, w_gradient), library.input_gradient(g, w, x_gradient)],
                )
            )
        numpy_us, torch_us, onednn_us = quick(functions, 0.12)
        size = n * k * m
        rows.append((f"{n}x{k}x{m}", f"2**{np.log2(size):.1f}", numpy_us, torch_us, onednn_us, numpy_us / torch_us))
    table(
        "Products: NumPy up to 2**18 multiplications (us for outputs and both gradients of a layer)",
        ("B x K x N", "mult.", "numpy", "torch", "onednn", "numpy/torch"), rows,
    )  # fmt: skip


def margin():
    """products._ONEDNN_MAX_TIME_RATIO = 0.8: spread of repeated timings as _fastest_by_timing makes them."""
    rows = []
    for n, k, m in ((64, 256, 256), (128, 256, 256), (128, 512, 512)):
        x, w, b = (numpy_tensor(th.rand(size)) for size in ((n, k), (m, k), (m,)))
        out = empty(n, m)
        same, other = [], []
        pairs = [(products.TORCH, products.TORCH, same)]
        if products._has_onednn():
            pairs.append((products.TORCH, products.ONEDNN, other))
        for _ in range(25):
            for left, right, ratios in pairs:
                best = []
                candidates = [library.outputs(x, w, b, out) for library in (left, right)]
                seconds = ([], [])
                for _ in range(9):
                    for candidate, record in zip(candidates, seconds, strict=True):
                        begin = time.perf_counter()
                        run(candidate)
                        record.append(time.perf_counter() - begin)
                best = [min(record[2:]) for record in seconds]
                ratios.append(best[1] / best[0])
        row = [f"{n}x{k}x{m}", min(same), statistics.median(same), max(same)]
        rows.append((*row, *((min(other), statistics.median(other), max(other)) if other else ("-", "-", "-"))))
    table(
        "Timing: ratio of two minima of 7 (25 repeats); oneDNN is used below 0.8",
        ("B x K x N", "torch/torch min", "median", "max", "onednn/torch min", "median", "max"), rows,
    )  # fmt: skip


def adam(tensors, n_denormal):
    tensors[2][:n_denormal] = 1e-39  # the step itself would decay them further
    settings = {"lr": 0.0, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.0, "eps": 1e-8}
    columns = ([tensor] for tensor in tensors)
    flat._fused_adam(*columns, [], [th.zeros(())], **settings, amsgrad=False, maximize=False)


def search(first):
    first[np.abs(first) < 0.0] = 0  # finds nothing, like most searches


def flush():
    """flat._FLUSH_EVERY = 128 steps of Adam, flat._FLUSH_THRESHOLD = 1e-31."""
    rows = []
    for width in (64, 256):
        modules = nn.Sequential(*mlp(8, width))
        size = sum(flat._padded_size(parameter) for parameter in modules.parameters())
        for share in (0.0, 0.25):
            tensors = [th.randn(size) for _ in range(2)] + [th.randn(size) * 1e-3, th.rand(size) * 1e-6]
            n_denormal = int(share * size)
            for tensor, value in zip(tensors[1:], (0.0, 1e-39, 1e-12), strict=True):
                tensor[:n_denormal] = value
            adam_us, search_us = quick([partial(adam, tensors, n_denormal), partial(search, tensors[2].numpy())])
            rows.append((f"{width}x{width}", size, share, adam_us, search_us, search_us / adam_us,
                         search_us / adam_us / flat._FLUSH_EVERY * 100))  # fmt: skip
    table(
        "Flush: a step of Adam, with a share of denormal first moments, against the search for small ones (us)",
        ("network", "parameters", "denormal", "Adam step", "search", "search/step", "% each 128"), rows,
    )  # fmt: skip


def small_buffer(shape, dtype, rows):
    space = spaces.Box(0, 255, shape, dtype) if dtype == np.uint8 else spaces.Box(-10, 10, shape, dtype)
    buffer = ScratchReplayBuffer(rows, space, spaces.Discrete(4), device="cpu", n_envs=1)
    rng = np.random.default_rng(0)
    for _ in range(rows):
        obs = rng.random((1, *shape)).astype(dtype)
        buffer.add(obs, obs, np.zeros((1, 1), np.int64), np.zeros(1, np.float32), np.zeros(1), [{}])
    return buffer


def sample(source, n_batches):
    source.sample(n_batches).split(n_batches)


def prefetch():
    """eager._MAX_PREFETCHED_BATCHES = 16 and eager._MAX_PREFETCHED_BYTES = 4 MiB."""
    for shape, dtype, batch_size in (((8,), np.float32, 64), ((4096,), np.float32, 32), ((4, 84, 84), np.uint8, 32)):
        buffer = small_buffer(shape, dtype, 2000)
        source = batch_source(buffer, batch_size, None, 0.99)
        counts = (1, 2, 4, 8, 16, 32, 64)

        rows = []
        each = 2 * batch_size * int(np.prod(shape)) * np.dtype(dtype).itemsize / 2**20
        for n, us in zip(counts, quick([partial(sample, source, n) for n in counts], 0.12), strict=True):
            rows.append((n, n * each, us / n))
        best = min(row[2] for row in rows)
        rows = [(*row, row[2] / best) for row in rows]
        table(
            f"Mini-batches sampled in one call: {shape} {np.dtype(dtype).name}, batch {batch_size} (16, or 4 MiB)",
            ("batches", "MiB", "us per batch", "vs best"), rows,
        )  # fmt: skip


def transfer():
    """cuda.feeds.UPDATES_PER_TRANSFER = 256: drawing on the host, and the bytes that are copied."""
    buffer = small_buffer((8,), np.float32, 2000)
    batch_size, rows = 64, []
    counts = (1, 4, 16, 64, 128, 256, 512, 1024)
    draws = [partial(buffer.sampler.draw, buffer, batch_size, n) for n in counts]
    for n, us in zip(counts, quick(draws, 0.1), strict=True):
        rows.append((n, us, us / n, n * batch_size * 8 / 1024))
    table(
        f"Random numbers drawn in one call (batch {batch_size}; copied to the device in one transfer)",
        ("updates", "us", "us per update", "KiB"), rows,
    )  # fmt: skip


TABLES = (relu, noise, passes, targets, multiply, margin, flush, prefetch, transfer)

if __name__ == "__main__":
    wanted = sys.argv[1:]
    print(f"torch {th.__version__}, numpy {np.__version__}, threads {th.get_num_threads()}")
    for measure in TABLES:
        if not wanted or measure.__name__ in wanted:
            begin = time.perf_counter()
            measure()
            print(f"[{measure.__name__}: {time.perf_counter() - begin:.1f} s]")
