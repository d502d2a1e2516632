"""Many trainings at a time: in processes of this machine, or on a Ray cluster.

    from agents.cluster import sweep, train_all

    runs = train_all(sweep(Config.preset("slo-mix"), seeds=range(5)), "runs/slo", jobs=2)

Each is a run in a folder of its own (`agents.runs`), and goes on from its last checkpoint whatever ended it:
a worker that died is replaced, and the same call again does what is left to do.

Workers are new processes, so call this under `if __name__ == "__main__":` in a script. On a cluster, this
package has to be installed on all machines; the folder, and the scenario if it is a file, have to be on a
disk that they share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import multiprocessing
import os
import pickle
import re
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.config import COSTS, Config
from agents.runs import Run
from llmsched_env.errors import InputError
from llmsched_env.files import require_writable_folder

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from agents.training import Progress

_RETRIES = 3  # of what was lost with its process or machine


class Failed(RuntimeError):
    """Some failed; the others are done.

    Attributes:
        failures: name -> why. done: name -> what came of it.
    """

    def __init__(self, failures: Mapping[str, str], done: Mapping[str, Any]) -> None:
        self.failures, self.done = dict(failures), dict(done)
        each = "; ".join(f"{name}: {why}" for name, why in failures.items())
        super().__init__(f"{len(failures)} of {len(failures) + len(done)} failed: {each}")


# ---------------------------------------------------------------------- trainings


def sweep(
    base: Config, settings: Mapping[str, Sequence[Any]] | None = None, seeds: Iterable[int] = (0,)
) -> dict[str, Config]:
    """Configurations by name, for `train_all`: all combinations of values of some settings, with each seed.

    They are called `learning_rate-0.001_entropy-0.01/seed-0`, without settings `seed-0`: all seeds of one
    combination are in one folder.

    Raises:
        InputError: an unknown setting, a value that does not fit, or what gives no or the same name twice.
    """
    varied, seeds = dict(settings or {}), list(seeds)
    for name, values in varied.items():
        if not isinstance(values, list | tuple) or not values:
            raise InputError(f"{name} is varied over a list of values, not {values!r}")
    found: dict[str, Config] = {}
    for values in itertools.product(*varied.values()):
        chosen = dict(zip(varied, values, strict=True))
        parts = [re.sub(r"[^\w.+-]+", "-", f"{name}-{value}") for name, value in chosen.items()]
        for seed in seeds:
            name = "/".join([*(["_".join(parts)] if parts else []), f"seed-{seed}"])
            if name in found:
                raise InputError(f"two trainings would be called {name}; give each value and seed once")
            found[name] = base.replace(**chosen, seed=seed)
    if not found:
        raise InputError("give one seed at least")
    return found


def train_all(
    configs: Mapping[str, Config],
    folder: str | Path,
    *,
    jobs: int = 1,
    address: str | None = None,
    use_ray: bool = False,
    progress: Callable[[str, Progress], None] | None = None,
) -> list[Run]:
    """Train an agent for each configuration, in `folder`/name; runs that were begun go on.

    Args:
        configs: by name.
        jobs, address, use_ray: where, as for `spread`.
        progress: called after each update, with the name, in the process that trains: it has to be importable
            there, such as a function of a module.

    Raises:
        InputError: a folder that cannot be written, or a run that was begun with other settings; then nothing
            was started.
        Failed: some trainings; the others are done.
    """
    folder = Path(folder)
    require_writable_folder(folder)
    tasks = {}
    for name, config in configs.items():
        _require_same(folder / name, config)
        if not Run(folder / name, config).done:
            tasks[name] = (config, os.path.abspath(folder / name), name, progress)
    if tasks:
        spread(_train, tasks, jobs=jobs, address=address, use_ray=use_ray)
    return [Run(folder / name, config) for name, config in configs.items()]


def _train(
    config: Config,
    folder: str,
    name: str,
    progress: Callable[[str, Progress], None] | None,
    stop: Callable[[], bool] | None = None,
) -> None:
    """Train, or go on with it."""
    from agents import training

    show = None if progress is None else lambda now: progress(name, now)
    try:
        if (Path(folder) / "config.yaml").exists():
            training.resume(folder, progress=show, stop=stop)
        else:
            training.train(config, folder, progress=show, stop=stop)
    except training.Diverged as error:  # which says how to mend it
        raise InputError(str(error)) from None


def _require_same(folder: Path, config: Config) -> None:
    """That a run in this folder, if there is one, is of this configuration."""
    if not (folder / "config.yaml").exists():
        return
    begun, asked = Run.open(folder).config.to_dict(), config.to_dict()
    other = [name for name in asked if begun[name] != asked[name]]
    if other:
        raise InputError(
            f"the run in {folder} was begun with another {', '.join(other)}; name another folder, or ask for "
            "the same"
        )


# ---------------------------------------------------------------------- search


def tune(
    base: Config,
    space: Mapping[str, Any],
    folder: str | Path,
    *,
    samples: int = 16,
    jobs: int = 1,
    address: str | None = None,
) -> list[Run]:
    """Search for good settings with Ray Tune.

    Settings are drawn at random and trained, each in a folder of its own, `folder`/sample-00000, ... ASHA
    (asynchronous successive halving) looks at their validations, and ends after an eighth, a half, ... of the
    training what is then not among the best. A worker that died is replaced, and goes on.

    Args:
        base: the settings that are not searched, and the seed of the search.
        space: by setting, a list of values, or a distribution such as `ray.tune.loguniform(1e-4, 1e-2)`.
        folder: new.
        samples: how many to try.
        jobs, address: where, as for `spread`.

    Returns:
        The runs, the best on the validation episodes first.

    Raises:
        InputError: no Ray, a setting that does not fit, or a folder that is in use.
        Failed: none was trained.
    """
    ray = _import_ray()
    from ray import tune as rt
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    folder = Path(os.path.abspath(folder))
    require_writable_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} is in use; a search needs a new folder")
    drawn = {
        name: rt.choice(values) if isinstance(values, list) else values for name, values in space.items()
    }
    base.replace(**{name: values.sample() for name, values in drawn.items()})  # refuses what is unknown

    def trial(chosen: dict[str, Any]) -> None:
        number = rt.get_context().get_trial_id().rpartition("_")[2]
        path = folder / f"sample-{number}"
        config = base.replace(**chosen)

        def report() -> bool:
            last = Run(path, config).read_rows("validation")[-1]
            rt.report({"steps": int(last["steps"]), "gain": best_gain(Run(path, config))})
            return False

        try:
            _train(config, str(path), path.name, None, report)
        except InputError as error:  # of these settings: the search goes on without
            print(f"{path.name}: {error}", flush=True)

    total = base.updates * base.rollout
    asha = ASHAScheduler("steps", max_t=total, grace_period=max(1, total // 8), reduction_factor=4)
    with _connected(ray, jobs, address):
        rt.Tuner(
            rt.with_resources(trial, {"cpu": 1}),
            param_space=drawn,
            tune_config=rt.TuneConfig(
                metric="gain",
                mode="max",
                num_samples=samples,
                scheduler=asha,
                search_alg=BasicVariantGenerator(random_state=base.seed),
            ),
            run_config=rt.RunConfig(
                name=".search",
                storage_path=str(folder),
                failure_config=rt.FailureConfig(max_failures=_RETRIES),
                verbose=0,
            ),
        ).fit()
    runs = [Run.open(path.parent) for path in sorted(folder.glob("sample-*/config.yaml"))]
    trained = [run for run in runs if run.read_rows("validation")]
    if not trained:
        raise Failed({folder.name: "no sample was trained; see what they printed"}, {})
    return sorted(trained, key=best_gain, reverse=True)


def best_gain(run: Run) -> float:
    """The improvement over vLLM V1 of the best agent so far, on the validation episodes; -inf: none yet.

    Costs of episodes that were cut do not count, as they do not in a training.
    """
    costs = run.config.metric in COSTS
    rows = run.read_rows("validation")
    gains = [float(row["gain"]) for row in rows if float(row["served"]) == 1.0 or not costs]
    return max(gains, default=-math.inf)


# ---------------------------------------------------------------------- where it is done


@dataclasses.dataclass(frozen=True)
class _Done:
    """What came of a call, or what is wrong."""

    value: Any = None
    wrong: str = ""


def spread(
    function: Callable[..., Any],
    tasks: Mapping[str, tuple[Any, ...]],
    *,
    jobs: int = 1,
    address: str | None = None,
    use_ray: bool = False,
    progress: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Call a function for each task, in other processes. One that dies is replaced, and its call made again.

    Args:
        function: importable by the workers, as its arguments and results are.
        tasks: arguments by name.
        jobs: how many at a time on this machine.
        use_ray: as Ray tasks of one core each.
        address: of the Ray cluster, or "auto", the one of this machine; it makes as many at a time as it has
            cores, and may ask for a token (RAY_AUTH_MODE). None: a Ray of `jobs` cores is started for this.
        progress: called with the number of calls that have ended, after each.

    Returns:
        The results by name.

    Raises:
        InputError: jobs that are not positive, no Ray, or what cannot be sent to another process.
        Failed: some calls; the others are done.
    """
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise InputError(f"jobs must be a whole number from 1, not {jobs!r}")
    if address is not None and not use_ray:
        raise InputError(f"the address {address} is of a Ray cluster; ask for Ray as well")
    made = _on_ray(function, tasks, jobs, address) if use_ray else _in_processes(function, tasks, jobs)
    ended: dict[str, _Done] = {}
    with contextlib.closing(made):
        for name, done in made:
            ended[name] = done
            progress(len(ended))
    found = {name: ended[name].value for name in tasks if not ended[name].wrong}
    failures = {name: ended[name].wrong for name in tasks if ended[name].wrong}
    if failures:
        raise Failed(failures, found)
    return found


def _attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> _Done:
    """What comes of a call; an error is told, and no reason for others to end."""
    try:
        return _Done(function(*arguments))
    except InputError as error:
        return _Done(wrong=str(error))
    except Exception as error:
        traceback.print_exc()  # for whoever mends it
        return _Done(wrong=f"{type(error).__name__}: {error}")


# A pool of `concurrent.futures` ends all its processes when one dies, so each call has a process of its own.


def _in_processes(
    function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]], jobs: int
) -> Generator[tuple[str, _Done], None, None]:
    context = multiprocessing.get_context("spawn")
    waiting = [(name, _RETRIES) for name in tasks]
    running: dict[Any, tuple[BaseProcess, str, int]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, retries = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(
                    target=_serve, args=(sender, function, tasks[name]), daemon=True
                )
                try:
                    process.start()
                except (pickle.PicklingError, AttributeError, TypeError) as error:
                    raise InputError(f"{name} cannot be sent to another process: {error}") from None
                sender.close()  # the worker's alone: it is closed when that dies
                running[receiver] = process, name, retries
            ready: Any
            for ready in connection.wait(list(running)):
                process, name, retries = running.pop(ready)
                try:
                    yield name, ready.recv()
                except (EOFError, OSError):
                    process.join()
                    if retries:
                        waiting.insert(0, (name, retries - 1))
                    else:
                        how = f"its process died {_RETRIES + 1} times, at last with code {process.exitcode}"
                        yield name, _Done(wrong=how)
    finally:
        for worker, _, _ in running.values():
            worker.terminate()
            worker.join()


def _serve(sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Be a worker, for one call."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this, who then ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(_attempt(function, arguments))


def _end_with_parent() -> None:
    """Else a training whose parent was killed would go on, beside the one that resumes it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _on_ray(
    function: Callable[..., Any], tasks: Mapping[str, tuple[Any, ...]], jobs: int, address: str | None
) -> Generator[tuple[str, _Done], None, None]:
    ray = _import_ray()
    with _connected(ray, jobs, address):
        call = ray.remote(num_cpus=1, max_retries=_RETRIES)(_attempt)
        running = {call.remote(function, arguments): name for name, arguments in tasks.items()}
        try:
            while running:
                [ready], _ = ray.wait(list(running))
                name = running.pop(ready)
                try:
                    yield name, ray.get(ready)
                except ray.exceptions.RayError as error:
                    lines = str(error).strip().splitlines()  # with the traceback, if it is of the call
                    called = isinstance(error, ray.exceptions.RayTaskError)
                    yield name, _Done(wrong=lines[-1 if called else 0])
        finally:
            for left in running:
                ray.cancel(left, force=True)


@contextlib.contextmanager
def _connected(ray: Any, jobs: int, address: str | None) -> Iterator[None]:
    """Within, Ray is at hand; one that was so before stays as it is."""
    if ray.is_initialized():
        yield
        return
    options = {"num_cpus": jobs, "include_dashboard": False} if address is None else {}
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address or "local", logging_level="error", **options)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise InputError(
            f"cannot connect to Ray at {address or 'hand'}: {why} (if it asks for a token: RAY_AUTH_MODE, in "
            "the documentation of Ray)"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise InputError('this needs Ray; pip install "llmsched-env[ray]"') from None
    return ray
