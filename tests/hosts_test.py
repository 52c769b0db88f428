"""Runs over hosts that share no folder (launch/lab): the same adapter as on one host, and what is refused where hosts are not
alike. Run by launch/test as root, with CORANK_BIN set."""

import os
import shlex
import shutil
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "launch" / "lab"
CORANK = Path(os.environ["CORANK_BIN"]).resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
               "OMPI_MCA_odls_base_sigkill_timeout": "0"}  # a refused run ends at once, not after three seconds
SECONDS = 60  # a refusal takes few, on a busy machine more; a hang does not end

# On each host: what is done to it before, the run, what is kept of it after.
RANK = """host=$(hostname)
{before}
{own}/corank train {own}/run.yaml {overrides}
code=$?
[ ! -d {own}/out ] || cp -r {own}/out {kept}/$host
exit $code"""


class Case(unittest.TestCase):
    """`own`: what each host has a copy of: program, run file, token files, output. `kept`: seen by all."""

    def setUp(self):
        folder = Path(tempfile.mkdtemp(prefix="corank-"))
        self.addCleanup(shutil.rmtree, folder)
        self.own, self.kept = folder / "own", folder / "kept"
        self.kept.mkdir()
        shutil.copytree(ROOT / "configs" / "tiny", self.own)
        shutil.copy(CORANK, self.own / "corank")
        text = (ROOT / "configs" / "tiny.yaml").read_text()
        self.run_file = self.own / "run.yaml"
        self.run_file.write_text(text.replace("configs/tiny/", f"{self.own}/").replace("runs/tiny", f"{self.own}/out"))

    def over_hosts(self, *overrides, second="", environment=ENVIRONMENT):
        """A run over two hosts; `second`: shell commands on the second one before it."""
        before = f'[ $host = host1 ] || {{ {second}; }}' if second else ""
        script = RANK.format(before=before, own=self.own, kept=self.kept, overrides=shlex.join(overrides))
        return subprocess.run([LAB, "--private", self.own, "--", "sh", "-c", script], cwd=ROOT, env=environment, text=True,
                              capture_output=True, timeout=SECONDS)

    def refused(self, code, *words, second, overrides=("train.max_steps=2", "eval_steps=0")):
        """By all ranks: rank 0, which has everything, says what is wrong on the other host."""
        done = self.over_hosts(*overrides, second=second)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        lines = [line.removeprefix("corank: ") for line in done.stderr.splitlines() if line.startswith("corank: ")]
        said = {line.removeprefix("rank 1: ") for line in lines}
        self.assertEqual(len(said), 1, done.stderr)  # rank 0's, and rank 1's where it is not ended sooner
        self.assertIn(min(said), lines)
        for word in ("rank 1 on host2", *words):
            self.assertIn(word, min(said))


class NoSharedFolder(Case):
    SHORT = ("train.max_steps=4", "eval_steps=2", "save_steps=2")

    def test_gives_the_adapter_of_one_host(self):
        done = self.over_hosts(*self.SHORT)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertEqual([path.name for path in self.kept.iterdir()], ["host1"])  # rank 0 writes alone
        hosts = [line for line in done.stdout.splitlines() if line.startswith("hosts ")]
        self.assertEqual(len(hosts), 1)
        self.assertRegex(hosts[0], r"^hosts 2 \(rank 0 on host1\), Open MPI v\S+, btl_tcp_if_include eth0, oob_tcp_if_include eth0")
        subprocess.run(["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2", self.own / "corank", "train", self.run_file,
                        *self.SHORT], cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True, timeout=SECONDS)
        adapter = Path("adapter") / "adapter_model.safetensors"
        self.assertEqual((self.kept / "host1" / adapter).read_bytes(), (self.own / "out" / adapter).read_bytes())

    def test_threads_are_those_of_the_smaller_host(self):
        free = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
        done = self.over_hosts("train.max_steps=1", "eval_steps=0", second="taskset -p -c 0 $$ >/dev/null", environment=free)
        self.assertIn(" 1 thread a rank", done.stdout, done.stderr)

    def test_a_run_resumes_where_its_checkpoint_lies_on_each_host(self):
        self.assertEqual(self.over_hosts(*self.SHORT).returncode, 0)
        shutil.copytree(self.kept / "host1", self.own / "out")
        shutil.rmtree(self.kept / "host1")
        self.refused(66, "checkpoint-4 is not on this host", "Copy it to every host", second=f"rm -r {self.own}/out",
                     overrides=self.SHORT)


class Unlike(Case):
    def tearDown(self):
        self.assertEqual(list(self.kept.iterdir()), [], "something was written")

    def test_program(self):
        self.refused(91, "program: SHA-256", "Install the same build on every host", second=f"printf x >>{self.own}/corank")

    def test_run_file(self):
        self.refused(91, "learning_rate: 0.02, on rank 0 learning_rate: 0.01", "run.yaml",
                     second=f"sed -i 's/learning_rate: 1e-2/learning_rate: 2e-2/' {self.own}/run.yaml")

    def test_no_run_file(self):
        self.refused(66, "run.yaml", second=f"rm {self.own}/run.yaml")

    def test_settings(self):
        self.refused(91, "settings: OMP_NUM_THREADS=2, on rank 0 OMP_NUM_THREADS=1", second="export OMP_NUM_THREADS=2")

    def test_instructions(self):
        self.refused(91, "LibTorch: - CPU capability usage: DEFAULT", second="export ATEN_CPU_CAPABILITY=default")

    def test_no_token_file(self):
        self.refused(66, "train.h5", second=f"rm {self.own}/train.h5")

    def test_other_samples(self):
        self.refused(91, "data", "identity", second=f"cp {self.own}/eval.h5 {self.own}/train.h5")


if __name__ == "__main__":
    unittest.main()
