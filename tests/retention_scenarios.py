"""Runs that are killed, stopped and started again: no start may lose a checkpoint that is still needed.

A scenario trains the tiny model with the real binary and returns a line that says what was kept. A run has three times
`unit` steps; where a scenario's text says 100, it means one unit. AssertionError: a checkpoint was lost.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


class Run:
    """One output_dir, and one start after the other of the run that belongs to it."""

    def __init__(self, folder, unit, *settings, ranks=1):
        self.out, self.unit = Path(folder) / "out", unit
        launcher = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
        self.command = [*launcher, os.environ["CORANK_BIN"], "train", "configs/tiny.yaml", f"output_dir={self.out}", "eval_steps=0",
                        f"train.max_steps={3 * unit}", f"save_steps={unit}", *settings]

    def start(self, *settings):
        return subprocess.Popen([*self.command, *settings], cwd=ROOT, env=ENVIRONMENT, text=True, start_new_session=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def finish(self, *settings):
        """Trains to the end; what was printed."""
        process = self.start(*settings)
        printed, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
        return printed

    def kill_while_saving(self, step, *settings):
        """SIGKILL while checkpoint-<step> is written: its manifest is not there yet. Tried until the kill comes in time."""
        before = self.out.with_name("before")
        shutil.copytree(self.out, before) if self.out.exists() else before.mkdir(parents=True)
        for _ in range(20):
            self.kill_at(self.out / f"checkpoint-{step}", *settings)
            if (self.out / f"checkpoint-{step}").exists() and step not in self.whole():
                shutil.rmtree(before)
                return
            shutil.rmtree(self.out)
            shutil.copytree(before, self.out)
        raise RuntimeError(f"no kill came while {self.out}/checkpoint-{step} was written")

    def kill_at(self, folder, *settings):
        """SIGKILL to every process of a start as soon as `folder` is there, once steps are being made."""
        process = self.start(*settings)
        while not (line := process.stdout.readline()).startswith("step "):
            assert line, process.communicate()[1]
        ranks = [int(pid) for listed in Path(f"/proc/{process.pid}/task").glob("*/children") for pid in listed.read_text().split()]
        while process.poll() is None and not folder.exists():
            time.sleep(0.0005)
        for pid in (*ranks, process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.communicate()
        wait_for_ranks(self.out)

    def stop_after(self, step, *settings):
        """SIGUSR1 once `step` was made; the step that was saved."""
        process = self.start(*settings)
        for line in process.stdout:
            if line.startswith("step ") and int(re.split(r"[ /]+", line)[1]) >= step:
                process.send_signal(signal.SIGUSR1)
                break
        rest, errors = process.communicate(timeout=100)
        assert process.returncode == 75, rest + errors
        return int(re.search(r"stopped after step (\d+) and saved", rest)[1])

    def whole(self):
        """Steps of the checkpoints that have a manifest."""
        return sorted(int(path.parent.name.split("-")[1]) for path in self.out.glob("checkpoint-*/manifest.json"))

    def set_aside(self):
        return sorted(path.name for path in self.out.glob("set-aside/*"))

    def resumes_after(self, *settings):
        """The step after which the next start goes on, 0 from the beginning."""
        found = re.search(r"resuming from \S+ after step (\d+)", self.finish(*settings))
        return int(found[1]) if found else 0


def wait_for_ranks(folder):
    """The ranks of a killed mpirun end a moment after it; until then they hold output_dir."""
    deadline = time.monotonic() + 30
    while subprocess.run(["flock", "--nonblock", str(folder), "true"]).returncode:
        assert time.monotonic() < deadline, "a rank outlives its mpirun"
        time.sleep(0.05)


def expect(what, found, wanted):
    assert found == wanted, f"{what}: {found}, expected {wanted}"


def killed_while_saving(run):
    """save_total_limit 1; killed while saving 200, resumed at 100, stopped at 131; the next start."""
    unit, limit = run.unit, "save_total_limit=1"
    run.kill_while_saving(2 * unit, limit)
    expect("after the kill", run.whole(), [unit])
    stopped = run.stop_after(unit + unit // 3, limit)
    expect("after the stop", run.whole(), [stopped])
    expect("the next start goes on after", run.resumes_after(limit), stopped)
    expect("at the end", run.whole(), [3 * unit])
    return f"killed while saving {2 * unit}, went on after {unit}, stopped and went on after {stopped}, kept {run.whole()}"


def never_over_a_finished_run(run):
    """Default limit; 300 steps done, again with resume=never, killed while saving 200; the plain restart."""
    unit = run.unit
    run.finish()
    old = run.whole()
    run.kill_while_saving(2 * unit, "resume=never")
    expect("of the new run", run.whole(), [unit])
    expect("of the old run", run.set_aside(), sorted(f"checkpoint-{step}" for step in old))
    expect("the plain restart goes on after", run.resumes_after(), unit)
    return f"{3 * unit} steps done, begun again, killed while saving {2 * unit}, went on after {unit}; set aside {run.set_aside()}"


def resumed_from_one_inside(run):
    """resume=FOLDER/checkpoint-20 with a limit of 1 keeps checkpoint-20, whatever it is called."""
    unit = run.unit
    run.finish()
    named = f"resume={run.out}/../out/checkpoint-{unit}/"
    printed = run.finish(named, "save_total_limit=1")
    assert f"after step {unit}" in printed, printed
    expect("kept", run.whole(), [unit, 3 * unit])
    expect("set aside", run.set_aside(), sorted(f"checkpoint-{step * unit}" for step in (2, 3)))
    return f"went on from checkpoint-{unit} by name: kept {run.whole()}, set aside {run.set_aside()}"


def killed_twice(run):
    """Killed while saving 200, and again: 100 stays, and the third start ends with the uninterrupted run's losses."""
    unit = run.unit
    for _ in range(2):
        run.kill_while_saving(2 * unit, "save_total_limit=1")
        expect("after the kill", run.whole(), [unit])
    expect("the third start goes on after", run.resumes_after("save_total_limit=1"), unit)
    interrupted = losses(run)
    run.finish("resume=never")
    expect("losses", losses(run), interrupted)
    return f"killed twice while saving {2 * unit}, went on after {unit}, to the losses of the uninterrupted run"


def never_twice(run):
    """Begun again twice: each time what there was is set aside under a name of its own."""
    unit = run.unit
    for _ in range(3):
        run.finish("resume=never", "save_total_limit=1")
    expect("kept", run.whole(), [3 * unit])
    expect("set aside", run.set_aside(), [f"checkpoint-{3 * unit}{n}" for n in ("", ".2")])
    return f"begun again twice: kept {run.whole()}, set aside {run.set_aside()}"


def another_limit(run):
    """A larger limit keeps more from then on, a smaller one removes the oldest at the next save."""
    unit = run.unit
    first = run.stop_after(unit + unit // 3, "save_total_limit=1")
    expect("with limit 1", run.whole(), [first])
    second = run.stop_after(2 * unit + unit // 3, "save_total_limit=9")
    expect("with limit 9", run.whole(), [first, 2 * unit, second])
    run.finish("save_total_limit=2")
    expect("with limit 2", run.whole(), [second, 3 * unit])
    return f"limit 1: kept {first}; 9: {2 * unit} and {second} too; 2: {run.whole()}"


def losses(run):
    return [json.loads(line)["loss"] for line in (run.out / "metrics.jsonl").read_text().splitlines()]


SCENARIOS = (killed_while_saving, never_over_a_finished_run, resumed_from_one_inside, killed_twice, never_twice, another_limit)
