"""`Runner`: CP-SAT within limits that several models share, and out of the way of Ctrl-C."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from llmsched_env.errors import InputError

Progress = Callable[[dict[str, Any]], None]
_MEMORY_MB = 6000


def cp_model() -> Any:
    """The module of OR-tools.

    Raises:
        InputError: it is not installed.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        raise InputError(
            f'method cpsat needs OR-tools ({error}): pip install "llmsched-env[optimal]"'
        ) from None
    return cp_model


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a model.

    Attributes:
        proved: whether nothing is left open: the value is the optimum, or there is no solution.
        value: the objective of the solution, None if there is none.
        bound: of the objective; of no meaning if it is proved that there is no solution.
        of: gives the value of a variable.
    """

    proved: bool
    value: int | None
    bound: int
    of: Callable[[Any], int]


class Runner:
    """Runs models one after the other until the time is up.

    Attributes:
        stopped: why nothing more should be run: "", "timeout" or "interrupted".
        runs: models so far.
    """

    def __init__(
        self,
        time_limit_s: float,
        *,
        seed: int = 0,
        workers: int = 2,
        deterministic_limit: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        """
        Args:
            time_limit_s: wall seconds, from now.
            deterministic_limit: CP-SAT's own measure of work, about seconds: with it and one worker, or where
                it ends before the time, runs are the same on every machine.
            progress: called at every better schedule with figures: seconds, objective, bound (of the model
                that runs, in its unit).
        """
        for name, value in (("time_limit_s", time_limit_s), ("deterministic_limit", deterministic_limit)):
            if value is not None and not value > 0:
                raise InputError(f"{name} must be positive, not {value!r}")
        if workers < 1:
            raise InputError(f"workers must be at least 1, not {workers!r}")
        self.cp_model = cp_model()
        self.began = time.perf_counter()
        self.until = self.began + time_limit_s
        self.seed, self.workers = seed, workers
        self.work_left = deterministic_limit
        self.progress = progress
        self.stopped = ""
        self.runs = 0

    @property
    def seconds(self) -> float:
        """That have passed."""
        return time.perf_counter() - self.began

    @property
    def seconds_left(self) -> float:
        """That it may still take."""
        return max(0.0, self.until - time.perf_counter())

    @property
    def over(self) -> bool:
        """Whether to stop."""
        if not self.stopped and (time.perf_counter() >= self.until or self._idle()):
            self.stopped = "timeout"
        return bool(self.stopped)

    def _idle(self) -> bool:
        return self.work_left is not None and self.work_left <= 0

    def run(self, model: Any, enough: int | None = None, share: float = 1.0, **parameters: Any) -> Answer:
        """Solve a model.

        Args:
            enough: a value of the objective with which it may stop.
            share: of the time left that it may take.
            parameters: of CP-SAT, besides the common ones.
        """
        cp = self.cp_model
        solver = cp.CpSolver()
        p = solver.parameters
        p.max_time_in_seconds = max(0.01, share * self.seconds_left)
        p.random_seed, p.num_workers = self.seed, self.workers
        p.max_memory_in_mb = _MEMORY_MB
        p.catch_sigint_signal = False
        if self.work_left is not None:
            p.max_deterministic_time = share * self.work_left
            p.interleave_search = self.workers > 1  # the workers take turns: the same result every time
        for name, value in parameters.items():
            setattr(p, name, value)
        status = self._wait(solver, model, self._callback(enough))
        if self.work_left is not None:
            self.work_left -= solver.response_proto.deterministic_time
        self.runs += 1
        if status == cp.MODEL_INVALID:
            raise InputError(f"the instance is too large for cpsat: {model.validate()}; use method search")
        found = status in (cp.OPTIMAL, cp.FEASIBLE)
        has_objective = model.has_objective()
        return Answer(
            status in (cp.OPTIMAL, cp.INFEASIBLE),
            round(solver.objective_value) if found else None,
            round(solver.best_objective_bound) if has_objective and status != cp.INFEASIBLE else 0,
            solver.value,
        )

    def _wait(self, solver: Any, model: Any, callback: Any) -> Any:
        """Solve in a thread, so that Ctrl-C gets here and stops it in order."""
        status: list[Any] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                status.append(solver.solve(model, callback))
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            try:
                thread.join(0.5)
            except KeyboardInterrupt:
                self.stopped = "interrupted"
                solver.stop_search()
        if errors:
            raise errors[0]
        return status[0]

    def _callback(self, enough: int | None) -> Any:
        runner = self

        class Callback(self.cp_model.CpSolverSolutionCallback):  # type: ignore[name-defined]
            def on_solution_callback(self) -> None:
                if runner.progress is not None:
                    figures = {"seconds": runner.seconds, "objective": self.objective_value}
                    runner.progress(figures | {"bound": self.best_objective_bound})
                if enough is not None and self.objective_value <= enough:
                    self.stop_search()

        return Callback()
