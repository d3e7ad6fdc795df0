"""Running a study: groups (a method on a dataset) one after the other or side by side, their cells in order.

A group trains every point of its grid with the first seed, measures dev, chooses, and then trains the chosen point with
every seed and measures test. What is finished is kept; what failed is noted, tried again next time, and stops no other.
"""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.files import write_json
from laser_dist.launch.ranks import free_port
from laser_dist.recipe import to_toml
from laser_dist.run_folder import checkpoints_of
from laser_dist.study.cells import BM25, FINISHED, UNTRAINED, Cell, Task, Workspace
from laser_dist.study.definition import Method

Group = tuple[str, str]
"""Dataset and method, or baseline."""
_PREEMPTED = 75


class CellFailed(Exception):
    """A stage of a cell ended badly; the message is its last line."""

    def __init__(self, stage: str, line: str):
        super().__init__(line)
        self.stage = stage


class Stopped(Exception):
    """A signal ended a cell's process: nothing failed, and the next call goes on."""


class Runner:
    """Runs what is missing; `say` gets a line whenever something begins, ends or fails."""

    def __init__(self, workspace: Workspace, say: Callable[[str], None], jobs: int = 1):
        self.workspace, self.study, self.say, self.jobs = workspace, workspace.study, say, jobs
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    def run(self, groups: list[Group]) -> None:
        """All groups, each after what it needs. Raises Stopped where a signal ended a cell."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures: dict[Group, Future[None]] = {}
            for group in groups:  # in the order of their needs, so that no worker waits for one that has not begun
                method = self.study.methods.get(group[1])
                needs = [(group[0], name) for name in (method.needs if method else ())]
                futures[group] = pool.submit(self._group, group, [futures[need] for need in needs if need in futures])
            try:
                for future in futures.values():
                    future.result()
            except BaseException:  # Ctrl-C, or a signal to a cell: nothing else begins
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def stop(self) -> None:
        """Ask the running cells to save and stop, and begin no other; for a signal handler."""
        self.stopping = True
        for process in list(self.processes):
            process.terminate()

    def _group(self, group: Group, needed: list[Future[None]]) -> None:
        for future in needed:
            future.result()
        dataset, name = group
        with _alone(self.workspace.out / "cells" / dataset / f".{name}.lock"):
            if name in (BM25, UNTRAINED):
                cell = self.workspace.baseline(dataset, name)
                self._finish(cell, self.workspace.tasks(cell, chosen=True))
                return
            method = self.study.methods[name]
            point = self._choose(dataset, method)
            if point is not None:
                for cell in self.workspace.cells(dataset, method, point):
                    self._finish(cell, self.workspace.tasks(cell, chosen=True))
            self._drop_checkpoints(dataset)

    def _choose(self, dataset: str, method: Method) -> dict | None:
        """The method's point; None where all its points failed, or what it takes its point from did."""
        workspace = self.workspace
        if (known := workspace.choice(dataset, method)) is not None or method.point_of:
            return known
        scores = []
        for point in self.study.points(method):
            cell = workspace.cell(dataset, method, point, self.study.seeds[0])
            tasks = workspace.tasks(cell, chosen=False)
            if self._finish(cell, tasks):
                scores.append((point, cell.measured(tasks)["dev/own"]["metrics"][self.study.metric]))
        return workspace.choose(dataset, method, scores) if scores else None

    def _finish(self, cell: Cell, tasks: list[Task]) -> bool:
        """Train and measure what is missing; False where it failed, which is noted."""
        try:
            if cell.state(tasks) != FINISHED:
                self._begin(cell)
                if cell.trains and not cell.trained():
                    self._train(cell)
                self._measure(cell, cell.missing(tasks))
                (cell.folder / "failed.json").unlink(missing_ok=True)
            return True
        except CellFailed as failure:
            write_json(cell.folder / "failed.json", {"stage": failure.stage, "line": str(failure)})
            self.say(f"{cell.name}: failed in {failure.stage}: {failure}")
            return False

    def _begin(self, cell: Cell) -> None:
        if (cell.folder / "cell.json").is_file() and not cell.current():
            self.say(f"{cell.name}: its recipe or data changed: what was measured before is discarded")
            shutil.rmtree(cell.folder)
        cell.folder.mkdir(parents=True, exist_ok=True)
        (cell.folder / "recipe.toml").write_text(to_toml(cell.config), encoding="utf-8")
        write_json(cell.folder / "cell.json", {"key": cell.key, "name": cell.name, "made_of": cell.identity})

    def _train(self, cell: Cell) -> None:
        if cell.config.objective.teacher:
            self._teach(cell)
        self.say(f"{cell.name}: training, {cell.config.train.max_steps} steps")
        recipe, processes = str(cell.folder / "recipe.toml"), self.study.processes
        command = [sys.executable, "-m", "laser_dist.train", recipe]
        if processes > 1:
            options = ["--num_accelerators", str(processes), "--master_port", str(free_port())]
            command = [sys.executable, "-m", "laser_dist.cli", "launch", *options, recipe]
        self._call(cell, "training", command)

    def _teach(self, cell: Cell) -> None:
        """The teacher's checkpoint may have been dropped: the same recipe makes the same one again."""
        teacher = self.workspace.chosen_cell(
            cell.dataset, self.study.methods[self.study.methods[cell.method].teacher], cell.seed or 0
        )
        if not teacher.trained():
            self._begin(teacher)
            try:
                self._train(teacher)
            except CellFailed as failure:
                raise CellFailed("its teacher's training", str(failure)) from None

    def _measure(self, cell: Cell, tasks: list[Task]) -> None:
        self.say(f"{cell.name}: measuring {', '.join(task.name for task in tasks)}")
        rewriting = self.study.rewriting
        job = {
            "kind": cell.method if not cell.trains else "trained",
            "key": cell.key,
            "out": str(cell.folder / "result.json"),
            "recipe": str(cell.folder / "recipe.toml"),
            "model": str(cell.run),
            "dtype": self.study.encode_dtype,
            "splits": {split: [str(f) for f in files] for split, files in self._splits(cell).items()},
            "tasks": [{"split": task.split, "key": task.key, "test": asdict(task.test)} for task in tasks],
            "rewriting": {
                "model": rewriting.model or cell.config.model.name,
                "tokens": rewriting.tokens,
                "batch": rewriting.batch,
                "folder": str(self.workspace.out / "rationales"),
            },
        }
        file = cell.folder / "measure.json"
        write_json(file, job)
        self._call(cell, "measuring", [sys.executable, "-m", "laser_dist.study.measure", str(file)])

    def _splits(self, cell: Cell) -> dict[str, tuple[Path, Path, Path]]:
        return self.workspace.data[cell.dataset].splits

    def _call(self, cell: Cell, stage: str, command: list[str]) -> None:
        """Run a stage, with what it says in the cell's log. CellFailed with its last line; Stopped by a signal."""
        share = max(1, len(os.sched_getaffinity(0)) // (self.jobs * self.study.processes))
        environment = {"OMP_NUM_THREADS": str(share), **os.environ}
        log = cell.folder / "log.txt"
        with log.open("ab") as stream:
            stream.write(f"\n$ {' '.join(command)}\n".encode())
            stream.flush()
            if self.stopping:
                raise Stopped(f"{cell.name}: not begun")
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
            self.processes.add(process)
            if self.stopping:  # asked while it was being started
                process.terminate()
            try:
                code = process.wait()
            finally:
                process.kill()  # if something but its end took us here
                self.processes.discard(process)
        if code in (_PREEMPTED, 130, -2, -15):
            raise Stopped(f"{cell.name}: stopped by a signal; the same command goes on from its last checkpoint")
        if code:
            raise CellFailed(stage, f"{_last_line(log)} (exit code {code}, {log})")

    def _drop_checkpoints(self, dataset: str) -> None:
        """Checkpoints that nothing needs any more: measured, and no teacher of what is still to come."""
        for method in self.study.methods.values():
            pupils = [m for m in self.study.methods.values() if m.teacher == method.name]
            if not all(self._done(dataset, m) for m in (method, *pupils)):
                continue
            chosen = self.workspace.choice(dataset, method)
            for point in self.study.points(method) if not method.point_of else [chosen or {}]:
                for cell in self.workspace.cells(dataset, method, point):
                    if self.study.keep == "none" or point != chosen:
                        shutil.rmtree(checkpoints_of(cell.run), ignore_errors=True)

    def _done(self, dataset: str, method: Method) -> bool:
        point = self.workspace.choice(dataset, method)
        if point is None:
            return False
        cells = self.workspace.cells(dataset, method, point)
        return all(cell.state(self.workspace.tasks(cell, chosen=True)) == FINISHED for cell in cells)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Two processes must not write into one cell. UserError where another works on this group."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{lock}: another process works on this part of the study: wait for it, or stop it"
            ) from None
        yield


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it said nothing"
