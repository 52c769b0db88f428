"""Several hosts on this machine (launch/lab): what ranks count as sent between hosts against the kernel's counters of the hosts'
interfaces. Run by launch/test as root, with CORANK_BIN set."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAB = ROOT / "launch" / "lab"
CORANK = Path(os.environ["CORANK_BIN"]).resolve()
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

PACKET = 66  # bytes: Ethernet 14, IP 20, TCP 20 and its time stamps 12
MPI_SHARE = 0.02  # Open MPI's headers, a part of what it carries; measured 0.1 % to 0.5 %


def lab(*command, options=()):
    """(text, report of the counters) of a command over hosts."""
    done = subprocess.run([LAB, "--json", *map(str, options), "--", *map(str, command)], cwd=ROOT, env=ENVIRONMENT, text=True,
                          capture_output=True, timeout=100)
    if done.returncode:
        raise AssertionError(f"the lab ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    text, _, report = done.stdout.rstrip("\n").rpartition("\n")
    return text, json.loads(report)


def carried(report):
    """Bytes that all hosts sent, without the headers of their packets."""
    return sum(host["bytes"] - PACKET * host["packets"] for host in report["hosts"])


def agrees(counted, carried_bytes):
    """Whether what the ranks count is what the interfaces carried, Open MPI's headers aside."""
    return counted <= carried_bytes <= counted * (1 + MPI_SHARE)


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="corank-"))
        self.addCleanup(shutil.rmtree, self.folder)

    def train(self, steps, *overrides, options=()):
        """(bytes a step between hosts as all ranks count them, report of the counters, records) of a run."""
        out = self.folder / f"out-{steps}"
        text, report = lab(CORANK, "train", "configs/tiny.yaml", f"output_dir={out}", f"train.max_steps={steps}", "eval_steps=0",
                           *overrides, options=options)
        found = re.search(r"^  between-hosts +([\d,]+)", text, re.M)
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return int(found[1].replace(",", "")) if found else 0, report, records


class Counters(Case):
    """Two runs that differ in the number of steps: what both share, such as the start, is not in the difference."""

    SHORT, LONG = 2, 12

    def compare(self, ranks_per_host, *overrides):
        options = ("--hosts", 2, "--ranks-per-host", ranks_per_host)
        counted, short, _ = self.train(self.SHORT, *overrides, options=options)
        again, long, records = self.train(self.LONG, *overrides, options=options)
        self.assertEqual(again, counted)
        steps = self.LONG - self.SHORT
        carried_bytes = (carried(long) - carried(short)) / steps
        wire = sum(b["bytes"] - a["bytes"] for a, b in zip(short["hosts"], long["hosts"], strict=True)) / steps
        print(f"2 hosts x {ranks_per_host}, {' '.join(overrides) or 'lora'}: a step counts {counted:,} bytes between hosts, the "
              f"interfaces {wire:,.0f}, without {PACKET} a packet {carried_bytes:,.0f} ({carried_bytes / counted - 1:+.2%})")
        self.assertTrue(agrees(counted, carried_bytes))
        return counted, carried_bytes, records

    def test_one_rank_a_host(self):
        counted, carried_bytes, records = self.compare(1)
        self.assertEqual(counted, 2 * (74752 + 16))  # of S bytes that two ranks sum each hands over S, and both send S
        links = records[-1]["links"]
        self.assertEqual(links["inside-host"], {})
        self.assertEqual(links["between-hosts"]["adapter-gradients"], {"payload": 74752, "sent": 74752})
        # A count that is off by one part in thirty does not pass.
        self.assertFalse(agrees(counted * 0.97, carried_bytes))
        self.assertFalse(agrees(counted * 1.03, carried_bytes))

    def test_tensor_parallel_ranks_share_a_host(self):
        counted, _, records = self.compare(2, "parallel.tensor=2")
        links = records[-1]["links"]
        self.assertGreater(links["inside-host"]["tensor-activations"]["sent"], counted)
        self.assertNotIn("tensor-activations", links["between-hosts"])

    def test_full_fine_tuning_crosses_once_a_host(self):
        counted, _, _ = self.compare(2, "adapter.method=full")
        self.assertAlmostEqual(counted / (2 * 1.5 * 500992), 1, delta=1e-3)  # 2 (n - 1) / n of four ranks, from each host


class Lab(Case):
    def test_hosts_have_names_and_links_of_their_own(self):
        text, report = lab("sh", "-c", "echo $OMPI_COMM_WORLD_RANK $(hostname) $(ls /sys/class/net | wc -l)",
                           options=("--hosts", 3, "--ranks-per-host", 2))
        self.assertEqual(sorted(line.split()[:2] for line in text.splitlines()), [[str(n), f"host{n // 2 + 1}"] for n in range(6)])
        self.assertEqual([host["name"] for host in report["hosts"]], ["host1", "host2", "host3"])

    def test_a_link_has_its_rate(self):
        mbps = 20
        _, _, records = self.train(4, "adapter.method=full", options=("--link-mbps", mbps))
        least = 500992 * 8 / mbps / 1e6  # seconds that one direction takes
        self.assertGreater(statistics.median(record["step_seconds"] for record in records), 0.9 * least)

    def test_a_private_folder_is_each_hosts_own(self):
        shared = self.folder / "shared"
        shared.mkdir()
        (shared / "given").write_text("all")
        text, _ = lab("sh", "-c", f"cd {shared}; hostname >$(hostname); sleep 0.3; echo $(ls)", options=("--private", shared))
        self.assertEqual(sorted(text.splitlines()), ["given host1", "given host2"])
        self.assertEqual([path.name for path in shared.iterdir()], ["given"])

    def test_an_error_is_the_labs(self):
        done = subprocess.run([LAB, "--", "sh", "-c", "exit 5"], cwd=ROOT, text=True, capture_output=True)
        self.assertEqual(done.returncode, 5, done.stderr)

    def test_nothing_is_left_behind(self):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(number.name), open(self.folder / "pids", "w+") as pids:
                process = subprocess.Popen([LAB, "--", "sh", "-c", "echo x; exec sleep 12345"], stdout=pids, stderr=pids)
                while (self.folder / "pids").read_text().count("x") < 2:
                    time.sleep(0.05)
                    self.assertIsNone(process.poll())
                process.send_signal(number)
                process.wait(timeout=10)
                end = time.monotonic() + 10
                while subprocess.run(["pgrep", "-f", "sleep 12345"], capture_output=True).returncode == 0:
                    self.assertLess(time.monotonic(), end)
                    time.sleep(0.05)

    def test_without_root_it_says_so(self):
        done = subprocess.run(["setpriv", "--reuid", "65534", "--clear-groups", sys.executable, "-", "--check"], text=True,
                              capture_output=True, input=LAB.read_text())
        self.assertEqual((done.returncode, done.stderr), (66, "lab: network namespaces need root\n"))


if __name__ == "__main__":
    unittest.main()
