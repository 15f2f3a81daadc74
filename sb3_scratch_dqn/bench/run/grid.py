"""Many runs, on this machine or on a cluster, that can be stopped and gone on with.

joblib hands the runs out, whatever it is that works on them; each run is a process of its own
(:mod:`sb3_scratch_dqn.bench.run.experiment`), and this process writes the files.
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

from sb3_scratch_dqn.bench.machine import ONE_THREAD, end_with, n_cores
from sb3_scratch_dqn.bench.results import Result, check_place, read_result, result_of
from sb3_scratch_dqn.bench.run.plan import Run, experiment, hyperparameters
from sb3_scratch_dqn.common.files import atomic_write, remove_stale_temporary

BACKENDS = ("loky", "ray", "dask")

_KEPT_OF_OUTPUT = 4_000  # characters, of a process that broke down
_READ_AT_ONCE = 2**16  # bytes
_MOST_READS_OF_A_PIPE = 2**20 // _READ_AT_ONCE  # no pipe holds more than a megabyte


def execute(run: Run) -> dict[str, Any]:
    """Execute a run in a process of its own and wait for it.

    :param run: the run
    :return: what is known of it, ready for JSON; its status is ``"failed"`` if something went wrong
    """
    try:
        answer, printed, code = _answer(run)
    except OSError as error:
        return _failed(run, type(error).__name__, f"its process could not be run: {error}")
    try:
        known: dict[str, Any] = json.loads(answer)
    except ValueError:
        return _failed(run, "ProcessEnded", f"its process ended with code {code}; it printed: {printed}")
    return known


def _answer(run: Run) -> tuple[bytes, str, int]:
    """What the process of a run answers, the last of what it prints, and its exit status."""
    # Pipes need no room on a disk
    receiving, sending = os.pipe()
    try:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "sb3_scratch_dqn.bench.run.experiment", str(os.getpid()), str(sending)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD},
                bufsize=0,
                pass_fds=[sending],
            )
        finally:
            os.close(sending)
        with process:
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError):  # it has ended already
                    process.stdin.write(json.dumps(asdict(run)).encode())
                process.stdin.close()
                answer, printed = _receive(process, receiving)
                process.wait()
            finally:
                process.kill()
    finally:
        os.close(receiving)
    return answer, printed.decode(errors="replace")[-_KEPT_OF_OUTPUT:], process.returncode


def _receive(process: subprocess.Popen[bytes], answers: int) -> tuple[bytes, bytes]:
    """Read what comes through the pipes of a process until it has ended, all of the answer and the last of the rest."""
    assert process.stdout is not None
    output = process.stdout.fileno()
    received = {answers: b"", output: b""}
    # Processes that it leaves behind may keep the pipes open, and may go on printing. After its end, only what is in
    # the pipes already is read
    reads_after_end = 0
    with selectors.DefaultSelector() as selector:
        for pipe in received:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map() and reads_after_end < _MOST_READS_OF_A_PIPE:
            ended = process.poll() is not None
            ready = selector.select(0 if ended else 0.2)
            if ended and not ready:
                break
            reads_after_end += ended
            for pipe in (key.fd for key, _ in ready):
                chunk = os.read(pipe, _READ_AT_ONCE)
                if not chunk:
                    selector.unregister(pipe)
                received[pipe] += chunk
            received[output] = received[output][-4 * _KEPT_OF_OUTPUT :]  # a character has 4 bytes at most
    return received[answers], received[output]


def _failed(run: Run, kind: str, message: str) -> dict[str, Any]:
    """What is known of a run that left nothing itself."""
    from sb3_scratch_dqn.bench.run.experiment import describe

    error = {"type": kind, "message": message, "traceback": ""}
    known = {**describe(run), "status": "failed", "settings": run.conditions(), "error": error}
    return dict(json.loads(json.dumps(known)))  # as it would be in the file


@contextmanager
def _cluster(backend: str, address: str | None, jobs: int | None) -> Iterator[int]:
    """Let joblib use a backend.

    :param backend: one of ``BACKENDS``
    :param address: of the cluster to join; ``None`` makes one of this machine
    :param jobs: runs at a time; ``None`` for one a processor
    :return: runs at a time
    """
    if backend not in BACKENDS:
        raise ValueError(f"--backend {backend!r} must be one of {', '.join(BACKENDS)}")
    if backend == "loky" and address is not None:
        raise ValueError(f"--address {address!r} is of no use to --backend loky, which stays on this machine")
    package = {"loky": "joblib", "ray": "ray", "dask": "distributed"}[backend]
    if find_spec(package) is None:
        raise ValueError(f'--backend {backend} needs {package}: pip install "sb3-scratch-dqn[{backend}]"')
    cluster = {"loky": _loky, "ray": _ray, "dask": _dask}[backend]
    with cluster(address, jobs) as at_a_time, parallel_config(backend, n_jobs=at_a_time):
        yield at_a_time


@contextmanager
def _loky(_: str | None, jobs: int | None) -> Iterator[int]:
    usual: Any = parallel.BACKENDS["loky"]

    class Watching(usual):  # type: ignore[misc]  # joblib has no types
        # Without this, its processes wait five minutes for another run after this process was killed
        def configure(self, *args: Any, **settings: Any) -> Any:
            return super().configure(*args, **settings, initializer=end_with, initargs=(os.getpid(),))

    register_parallel_backend("loky", Watching)
    try:
        yield jobs or n_cores()
    finally:
        register_parallel_backend("loky", usual)


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
        # It can give results as they come; what it derives from cannot
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
    """Execute the runs that have not been executed yet, telling on stderr how far it is.

    :param plan: the runs
    :param out: the folder of results
    :param backend: one of ``BACKENDS``
    :param address: of the cluster to join; ``None`` makes one of this machine
    :param jobs: runs at a time; ``None`` for as many as there are processors
    :param retry_failed: execute those again that failed
    :return: all results, in the order of the plan; a run whose file could not be written is not done
    :raises ValueError: if a file in the folder is broken, or was made with other settings
    """
    results: dict[Run, Result] = {}
    for run in plan:
        path = out / run.path
        if path.exists():
            result = read_result(path)
            check_place(result, out)
            _check_same(run, result, path)
            if result.done or not retry_failed:
                results[run] = result
    waiting = [run for run in plan if run not in results]
    if len(waiting) < len(plan):
        _tell(f"{len(plan) - len(waiting)} of {len(plan)} runs are there already")
    if not waiting:
        return [results[run] for run in plan]
    with _cluster(backend, address, jobs) as at_a_time:
        _tell(f"{len(waiting)} to go, {at_a_time} at a time; a line for each that is done")
        progress = Progress(plan, results, at_a_time)
        execute_all = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        unwritten: dict[Run, Result] = {}
        for known in execute_all(delayed(_numbered)(number, run) for number, run in enumerate(waiting)):
            run = waiting[known.pop("number")]
            try:
                result = result_of(known, str(out / run.path))
            except ValueError as error:  # as what another version on a machine of a cluster gives may be refused
                known = _failed(run, "ValueError", str(error))
                result = result_of(known, str(out / run.path))
            try:
                write(known, out / run.path)
            except OSError as error:  # a full disk may have room again when the other runs are done
                told = f"could not be written: {error.strerror or error}"
                _tell(f"{out / run.path} {told}")
                unwritten[run] = replace(result, done=False, error=f"its file {told}")
            results[run] = result
            progress.finished(run, result)
    if unwritten:
        _tell(f"{len(unwritten)} of {len(plan)} runs could not be written; the same command makes them again")
    return [unwritten.get(run, results[run]) for run in plan]


def _numbered(number: int, run: Run) -> dict[str, Any]:
    return {**execute(run), "number": number}


def write(known: dict[str, Any], path: Path) -> None:
    """Write the file of a run, all of it or nothing.

    :param known: what is known of the run
    :param path: of the file
    :raises OSError: if it cannot be written; the error names the file
    """
    remove_stale_temporary(path.with_suffix(".tmp"))  # of an earlier version
    with atomic_write(path) as file:
        file.write(f"{_readable(known)}\n".encode())


def _readable(known: dict[str, Any]) -> str:
    """JSON with a line for each entry, whatever is in it, and one for each column of the curve."""

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

    return f"{{\n{lines(known, '  ')}\n}}"


def _check_same(run: Run, result: Result, path: Path) -> None:
    wanted, found = json.loads(json.dumps(run.conditions())), dict(result.settings)
    if result.done:
        wanted.update(_current_hyperparameters(run.algo, run.env, run.same_settings))
        found.update(found.pop("hyperparameters"))
        wanted["deterministic_evaluation"] = found["deterministic_evaluation"]  # the Zoo's business
    for name in sorted(wanted.keys() | found.keys()):
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} was made with {name}={found.get(name)!r}, and now it is to be {wanted.get(name)!r}; "
                "choose another folder with --out, or the same settings"
            )


@cache
def _current_hyperparameters(algo: str, env: str, same_settings: str | None) -> dict[str, Any]:
    run = Run(algo, env, 0, 1, 1, 1, same_settings=same_settings)
    return hyperparameters(experiment(run, "")[1])


def _tell(text: str) -> None:
    with suppress(OSError):  # stderr may be a file on a full disk, and the results on another disk
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Tells which runs are done, and how long the others will take.

    :param plan: all runs
    :param results: of those that are done
    :param jobs: runs at a time
    """

    def __init__(self, plan: Sequence[Run], results: dict[Run, Result], jobs: int) -> None:
        self._plan, self._results, self._jobs = plan, results, jobs

    def finished(self, run: Run, result: Result) -> None:
        """Tell that a run is done.

        :param run: the run, which is among the results by now
        :param result: what came of it
        """
        width = len(str(len(self._plan)))
        if result.done:
            told = f"return {result.final:,.1f}, {result.steps_per_second:,.0f} steps/s"
        else:
            told = f"FAILED: {result.error}"
        _tell(f"[{len(self._results):{width}}/{len(self._plan)}] {run}: {told}; {self._left()}")

    def _left(self) -> str:
        waiting = [run for run in self._plan if run not in self._results]
        if not waiting:
            return "all done"
        seconds = sum(map(self._estimate, waiting)) / min(self._jobs, len(waiting))
        return f"about {_duration(seconds)} left"

    def _estimate(self, run: Run) -> float:
        """Seconds that a run will take: those of its like, or of what is nearest to it."""
        for alike in (
            lambda other: (other.algo, other.env) == (run.algo, run.env),
            lambda other: other.env == run.env,
            lambda other: True,
        ):
            a_step = [
                result.wall_seconds / other.n_timesteps
                for other, result in self._results.items()
                if alike(other) and result.done
            ]
            if a_step:
                return run.n_timesteps * sum(a_step) / len(a_step)
        return 0.0


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 1:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
