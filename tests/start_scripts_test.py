"""The scripts that start runs on several hosts, without hosts: what they hand to mpirun and srun. Run by launch/test."""

import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
HOSTS = ROOT / "launch" / "hosts"

# Stands for mpirun, srun and scontrol: a line of its words and of settings that matter; ends as $ENDS says.
RECORDER = """#!/bin/sh
case "$*" in --mpi=list) echo "$MPI_PLUGINS"; exit;; esac
settings="oob=$OMPI_MCA_oob_tcp_if_include btl=$OMPI_MCA_btl_tcp_if_include nccl=$NCCL_SOCKET_IFNAME"
echo "$(basename "$0")" "$@" "$settings" >>"$RECORD"
case "$0" in *scontrol) exit;; esac
[ -z "$WAITS" ] || { trap 'echo saved >>"$RECORD"; exit 75' USR1; echo waits >>"$RECORD"; while :; do sleep 0.05; done; }
exit "$ENDS"
"""


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="corank-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.record = self.folder / "record"
        for name in ("mpirun", "srun", "scontrol"):
            (self.folder / name).write_text(RECORDER)
            (self.folder / name).chmod(0o755)
        self.hostfile = self.folder / "hosts"
        self.hostfile.write_text("a slots=2\nb slots=2\n")
        kept = {name: value for name, value in os.environ.items()
                if not name.startswith(("CORANK_", "NCCL_", "OMP", "SLURM_", "MKL_", "UCX_", "TORCH_", "ATEN_", "CUBLAS_"))}
        self.environment = {**kept, "PATH": f"{self.folder}:{os.environ['PATH']}", "RECORD": str(self.record), "ENDS": "0",
                            "WAITS": "", "MPI_PLUGINS": "none pmix", "CORANK_BIN": "/opt/corank", "SLURM_JOB_ID": "17"}

    def start(self, script, *arguments, folder=ROOT, **environment):
        """(exit code, lines that the recorder wrote, else standard error) of a script of launch/hosts."""
        done = subprocess.run([HOSTS / script, *map(str, arguments)], cwd=folder, env={**self.environment, **environment},
                              text=True, capture_output=True, timeout=20)
        return done.returncode, self.record.read_text().splitlines() if self.record.exists() else done.stderr

    def words(self, line):
        """A recorded line without what only root needs."""
        return line.replace(" --allow-run-as-root", "")


class Mpirun(Case):
    def test_hosts_settings_and_command(self):
        code, lines = self.start("mpirun", self.hostfile, "train", "run.yaml", 'output_dir="run #2"', CORANK_INTERFACE="eth0",
                                 OMP_NUM_THREADS="4", NCCL_DEBUG="WARN")
        self.assertEqual(code, 0)
        self.assertEqual([self.words(line) for line in lines],
                         [f"mpirun --bind-to none --hostfile {self.hostfile} -x CORANK_BIN -x CORANK_CACHE -x CORANK_INTERFACE "
                          "-x CORANK_PRESET -x NCCL_DEBUG -x NCCL_SOCKET_IFNAME -x OMP_NUM_THREADS /opt/corank train run.yaml "
                          'output_dir="run #2" oob=eth0 btl=eth0 nccl=eth0'])

    def test_without_an_interface_none_is_chosen(self):
        _, lines = self.start("mpirun", self.hostfile, "eval", "run.yaml")
        self.assertTrue(lines[0].endswith("/opt/corank eval run.yaml oob= btl= nccl="), lines)

    def test_ends_as_the_run_does(self):
        self.assertEqual(self.start("mpirun", self.hostfile, "train", "run.yaml", ENDS="91")[0], 91)

    def test_the_build_of_the_preset_is_run(self):
        self.environment.pop("CORANK_BIN")
        _, lines = self.start("mpirun", self.hostfile, "train", "run.yaml", CORANK_PRESET="gpu")
        self.assertIn(f" {ROOT}/build/gpu/corank train run.yaml", lines[0])

    def test_refusals(self):
        self.assertEqual(self.start("mpirun", self.hostfile)[0], 64)
        code, text = self.start("mpirun", self.folder / "none", "train", "run.yaml")
        self.assertEqual(code, 66)
        self.assertIn("cannot be read", text)


class Slurm(Case):
    def test_srun_where_it_knows_pmix(self):
        code, lines = self.start("slurm", "train", "run.yaml", CORANK_INTERFACE="ib0", SLURM_CPUS_PER_TASK="6")
        self.assertEqual((code, lines), (0, ["srun --mpi=pmix --cpus-per-task=6 /opt/corank train run.yaml "
                                             "oob=ib0 btl=ib0 nccl=ib0"]))

    def test_mpirun_elsewhere_or_where_asked_for(self):
        for environment in ({"MPI_PLUGINS": "none pmi2"}, {"CORANK_START": "mpirun"}):
            self.record.unlink(missing_ok=True)
            code, lines = self.start("slurm", "train", "run.yaml", **environment)
            self.assertEqual((code, len(lines)), (0, 1))
            self.assertTrue(self.words(lines[0]).startswith("mpirun --bind-to none -x CORANK_BIN "), lines)
            self.assertIn(" /opt/corank train run.yaml ", lines[0])
        self.assertEqual(self.start("slurm", "train", "run.yaml", CORANK_START="ssh")[0], 64)

    def test_submitted_from_elsewhere_it_says_so(self):
        code, text = self.start("slurm", "train", "run.yaml", folder=self.folder)
        self.assertEqual(code, 64)
        self.assertIn("from the checkout's folder", text)

    def test_a_stopped_run_is_queued_again_and_a_refused_one_is_not(self):
        code, lines = self.start("slurm", "train", "run.yaml", ENDS="75")
        self.assertEqual((code, len(lines)), (75, 2))
        self.assertTrue(lines[1].startswith("scontrol requeue 17"), lines)
        self.record.unlink()
        code, lines = self.start("slurm", "train", "run.yaml", ENDS="64")
        self.assertEqual((code, len(lines)), (64, 1))

    def test_the_signal_before_the_end_reaches_the_ranks(self):
        for start in ("srun", "mpirun"):
            with self.subTest(start):
                self.record.write_text("")
                job = subprocess.Popen([HOSTS / "slurm", "train", "run.yaml"], cwd=ROOT,
                                       env={**self.environment, "WAITS": "1", "CORANK_START": start})
                while "waits" not in self.record.read_text():
                    self.assertIsNone(job.poll())
                job.send_signal(signal.SIGUSR1)
                self.assertEqual(job.wait(timeout=10), 75)
                lines = self.record.read_text().splitlines()
                self.assertEqual(lines[2], "saved")
                self.assertTrue(lines[3].startswith("scontrol requeue 17"), lines)


class Files(unittest.TestCase):
    def test_shell_scripts_are_sound(self):
        scripts = [path for path in (ROOT / "launch").rglob("*") if path.is_file() and
                   (path.name == "environment.sh" or path.read_bytes().startswith(b"#!/usr/bin/env bash"))]
        self.assertGreater(len(scripts), 5)
        done = subprocess.run(["shellcheck", "--severity=warning", "--shell=bash", *scripts], text=True, capture_output=True)
        self.assertEqual(done.stdout + done.stderr, "")

    def test_the_mpi_job_starts_what_is_here(self):
        job = yaml.safe_load((HOSTS / "mpijob.yaml").read_text())
        self.assertEqual((job["apiVersion"], job["kind"]), ("kubeflow.org/v2beta1", "MPIJob"))
        replicas = job["spec"]["mpiReplicaSpecs"]
        launcher, worker = (replicas[name]["template"]["spec"] for name in ("Launcher", "Worker"))
        command = launcher["containers"][0]["command"]
        self.assertTrue(os.access(ROOT / command[0], os.X_OK))
        self.assertEqual(command[1:3], ["/etc/mpi/hostfile", "train"])  # where the operator puts it
        self.assertEqual(worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"], job["spec"]["slotsPerWorker"])
        mounts = worker["containers"][0]["volumeMounts"]
        self.assertEqual({mount["name"] for mount in mounts}, {volume["name"] for volume in worker["volumes"]})
        self.assertIn("/dev/shm", [mount["mountPath"] for mount in mounts])


if __name__ == "__main__":
    unittest.main()
