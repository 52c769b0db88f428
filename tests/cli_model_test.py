"""Model folders as a user meets them: what is refused by name, what is believed, what a merge takes along."""

import json
import os
import shutil
import unittest

import cli_test
import numpy as np
from cli_test import ROOT, corank, load_file, save_file

GOLDEN = ROOT / "tests" / "golden" / "llama"


class ModelCase(cli_test.Case):
    def setUp(self):
        super().setUp()
        self.model = self.folder / "model"
        shutil.copytree(GOLDEN / "model", self.model)
        self.run_file = self.folder / "run.yaml"
        self.run_file.write_text(f"model: {{path: {self.model}, dtype: float32}}\nadapter: {{method: lora}}\n"
                                 f"data: {{train: none.h5, seq_len: 16}}\ntrain: {{max_steps: 1, global_batch_size: 1, "
                                 f"micro_batch_size: 1, learning_rate: 1e-3}}\noutput_dir: {self.out}\n")

    def configure(self, **changes):
        config = json.loads((GOLDEN / "model" / "config.json").read_text())
        (self.model / "config.json").write_text(json.dumps({**config, **changes}))

    def replace(self, **tensors):
        old = load_file(GOLDEN / "model" / "model.safetensors")
        save_file({**old, **{name.replace("__", "."): value for name, value in tensors.items()}},
                  self.model / "model.safetensors")
        return old

    def generate(self):
        return corank("generate", self.run_file, "--prompt-tokens", "1,2,3,4", "--json")

    def merge(self):
        return corank("merge", self.run_file, f"adapter.path={GOLDEN / 'adapter'}", "--out", self.out)


class Configurations(ModelCase):
    def test_what_changes_the_result_is_refused_by_name(self):
        refusals = {
            "rope_scaling is []": {"rope_scaling": []},
            "rope_scaling is \"linear\"": {"rope_scaling": "linear"},
            "low_freq_factor is missing": {"rope_scaling": {"type": "llama3", "factor": 8}},
            "max_position_embeddings, 3:": {"rope_scaling": {"type": "dynamic", "factor": 4},
                                           "max_position_embeddings": 3},
            "num_hidden_layers": {"num_hidden_layers": 2**70},
            "rms_norm_eps": {"rms_norm_eps": -1e-6},
            "mystery": {"mystery": 1},
            "quantization_config": {"quantization_config": []},
        }
        for word, changes in refusals.items():
            with self.subTest(word):
                self.configure(**changes)
                self.refuse(self.generate(), 65, "config.json", word)

    def test_texts_that_are_no_plain_object(self):
        good = (GOLDEN / "model" / "config.json").read_text().strip()
        texts = {"NUL": good + "\0{}", "stands twice": good[:-1] + ',"vocab_size": 130}', "not valid JSON": good + "x",
                 "nested deeper": good[:-1] + ',"a":' + "[" * 300_000 + "]" * 300_000 + "}", "not a JSON object": "[]"}
        for word, text in texts.items():
            with self.subTest(word):
                (self.model / "config.json").write_text(text)
                self.refuse(self.generate(), 65, "config.json", word)

    def test_a_head_of_its_own_beside_tied_embeddings(self):
        separate = self.succeed(self.generate())
        self.configure(tie_word_embeddings=True)
        self.assertEqual(self.succeed(self.generate()), separate)
        self.succeed(self.merge())
        merged, base = (load_file(folder / "model.safetensors") for folder in (self.out, self.model))
        np.testing.assert_array_equal(merged["lm_head.weight"], base["lm_head.weight"])
        shutil.rmtree(self.out)
        self.replace(lm_head__weight=base["model.embed_tokens.weight"])
        self.assertNotEqual(self.succeed(self.generate()), separate)


class Weights(ModelCase):
    def test_what_is_not_finite_is_named_with_its_file(self):
        for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
            bad = load_file(GOLDEN / "model" / "model.safetensors")[name].copy()
            bad.flat[0] = np.inf
            self.replace(**{name.replace(".", "__"): bad})
            for command in (self.generate, self.merge):
                with self.subTest(f"{name} {command.__name__}"):
                    self.refuse(command(), 65, "model.safetensors", name, "infinite")

    def test_integers_are_refused(self):
        for dtype in (np.int64, np.int32, np.int8, np.uint8, bool):
            with self.subTest(dtype.__name__):
                self.replace(lm_head__weight=np.ones((130, 64), dtype))
                for command in (self.generate, self.merge):
                    self.refuse(command(), 65, "model.safetensors", "lm_head.weight")


class Companions(ModelCase):
    def test_links_out_of_the_folder_and_pipes_stay_behind(self):
        (self.folder / "secret").write_text("secret")
        (self.model / "tokenizer.json").write_text("{}")
        (self.model / "leak.json").symlink_to("../secret")
        os.mkfifo(self.model / "pipe.json")
        result = self.merge()
        self.succeed(result)
        self.assertIn("leak.json is a symbolic link out of the model folder", result.stderr)
        self.assertEqual({path.name for path in self.out.iterdir()}, {"config.json", "model.safetensors", "tokenizer.json"})


if __name__ == "__main__":
    unittest.main()
