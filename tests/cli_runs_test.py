"""Runs as a user meets them: what they train on, what they check, what they save and never lose. Run by launch/test with CORANK_BIN set."""

import hashlib
import json
import os
import shutil
import subprocess
import unittest

from cli_test import CORANK, ENVIRONMENT, MPIRUN, ROOT, TINY, Case, adapter_bytes, corank, losses
from retention_scenarios import SCENARIOS, Run

import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

MODEL = ROOT / "tests/golden/llama/model"
VOCABULARY = 130


def write_tokens(path, samples, vocab_size=VOCABULARY, **attributes):
    """`samples`: (tokens, places of the targets)."""
    lengths = [len(tokens) for tokens, _ in samples]
    mask = [np.isin(np.arange(len(tokens)), targets) for tokens, targets in samples]
    with h5py.File(path, "w") as file:
        file["tokens"] = np.concatenate([tokens for tokens, _ in samples]).astype(np.int32)
        file["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        file["loss_mask"] = np.concatenate(mask).astype(np.uint8)
        file.attrs.update({"format": "corank-tokens", "version": 1, "vocab_size": vocab_size, **attributes})
    return path


def ordinary_samples(count, length=12):
    return [((np.arange(length) * (i + 3) + i) % 70, np.arange(1, length)) for i in range(count)]


class Reproducible(Case):
    """Three micro-batches, which two ranks share unevenly; one rank might have used more threads."""

    SETTINGS = ("train.max_steps=6", "eval_steps=6", "train.micro_batch_size=4")

    def bits(self, ranks, *overrides, threads=1):
        out = self.folder / f"{ranks}-{threads}-{len(overrides)}"
        self.succeed(self.train(*self.SETTINGS, *overrides, ranks=ranks, threads=threads, out=out))
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return [[r["loss"], r["grad_norm"], r.get("eval_loss")] for r in records], adapter_bytes(out)

    def test_the_number_of_ranks_and_threads_leaves_no_trace(self):
        exact = self.bits(1, "train.reproducible=true", threads=2)
        for ranks in (2, 3):
            self.assertEqual(self.bits(ranks, "train.reproducible=true"), exact)
        self.assertNotEqual(self.bits(3), self.bits(1))

    def test_gradients_travel_in_half_the_bytes(self):
        report = json.loads(self.succeed(corank("bench", "comm", TINY, "parallel.gradient_dtype=bfloat16", "--json", ranks=2)))
        plain = json.loads(self.succeed(corank("bench", "comm", TINY, "--json", ranks=2)))
        for method, purpose in (("adapter", "adapter-gradients"), ("full", "weight-gradients")):
            self.assertEqual(2 * report[method][purpose]["counted"], plain[method][purpose]["counted"])


class ModelCase(Case):
    """A copy of a model folder, token files and a run file for both."""

    def setUp(self):
        super().setUp()
        self.model = self.folder / "model"
        shutil.copytree(MODEL, self.model)
        self.tokens = write_tokens(self.folder / "tokens.h5", ordinary_samples(8))
        self.run_file = self.folder / "run.yaml"
        self.run_file.write_text(f"model: {{path: {self.model}, dtype: float32}}\n"
                                 f"data: {{train: {self.tokens}, eval: {self.tokens}, seq_len: 32}}\n"
                                 f"train: {{max_steps: 2, global_batch_size: 2}}\noutput_dir: {self.out}\n")

    def refused(self, result, code, *words):
        """As refuse(), where something may have been written before."""
        self.assertEqual(result.returncode, code, result.stderr + result.stdout)
        for word in words:
            self.assertIn(word, result.stderr)

    def change_config(self, name, **changes):
        path = self.model / name
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **changes}))

    def change_weights(self, change):
        weights = load_file(self.model / "model.safetensors")
        change(weights)
        save_file(weights, self.model / "model.safetensors")

    def generated(self, *arguments):
        return json.loads(self.succeed(corank("generate", self.run_file, "--prompt-tokens", "5,25,62", *arguments, "--json")))["tokens"]

    def serve(self, requests, *arguments, ranks=1):
        launcher = [*MPIRUN, str(ranks)] if ranks > 1 else []
        done = subprocess.run([*launcher, CORANK, "generate", str(self.run_file), "--serve", "--max-positions", "64", *arguments],
                              input="\n".join(map(json.dumps, requests)), cwd=ROOT, env=ENVIRONMENT, text=True,
                              capture_output=True, timeout=100)
        return [json.loads(line) for line in self.succeed(done).splitlines()]


class SamplesWithoutTargets(Case):
    """Their answer lies behind data.seq_len: a run over them is the run without them."""

    SETTINGS = ("train.max_steps=null", "train.num_train_epochs=2", "train.global_batch_size=2", "data.seq_len=16", "eval_steps=1",
                "data.shuffle=true", "train.weight_decay=0.1")

    def setUp(self):
        super().setUp()
        short = [(np.arange(5, 5 + length), np.arange(2, length)) for length in (5, 7, 16, 30, 9)]
        long = [(np.arange(60, 90), np.arange(16, 30)), (np.arange(9, 50), [40])]
        self.all = write_tokens(self.folder / "all.h5", [long[0], *short[:3], long[1], *short[3:], long[0]], 256)
        self.kept = write_tokens(self.folder / "kept.h5", short, 256)

    def train_on(self, tokens, out, *overrides, ranks=1):
        return self.succeed(self.train(f"data.train={tokens}", f"data.eval={tokens}", *self.SETTINGS, *overrides, out=out, ranks=ranks))

    def test_a_run_is_the_run_without_them(self):
        for packing in ("true", "false"):
            with self.subTest(packing=packing):
                setting = f"data.packing={packing}"
                one, other, two = (self.folder / f"{name}-{packing}" for name in ("all", "kept", "ranks"))
                text = self.train_on(self.all, one, setting)
                self.assertIn("all.h5: 3 of 8 samples have no target within data.seq_len 16 and are left out", text)
                self.assertIn("all.h5: 1 of 5 samples are longer than data.seq_len 16 and are cut", text)
                self.assertNotIn("left out", self.train_on(self.kept, other, setting))
                self.assertEqual(adapter_bytes(one), adapter_bytes(other))
                records = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (one, other)]
                for key in ("step", "loss", "target_tokens", "eval_loss"):
                    self.assertEqual(*([record[key] for record in records] for records in records))
                self.assertEqual(len(records[0]), 4 if packing == "true" else 6)
                self.assertGreater(min(record["target_tokens"] for record in records[0]), 0)
                self.train_on(self.all, two, setting, ranks=2)
                for a, b in zip(losses(one), losses(two), strict=True):
                    self.assertAlmostEqual(a / b, 1, delta=1e-5)

    def test_evaluation_and_validation_count_the_others(self):
        results = [corank("eval", TINY, f"data.eval={tokens}", "data.seq_len=16", "--json") for tokens in (self.all, self.kept)]
        self.assertEqual(*(json.loads(self.succeed(result)) for result in results))
        self.assertEqual(json.loads(results[0].stdout)["samples"], 5)
        self.assertIn("3 of 8 samples have no target", results[0].stderr)
        result = corank("validate", TINY, f"data.train={self.all}", *self.SETTINGS, "--json")
        self.assertEqual(json.loads(self.succeed(result))["train_samples"], 5)
        self.assertIn("3 of 8 samples have no target", result.stderr)

    def test_none_left(self):
        result = self.train(f"data.train={self.all}", "data.seq_len=2")
        self.refuse(result, 65, "all.h5", "no target is left", "data.seq_len 2")


def fingerprint(tokenizer):
    """data/prepare's, for a BPE tokenizer."""
    model = tokenizer["model"]
    tokens = {(i, text) for text, i in model["vocab"].items()} | {(t["id"], t["content"]) for t in tokenizer["added_tokens"]}
    lines = [f"t {i} {len(text.encode())} {text}\n" for i, text in sorted(tokens, key=lambda t: (t[0], t[1].encode()))]
    lines += ["m %d %s %d %s\n" % (len(a), a, len(b), b) for a, b in (merge.split(" ", 1) for merge in model["merges"])]
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()


class TokenFileOfAnotherTokenizer(ModelCase):
    TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
                 "added_tokens": [{"id": 3, "content": "<s>"}]}

    def mark(self, **attributes):
        write_tokens(self.tokens, ordinary_samples(8), 90, **attributes)

    def commands(self):
        return {command: corank(*command.split(), self.run_file) for command in ("validate", "train", "eval", "bench step")}

    def expect(self, code, *words):
        for command, result in self.commands().items():
            with self.subTest(command):
                self.assertEqual(result.returncode, code, result.stderr)
                for word in words:
                    self.assertIn(word, result.stderr)
        shutil.rmtree(self.out, ignore_errors=True)

    def write_tokenizer(self, **layout):
        (self.model / "tokenizer.json").write_text(json.dumps(self.TOKENIZER, **layout))
        return "sha256:" + hashlib.sha256((self.model / "tokenizer.json").read_bytes()).hexdigest()

    def test_refused_by_name(self):
        own, other = self.write_tokenizer(), "sha256:" + 64 * "1"
        self.mark(tokenizer=other)
        self.expect(65, str(self.tokens), other, "90", "tokenizer.json", own, "130", "data/prepare --model")
        self.mark(tokenizer=other, tokenizer_content=other, tokenizer_loaded=other)
        self.expect(65, other, own)

    def test_taken(self):
        own, other = self.write_tokenizer(), "sha256:" + 64 * "1"
        for attributes in ({}, {"tokenizer": "none"}, {"tokenizer": own},
                           {"tokenizer": other, "tokenizer_content": other, "tokenizer_loaded": fingerprint(self.TOKENIZER)}):
            self.mark(**attributes)
            self.assertEqual(corank("validate", self.run_file).returncode, 0, attributes)
        self.write_tokenizer(indent=1)  # saved again
        self.expect(0)
        (self.model / "tokenizer.json").unlink()
        self.mark(tokenizer=other)
        self.assertEqual(corank("validate", self.run_file).returncode, 0)

    def test_a_damaged_tokenizer(self):
        self.mark(tokenizer="sha256:" + 64 * "1", tokenizer_content="sha256:" + 64 * "2")
        for text in ("", "[]", '{"model": {"vocab": {"a": "b"}}}', "[" * 300000):  # more in tokenizer_identity_test
            (self.model / "tokenizer.json").write_text(text)
            self.refuse(corank("validate", self.run_file), 65, "tokenizer.json")


class Needs(ModelCase):
    """A command asks for what it uses of the run, and for nothing else."""

    def setUp(self):
        super().setUp()
        self.blocked = self.folder / "file"
        self.blocked.touch()
        (self.model / "tokenizer.json").write_text(json.dumps(TokenFileOfAnotherTokenizer.TOKENIZER))
        self.foreign = write_tokens(self.folder / "foreign.h5", ordinary_samples(2), 90, tokenizer="sha256:" + 64 * "1")
        self.training_only = ("train.max_steps=null", f"output_dir={self.blocked}/out", "resume=nowhere", "eval_steps=1",
                              "save_steps=1000", "train.warmup_steps=1000")

    def test_evaluation(self):
        for train, ranks in (("nowhere.h5", 2), (self.foreign, 1), ("null", 1)):
            self.succeed(corank("eval", self.run_file, *self.training_only, "train.global_batch_size=7", f"data.train={train}", ranks=ranks))
        self.refused(corank("eval", self.run_file, "data.eval=null"), 64, "data.eval")
        self.refused(corank("eval", self.run_file, "data.eval=nowhere.h5"), 66, "nowhere.h5")
        self.refused(corank("eval", self.run_file, "parallel.tensor=2"), 64, "parallel.tensor")

    def test_generation_and_merging(self):
        self.succeed(corank("train", self.run_file))
        settings = (f"adapter.path={self.out}/adapter", *self.training_only, "train.micro_batch_size=7", "data.train=nowhere.h5")
        for held_out in ("nowhere.h5", "null"):
            self.succeed(corank("generate", self.run_file, *settings, f"data.eval={held_out}", "--prompt-tokens", "1"))
            self.succeed(corank("merge", self.run_file, *settings, f"data.eval={held_out}", "--out", self.folder / f"merged-{held_out}"))

    def test_benchmarks(self):
        for command in (("bench", "step", self.run_file, "--steps", "1", "--warmup", "0"), ("bench", "comm", self.run_file)):
            self.succeed(corank(*command, *self.training_only, "data.eval=nowhere.h5"))
            self.refused(corank(*command, "data.train=nowhere.h5"), 66, "nowhere.h5")

    def test_training_asks_for_all_of_it(self):
        for settings, code, word in ((["data.train=nowhere.h5"], 66, "nowhere.h5"), ([f"data.train={self.foreign}"], 65, "foreign.h5"),
                                     (["data.eval=nowhere.h5"], 66, "nowhere.h5"), (["data.train=null"], 64, "data.train"),
                                     (["train.max_steps=null"], 64, "max_steps"), (["output_dir=null"], 64, "output_dir"),
                                     (["train.micro_batch_size=3"], 64, "global_batch_size"), (["resume=nowhere"], 66, "resume"),
                                     ([f"output_dir={self.blocked}/out"], 74, "output_dir"),
                                     (["eval_steps=1", "data.eval=null"], 64, "eval_steps")):
            with self.subTest(settings):
                self.refuse(corank("validate", self.run_file, *settings), code, word)

    def test_adalora_is_evaluated_whatever_the_schedule(self):
        self.succeed(corank("train", self.run_file, "adapter.method=adalora", "adapter.tinit=1", "adapter.tfinal=1", "train.max_steps=4"))
        adapter = f"adapter.path={self.out}/adapter"
        results = {self.succeed(corank("eval", self.run_file, adapter, *settings, "--json"))
                   for settings in ((), ("train.max_steps=1",), ("train.max_steps=null",))}
        self.assertEqual(len(results), 1)
        self.refused(corank("validate", self.run_file, adapter, "train.max_steps=1", f"output_dir={self.folder}/new"), 64, "adapter.tinit")

    def test_pissa_iterations_matter_to_training_alone(self):
        pissa = ("adapter.method=pissa", "adapter.r=4", "adapter.lora_alpha=4", "adapter.pissa_iterations=2")
        self.refuse(corank("train", self.run_file, *pissa), 64, "adapter.pissa_iterations", "model.quantization is none")
        self.succeed(corank("train", self.run_file, *pissa, "model.quantization=nf4"))
        self.succeed(corank("eval", self.run_file, *pissa, f"adapter.path={self.out}/adapter"))
        self.succeed(corank("generate", self.run_file, *pissa, f"adapter.path={self.out}/adapter", "--prompt-tokens", "1"))


class NotFinite(ModelCase):
    """A model whose attention overflows where token 77 is in the sample, and nowhere else."""

    TOKEN = 77

    def setUp(self):
        super().setUp()

        def overflow(weights):
            weights["model.embed_tokens.weight"][:, 3] = 0
            weights["model.embed_tokens.weight"][self.TOKEN, 3] = 1
            for name in ("q_proj", "k_proj"):
                weights[f"model.layers.0.self_attn.{name}.weight"][:, 3] = 1e30

        self.change_weights(overflow)
        samples = ordinary_samples(8)
        for i in (5, 2):
            samples[i][0][1] = self.TOKEN
        self.bad = write_tokens(self.folder / "bad.h5", samples)

    def test_evaluation_names_the_first_sample(self):
        self.succeed(corank("eval", self.run_file))
        for settings, ranks in (([], 1), (["data.packing=false"], 2), (["parallel.tensor=2"], 2), (["data.seq_len=12"], 4)):
            with self.subTest(settings, ranks=ranks):
                self.refuse(corank("eval", self.run_file, f"data.eval={self.bad}", *settings, ranks=ranks), 65, "data.eval", "sample 2 ",
                            "not finite")

    def test_evaluation_of_a_run(self):
        result = corank("train", self.run_file, f"data.eval={self.bad}", "eval_steps=2", ranks=2)
        self.refused(result, 65, "evaluation after step 2", "sample 2 ")

    def test_generation_names_the_position(self):
        bad = ("--prompt-tokens", f"5,{self.TOKEN}")
        for settings, ranks in (([], 1), (["parallel.tensor=2"], 2), (["--temperature", "1"], 1)):
            self.refuse(corank("generate", self.run_file, *settings, *bad, ranks=ranks), 65, "position 2", "2 tokens")

    def test_a_served_request_is_refused_alone(self):
        good, bad = {"prompt": [5, 25], "max_new_tokens": 3}, {"prompt": [5, 25, self.TOKEN], "max_new_tokens": 3}
        for settings, ranks in (([], 1), (["parallel.tensor=2"], 2)):
            answers = self.serve([good, bad, good], *settings, ranks=ranks)
            self.assertIn("position 3", answers[1]["error"])
            self.assertEqual(answers[0], answers[2])
            self.assertEqual(len(answers[0]["tokens"]), 3)


class Stops(ModelCase):
    """Generation ends where the model's makers say."""

    def setUp(self):
        super().setUp()
        self.change_config("config.json", eos_token_id=None)
        self.all = self.generated("--max-new-tokens", 12)
        self.assertEqual(len(self.all), 12)
        self.first = next(i for i, token in enumerate(self.all) if i > 1 and token not in self.all[:i])
        self.end = self.all[self.first]

    def until_end(self):
        return self.all[:self.first + 1]

    def test_numbers_are_decimal_digits(self):
        for option, number in (("--prompt-tokens", "010"), ("--prompt-tokens", "0x10"), ("--prompt-tokens", "1,,2"),
                               ("--prompt-tokens", "1,"), ("--prompt-tokens", "-1"), ("--stop-tokens", "5,05"), ("--seed", "010"),
                               ("--seed", "-1"), ("--max-new-tokens", "0x10")):
            with self.subTest(f"{option} {number}"):
                prompt = [] if option == "--prompt-tokens" else ["--prompt-tokens", "1"]
                self.refused(corank("generate", self.run_file, *prompt, f"{option}={number}"), 64, "corank: ", option)

    def test_a_temperature_next_to_0_is_greedy(self):
        self.assertEqual(self.generated("--max-new-tokens", 12, "--temperature", "1e-300"), self.all)

    def test_requests_name_their_own_keys(self):
        requests = [{"prompt": [1], "stop_tokens": [999]}, {"prompt": [2**63]}, {"prompt": [1], "seed": -1}, {"prompt": [1], "x": 1}]
        for answer, word in zip(self.serve(requests), ("stop_tokens: 999", f"prompt is {2**63}", "seed is -1", "x is not one of"), strict=True):
            self.assertIn(word, answer["error"])

    def test_where_it_is_named(self):
        other = next(i for i in range(VOCABULARY) if i not in self.all)
        for generation, config, stops in (({}, self.end, True), ({}, [other, self.end], True), (None, self.end, True),
                                          ({"eos_token_id": None}, self.end, True), ({"eos_token_id": self.end}, other, True),
                                          ({"eos_token_id": [self.end, 999]}, None, True), ({"eos_token_id": other}, self.end, False),
                                          ({"eos_token_id": [-1, 130, 2 ** 40]}, None, False), (None, None, False)):
            with self.subTest(generation=generation, config=config):
                self.change_config("config.json", eos_token_id=config)
                (self.model / "generation_config.json").unlink(missing_ok=True)
                if generation is not None:
                    self.change_config("generation_config.json", **generation)
                self.assertEqual(self.generated("--max-new-tokens", 12), self.until_end() if stops else self.all)

    def test_what_the_user_says_comes_first(self):
        self.change_config("generation_config.json", eos_token_id=self.end)
        self.assertEqual(self.generated("--max-new-tokens", 12, "--ignore-eos"), self.all)
        self.assertEqual(self.generated("--max-new-tokens", 12, "--stop-tokens", self.all[0]), self.all[:1])
        self.refused(corank("generate", self.run_file, "--prompt-tokens", "1", "--ignore-eos", "--stop-tokens", "1"), 64, "--ignore-eos")
        request = {"prompt": [5, 25, 62], "max_new_tokens": 12}
        answers = self.serve([request, {**request, "stop_tokens": []}, {**request, "stop_tokens": [self.all[0]]}])
        self.assertEqual([answer["tokens"] for answer in answers], [self.until_end(), self.all, self.all[:1]])

    def test_wrong_types(self):
        for value in ("2", [2, "3"], 2.5, True, {}, 2 ** 63):
            with self.subTest(value):
                self.change_config("generation_config.json", eos_token_id=value)
                self.refuse(corank("generate", self.run_file, "--prompt-tokens", "1"), 65, "generation_config.json", "eos_token_id")
        for text in ("", "[]", "[" * 300000, '{"eos_token_id": 1, "eos_token_id": 2}'):
            (self.model / "generation_config.json").write_text(text)
            self.refuse(corank("generate", self.run_file, "--prompt-tokens", "1"), 65, "generation_config.json")


class Folders(Case):
    """What stands in output_dir, whoever wrote it."""

    SETTINGS = ("train.max_steps=4", "save_steps=1", "eval_steps=0")

    def again(self):
        return self.train(*self.SETTINGS)

    def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(self):
        self.succeed(self.train(*self.SETTINGS, "save_total_limit=9"))
        os.chmod(self.out / "checkpoint-1", 0o555)
        ordinary = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner", "--inh-caps=-dac_override,-dac_read_search,-fowner"]
        command = [CORANK, "train", TINY, f"output_dir={self.out}", *self.SETTINGS, "save_total_limit=1",
                   f"resume={self.out}/checkpoint-2"]
        for start in (1, 2):
            done = subprocess.run([*ordinary, *command] if os.getuid() == 0 else command, cwd=ROOT, env=ENVIRONMENT, text=True,
                                  capture_output=True, timeout=100)
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn("remove it by hand", done.stderr)
        os.chmod(self.out / "pruned-checkpoint-1", 0o755)

    def test_a_damaged_run_yaml_is_named(self):
        self.succeed(self.again())
        (self.out / "run.yaml").write_text("")
        refused = self.again()
        self.assertEqual(refused.returncode, 64, refused.stderr)
        self.assertIn("Remove that file alone", refused.stderr)
        (self.out / "run.yaml").unlink()
        self.assertIn("already complete after step 4", self.succeed(self.again()))

    def test_a_manifest_of_another_identity_is_damaged(self):
        self.succeed(self.again())
        manifest = self.out / "checkpoint-4" / "manifest.json"
        content = json.loads(manifest.read_text())
        for drop in ((), ("sha256",)):
            changed = {key: value for key, value in content.items() if key not in drop}
            changed["identity"] = changed["identity"].replace(changed["identity"][0], "x", 1)
            manifest.write_text(json.dumps(changed))
            self.succeed(corank("validate", TINY, f"output_dir={self.out}", *self.SETTINGS))
        text = self.succeed(self.again())
        self.assertIn("checkpoint-3 after step 3", text)
        self.assertIn("passed over", text)
        self.assertTrue((self.out / "set-aside/checkpoint-4").is_dir())

    def test_a_renamed_checkpoint(self):
        self.succeed(self.again())
        (self.out / "checkpoint-2").rename(self.out / "checkpoint-9")
        result = self.train(*self.SETTINGS, f"resume={self.out}/checkpoint-9")
        self.assertEqual(result.returncode, 65)
        self.assertIn("step 2", result.stderr)
        (self.out / "checkpoint-9").rename(self.folder / "best")
        self.assertIn("after step 2", self.succeed(self.train(*self.SETTINGS, f"resume={self.folder}/best")))

    def test_hostile_files(self):
        self.succeed(self.again())
        for text in ("[" * 300000, '{"step": "4"}', " " * (2 << 20)):  # more in checkpoint_folder_test
            (self.out / "checkpoint-4" / "manifest.json").write_text(text)
            self.succeed(corank("validate", TINY, f"output_dir={self.out}", *self.SETTINGS))
            self.assertEqual(corank("inspect", self.out / "checkpoint-4").returncode, 65)
        self.assertEqual(self.train(*self.SETTINGS, f"resume={self.out}/checkpoint-4").returncode, 65)
        records = (self.out / "metrics.jsonl").read_text().splitlines()
        strange = ['{"step": "1"}', '{"step": null}', '{"step": 1.5}', "[" * 300000, '{"step": {}}', "\0", '{"step": 99}', "{", "[1]"]
        (self.out / "metrics.jsonl").write_text("\n".join([strange[0], *records[:3], *strange]))
        self.succeed(self.again())
        self.assertEqual([json.loads(line)["step"] for line in (self.out / "metrics.jsonl").read_text().splitlines()], [1, 2, 3, 4])

    def test_leftovers_go_at_the_next_start(self):
        self.succeed(self.again())
        for name in ("metrics.jsonl.5-0.tmp", "checkpoint-3/adapter.h5.7-1.tmp", "adapter/adapter_config.json.5-0.tmp"):
            (self.out / name).write_text("half")
        shutil.copytree(self.out / "checkpoint-2", self.out / "pruned-checkpoint-1")
        (self.out / "mine.tmp").touch()
        self.succeed(self.again())
        self.assertEqual(sorted(p.name for p in self.out.rglob("*.tmp")) + sorted(p.name for p in self.out.glob("pruned-*")), ["mine.tmp"])
        self.assertEqual(sorted(p.name for p in self.out.glob("checkpoint-*")), ["checkpoint-2", "checkpoint-3", "checkpoint-4"])


class Retention(Case):
    def test_no_checkpoint_is_lost(self):
        for scenario in SCENARIOS:
            for ranks in (1, 2) if scenario is SCENARIOS[0] else (1,):
                with self.subTest(scenario.__name__, ranks=ranks):
                    scenario(Run(self.folder / f"{scenario.__name__}-{ranks}", 12, "train.global_batch_size=4", ranks=ranks))


if __name__ == "__main__":
    unittest.main()
