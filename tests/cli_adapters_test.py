"""Adapters and run files of strangers as a user meets them. Run by launch/test with CORANK_BIN set."""

import json
import os
import re
import shutil
import unittest

from cli_test import ROOT, Case, corank

import h5py
import numpy as np
from safetensors.numpy import load_file, save_file

MODEL = ROOT / "tests/golden/llama/model"
ADAPTER = ROOT / "tests/golden/methods/combine/first"
HEAD, EMBEDDING = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class AdapterCase(Case):
    def setUp(self):
        super().setUp()
        self.run_file = self.folder / "run.yaml"
        self.run_file.write_text(f"""
model: {{path: {MODEL}, dtype: float32}}
data: {{train: {self.tokens()}, eval: {self.tokens()}, seq_len: 64}}
""")

    def tokens(self):
        """A token file of the golden model's vocabulary."""
        path = self.folder / "tokens.h5"
        with h5py.File(path, "w") as file:
            file["tokens"] = np.random.default_rng(7).integers(0, 130, 256).astype(np.int32)
            file["offsets"] = np.arange(0, 257, 32)
            file["loss_mask"] = np.ones(256, np.uint8)
            file.attrs.update({"format": "corank-tokens", "version": 1, "vocab_size": 130, "tokenizer": "none", "source": "", "created": ""})
        return path

    def adapter(self, name, config=None, tensors=None, text=None):
        """A copy of the golden adapter with other fields and tensors, or with `text` as its configuration."""
        folder = self.folder / name
        folder.mkdir()
        fields = json.loads((ADAPTER / "adapter_config.json").read_text())
        content = json.dumps({**fields, **(config or {})}) if text is None else text
        (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        save_file({**load_file(ADAPTER / "adapter_model.safetensors"), **(tensors or {})}, folder / "adapter_model.safetensors")
        return folder

    def loss(self, adapter, *overrides):
        return json.loads(self.succeed(corank("eval", self.run_file, f"adapter.path={adapter}", "--json", *overrides)))["loss"]

    def refuse_plainly(self, result, code, *words):
        """As refuse(), in one short line without anything that a terminal obeys."""
        self.refuse(result, code, *words)
        self.assertLess(len(result.stderr), 5000)
        self.assertEqual(result.stderr.count("\n"), 1, result.stderr)
        self.assertIsNone(CONTROL.search(result.stderr), repr(result.stderr))


class SavedAlong(AdapterCase):
    def setUp(self):
        super().setUp()
        base = load_file(MODEL / "model.safetensors")
        self.same = {HEAD: base["lm_head.weight"], EMBEDDING: base["model.embed_tokens.weight"]}
        self.other = {name: value * 1.5 for name, value in self.same.items()}

    def test_what_the_base_has_changes_nothing(self):
        along = self.adapter("along", tensors=self.same)
        self.assertEqual(self.loss(along), self.loss(ADAPTER))
        self.succeed(corank("validate", self.run_file, f"adapter.path={along}", f"output_dir={self.out}",
                            "train.max_steps=1", "train.global_batch_size=1", "train.micro_batch_size=1"))
        plain = self.folder / "plain"
        self.refuse(corank("export", along, "--out", self.out, "--as", "plain-lora"), 64, "lm_head", "--base")
        self.succeed(corank("export", along, "--out", plain, "--as", "plain-lora", "--base", MODEL))
        self.assertEqual(load_file(plain / "adapter_model.safetensors").keys(), load_file(ADAPTER / "adapter_model.safetensors").keys())
        self.refuse(corank("combine", along, ADAPTER, "--weights", "1,1", "--how", "cat", "--out", self.out), 64, "lm_head", "--base")

    def test_other_values_take_the_place_of_the_bases(self):
        along = self.adapter("along", tensors=self.other)
        loss = self.loss(along)
        self.assertNotAlmostEqual(loss, self.loss(ADAPTER), 3)
        merged = self.folder / "merged"
        self.succeed(corank("merge", self.run_file, f"adapter.path={along}", "--out", merged))
        weights = load_file(merged / "model.safetensors")
        np.testing.assert_array_equal(weights["lm_head.weight"], self.other[HEAD])
        np.testing.assert_array_equal(weights["model.embed_tokens.weight"], self.other[EMBEDDING])
        base = json.loads(self.succeed(corank("eval", self.run_file, f"model.path={merged}", "--json")))["loss"]
        self.assertAlmostEqual(loss, base, 5)
        file = self.folder / "along.h5"
        self.succeed(corank("import", along, "--out", file))
        self.assertEqual(self.loss(file), loss)

    def test_each_of_several_adapters_brings_its_own(self):
        along = self.adapter("along", tensors=self.other)
        options = ["--prompt-tokens", "1,2,3", "--max-new-tokens", "8"]
        alone = self.succeed(corank("generate", self.run_file, f"adapter.path={along}", *options))
        plain = self.succeed(corank("generate", self.run_file, f"adapter.path={ADAPTER}", *options))
        for use, expected in (("a", alone), ("b", plain)):
            several = corank("generate", self.run_file, "--adapter", f"a={along}", "--adapter", f"b={ADAPTER}", "--use", use, *options)
            self.assertEqual(self.succeed(several), expected)

    def test_a_resized_vocabulary_is_refused_by_name(self):
        head = np.concatenate([self.same[HEAD], self.same[HEAD][:2]])
        for command in ("eval", "merge"):
            result = corank(command, self.run_file, f"adapter.path={self.adapter(command, tensors={HEAD: head})}",
                            *(["--out", self.out] if command == "merge" else []))
            self.refuse_plainly(result, 65, "lm_head", str(list(head.shape)), str(list(self.same[HEAD].shape)), "resized")


class HostileAdapters(AdapterCase):
    def refused(self, name, *words, **adapter):
        folder = self.adapter(name, **adapter)
        self.refuse_plainly(corank("eval", self.run_file, f"adapter.path={folder}"), 65, str(folder), *words)
        return folder

    def refused_by_all(self, name, *words, **adapter):
        """Without a model too."""
        folder = self.refused(name, *words, **adapter)
        self.refuse_plainly(corank("import", folder, "--out", self.folder / "x.h5"), 65, str(folder), *words)

    def test_configurations(self):
        config = json.loads((ADAPTER / "adapter_config.json").read_text())
        good = json.dumps(config)[:-1]
        deep = "[" * 300_000
        self.refused("slow", "target_modules", "takes too long", config={"target_modules": r"(\w+\.?)+\d\d"})
        self.refused_by_all("slow_key", "rank_pattern", "takes too long", config={"rank_pattern": {r"([a-z_.]+)+[0-9]+\d": 4}})
        self.refused_by_all("long", "target_modules", "100000 bytes", config={"target_modules": "q" * 100_000})
        self.refused_by_all("recursive", "exclude_modules", config={"exclude_modules": "(?R)*"})
        self.refused_by_all("deep", "nested deeper", text=good + ', "future": ' + deep)
        self.refused_by_all("twice", "stands twice", text=good + ', "r": 2}')
        self.refused_by_all("nul", "NUL", text=(good + "}").encode() + b"\0{}")
        self.refused_by_all("bytes", text=(good + '}').encode() + b"\xff")
        self.refused_by_all("null", "lora_alpha is null", config={"lora_alpha": None})
        self.refused_by_all("rank", "r is", config={"r": 2**70})
        self.refused_by_all("key", r"\x1b", config={"\x1b]0;x\x07\x9b31m": True})
        self.refused_by_all("value", "peft_type", config={"peft_type": "\u202e\x1b[2J" * 100_000})

    def test_a_layer_beyond_every_number(self):
        name = f"base_model.model.model.layers.{2**70}.self_attn.q_proj.lora_"
        tensors = {name + "A.weight": np.ones((4, 64), np.float32), name + "B.weight": np.ones((64, 4), np.float32)}
        self.refuse_plainly(corank("eval", self.run_file, f"adapter.path={self.adapter('a', {'layers_to_transform': [0, 1]}, tensors)}"),
                            65, str(2**70))

    def test_whole_numbers(self):
        self.refused_by_all("whole", "lora_A", "Int", tensors={"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": np.ones((4, 64), np.int32)})

    def test_files_of_ours_that_are_not(self):
        file = self.folder / "a.h5"
        self.succeed(corank("import", ADAPTER, "--out", file))

        def changed(name, change):
            path = self.folder / name
            shutil.copy(file, path)
            with h5py.File(path, "r+") as h5:
                change(h5)
            return path

        def lattice(h5):
            group = h5
            for _ in range(30):
                below = group.create_group("a")
                group["b"] = below
                group = below

        def whole(h5):
            h5["base_model.model.x.lora_A.weight"] = np.ones((2, 2), np.int64)

        def attribute(name, value):
            return lambda h5: h5.attrs.__setitem__(name, value)

        for name, change, word in (("lattice", lattice, "another name"), ("whole", whole, "Long"),
                                   ("name", lambda h5: h5.__setitem__("\x1b[31m", np.ones(2, np.float32)), r"\x1b"),
                                   ("method", attribute("method", "\x1b[31m"), "method"),
                                   ("pissa", attribute("method", "pissa"), "pissa_A"),
                                   ("mora", attribute("method", "mora"), "lora_B"),
                                   ("base", attribute("base_model", np.bytes_(b"\xff\xfe")), "base_model"),
                                   ("config", attribute("adapter_config", "[" * 300_000), "nested")):
            with self.subTest(name):
                path = changed(name + ".h5", change)
                for result in (corank("eval", self.run_file, f"adapter.path={path}"),
                               corank("export", path, "--out", self.folder / "x"), corank("inspect", path)):
                    if result.args[1] == "inspect" and result.returncode == 0:  # what is in it, and nothing that is obeyed
                        self.assertIsNone(CONTROL.search(result.stdout), repr(result.stdout))
                    else:
                        self.refuse_plainly(result, 65, word)

    def test_inspect_shows_names_and_never_obeys_them(self):
        folder = self.adapter("a", config={"base_model_name_or_path": "\x1b[31m\u202ered\x07"})
        shown = self.succeed(corank("inspect", folder))
        self.assertIsNone(CONTROL.search(shown), repr(shown))
        self.assertIn(r"\x1b[31m\u202ered\x07", shown)
        self.assertEqual(json.loads(self.succeed(corank("inspect", folder, "--json")))["base_model"], "\x1b[31m\u202ered\x07")

    def test_names_of_files_that_are_no_text(self):
        name = os.fsdecode(b"\xff\x1b[31m")
        self.refuse_plainly(corank("inspect", self.folder / name), 66, r"\xff\x1b[31m")
        out = json.loads(self.succeed(corank("export", ADAPTER, "--out", self.folder / name, "--json")))
        self.assertEqual(out["tensors"], 8)


class WhatIsCompared(AdapterCase):
    def test_a_tensor_of_no_module(self):
        for number, name in enumerate(("foo", "base_model.model.")):
            with self.subTest(name):
                adapter = self.adapter(f"a{number}", tensors={name: np.ones((4, 4), np.float32)})
                self.refuse_plainly(corank("eval", self.run_file, f"adapter.path={adapter}"), 65, "not a tensor name of an adapter")

    def test_modules_to_save_of_an_adapter_are_the_adapters(self):
        name = "model.layers.0.self_attn.k_proj.weight"
        weight = load_file(MODEL / "model.safetensors")[name]
        adapter = self.adapter("saved", {"modules_to_save": ["k_proj"]}, {f"base_model.model.{name}": weight})
        self.refuse_plainly(corank("eval", self.run_file, f"adapter.path={adapter}"), 65, str(adapter), "modules_to_save: k_proj")

    def test_r_beside_a_pattern_is_that_of_the_file(self):
        plain, pattern = self.adapter("plain"), self.adapter("pattern", {"r": 8, "rank_pattern": {".*": 4}})
        self.assertEqual(self.loss(pattern, "adapter.r=8"), self.loss(plain, "adapter.r=4"))
        self.refuse_plainly(corank("eval", self.run_file, f"adapter.path={pattern}", "adapter.r=2"), 64, "adapter.r", "2")

    def test_names_are_shown_and_not_obeyed(self):
        named = self.folder / "y\x1b[31m.yaml"
        named.write_text(self.run_file.read_text() + f"train: {{max_steps: 1}}\noutput_dir: {self.out}\n")
        self.assertNotIn("\x1b", self.succeed(corank("validate", named)))


class HostileRunFiles(AdapterCase):
    def refused(self, text, *words, code=64):
        self.run_file.write_bytes(text if isinstance(text, bytes) else text.encode())
        self.refuse_plainly(corank("validate", self.run_file, f"output_dir={self.out}"), code, *words)

    def test_texts(self):
        self.refused("model: " + "[" * 300_000, "run.yaml:1")
        self.refused("a: &a [x]\nb: *a\n", "run.yaml:1", "anchors")
        self.refused("model: {path: a}\nmodel: {path: b}\n", "run.yaml:2", "twice")
        self.refused(b"model: \xff\n", "UTF-8")
        self.refused(b"model: {path: a}\0\n", "UTF-8")
        self.refused('model: {shape: tiny-llama}\n"\\e[31m\\u202e": 1\n', r"\x1b[31m\u202e")
        self.refused("model: {shape: tiny-llama}\n" + "".join(f"key{i}: 1\n" for i in range(4900)), "bytes left out")
        self.refused("model: {shape: tiny-llama}\n? " + "k" * 900_000 + "\n: 1\n", "unknown key")
        self.refused("x" * 2_000_000, "larger than")
        self.refused('model: {path: "a\\0b"}\n', "NUL")
        self.refused("model: {path: /nowhere}\nadapter: {target_modules: '(?R)'}\n", "adapter.target_modules")
        self.refused("model: {shape: tiny-llama}\nadapter: {target_modules: '(\\w+\\.?)+\\d\\d'}\ntrain: {max_steps: 1}\ndata: {train: configs/tiny/train.h5}\n",
                     "run.yaml:2: adapter.target_modules", "takes too long")

    def test_overrides(self):
        for override in ("adapter.r=" + "[" * 100_000, "adapter." + "r" * 100_000 + "=1", "adapter.r=\x1b[31m", "model.path=\x1b]0;x\x07"):
            with self.subTest(override[:20]):
                result = corank("validate", "configs/tiny.yaml", f"output_dir={self.out}", override)
                self.refuse_plainly(result, 64 if "path" not in override else result.returncode)
                self.assertIn(result.returncode, (64, 66))

    def test_run_yaml_holds_any_path(self):
        out = self.folder / 'a\nresume: never\n"b" \\ #: \t'
        self.succeed(corank("train", "configs/tiny.yaml", "train.max_steps=1", "eval_steps=0", f"output_dir={json.dumps(str(out))}"))
        lines = (out / "run.yaml").read_text().splitlines()
        self.assertTrue(lines[0].startswith("# identity: "))
        again = self.succeed(corank("train", out / "run.yaml"))
        self.assertIn("already complete after step 1", again)


if __name__ == "__main__":
    unittest.main()
