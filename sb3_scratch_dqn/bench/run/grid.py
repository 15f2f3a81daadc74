"""Execute many runs in parallel, on this machine or on a cluster. Interrupted, the same call continues.

joblib distributes the runs over a backend. Each run is its own process (:mod:`sb3_scratch_dqn.bench.run.experiment`);
the process that calls :func:`run_all` writes the files.
"""

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel, parallel_config, register_parallel_backend

from sb3_scratch_dqn.bench.machine import ONE_THREAD, exit_with_parent, n_cores
from sb3_scratch_dqn.bench.results import Result, check_location, parse_result, read_result
from sb3_scratch_dqn.bench.run.plan import Run, json_hyperparameters, load_settings
from sb3_scratch_dqn.common.files import atomic_write, remove_stale_temporary

BACKENDS = ("loky", "ray", "dask")

_MAX_OUTPUT = 4_000  # characters kept of the output of a process that crashed
_CHUNK_SIZE = 2**16  # bytes per read
_MAX_READS_AFTER_EXIT = 2**20 // _CHUNK_SIZE  # no pipe holds more than a megabyte


def execute(run: Run) -> dict[str, Any]:
    """Execute a run in its own process and wait for it.

    :param run: the run
    :return: the content of its file, ready for JSON; the status is ``"failed"`` if the run or its process failed
    """
    try:
        answer, output, code = _run_process(run)
    except OSError as error:
        return _failed(run, type(error).__name__, f"its process could not be run: {error}")
    try:
        content: dict[str, Any] = json.loads(answer)
    except ValueError:
        return _failed(run, "ProcessEnded", f"its process ended with code {code}; it printed: {output}")
    return content


def _run_process(run: Run) -> tuple[bytes, str, int]:
    """Return the answer of the process of a run, the end of its output, and its exit status."""
    # The answer comes through a pipe, because the disk may be full
    read_end, write_end = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "sb3_scratch_dqn.bench.run.experiment", str(os.getpid()), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD},
                bufsize=0,
                pass_fds=[write_end],
            )
        finally:
            os.close(write_end)
        with process:
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # the process has exited already
                    process.stdin.write(json.dumps(asdict(run)).encode())
                process.stdin.close()
                answer, output = _read_pipes(process, read_end)
                process.wait()
            finally:
                process.kill()
    finally:
        os.close(read_end)
    return answer, output.decode(errors="replace")[-_MAX_OUTPUT:], process.returncode


def _read_pipes(process: subprocess.Popen[bytes], answer_pipe: int) -> tuple[bytes, bytes]:
    """Read the pipes of a process until it exits; return the whole answer and the end of the output."""
    assert process.stdout is not None
    output_pipe = process.stdout.fileno()
    received = {answer_pipe: b"", output_pipe: b""}
    # Child processes that outlive it may keep the pipes open and continue to print. After its exit, only what the pipes
    # hold by then is read
    reads_after_exit = 0
    with selectors.DefaultSelector() as selector:
        for pipe in received:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and reads_after_exit < _MAX_READS_AFTER_EXIT:
            exited = process.poll() is not None
            ready = selector.select(0 if exited else 0.2)
            if exited and not ready:
                break
            reads_after_exit += exited
            for pipe in (key.fd for key, _ in ready):
                chunk = os.read(pipe, _CHUNK_SIZE)
                if not chunk:
                    selector.unregister(pipe)
                received[pipe] += chunk
            received[output_pipe] = received[output_pipe][-4 * _MAX_OUTPUT :]  # a character has at most 4 bytes
    return received[answer_pipe], received[output_pipe]


def _failed(run: Run, kind: str, message: str) -> dict[str, Any]:
    """Return the content of the file of a run whose process gave no answer."""
    from sb3_scratch_dqn.bench.run.experiment import describe

    error = {"type": kind, "message": message, "traceback": ""}
    content = {**describe(run), "status": "failed", "settings": run.common_settings(), "error": error}
    return dict(json.loads(json.dumps(content)))  # with the types that a file gives


@contextmanager
def _parallel_backend(backend: str, address: str | None, jobs: int | None) -> Iterator[int]:
    """Make joblib use a backend.

    :param backend: one of ``BACKENDS``
    :param address: the address of the cluster to join; ``None`` starts one on this machine
    :param jobs: number of parallel runs; ``None`` for one per processor core
    :return: the number of parallel runs
    """
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "loky" and address is not None:
        raise ValueError(f"--address {address!r} cannot be used with --backend loky, which only uses this machine")
    package = {"loky": "joblib", "ray": "ray", "dask": "distributed"}[backend]
    if find_spec(package) is None:
        raise ValueError(f'--backend {backend} needs {package}: pip install "sb3-scratch-dqn[{backend}]"')
    start = {"loky": _loky, "ray": _ray, "dask": _dask}[backend]
    with start(address, jobs) as n_jobs, parallel_config(backend, n_jobs=n_jobs):
        yield n_jobs


@contextmanager
def _loky(_: str | None, jobs: int | None) -> Iterator[int]:
    original: Any = parallel.BACKENDS["loky"]

    class ExitWithParent(original):  # type: ignore[misc]  # joblib has no types
        # Without this, the workers wait five minutes for another run after this process was killed
        def configure(self, *args: Any, **settings: Any) -> Any:
            return super().configure(*args, **settings, initializer=exit_with_parent, initargs=(os.getpid(),))

    register_parallel_backend("loky", ExitWithParent)
    try:
        yield jobs or n_cores()
    finally:
        register_parallel_backend("loky", original)


@contextmanager
def _dask(address: str | None, jobs: int | None) -> Iterator[int]:
    from distributed import Client, LocalCluster

    if address is not None:
        with Client(address) as client:
            yield jobs or sum(client.ncores().values())
        return
    with LocalCluster(n_workers=jobs or n_cores(), threads_per_worker=1) as cluster, Client(cluster):
        yield jobs or n_cores()


@contextmanager
def _ray(address: str | None, jobs: int | None) -> Iterator[int]:
    import ray
    from ray.util.joblib.ray_backend import RayBackend

    class Unordered(RayBackend):  # type: ignore[misc]  # Ray has no types for it
        # Ray's backend can yield results as runs finish, but inherits False from joblib
        supports_return_generator = True

    register_parallel_backend("ray", Unordered)
    if address is None:
        ray.init(num_cpus=jobs or n_cores(), include_dashboard=False, log_to_driver=False)
    else:
        ray.init(address=address, log_to_driver=False)
    try:
        yield jobs or int(ray.cluster_resources()["CPU"])
    finally:
        ray.shutdown()


def run_all(
    plan: Sequence[Run],
    out: Path,
    backend: str = "loky",
    address: str | None = None,
    jobs: int | None = None,
    retry_failed: bool = False,
) -> list[Result]:
    """Execute the runs that have no file yet, and log the progress on stderr.

    :param plan: the runs
    :param out: the folder of results
    :param backend: one of ``BACKENDS``
    :param address: the address of the cluster to join; ``None`` starts one on this machine
    :param jobs: number of parallel runs; ``None`` for one per processor core
    :param retry_failed: whether to execute failed runs again
    :return: all results, in the order of the plan; a run whose file could not be written is not done
    :raises ValueError: if a file in the folder is broken, or was made with other settings
    """
    results = _read_existing(plan, out, retry_failed)
    remaining = [run for run in plan if run not in results]
    if len(remaining) < len(plan):
        _log(f"{len(plan) - len(remaining)} of {len(plan)} runs exist already")
    if not remaining:
        return [results[run] for run in plan]
    with _parallel_backend(backend, address, jobs) as n_jobs:
        _log(f"{len(remaining)} runs to execute, {n_jobs} in parallel; one line per finished run")
        progress = Progress(plan, results, n_jobs)
        execute_all = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        unwritten: dict[Run, Result] = {}
        for content in execute_all(delayed(_execute_numbered)(number, run) for number, run in enumerate(remaining)):
            run = remaining[content.pop("number")]
            result, write_error = _save(run, content, out)
            if write_error:
                _log(f"{out / run.path} {write_error}")
                unwritten[run] = replace(result, done=False, error=f"its file {write_error}")
            results[run] = result
            progress.log(run, result)
    if unwritten:
        _log(f"{len(unwritten)} of {len(plan)} runs could not be written; the same command repeats them")
    return [unwritten.get(run, results[run]) for run in plan]


def _read_existing(plan: Sequence[Run], out: Path, retry_failed: bool) -> dict[Run, Result]:
    results: dict[Run, Result] = {}
    for run in plan:
        path = out / run.path
        if path.exists():
            result = read_result(path)
            check_location(result, out)
            _check_settings(run, result, path)
            if result.done or not retry_failed:
                results[run] = result
    return results


def _check_settings(run: Run, result: Result, path: Path) -> None:
    """Raise ValueError unless a result was made with the settings of a run."""
    wanted, found = json.loads(json.dumps(run.common_settings())), dict(result.settings)
    if result.done:
        wanted.update(_current_hyperparameters(run.algo, run.env, run.same_settings))
        found.update(found.pop("hyperparameters"))
        wanted["deterministic_evaluation"] = found[
            "deterministic_evaluation"
        ]  # the Zoo derives it from the environment
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} was made with {name}={found.get(name)!r}, but now {name} is {wanted.get(name)!r}; "
                "choose another folder with --out, or use the same settings"
            )


@cache
def _current_hyperparameters(algo: str, env: str, same_settings: str | None) -> dict[str, Any]:
    run = Run(algo, env, 0, 1, 1, 1, same_settings=same_settings)
    return json_hyperparameters(load_settings(run, "")[1])


def _execute_numbered(number: int, run: Run) -> dict[str, Any]:
    return {**execute(run), "number": number}


def _save(run: Run, content: dict[str, Any], out: Path) -> tuple[Result, str | None]:
    """Write the file of a run; return its result, and why it could not be written or ``None``."""
    path = out / run.path
    try:
        result = parse_result(content, str(path))
    except ValueError as error:  # for example if a machine of the cluster has another version of this package
        content = _failed(run, "ValueError", str(error))
        result = parse_result(content, str(path))
    try:
        write_result(content, path)
    except OSError as error:  # not raised: a full disk may have space again when the other runs finish
        return result, f"could not be written: {error.strerror or error}"
    return result, None


def write_result(content: dict[str, Any], path: Path) -> None:
    """Write the file of a run atomically.

    :param content: the content, ready for JSON
    :param path: the path of the file
    :raises OSError: if it cannot be written; the error names the file
    """
    remove_stale_temporary(path.with_suffix(".tmp"))  # the temporary name that an earlier version used
    with atomic_write(path) as file:
        file.write(f"{_format_json(content)}\n".encode())


def _format_json(content: dict[str, Any]) -> str:
    """Return JSON with one line per entry, and lists, such as the columns of the curve, on one line."""

    def lines(entries: dict[str, Any], indent: str) -> str:
        parts = [
            f"{indent}{json.dumps(name)}: "
            + (
                f"{{\n{lines(value, indent + '  ')}\n{indent}}}"
                if isinstance(value, dict) and value
                else json.dumps(value)
            )
            for name, value in entries.items()
        ]
        return ",\n".join(parts)

    return f"{{\n{lines(content, '  ')}\n}}"


def _log(text: str) -> None:
    with suppress(OSError):  # stderr may be a file on a full disk while the results are on another disk
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Log finished runs, and estimate the remaining time.

    :param plan: all runs
    :param results: the results of finished runs; the caller adds to them
    :param jobs: number of parallel runs
    """

    def __init__(self, plan: Sequence[Run], results: dict[Run, Result], jobs: int) -> None:
        self._plan, self._results, self._jobs = plan, results, jobs

    def log(self, run: Run, result: Result) -> None:
        """Log a finished run.

        :param run: the run, whose result is in ``results``
        :param result: its result
        """
        width = len(str(len(self._plan)))
        if result.done:
            outcome = f"return {result.final:,.1f}, {result.steps_per_second:,.0f} steps/s"
        else:
            outcome = f"FAILED: {result.error}"
        _log(f"[{len(self._results):{width}}/{len(self._plan)}] {run}: {outcome}; {self._remaining_time()}")

    def _remaining_time(self) -> str:
        remaining = [run for run in self._plan if run not in self._results]
        if not remaining:
            return "all done"
        seconds = sum(map(self._estimate_seconds, remaining)) / min(self._jobs, len(remaining))
        return f"about {_format_duration(seconds)} left"

    def _estimate_seconds(self, run: Run) -> float:
        """Estimate the duration of a run from finished runs: same algorithm and environment, same environment, any."""
        for is_similar in (
            lambda finished: (finished.algo, finished.env) == (run.algo, run.env),
            lambda finished: finished.env == run.env,
            lambda finished: True,
        ):
            seconds_per_step = [
                result.wall_seconds / finished.n_timesteps
                for finished, result in self._results.items()
                if is_similar(finished) and result.done
            ]
            if seconds_per_step:
                return run.n_timesteps * sum(seconds_per_step) / len(seconds_per_step)
        return 0.0


def _format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
