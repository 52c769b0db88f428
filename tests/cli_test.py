"""The commands as a user meets them: exit codes, messages, files. Run by launch/test with CORANK_BIN set."""

import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "data"))
import environment

environment.require("h5py", "numpy", "safetensors")
import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

CORANK = os.environ["CORANK_BIN"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
MPIRUN = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np"]
TINY = "configs/tiny.yaml"


def corank(*arguments, ranks=1, threads=1):
    launcher = [*MPIRUN, str(ranks)] if ranks > 1 else []
    return subprocess.run([*launcher, CORANK, *map(str, arguments)], cwd=ROOT, env={**ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
                          text=True, capture_output=True, timeout=100)


def losses(folder):
    return [json.loads(line)["loss"] for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def adapter_bytes(folder):
    return (Path(folder) / "adapter" / "adapter_model.safetensors").read_bytes()


class Case(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="corank-"))
        self.addCleanup(shutil.rmtree, self.folder)
        self.out = self.folder / "out"

    def train(self, *overrides, ranks=1, out=None, threads=1):
        return corank("train", TINY, f"output_dir={out or self.out}", *overrides, ranks=ranks, threads=threads)

    def succeed(self, result):
        self.assertEqual(result.returncode, 0, result.stderr + result.stdout)
        return result.stdout

    def refuse(self, result, code, *words):
        """Exit code, one paragraph on standard error that holds `words`, and nothing left behind."""
        self.assertEqual(result.returncode, code, result.stderr + result.stdout)
        for word in words:
            self.assertIn(word, result.stderr)
        self.assertEqual(result.stderr.count("corank: "), 1, result.stderr)
        self.assertFalse(self.out.exists(), "something was written")


class Refusals(Case):
    def test_unknown_key_names_line_and_nearest(self):
        self.refuse(self.train("train.learning_rat=1"), 64, "train.learning_rat", "learning_rate")

    def test_unknown_section_key_of_the_file(self):
        run = self.folder / "run.yaml"
        run.write_text((ROOT / TINY).read_text().replace("  r: 8", "  rr: 8"))
        self.refuse(corank("train", run, f"output_dir={self.out}"), 64, "run.yaml:8", "adapter.rr")

    def test_tasks_of_srun_that_do_not_know_each_other(self):
        result = subprocess.run([CORANK, "train", TINY, f"output_dir={self.out}"], cwd=ROOT, text=True, capture_output=True,
                                env={**ENVIRONMENT, "SLURM_STEP_NUM_TASKS": "2"}, timeout=100)
        self.refuse(result, 64, "srun started 2 tasks", "srun --mpi=pmix")

    def test_heads_that_do_not_divide(self):
        self.refuse(self.train("parallel.tensor=3", ranks=3), 64, "parallel.tensor", "3", "attention heads")

    def test_ranks_that_tensor_does_not_divide(self):
        self.refuse(self.train("parallel.tensor=2", ranks=3), 64, "parallel.tensor", "2", "3 ranks")

    def test_batch_that_does_not_divide(self):
        self.refuse(self.train("train.global_batch_size=10", ranks=4), 64, "global_batch_size", "10")

    def test_targets_that_match_nothing(self):
        self.refuse(self.train("adapter.target_modules=[q_pro]"), 64, "target_modules", "q_pro", "q_proj")

    def test_one_target_that_matches_nothing(self):
        self.refuse(self.train("adapter.target_modules=[q_proj,zzz]"), 64, "target_modules", "zzz")

    def test_targets_that_are_no_linear(self):
        self.refuse(self.train("adapter.target_modules=[q_proj,lm_head]"), 64, "lm_head")

    def test_contradicting_keys(self):
        self.refuse(self.train("train.num_train_epochs=1"), 64, "max_steps", "num_train_epochs")

    def test_a_backend_that_is_not_built(self):
        self.refuse(self.train("parallel.backend=gloo"), 64, "parallel.backend", "gloo", "mpi")

    def test_values_out_of_range(self):
        for override in ("adapter.r=0", "adapter.lora_dropout=1", "train.micro_batch_size=0", "train.learning_rate=-1",
                         "adapter.method=dorra", "adapter.pissa_iterations=0", "model.quantization=nf5", "data.packing=maybe"):
            with self.subTest(override):
                self.refuse(self.train(override), 64, override.split("=")[0])

    def test_quantisations_that_contradict(self):
        self.refuse(self.train("model.quantization=int8", "model.double_quant=false"), 64, "model.double_quant", "int8")
        self.refuse(self.train("model.double_quant=false"), 64, "model.double_quant", "nf4")
        self.refuse(self.train("model.quantization=nf4", "adapter.method=full"), 64, "model.quantization", "nf4", "full")
        self.refuse(self.train("adapter.method=pissa", "adapter.pissa_iterations=5"), 64, "adapter.pissa_iterations", "none")

    def test_values_that_no_run_can_use(self):
        for overrides in (["train.global_batch_size=2000000"], ["data.seq_len=2000000"], ["data.seq_len=1"],
                          ["train.num_train_epochs=1e7", "train.max_steps=null"],
                          ["train.num_train_epochs=2e4", "train.max_steps=null"], ["adapter.r=20000"],
                          ["adapter.lora_alpha=1e39"], ["train.adam_beta1=1"], ["train.adam_epsilon=0"],
                          ["adapter.target_modules=q_(proj"], ["adapter.rank_pattern={q_(proj: 4}"]):
            with self.subTest(overrides):
                self.refuse(corank("validate", TINY, f"output_dir={self.out}", *overrides), 64,
                            "command line: " + overrides[0].split("=")[0])

    def test_entries_that_match_no_module(self):
        for key, value in (("exclude_modules", "[zzz]"), ("rank_pattern", "{zzz: 4}"), ("alpha_pattern", "{zzz: 4}")):
            with self.subTest(key):
                self.refuse(self.train(f"adapter.{key}={value}"), 64, f"adapter.{key}", "zzz")

    def test_values_that_yaml_would_cut(self):
        self.refuse(corank("validate", TINY, f"output_dir={self.out} #2"), 64, "output_dir", "quotes")
        self.refuse(corank("validate", TINY, f"output_dir={self.out}", "adapter.target_modules=[q_proj] # ,k_proj]"), 64,
                    "target_modules", "quotes")
        self.succeed(corank("validate", TINY, f'output_dir="{self.out} #2"'))
        self.succeed(corank("validate", TINY, f"output_dir={self.out}", "adapter.target_modules=['q_proj', \"k_proj\"]"))

    def test_validate_checks_what_train_needs(self):
        self.out.touch()
        for override, code in (("data.train=null", 64), ("train.max_steps=null", 64), ("output_dir=null", 64),
                               ("resume=nowhere", 66), ("data.train=/", 66), (f"output_dir={self.out}", 74)):
            with self.subTest(override):
                place = [] if "output_dir" in override else [f"output_dir={self.folder / 'fresh'}"]
                result = corank("validate", TINY, override, *place)
                self.assertEqual(result.returncode, code, result.stderr)
                self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        self.assertEqual(self.out.stat().st_size, 0)

    def test_pipes_are_not_waited_for(self):
        pipe = self.folder / "pipe"
        os.mkfifo(pipe)
        self.refuse(corank("validate", pipe), 66, str(pipe))
        self.refuse(self.train(f"data.train={pipe}"), 66, str(pipe))
        self.refuse(corank("inspect", pipe), 65, str(pipe))

    def test_unknown_commands(self):
        self.refuse(corank("trian"), 64, "'trian'", "validate")

    def test_generate_options(self):
        for option, value in (("--temperature", "nan"), ("--temperature", "-1"), ("--top-p", "0"), ("--stop-tokens", "256"),
                              ("--max-new-tokens", "2000000")):
            with self.subTest(f"{option} {value}"):
                result = corank("generate", TINY, "--prompt-tokens", "1", option, value)
                self.assertEqual(result.returncode, 64)
                self.assertIn(option[2:].replace("-", "_"), result.stderr.replace("-", "_"))

    def test_missing_inputs(self):
        self.refuse(self.train("data.train=nowhere.h5"), 66, "nowhere.h5")
        self.refuse(corank("train", "nowhere.yaml"), 66, "nowhere.yaml")
        self.refuse(self.train("adapter.path=nowhere"), 66, "nowhere")

    def test_one_message_for_all_ranks(self):
        self.refuse(self.train("adapter.r=0", ranks=4), 64, "adapter.r")

    def test_commands_of_one_process(self):
        for command in (("merge", TINY, "--out", self.folder / "merged"), ("validate", TINY)):
            self.refuse(corank(*command, ranks=2), 64, command[0], "2 ranks", "one process")

    def test_output_of_another_run(self):
        self.succeed(self.train("train.max_steps=2"))
        before = sorted(self.out.rglob("*"))
        result = self.train("train.max_steps=2", "adapter.r=4")
        self.assertEqual(result.returncode, 64)
        self.assertIn("holds another run (now r: 4;", result.stderr)
        self.assertEqual(sorted(self.out.rglob("*")), before)


class TokenFiles(Case):
    def token_file(self, change):
        path = self.folder / "train.h5"
        shutil.copy(ROOT / "configs/tiny/train.h5", path)
        with h5py.File(path, "r+") as file:
            change(file)
        return path

    def test_token_beyond_the_vocabulary(self):
        def change(file):
            file["tokens"][7] = 256

        path = self.token_file(change)
        self.refuse(self.train(f"data.train={path}"), 65, str(path), "256")

    def test_no_target_within_seq_len(self):
        def change(file):
            mask, offsets = file["loss_mask"][:], file["offsets"][:]
            mask[:] = 0
            mask[offsets[1:] - 1] = 1
            file["loss_mask"][:] = mask

        path = self.token_file(change)
        self.refuse(self.train(f"data.train={path}", "data.seq_len=2"), 65, str(path), "no target", "seq_len")
        self.assertEqual(corank("eval", TINY, f"data.eval={path}", "data.seq_len=2").returncode, 65)

    def test_wrong_format_attribute(self):
        path = self.token_file(lambda file: file.attrs.__setitem__("format", "other"))
        self.refuse(self.train(f"data.train={path}"), 65, str(path), "format")

    def test_truncated(self):
        path = self.token_file(lambda file: None)
        data = path.read_bytes()
        for size in (len(data) // 2, len(data) - 1, 100, 0):
            path.write_bytes(data[:size])
            with self.subTest(size):
                self.refuse(self.train(f"data.train={path}"), 65, str(path))


class Models(Case):
    def model(self):
        path = self.folder / "model"
        shutil.copytree(ROOT / "tests/golden/llama/model", path)
        return path

    def train_on(self, model):
        tokens = self.folder / "tokens.h5"
        if not tokens.exists():
            with h5py.File(tokens, "w") as file:
                file["tokens"] = np.arange(60, dtype=np.int32) % 130
                file["offsets"] = np.arange(0, 61, 5, dtype=np.int64)
                file["loss_mask"] = np.ones(60, np.uint8)
                file.attrs.update({"format": "corank-tokens", "version": 1, "vocab_size": 130})
        run = self.folder / "run.yaml"
        run.write_text(f"model: {{path: {model}, dtype: float32}}\ndata: {{train: {tokens}, seq_len: 32}}\n"
                       f"train: {{max_steps: 2, global_batch_size: 2}}\noutput_dir: {self.out}\n")
        return corank("train", run)

    def change_weights(self, model, change):
        weights = load_file(model / "model.safetensors")
        change(weights)
        save_file(weights, model / "model.safetensors")

    def test_as_it_is(self):
        self.succeed(self.train_on(self.model()))

    def test_missing_tensor(self):
        model = self.model()
        self.change_weights(model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
        self.refuse(self.train_on(model), 65, "model.layers.1.mlp.up_proj.weight", "missing")

    def test_unused_tensor(self):
        model = self.model()
        self.change_weights(model, lambda w: w.update({"model.layers.2.extra": np.zeros(3, np.float32)}))
        self.refuse(self.train_on(model), 65, "model.layers.2.extra")

    def test_wrong_shape(self):
        model = self.model()
        self.change_weights(model, lambda w: w.update({"model.norm.weight": np.ones(65, np.float32)}))
        self.refuse(self.train_on(model), 65, "model.norm.weight", "65", "64")

    def test_truncated_weights(self):
        model = self.model()
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        self.refuse(self.train_on(model), 65, "model.safetensors")

    def test_hostile_header(self):
        model = self.model()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
        self.refuse(self.train_on(model), 65, "model.safetensors")

    def test_folders_of_other_quantisations(self):
        for quantised, code, words in (({"quant_method": "gptq", "bits": 4}, 65, ["gptq"]),
                                       ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 65, ["bitsandbytes"]),
                                       ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 64,
                                        ["model.quantization: none", "nf4"])):
            model = self.model()
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))
            with self.subTest(quantised):
                self.refuse(self.train_on(model), code, "config.json", *words)
            shutil.rmtree(model)

    def test_attributes_that_change_the_result(self):
        for change in ({"model_type": "mamba"}, {"hidden_act": "gelu"}, {"is_causal": False},
                       {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "rope_parameters": None}):
            model = self.model()
            config = json.loads((model / "config.json").read_text())
            (model / "config.json").write_text(json.dumps({**config, **change}))
            with self.subTest(change):
                self.refuse(self.train_on(model), 65, "config.json")
            shutil.rmtree(model)


class Life(Case):
    """An adapter on a model folder: merged, and switched to and from."""

    def setUp(self):
        super().setUp()
        self.model = ROOT / "tests/golden/llama/model"
        self.merged = self.folder / "merged"
        tokens = self.folder / "tokens.h5"
        with h5py.File(tokens, "w") as file:
            file["tokens"] = (np.arange(600) ** 2 % 131 % 130).astype(np.int32)
            file["offsets"] = np.arange(0, 601, 20, dtype=np.int64)
            file["loss_mask"] = np.ones(600, np.uint8)
            file.attrs.update({"format": "corank-tokens", "version": 1, "vocab_size": 130})
        self.run_file = self.folder / "run.yaml"
        self.run_file.write_text(f"model: {{path: {self.model}, dtype: float32}}\n"
                                 f"data: {{train: {tokens}, eval: {tokens}, seq_len: 32, packing: false}}\n"
                                 "train: {max_steps: 4, global_batch_size: 4, learning_rate: 1e-2}\n")

    def trained(self, name, *overrides):
        self.succeed(corank("train", self.run_file, f"output_dir={self.folder / name}", *overrides))
        return self.folder / name / "adapter"

    def loss(self, *overrides):
        return json.loads(self.succeed(corank("eval", self.run_file, *overrides, "--json")))["loss"]

    def merge(self, adapter, *overrides, out=None):
        return corank("merge", self.run_file, f"adapter.path={adapter}", "--out", out or self.merged, *overrides)

    def generate(self, *arguments, ranks=1, **options):
        """Answers of one process that serves `requests`, or the tokens that one process of its own gives."""
        command = [*([*MPIRUN, str(ranks)] if ranks > 1 else []), CORANK, "generate", *map(str, (self.run_file, *arguments))]
        done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=100, **options)
        return [json.loads(line) for line in self.succeed(done).splitlines()]

    def test_merged_is_the_base_with_its_adapter(self):
        for settings, overrides in (([], []), (["adapter.method=dora"], []), (["adapter.method=mora", "adapter.mora_type=6"], []),
                                    (["adapter.method=pissa"], []),
                                    (["adapter.method=mora", "adapter.remora_steps=2", "adapter.remora_warmup_steps=1"], []),
                                    (["model.quantization=nf4"], ["model.quantization=nf4"]),
                                    (["model.quantization=int8", "adapter.modules_to_save=[lm_head]"], ["model.quantization=int8"])):
            with self.subTest(settings):
                shutil.rmtree(self.folder / "run", ignore_errors=True)
                adapter = self.trained("run", *settings)
                report = json.loads(self.succeed(self.merge(adapter, *overrides, "--json")))
                self.assertEqual((report["merged"], report["replaced"], report["tensors"]),
                                 (14, int("lm_head" in str(settings)), 21))
                self.assertEqual(report["base"], "dequantized" if overrides else "stored")
                with_adapter = self.loss(f"adapter.path={adapter}", *overrides)
                merged = self.loss(f"model.path={self.merged}")
                self.assertAlmostEqual(merged / with_adapter, 1, delta=1e-5)
                self.assertGreater(abs(self.loss(*overrides) / with_adapter - 1), 1e-3)
                if overrides:
                    original = self.folder / "original"
                    self.assertIn("as the folder holds it", self.succeed(self.merge(adapter, *overrides, "--base", "original",
                                                                                    out=original)))
                    self.assertAlmostEqual(self.loss(f"model.path={original}") / self.loss(f"adapter.path={adapter}"), 1, delta=1e-5)
                    shutil.rmtree(original)
                shutil.rmtree(self.merged)

    def test_a_pissa_result_is_used_by_the_run_that_made_it(self):
        pissa = ("adapter.method=pissa", "adapter.r=4", "adapter.lora_alpha=4", "adapter.pissa_niter=2",
                 "adapter.rank_pattern={q_proj: 6}")
        adapter = self.trained("run", *pissa)
        alone = self.loss(f"adapter.path={adapter}")
        for path in (adapter, adapter.parent / "checkpoint-4"):
            self.assertEqual(self.loss(f"adapter.path={path}", *pissa), alone)
        self.assertNotEqual(self.loss(), alone)
        prompt = ("--prompt-tokens", "5,25,62", "--max-new-tokens", 12, "--json")
        self.assertEqual(self.generate(f"adapter.path={adapter}", *pissa, *prompt), self.generate(f"adapter.path={adapter}", *prompt))
        self.succeed(self.merge(adapter, *pissa))
        self.assertAlmostEqual(self.loss(f"model.path={self.merged}") / alone, 1, delta=1e-5)
        self.refuse(corank("eval", self.run_file, f"adapter.path={adapter}", "adapter.r=5", pissa[0], *pissa[2:]), 64, "adapter.r", "10")
        self.refuse(corank("train", self.run_file, f"adapter.path={adapter}", *pissa, f"output_dir={self.folder / 'on'}"), 64,
                    "adapter.method")
        quantised = (*pissa, "model.quantization=nf4")
        self.refuse(corank("eval", self.run_file, f"adapter.path={adapter}", *quantised), 64, "original weights",
                    "model.quantization=none")
        self.refuse(self.merge(adapter, *quantised, out=self.folder / "never"), 64, "--base original")
        self.succeed(self.merge(adapter, *quantised, "--base", "original", out=self.folder / "original"))

    def test_merge_refusals(self):
        adapter = self.trained("run")
        foreign, before = self.folder / "foreign", sorted(self.model.iterdir())
        foreign.mkdir()
        (foreign / "notes").touch()
        for code, words, result in (
                (64, ("adapter.path",), corank("merge", self.run_file, "--out", self.merged)),
                (64, ("full fine-tuning",), corank("merge", self.run_file, "adapter.method=full", "--out", self.merged)),
                (64, ("the model itself",), self.merge(adapter, out=self.model)),
                (64, (str(foreign), "holds something already"), self.merge(adapter, out=foreign)),
                (64, ("--base dequantized",), self.merge(adapter, "--base", "dequantized")),
                (64, ("model.shape",), corank("merge", TINY, f"adapter.path={adapter}", "--out", self.merged)),
                (64, ("4 bits", "--base dequantized"), self.merge(
                    adapter, f"model.path={ROOT}/tests/golden/methods/llama_nf4/model", "model.quantization=nf4", "--base", "original")),
                (65, ("none that",), self.changed(adapter, lambda w: {**w, "base_model.model.model.norm.weight": np.ones(64)})),
                (65, ("no place for", "layers.7"), self.changed(
                    adapter, lambda w: {name.replace("layers.1", "layers.7"): value for name, value in w.items()})),
                (65, ("NaN or infinite",), self.changed(
                    adapter, lambda w: {name: value * np.float32(1e30) for name, value in w.items()})),
                (66, ("nowhere",), self.merge("nowhere"))):
            with self.subTest(words):
                self.refuse(result, code, *words)
                self.assertEqual([sorted(self.model.iterdir()), sorted(foreign.iterdir())], [before, [foreign / "notes"]])
                self.assertFalse(self.merged.exists() or Path(f"{self.merged}.partial").exists())

    def changed(self, adapter, change):
        """What merge makes of an adapter whose weights were changed."""
        folder = self.folder / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter, folder)
        save_file(change(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
        return self.merge(folder)

    def test_a_killed_merge_leaves_no_folder_and_the_next_one_is_whole(self):
        adapter, large = self.trained("run"), self.folder / "large"
        shutil.copytree(self.model, large)
        (large / "merges.txt").write_bytes(bytes(1 << 28))
        partial = Path(f"{self.merged}.partial")
        process = subprocess.Popen([CORANK, "merge", self.run_file, f"model.path={large}", f"adapter.path={adapter}", "--out",
                                    self.merged], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
        while not (partial / "model.safetensors").exists():
            self.assertIsNone(process.poll(), "the merge ended before it could be killed")
            time.sleep(0.001)
        process.kill()
        process.wait()
        self.assertTrue(partial.exists())
        self.assertFalse(self.merged.exists())
        self.succeed(self.merge(adapter))
        self.assertFalse(partial.exists())
        self.assertEqual(sorted(p.name for p in self.merged.iterdir()), ["config.json", "model.safetensors"])

    def adapters(self):
        """One of each kind, and what a process of its own answers with each."""
        paths = {"a": self.trained("a"),
                 "b": self.trained("b", "adapter.method=dora", "adapter.r=4", "adapter.target_modules=[q_proj,down_proj]",
                                   "adapter.modules_to_save=[embed_tokens,norm,lm_head]"),
                 "c": self.trained("c", "adapter.method=adalora"),
                 "d": self.trained("d", "adapter.method=mora", "adapter.mora_type=6"),
                 "e": self.trained("e", "adapter.method=pissa").parent / "checkpoint-4",
                 "f": self.trained("f", "adapter.method=mora", "adapter.remora_steps=2", "adapter.remora_warmup_steps=1")}
        prompt = ("--prompt-tokens", "5,25,62", "--max-new-tokens", 12, "--json")
        alone = {name: self.generate(f"adapter.path={path}", *prompt)[0]["tokens"] for name, path in paths.items()}
        alone["base"] = self.generate(*prompt)[0]["tokens"]
        self.assertGreater(len(set(map(str, alone.values()))), 4, alone)
        return paths, alone

    def test_switching_gives_what_fresh_processes_give(self):
        paths, alone = self.adapters()
        everything = ["a", "b", "f", "a", "f", "base", "b", "c", "e", "d", "b", "base", "e", "f", "a", "d", "c"]
        for settings in ([], ["parallel.tensor=2"], ["--merge"], ["parallel.tensor=2", "--merge"], ["model.quantization=nf4"],
                         ["model.quantization=nf4", "--merge"]):
            with self.subTest(settings):
                fits = {name: path for name, path in paths.items() if name != "f" or "model.quantization=nf4" not in settings}
                named = [word for name, path in fits.items() for word in ("--adapter", f"{name}={path}")]
                order = [name for name in everything if name in (*fits, "base")]
                requests = "".join(json.dumps({"prompt": [5, 25, 62], "adapter": name}) + "\n" for name in order)
                if "model.quantization=nf4" in settings:
                    expected = {name: self.generate(*(f"adapter.path={paths[n]}" for n in [name] if n != "base"), settings[0],
                                                    "--prompt-tokens", "5,25,62", "--max-new-tokens", 12, "--json")[0]["tokens"]
                                for name in ("a", "b", "base")}
                else:
                    expected = alone
                answers = self.generate(*named, *settings, "--serve", "--max-new-tokens", 12, "--max-positions", 64,
                                        ranks=2 if "parallel.tensor=2" in settings else 1, input=requests)
                self.assertEqual([answer["adapter"] for answer in answers], order)
                for name, answer in zip(order, answers, strict=True):
                    if name in expected:
                        self.assertEqual(answer["tokens"], expected[name], name)
        one = self.generate(*named, "--use", "b", "--prompt-tokens", "5,25,62", "--max-new-tokens", 12, "--json")
        self.assertEqual(one[0]["tokens"], alone["b"])

    def test_requests_that_are_refused_do_not_end_the_process(self):
        adapter = self.trained("run")
        good = {"prompt": [5, 25], "max_new_tokens": 3}
        bad = (("{", "request"), ([], "JSON object"), ({}, "prompt is missing"), ({**good, "promt": 1}, "promt"),
               ({**good, "prompt": [1.5]}, "prompt is 1.5"), ({**good, "prompt": [130]}, "vocabulary"),
               ({**good, "adapter": "x"}, "'x'; there are: default, y, base"), ({**good, "temperature": -1}, "temperature"),
               ({**good, "max_new_tokens": 0}, "max_new_tokens"), ({**good, "max_new_tokens": 99}, "--max-positions"))
        lines = [line if isinstance(line, str) else json.dumps(line) for request, _ in bad for line in (request, good)]
        answers = self.generate(f"adapter.path={adapter}", "--adapter", f"y={adapter}", "--serve", "--max-positions", 64,
                                input="\n".join(lines))
        for (_, word), refusal, answer in zip(bad, answers[::2], answers[1::2], strict=True):
            self.assertIn(word, refusal["error"])
            self.assertEqual(answer, answers[1])
        served = (CORANK, "generate", str(self.run_file), f"adapter.path={adapter}", "--serve", "--max-positions", "64")
        done = subprocess.run(served, cwd=ROOT, env=ENVIRONMENT, input=b'{"adapter": "\xff", "prompt": [1]}\n\xff\n{"prompt": [5], "max_new_tokens": 3}\n',
                              capture_output=True, timeout=100)
        self.assertEqual(["error" in json.loads(line) for line in done.stdout.splitlines()], [True, True, False], done.stderr)
        drawn = [{**good, "temperature": 1.0, "seed": seed, "max_new_tokens": 20} for seed in (1, 2, 1)]
        answers = self.generate("--serve", input="\n".join(map(json.dumps, drawn)))
        self.assertEqual(answers[0], answers[2])
        self.assertNotEqual(answers[0], answers[1])

    def test_adapters_that_are_refused(self):
        adapter = self.trained("run")
        full = self.folder / "full"
        self.succeed(corank("train", self.run_file, f"output_dir={full}", "adapter.method=full"))
        prompt = ("--prompt-tokens", "5")
        for arguments, code, word in (((f"base={adapter}",), 64, "base"), ((f"x={adapter}", f"x={adapter}"), 64, "two adapters"),
                                      ((str(adapter),), 64, "NAME=PATH"), ((f"x y={adapter}",), 64, "letters"),
                                      (("x=nowhere",), 66, "nowhere"), ((f"x={full}/model",), 66, "no adapter here"),
                                      ((f"x={full}/checkpoint-4",), 65, "full fine-tuning")):
            with self.subTest(arguments):
                named = [word for argument in arguments for word in ("--adapter", argument)]
                self.refuse(corank("generate", self.run_file, *named, *prompt), code, word)
        self.refuse(corank("generate", self.run_file, "--use", "x", *prompt), 64, "'x'")
        self.refuse(corank("generate", self.run_file), 64, "--prompt-tokens", "--serve")
        self.refuse(corank("generate", self.run_file, "--serve", *prompt), 64, "--serve")


class AdapterFiles(Case):
    """combine, and export --as plain-lora: files into files."""

    MODEL = ROOT / "tests/golden/llama/model"
    INPUTS = [ROOT / "tests/golden/methods/combine" / name for name in ("first", "second", "third")]

    def loss(self, adapter):
        tokens = self.folder / "tokens.h5"
        if not tokens.exists():
            with h5py.File(tokens, "w") as file:
                file["tokens"] = np.arange(60, dtype=np.int32) * 7 % 130
                file["offsets"] = np.arange(0, 61, 10, dtype=np.int64)
                file["loss_mask"] = np.ones(60, np.uint8)
                file.attrs.update({"format": "corank-tokens", "version": 1, "vocab_size": 130})
        run = self.folder / "run.yaml"
        run.write_text(f"model: {{path: {self.MODEL}, dtype: float32}}\nadapter: {{path: {adapter}}}\n"
                       f"data: {{eval: {tokens}, seq_len: 32}}\n")
        return json.loads(self.succeed(corank("eval", run, "--json")))["loss"]

    def combine(self, *options, inputs=INPUTS):
        return corank("combine", *inputs, "--out", self.out, *options)

    def test_combine(self):
        for how, inputs, weights, peft in (("cat", self.INPUTS, "0.7,-0.4,1.5", "cat"), ("svd", self.INPUTS, "0.7,-0.4,1.5", "svd"),
                                           ("linear", self.INPUTS[:2], "0.7,-0.4", "linear")):
            with self.subTest(how):
                report = json.loads(self.succeed(self.combine("--weights", weights, "--how", how, "--json", inputs=inputs)))
                config = json.loads((self.out / "adapter_config.json").read_text())
                self.assertEqual((report["r"], report["lora_alpha"]), (config["r"], config["lora_alpha"]))
                self.assertAlmostEqual(self.loss(self.out) / self.loss(self.INPUTS[0].parent / peft), 1, delta=1e-6)
        self.assertIn("plain LoRA of rank 3", self.succeed(self.combine("--weights=-0.7,0.4,1", "--how", "svd", "--r", "3")))

    def test_combine_takes_checkpoints_and_files(self):
        run, imported = self.folder / "run", self.folder / "first.h5"
        self.succeed(self.train("train.max_steps=1", "adapter.method=pissa", out=run))
        self.assertIn("rank 32", self.succeed(corank("combine", run / "checkpoint-1", run / "adapter", "--weights", "0.5,0.5",
                                                     "--how", "cat", "--out", self.out)))
        self.succeed(corank("import", self.INPUTS[0], "--out", imported))
        self.succeed(corank("combine", imported, "--weights", "1", "--how", "linear", "--out", self.folder / "same"))
        self.assertAlmostEqual(self.loss(self.folder / "same") / self.loss(self.INPUTS[0]), 1, delta=1e-6)

    def test_import_overwrites_nothing_but_adapters(self):
        tokens = self.folder / "tokens.h5"
        shutil.copy(ROOT / "configs/tiny/train.h5", tokens)
        before = tokens.read_bytes()
        self.refuse(corank("import", self.INPUTS[0], "--out", tokens), 64, str(tokens), "no adapter")
        self.assertEqual(tokens.read_bytes(), before)
        for _ in range(2):
            self.succeed(corank("import", self.INPUTS[0], "--out", self.folder / "adapter.h5"))

    def test_modules_to_save_have_their_full_names_in_a_peft_folder(self):
        run, saved = self.folder / "run", "adapter.modules_to_save=[norm, embed_tokens]"
        self.succeed(self.train("train.max_steps=1", saved, out=run))
        config = json.loads((run / "adapter" / "adapter_config.json").read_text())
        self.assertEqual(config["modules_to_save"], ["model.norm", "model.embed_tokens"])
        self.succeed(self.train("train.max_steps=1", saved, f"adapter.path={run / 'adapter'}", out=self.folder / "on"))
        self.refuse(self.train("train.max_steps=1", "adapter.modules_to_save=[norm]", f"adapter.path={run / 'adapter'}",
                               out=self.folder / "no"), 64, "modules_to_save")

    def test_inspect_knows_the_folder_of_a_remora_run(self):
        run = self.folder / "run"
        self.succeed(self.train("train.max_steps=3", "adapter.method=mora", "adapter.remora_steps=2",
                                "adapter.remora_warmup_steps=1", out=run))
        self.assertIn("remora_0", self.succeed(corank("inspect", run / "adapter")))

    def test_combine_refuses(self):
        one, two = self.INPUTS[:2]
        for inputs, options, code, words in (
                ([one, two], ["--weights", "1", "--how", "cat"], 64, ["--weights", "1 weights for 2"]),
                ([one, two], ["--weights", "1,nan", "--how", "cat"], 64, ["--weights", "nan"]),
                ([one, self.INPUTS[2]], ["--weights", "1,1", "--how", "linear"], 64, ["rank 4", "cat or svd"]),
                ([one, two], ["--weights", "1,1", "--how", "cat", "--r", "4"], 64, ["--r"]),
                ([one, two], ["--weights", "1e40,1", "--how", "cat"], 64, ["--weights", "float32"]),
                ([one, ROOT / "tests/golden/families/gpt2/adapter"], ["--weights", "1,1", "--how", "cat"], 65, ["transformer.h.0", "different models"]),
                ([one, self.folder / "none"], ["--weights", "1,1", "--how", "cat"], 66, ["none"]),
                ([one, ROOT / "tests/golden/methods/dora/adapter"], ["--weights", "1,1", "--how", "cat"], 64,
                 ["dora", "export --as plain-lora"]),
                ([one, ROOT / "tests/golden/methods/modules_to_save/adapter"], ["--weights", "1,1", "--how", "cat"], 64,
                 ["modules_to_save", "lm_head"])):
            with self.subTest(words):
                self.refuse(self.combine(*options, inputs=inputs), code, *words)
        self.assertEqual(self.combine("--weights", "1", "--how", "ties", inputs=[one]).returncode, 64)
        self.assertEqual(corank("combine", one, "--weights", "1", "--how", "cat", "--out", one).returncode, 64)

    def test_plain_lora_by_svd(self):
        dora = ROOT / "tests/golden/methods/dora/adapter"
        export = ("export", dora, "--out", self.out, "--as", "plain-lora")
        self.refuse(corank(*export), 64, "--base", "dora")
        self.refuse(corank(*export, "--base", self.MODEL), 65, "--max-error", "rank 8 leaves", "more than 0.05", "model.layers.")
        self.refuse(corank(*export, "--base", ROOT / "tests/golden/families/qwen2/model"), 65, "base model")
        self.assertIn("largest", self.succeed(corank(*export, "--base", self.MODEL, "--max-error", "0.9")))
        report = json.loads(self.succeed(corank(*export, "--base", self.MODEL, "--r", "64", "--max-error", "1e-6", "--json")))
        self.assertEqual((report["r"], len(report["errors"])), (64, 14))
        self.assertAlmostEqual(self.loss(self.out) / self.loss(dora), 1, delta=1e-6)

    def test_plain_lora_refuses(self):
        adapters = ROOT / "tests/golden/methods"
        for adapter, options, code, words in (("modules_to_save/adapter", ["--as", "plain-lora"], 64, ["modules_to_save", "lm_head"]),
                                              ("adalora/adapter", ["--as", "plain-lora", "--r", "4"], 64, ["--r", "exactly"]),
                                              ("dora/adapter", ["--r", "4"], 64, ["--r", "plain-lora"])):
            with self.subTest(adapter):
                self.refuse(corank("export", adapters / adapter, "--out", self.out, *options), code, *words)


class Runs(Case):
    def test_validate(self):
        result = json.loads(self.succeed(corank("validate", TINY, f"output_dir={self.out}", "--json")))
        self.assertEqual((result["valid"], result["train_samples"], result["targets"]), (True, 288, 14))
        self.assertEqual(corank("validate", TINY, "parallel.tensor=3", "--ranks", 3).returncode, 64)

    def test_result_files(self):
        text = self.succeed(self.train("train.max_steps=3", "save_steps=1", "save_total_limit=2", ranks=2))
        self.assertIn("trainable params: 18,688 || all params: 143,936 || trainable%: 12.9835", text)
        self.assertIn("ranks 2 = dp 2 x tp 1, global batch 12 = 2 dp x 6 accumulation x 1 micro-batch", text)
        self.assertEqual(sorted(p.name for p in self.out.iterdir()),
                         ["adapter", "checkpoint-2", "checkpoint-3", "metrics.jsonl", "run.yaml"])
        record = json.loads((self.out / "metrics.jsonl").read_text().splitlines()[0])
        for key in ("step", "loss", "grad_norm", "learning_rate", "target_tokens", "tokens_per_second", "step_seconds",
                    "peak_memory_bytes", "bytes", "links"):
            self.assertIn(key, record)
        self.assertEqual(record["links"]["inside-host"]["adapter-gradients"], {"payload": 74752, "sent": 74752})
        self.assertEqual(record["links"]["between-hosts"], {})
        self.assertRegex(text, r"\n  sent by all ranks\n  inside-host +149,536 +1,002,016   6\.7 times less\n")
        self.assertEqual(record["step"], 1)

    def test_resolved_run_is_the_same_run(self):
        self.succeed(self.train("train.max_steps=3"))
        again = self.folder / "again"
        self.succeed(corank("train", self.out / "run.yaml", f"output_dir={again}"))
        self.assertEqual(adapter_bytes(self.out), adapter_bytes(again))

    def test_quantised_bases_train_in_every_layout(self):
        first = {}
        for setting in ("none", "int8", "nf4", "nf4 model.double_quant=false"):
            settings = (f"model.quantization={setting}".split(" ") + ["train.max_steps=3"])
            one, four = self.folder / f"{setting}-1", self.folder / f"{setting}-4"
            self.succeed(self.train(*settings, out=one))
            self.succeed(self.train(*settings, "parallel.tensor=2", ranks=4, out=four))
            for a, b in zip(losses(one), losses(four), strict=True):
                self.assertAlmostEqual(a / b, 1, delta=1e-5)
            first[setting] = losses(one)[0]
        self.assertEqual(len(set(first.values())), 4, first)
        again = self.folder / "again"
        self.succeed(corank("train", self.folder / "nf4 model.double_quant=false-1/run.yaml", f"output_dir={again}"))
        self.assertEqual(losses(again)[0], first["nf4 model.double_quant=false"])

    def test_eight_tensor_parallel_ranks(self):
        for method in ("lora", "dora", "adalora"):
            one, eight = self.folder / f"{method}-1", self.folder / f"{method}-8"
            settings = ("model.shape=tiny-gpt2", f"adapter.method={method}", "train.max_steps=3")
            self.succeed(self.train(*settings, out=one))
            self.succeed(self.train(*settings, "parallel.tensor=8", ranks=8, out=eight))
            for a, b in zip(losses(one), losses(eight), strict=True):
                self.assertAlmostEqual(a / b, 1, delta=1e-5)

    def newest_checkpoint(self):
        return max((int(p.name.split("-")[1]) for p in self.out.glob("checkpoint-*")), default=0)

    def test_kill_at_any_time_and_start_again(self):
        straight = self.folder / "straight"
        settings = ("train.max_steps=100", "save_steps=1")
        self.succeed(self.train(*settings, ranks=2, out=straight))
        command = [*MPIRUN, "2", CORANK, "train", TINY, f"output_dir={self.out}", *settings]
        for kill_after in (2, 25, 50):
            process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.DEVNULL, start_new_session=True)
            deadline = time.monotonic() + 60
            while self.newest_checkpoint() < kill_after:
                self.assertIsNone(process.poll(), "the run ended before it could be killed")
                self.assertLess(time.monotonic(), deadline)
                time.sleep(0.002)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(2)  # mpirun's ranks end with it, a moment later
        self.succeed(self.train(*settings, ranks=2))
        self.assertEqual(adapter_bytes(self.out), adapter_bytes(straight))
        self.assertEqual(losses(self.out), losses(straight))

    def test_stop_on_request_saves_and_resumes(self):
        straight = self.folder / "straight"
        self.succeed(self.train(ranks=2, out=straight))
        process = subprocess.Popen([*MPIRUN, "2", CORANK, "train", TINY, f"output_dir={self.out}"], cwd=ROOT, env=ENVIRONMENT,
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step  3/"):
                process.send_signal(signal.SIGUSR1)
                break
        rest = process.stdout.read()
        process.stdout.close()
        self.assertEqual(process.wait(timeout=60), 75, rest)
        self.assertIn("start the same command again", rest)
        self.assertIn("resuming from", self.succeed(self.train(ranks=2)))
        self.assertEqual(adapter_bytes(self.out), adapter_bytes(straight))
        self.assertEqual(losses(self.out), losses(straight))

    def test_damaged_newest_checkpoint_is_passed_over(self):
        self.succeed(self.train("train.max_steps=4", "save_steps=1"))
        state = self.out / "checkpoint-4" / "state.h5"
        data = bytearray(state.read_bytes())
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
        (self.out / "checkpoint-99999999999999999999999").mkdir()
        text = self.succeed(self.train("train.max_steps=4", "save_steps=1"))
        self.assertIn("checkpoint-3 after step 3", text)
        self.assertIn("passed over", text)

    def test_checkpoints_that_are_all_damaged_are_not_trained_over(self):
        settings = ("train.max_steps=2", "save_steps=1")
        self.succeed(self.train(*settings))
        for folder in self.out.glob("checkpoint-*"):
            (folder / "state.h5").write_bytes(b"")
        for command in ("train", "validate"):
            result = corank(command, TINY, f"output_dir={self.out}", *settings)
            self.assertEqual(result.returncode, 65, result.stderr)
            for word in ("checkpoint-1: state.h5", "checkpoint-2: state.h5", "start over"):
                self.assertIn(word, result.stderr)
        for folder in self.out.glob("checkpoint-*"):  # what a kill during a first save leaves
            (folder / "manifest.json").unlink()
        self.assertIn("no checkpoint was ever completed", self.succeed(self.train(*settings)))

    def test_a_finished_run_says_so(self):
        self.succeed(self.train("train.max_steps=1", ranks=2))
        text = self.succeed(self.train("train.max_steps=1", ranks=2))
        self.assertIn("already complete after step 1", text)
        self.assertNotIn("bytes a step, rank 0", text)

    def test_second_run_into_one_folder_is_refused(self):
        first = subprocess.Popen([CORANK, "train", TINY, f"output_dir={self.out}", "train.max_steps=100000"], cwd=ROOT,
                                 env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        try:
            while not first.stdout.readline().startswith("step "):
                self.assertIsNone(first.poll())
            second = self.train("train.max_steps=100000")
            self.assertEqual(second.returncode, 64)
            self.assertIn("another process is writing this folder", second.stderr)
        finally:
            first.kill()
            first.stdout.close()
            first.wait()

    def test_samples_that_are_cut_are_counted(self):
        self.assertIn("are cut at their end", self.succeed(self.train("train.max_steps=1", "data.seq_len=20")))

    def test_adapter_path_brings_its_settings(self):
        self.succeed(self.train("train.max_steps=3", "adapter.r=4"))
        adapter = self.out / "adapter"
        run = self.folder / "run.yaml"
        run.write_text((ROOT / TINY).read_text().replace("  r: 8\n  lora_alpha: 16\n", f"  path: {adapter}\n"))
        with_adapter = json.loads(self.succeed(corank("eval", run, "--json")))["loss"]
        without = json.loads(self.succeed(corank("eval", TINY, "--json")))["loss"]
        self.assertLess(with_adapter, without)
        both = corank("eval", run, "adapter.r=8")
        self.assertEqual(both.returncode, 64)
        self.assertIn("adapter.r", both.stderr)

    def test_eval_is_the_same_in_every_layout(self):
        values = []
        for ranks, tensor in ((1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (4, 4)):
            result = json.loads(self.succeed(corank("eval", TINY, f"parallel.tensor={tensor}", "--json", ranks=ranks)))
            self.assertEqual((result["samples"], result["target_tokens"]), (32, values[0][1] if values else result["target_tokens"]))
            values.append((result["loss"], result["target_tokens"]))
        for loss, _ in values:
            self.assertAlmostEqual(loss / values[0][0], 1, delta=1e-6)

    def test_full_fine_tuning_leaves_a_model(self):
        self.succeed(self.train("adapter.method=full", "train.max_steps=3", "train.learning_rate=1e-3", ranks=2))
        self.assertFalse((self.out / "adapter").exists())
        self.assertEqual(load_file(self.out / "model" / "model.safetensors")["model.norm.weight"].shape, (64,))
        run = self.folder / "run.yaml"
        run.write_text((ROOT / TINY).read_text().replace("shape: tiny-llama", f"path: {self.out}/model"))
        self.succeed(corank("eval", run, "--json"))

    def test_every_method_from_run_to_folder_and_back(self):
        """run.yaml is a run again, folder and checkpoint evaluate to the run's own figure, export says who loads it."""
        plain = "consumers of plain LoRA (vLLM, S-LoRA, llama.cpp's converter) do not"
        for method, words in (("lora", "so do consumers of plain LoRA"), ("dora", plain), ("adalora", plain),
                              ("mora", "PEFT itself does not know"), ("pissa", "so do consumers of plain LoRA")):
            with self.subTest(method):
                out, peft = self.folder / method, self.folder / f"{method}-peft"
                self.succeed(self.train(f"adapter.method={method}", out=out))
                trained = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["eval_loss"]
                self.succeed(corank("validate", out / "run.yaml"))
                for adapter in (out / "adapter", out / "checkpoint-20"):
                    result = self.succeed(corank("eval", TINY, "adapter.method=null", "adapter.r=null",
                                                 "adapter.lora_alpha=null", f"adapter.path={adapter}", "--json"))
                    self.assertAlmostEqual(json.loads(result)["loss"] / trained, 1, delta=1e-6)
                self.assertIn(words, self.succeed(corank("export", out / "checkpoint-20", "--out", peft)))
                plain = self.folder / f"{method}-plain"
                result = corank("export", out / "checkpoint-20", "--out", plain, "--as", "plain-lora")
                if method in ("dora", "mora"):  # not without the weights
                    self.assertEqual(result.returncode, 64, result.stderr)
                    self.assertIn("--base", result.stderr)
                    continue
                self.assertIn("rank", self.succeed(result))
                config = json.loads((plain / "adapter_config.json").read_text())
                self.assertEqual((config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]), (False, {}, {}))
                result = self.succeed(corank("eval", TINY, "adapter.method=null", "adapter.r=null", "adapter.lora_alpha=null",
                                             f"adapter.path={plain}", "--json"))
                self.assertAlmostEqual(json.loads(result)["loss"] / trained, 1, delta=1e-6)

    def test_remora_from_run_to_file_and_back(self):
        """Its result is an adapter.h5, which evaluates to the run's own figure and trains on; PEFT has no form for it."""
        keys = ["adapter.method=mora", "adapter.remora_steps=8", "adapter.remora_warmup_steps=2"]
        out, peft = self.folder / "remora", self.folder / "peft"
        self.succeed(self.train(*keys, out=out))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        rates = [record["learning_rate"] for record in records]
        self.assertEqual([rate == 0 for rate in rates], [step in (1, 9, 17) for step in range(1, 21)])
        self.succeed(corank("validate", out / "run.yaml"))
        self.assertEqual([path.name for path in (out / "adapter").iterdir()], ["adapter.h5"])
        plain = ["adapter.method=null", "adapter.r=null", "adapter.lora_alpha=null"]
        for adapter in (out / "adapter", out / "checkpoint-20"):
            result = self.succeed(corank("eval", TINY, *plain, f"adapter.path={adapter}", "--json"))
            self.assertAlmostEqual(json.loads(result)["loss"] / records[-1]["eval_loss"], 1, delta=1e-6)
            self.refuse(corank("export", adapter, "--out", peft), 64, "corank merge")
            self.assertFalse(peft.exists())
        start = [*plain, f"adapter.path={out}/adapter"]
        self.succeed(self.train(*start, "train.max_steps=2", out=self.folder / "plain"))
        self.succeed(self.train(*start, *keys[1:], out=self.folder / "on"))
        self.refuse(self.train(*start, *keys[1:], "adapter.remora_types=[2, 1]", out=self.folder / "other"), 64, "[1, 2]")
        self.refuse(corank("validate", TINY, *start, "model.quantization=nf4"), 64, "remora_steps")
        self.refuse(corank("validate", TINY, "adapter.method=mora", "adapter.remora_steps=60"), 64, "remora_steps", "the run's 20 steps")

    def test_uuid_experiment(self):
        """The script from data to table, with runs of four steps."""
        config, out = self.folder / "four.yaml", self.folder / "uuid"
        steps = "train: {max_steps: 4, global_batch_size: 4, micro_batch_size: 4}"
        config.write_text(
            "{pairs: 8, base_pairs: 8, jobs: 2, base: {model: {shape: tiny-llama}, adapter: {method: full}},\n"
            "run: {model: {dtype: float32}, data: {seq_len: 73, packing: false}, eval_steps: 2, %s},\n"
            "methods: {full: {adapter: {method: full}, search: [0.001, 0.002]}, %s}}" % (steps, ", ".join(
                f"{method} {r}: {{adapter: {{method: {method}, r: {r}}}, search: [0.01]}}"
                for method in ("mora", "lora") for r in (8, 1))))
        command = [ROOT / "launch/experiments/uuid", "--config", config, "--out", out, "--json"]
        environment = {**ENVIRONMENT, "CORANK_BIN": str(Path(CORANK).resolve())}
        for option, names in (([], {"full", "mora 8", "lora 8", "mora 1", "lora 1"}),
                              (["--search"], {"full 0.001", "full 0.002", "mora 8 0.01", "lora 8 0.01", "mora 1 0.01", "lora 1 0.01"})):
            done = subprocess.run([*command, *option], env=environment, text=True, capture_output=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            result = json.loads(done.stdout)
            self.assertEqual(set(result["accuracy"]), names)
            for accuracy in result["accuracy"].values():
                self.assertEqual(set(accuracy), {"2", "4"})
        (out / "uuid-experiment").unlink()
        self.assertEqual(subprocess.run(command, env=environment, capture_output=True).returncode, 64)

    def test_remora_keys(self):
        for keys, words in ((("remora_types=[1, 2]",), ("remora_types", "remora_steps")),
                            (("remora_steps=40",), ("remora_warmup_steps", "50")),
                            (("remora_steps=60", "mora_type=2"), ("mora_type", "remora_types")),
                            (("remora_steps=60", "remora_types=[1, 6]"), ("remora_types", "6 is not")),
                            (("remora_steps=-1",), ("remora_steps", "-1"))):
            with self.subTest(keys):
                self.refuse(self.train("adapter.method=mora", *(f"adapter.{key}" for key in keys)), 64, *words)
        self.refuse(self.train("adapter.remora_steps=60"), 64, "remora_steps", "mora")

    def test_accuracy_counts_the_targets_that_are_found(self):
        """Evaluated with every run; of a model that guesses, about what guessing gives, and the same in every layout."""
        self.succeed(self.train("train.max_steps=20"))
        record = json.loads((self.out / "metrics.jsonl").read_text().splitlines()[-1])
        values = {json.loads(self.succeed(corank("eval", TINY, f"adapter.path={self.out}/adapter", f"parallel.tensor={tensor}",
                                                 "--json", ranks=ranks)))["token_accuracy"]
                  for ranks, tensor in ((1, 1), (2, 1), (2, 2), (4, 4))}
        self.assertEqual(values, {record["eval_accuracy"]})
        untrained = json.loads(self.succeed(corank("eval", TINY, "--json")))["token_accuracy"]
        self.assertLess(untrained, 0.05)
        self.assertGreater(record["eval_accuracy"], 0.05)

    def test_an_adapter_of_another_method_or_scale(self):
        adalora = self.folder / "adalora"
        self.succeed(self.train("adapter.method=adalora", out=adalora))
        start = [f"adapter.path={adalora}/adapter", "adapter.method=null"]
        self.refuse(self.train(*start, "adapter.lora_alpha=4"), 64, "adapter.lora_alpha", "4", "16")
        self.refuse(self.train(*start, "adapter.use_rslora=true"), 64, "adapter.use_rslora")
        self.refuse(self.train(*start, "adapter.mora_type=6"), 64, "adapter.mora_type", "mora", "adalora")
        self.succeed(self.train(*start, "train.max_steps=2"))

    def test_export_import_and_inspect(self):
        self.succeed(self.train("train.max_steps=2"))
        exported, imported = self.folder / "peft", self.folder / "back.h5"
        self.succeed(corank("export", self.out / "checkpoint-2", "--out", exported))
        self.assertEqual((exported / "adapter_model.safetensors").read_bytes(), adapter_bytes(self.out))
        self.assertEqual((exported / "adapter_config.json").read_text(), (self.out / "adapter/adapter_config.json").read_text())
        report = json.loads(self.succeed(corank("import", exported, "--out", imported, "--json")))
        self.assertEqual((report["path"], report["tensors"], report["r"]), (str(imported), 28, 8))
        again = self.folder / "again"
        self.succeed(corank("export", imported, "--out", again))
        self.assertEqual((again / "adapter_model.safetensors").read_bytes(), adapter_bytes(self.out))
        for path, kind in ((self.out / "checkpoint-2", "checkpoint"), (exported, "adapter"), (imported, "adapter"),
                           ("configs/tiny/train.h5", "tokens"), ("tests/golden/llama/model", "model")):
            self.assertEqual(json.loads(self.succeed(corank("inspect", path, "--json")))["kind"], kind)
        checkpoint = self.out / "checkpoint-2"
        for path, word in ((self.out, "checkpoint-2"), (checkpoint / "state.h5", "checkpoint folder")):
            result = corank("inspect", path)
            self.assertEqual(result.returncode, 64)
            self.assertIn(word, result.stderr)
        self.assertEqual(corank("export", checkpoint, "--out", checkpoint).returncode, 64)

    def test_export_into_a_folder_of_something_else(self):
        self.succeed(self.train("train.max_steps=1"))
        foreign = self.folder / "foreign"
        foreign.mkdir()
        self.succeed(corank("export", self.out / "checkpoint-1", "--out", foreign))
        self.succeed(corank("export", self.out / "checkpoint-1", "--out", foreign))
        (foreign / "adapter_config.json").rename(foreign / "notes.json")
        result = corank("export", self.out / "checkpoint-1", "--out", foreign)
        self.assertEqual(result.returncode, 64)
        self.assertIn("holds other files", result.stderr)

    def test_damaged_adapters(self):
        self.succeed(self.train("train.max_steps=1"))
        adapter = self.out / "adapter"
        weights = load_file(adapter / "adapter_model.safetensors")
        first, last = sorted(weights)[0], sorted(weights)[-1]
        for change, word in (({last: weights[last] * np.nan}, "NaN"), ({first: weights[first][:-1]}, "config asks for"),
                             ({last: None}, "is missing"), ({"base_model.model.model.norm.weight": weights[first]}, "none that"),
                             ({name: None for name in weights}, "holds no tensor")):
            changed = {name: value for name, value in {**weights, **change}.items() if value is not None}
            save_file(changed, adapter / "adapter_model.safetensors")
            for command in (["export", adapter, "--out", self.folder / "new"], ["import", adapter, "--out", self.folder / "new.h5"],
                            ["validate", TINY, f"adapter.path={adapter}"], ["generate", TINY, f"adapter.path={adapter}",
                                                                           "--prompt-tokens", "1"]):
                with self.subTest(word, command=command[0]):
                    result = corank(*command)
                    self.assertEqual(result.returncode, 65, result.stderr)
                    self.assertIn(word, result.stderr)
        save_file(weights, adapter / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": "16"}))
        result = corank("inspect", adapter)
        self.assertEqual(result.returncode, 65)
        self.assertIn('lora_alpha is "16", not a number', result.stderr)

    def test_adapter_of_another_model(self):
        self.succeed(self.train("train.max_steps=1"))
        result = corank("validate", TINY, f"adapter.path={self.out}/adapter", "model.shape=llama-3.2-1b")
        self.assertEqual(result.returncode, 65)
        self.assertIn("the run needs", result.stderr)

    def test_inspect_names_what_it_does_not_read(self):
        self.refuse(corank("inspect", TINY), 65, "none of the things that inspect reads")

    def test_a_signal_ends_the_setup(self):
        slow = ("data.packing=true", "train.max_steps=null", "train.num_train_epochs=10000")
        process = subprocess.Popen([CORANK, "train", TINY, f"output_dir={self.out}", *slow], cwd=ROOT, env=ENVIRONMENT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(timeout=30), -signal.SIGTERM)

    def test_generate_continues_greedily_in_every_layout(self):
        first = json.loads(self.succeed(corank("generate", TINY, "--prompt-tokens", "97,98,61", "--max-new-tokens", 8, "--json")))
        self.assertEqual(len(first["tokens"]), 8)
        split = corank("generate", TINY, "parallel.tensor=4", "--prompt-tokens", "97,98,61", "--max-new-tokens", 8, "--json", ranks=4)
        self.assertEqual(json.loads(self.succeed(split)), first)
        for bad in ("256", "-1", ""):
            self.assertEqual(corank("generate", TINY, "--prompt-tokens", bad).returncode, 64, bad)

    def test_bench_comm_predicts_what_is_counted(self):
        for ranks, tensor in ((2, 1), (2, 2), (4, 2)):
            report = json.loads(self.succeed(corank("bench", "comm", TINY, f"parallel.tensor={tensor}", "--json", ranks=ranks)))
            for part in ("adapter", "full"):
                for purpose, line in report[part].items():
                    self.assertEqual(line["predicted"], line["counted"], f"{part} {purpose} ranks {ranks} tensor {tensor}")
                    inside, between = line["sent"]["inside-host"], line["sent"]["between-hosts"]
                    self.assertEqual(inside["predicted"], inside["counted"], f"{part} {purpose} ranks {ranks} tensor {tensor}")
                    self.assertGreater(inside["counted"], 0)
                    self.assertEqual(between, {"predicted": 0, "counted": 0})
            self.assertIn("adapter-gradients", report["adapter"])
            if ranks > tensor:  # sharded weights of one data-parallel rank have nothing to sum
                self.assertIn("weight-gradients", report["full"])
                self.assertGreater(report["ratio"], 1)

    def test_the_closing_table_foretells_full_fine_tuning(self):
        for settings in ([], ["parallel.shard_base=dp", "adapter.method=dora"]):
            text = self.succeed(self.train("train.max_steps=1", "eval_steps=0", *settings, ranks=2))
            report = json.loads(self.succeed(corank("bench", "comm", TINY, *settings, "--json", ranks=2)))
            for part, column in (("adapter", 1), ("full", 2)):
                payload = sum(line["counted"] for line in report[part].values())
                sent = sum(line["sent"]["inside-host"]["counted"] for line in report[part].values())
                total, inside = (re.search(rf"^  {name} +([\d,]+) +([\d,]+)", text, re.M) for name in ("total", "inside-host"))
                self.assertEqual([int(found[column].replace(",", "")) for found in (total, inside)], [payload, sent], part)
            shutil.rmtree(self.out)

    def test_bench_step_reports(self):
        report = json.loads(self.succeed(corank("bench", "step", TINY, "--steps", 2, "--warmup", 1, "--json")))
        self.assertEqual(sorted(report), ["final_loss", "model_tflops", "peak_memory_bytes", "step_seconds", "tokens_per_second"])

    def test_help_of_every_command(self):
        for command in (["train"], ["eval"], ["generate"], ["merge"], ["export"], ["import"], ["combine"], ["inspect"], ["validate"], ["bench", "comm"],
                        ["bench", "step"]):
            self.assertIn("Usage", self.succeed(corank(*command, "--help")))


if __name__ == "__main__":
    unittest.main()
