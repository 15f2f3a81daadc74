"""Many runs, on this machine or on a cluster, that can be stopped and gone on with.

joblib hands the runs out, whatever it is that works on them; each run is a process of its own
(:mod:`sb3_scratch_dqn.bench.experiment`), and this process writes the files.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed, parallel_config

from sb3_scratch_dqn.bench.machine import ONE_THREAD, end_with, n_cores
from sb3_scratch_dqn.bench.plan import Run, experiment, hyperparameters
from sb3_scratch_dqn.bench.results import Result, check_place, read_result, result_of

BACKENDS = ("loky", "ray", "dask")

_KEPT_OF_OUTPUT = 4_000  # characters, of a process that broke down


def execute(run: Run) -> dict[str, Any]:
    """Execute a run in a process of its own and wait for it.

    :param run: the run
    :return: what is known of it, ready for JSON; its status is ``"failed"`` if something went wrong
    """
    with tempfile.TemporaryDirectory() as folder:
        answer, output = Path(folder, "run.json"), Path(folder, "output.txt")
        with output.open("w") as printed:
            process = subprocess.Popen(
                [sys.executable, "-m", "sb3_scratch_dqn.bench.experiment", str(answer)],
                stdin=subprocess.PIPE,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**os.environ, **ONE_THREAD},
                text=True,
            )
            try:
                assert process.stdin is not None
                process.stdin.write(json.dumps(asdict(run)))
                process.stdin.close()
                process.wait()
            finally:
                process.kill()
                process.wait()
        if answer.is_file():
            known: dict[str, Any] = json.loads(answer.read_text())
            return known
        message = (
            f"its process ended with code {process.returncode}; it printed: {output.read_text()[-_KEPT_OF_OUTPUT:]}"
        )
        return _failed(run, "ProcessEnded", message)


def _failed(run: Run, kind: str, message: str) -> dict[str, Any]:
    """What is known of a run that left nothing itself."""
    from sb3_scratch_dqn.bench.experiment import describe

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
    yield jobs or n_cores()


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
    from joblib import register_parallel_backend
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
    :return: all results, in the order of the plan
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
        parallel = Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        tasks = (delayed(_numbered)(number, run, os.getpid(), backend) for number, run in enumerate(waiting))
        for known in parallel(tasks):
            run = waiting[known.pop("number")]
            try:
                result = result_of(known, str(out / run.path))
            except ValueError as error:  # as what another version on a machine of a cluster gives may be refused
                known = _failed(run, "ValueError", str(error))
                result = result_of(known, str(out / run.path))
            write(known, out / run.path)
            results[run] = result
            progress.finished(run, results[run])
    return [results[run] for run in plan]


def _numbered(number: int, run: Run, wanted_by: int, backend: str) -> dict[str, Any]:
    if os.getpid() != wanted_by:  # as it is with one run at a time
        # A process of loky may get its next run when the one that wanted it has just been killed
        end_with(wanted_by if backend == "loky" else os.getppid())
    return {**execute(run), "number": number}


def write(known: dict[str, Any], path: Path) -> None:
    """Write the file of a run, all of it or nothing.

    :param known: what is known of the run
    :param path: of the file
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(_readable(known) + "\n")
    beside.replace(path)


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
