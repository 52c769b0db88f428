#!/usr/bin/env python3
"""Tests of the Python tools: python3 tests/data_tools_test.py. All fixtures are made here, in temporary folders."""

import json
import math
import os
import re
import runpy
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "data"), str(ROOT / "launch")]

from compile_flags import wrong_flags
from count_tests import MethodCounts, column_of, method_of
from environment import require

require("numpy", "h5py", "gguf", "tokenizers", "safetensors", "yaml", "transformers")

import gguf
import h5py
import numpy as np
from safetensors.numpy import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template  # noqa: F401  imported once for all tests

TEMPLATE = ("{% for message in messages %}{{ '<s>' + message['role'] + '\n' + message['content'] + '<e>' + '\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}")
START, END = 0, 1
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = ["<s>", "<e>", "<u>", *BYTES, "\u010a\u010a", "21"]  # the last but one: two line feeds
MERGES = [("\u010a", "\u010a"), ("2", "1")]


def tool(name, *arguments, code=0, **environment):
    """Runs a command of the project and checks how it ends. Returns (standard output, standard error). The process is a
    copy of this one: it has already imported what takes long."""

    def run_script():
        os.environ.update(environment)
        sys.argv = [str(ROOT / name), *map(str, arguments)]
        runpy.run_path(sys.argv[0], run_name="__main__")

    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            in_child(run_script, output, error)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [(file.seek(0), file.read().decode())[1] for file in (output, error)]
    if ended != code:
        raise AssertionError(f"{name} ended with {ended}, expected {code}: {''.join(texts)}")
    return texts


def in_child(work, output, error):
    """Does the work and ends the process, a copy of the tests' own, as Python would end a script."""
    code = 1
    try:
        for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), output.fileno(), error.fileno())):
            os.dup2(file, number)
        work()
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def write_model(folder, template=TEMPLATE, bos=False):
    """A model folder with a byte-level tokenizer: nearly every byte is one token."""
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(VOCABULARY)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in VOCABULARY[:3]])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", START)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "<e>"}
    if template is not None:
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 300}))
    return folder


def byte_ids(text):
    """Ids of ASCII text, worked out without the tokenizer: one for each character or special token."""
    pieces = re.findall("<s>|<e>|.", text, re.DOTALL)
    return [VOCABULARY.index(piece.replace(" ", "\u0120").replace("\n", "\u010a")) for piece in pieces]


def setUpModule():
    """What transformers imports with the first tokenizer is there in all processes that are copies of this one."""
    with tempfile.TemporaryDirectory() as folder:
        AutoTokenizer.from_pretrained(str(write_model(Path(folder) / "model")))


class Scratch(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.folder = Path(scratch.name)


class PrepareTest(Scratch):
    def setUp(self):
        super().setUp()
        self.model = write_model(self.folder / "model")

    def prepare(self, records, *options, code=0, model=None, **environment):
        source = self.folder / "in.jsonl"
        if not isinstance(records, bytes):
            records = "".join(json.dumps(record) + "\n" for record in records).encode()
        source.write_bytes(records)
        return tool("data/prepare", source, "--model", model or self.model, "--out", self.folder / "out.h5", *options,
                    code=code, **environment)

    def samples(self, name="out.h5"):
        with h5py.File(self.folder / name) as file:
            offsets = file["offsets"][:]
            self.assertEqual(len(file["tokens"]), len(file["loss_mask"]))
            self.assertEqual((offsets[0], offsets[-1]), (0, len(file["tokens"])))
            return [(file["tokens"][a:b].tolist(), file["loss_mask"][a:b].tolist())
                    for a, b in zip(offsets, offsets[1:])]

    def assert_sample(self, *parts, index=0):
        """`parts` are (text, whether it is a target)."""
        ids = [i for text, _ in parts for i in byte_ids(text)]
        mask = [int(target) for text, target in parts for _ in byte_ids(text)]
        self.assertEqual(self.samples()[index], (ids, mask))

    def test_every_assistant_turn_is_a_target(self):
        self.prepare([{"messages": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"},
                                    {"role": "assistant", "content": "yes"}, {"role": "user", "content": "so"},
                                    {"role": "assistant", "content": "no"}]}])
        self.assert_sample(("<s>system\nbe<e>\n<s>user\nhi<e>\n<s>assistant\n", 0), ("yes<e>", 1),
                           ("\n<s>user\nso<e>\n<s>assistant\n", 0), ("no<e>", 1), ("\n", 0))

    def test_prompt_and_completion(self):
        self.prepare([{"prompt": "ab", "completion": " cd"}, {"prompt": "", "completion": "cd"}])
        self.assert_sample(("ab", 0), (" cd<e>", 1))
        self.assert_sample(("c", 0), ("d<e>", 1), index=1)

    def test_instruction_is_a_chat_turn_where_there_is_a_template(self):
        self.prepare([{"instruction": "ab", "input": "", "output": "cd"}, {"instruction": "ab", "output": "cd"}])
        for index in (0, 1):
            self.assert_sample(("<s>user\nab<e>\n<s>assistant\n", 0), ("cd<e>", 1), ("\n", 0), index=index)
        self.prepare([{"instruction": "ab", "input": "x", "output": "cd"}])
        self.assert_sample(("<s>user\nab\n\nx<e>\n<s>assistant\n", 0), ("cd<e>", 1), ("\n", 0))

    def test_instruction_without_a_template(self):
        model = write_model(self.folder / "plain", template=None, bos=True)
        self.prepare([{"instruction": "ab", "input": "x", "output": "cd"}], model=model)
        tokens, mask = self.samples()[0]
        text = Tokenizer.from_file(str(model / "tokenizer.json")).decode(tokens)
        self.assertTrue(text.startswith("Below is an instruction that describes a task, paired with an input"))
        self.assertTrue(text.endswith("### Instruction:\nab\n\n### Input:\nx\n\n### Response:\ncd"))
        self.assertEqual(tokens[0], START)
        self.assertEqual(tokens[-3:], byte_ids("cd<e>"))
        self.assertEqual(mask, [0] * (len(tokens) - 3) + [1] * 3)

    def test_text_without_and_with_a_start_token(self):
        self.prepare([{"text": "abc"}])
        self.assert_sample(("a", 0), ("bc<e>", 1))
        self.prepare([{"text": "abc"}], model=write_model(self.folder / "bos", bos=True))
        self.assert_sample(("<s>", 0), ("abc<e>", 1))

    def test_file_layout(self):
        self.prepare([{"text": "abc"}], SOURCE_DATE_EPOCH="86400")
        with h5py.File(self.folder / "out.h5") as file:
            types = {name: str(data.dtype) for name, data in file.items()}
            self.assertEqual(types, {"tokens": "int32", "offsets": "int64", "loss_mask": "uint8"})
            self.assertTrue(all(data.fletcher32 and data.chunks for data in file.values()))
            attributes = dict(file.attrs)
        self.assertEqual((attributes["format"], attributes["version"], attributes["vocab_size"]),
                         ("corank-tokens", 1, 300))
        self.assertEqual(attributes["created"], "1970-01-02T00:00:00Z")
        self.assertTrue(attributes["source"].startswith("in.jsonl sha256:"))
        self.assertTrue(attributes["tokenizer"].startswith("sha256:"))

    def test_equal_input_gives_equal_bytes(self):
        records = [{"text": f"some text {i}"} for i in range(40)]
        written = []
        for attempt in range(2):
            time.sleep(1.1 * attempt)  # HDF5's own time stamps count in seconds
            self.prepare(records, "--eval", self.folder / "eval.h5", "--eval-samples", 7, SOURCE_DATE_EPOCH="1")
            written.append([(self.folder / name).read_bytes() for name in ("out.h5", "eval.h5")])
        self.assertEqual(*written)
        self.prepare([*records[:-1], {"text": "another text"}], SOURCE_DATE_EPOCH="1")
        self.assertNotEqual((self.folder / "out.h5").read_bytes(), written[0][0])
        self.assertEqual([path.name for path in self.folder.iterdir() if path.name.startswith(".")], [])

    def test_created_is_the_inputs_time_stamp(self):
        source = self.folder / "aged.jsonl"
        source.write_text('{"text": "abc"}\n')
        os.utime(source, (86400, 86400))
        environment = {"SOURCE_DATE_EPOCH": ""}
        tool("data/prepare", source, "--model", self.model, "--out", self.folder / "out.h5", **environment)
        with h5py.File(self.folder / "out.h5") as file:
            self.assertEqual(file.attrs["created"], "1970-01-02T00:00:00Z")

    def test_split_is_disjoint_and_depends_on_the_seed(self):
        records = [{"text": f"text {i % 90}"} for i in range(100)]  # ten stand in it twice
        chosen = {}
        for seed in (1, 1, 2):
            self.prepare(records, "--eval", self.folder / "eval.h5", "--eval-fraction", 0.2, "--seed", seed)
            train, held_out = ([tuple(tokens) for tokens, _ in self.samples(name)] for name in ("out.h5", "eval.h5"))
            self.assertEqual((len(train), len(held_out)), (80, 20))
            self.assertEqual(set(train) & set(held_out), set())
            self.assertEqual(chosen.setdefault(seed, held_out), held_out)
        self.assertNotEqual(chosen[1], chosen[2])

    def test_split_that_leaves_nothing_is_refused(self):
        options = ("--eval", self.folder / "eval.h5", "--eval-samples")
        self.prepare([{"text": "abc"}] * 4, *options, 2, code=65)
        self.prepare([{"text": "abc"}, {"text": "abd"}], *options, 2, code=65)
        self.assertFalse((self.folder / "out.h5").exists())

    def test_limits(self):
        output, _ = self.prepare([{"text": "abcdef"}, {"text": "gh"}, {"text": "ij"}], "--max-samples", 2,
                                 "--max-length", 4)
        self.assertEqual([len(tokens) for tokens, _ in self.samples()], [4, 3])
        self.assertIn("2 samples, 7 tokens, 5 target tokens, longest sample 4 tokens", output)
        self.assertIn("cut at --max-length: 1 samples", output)
        _, message = self.prepare([{"prompt": "abcdef", "completion": "g"}], "--max-length", 4, code=65)
        self.assertIn("in.jsonl, line 1 (byte 0): it has no target token within --max-length 4", message)

    def test_byte_order_mark_line_ends_and_empty_lines(self):
        output, _ = self.prepare(b'\xef\xbb\xbf{"text": "abc"}\r\n\r\n{"text": "def"}')
        self.assertEqual(len(self.samples()), 2)
        self.assertIn("1 empty lines", output)

    def test_bad_records_are_refused_with_their_line(self):
        good = b'{"text": "abc"}\n'
        bad = {b'{"id": 1}': "its keys are", b'{"conversations": [], "messages": []}': "more than one kind",
               b'{"text": ""}': "text is empty", b'{"text": 1}': "string",
               b'{"text": "a\\u0000"}': "zero character", b'{"text": "\\ud800"}': "surrogate",
               b'["a"]': "not a JSON object",
               b'{"text": "a\xff"}': "UTF-8", b'{"text": NaN}': "NaN", b'{"text": "a", "text": "b"}': "stands twice",
               b'{"text": "abc"': "not a JSON object", b"[" * 100000: "not a JSON object",
               b'{"messages": []}': "not a list of objects",
               b'{"messages": [{"role": "user"}]}': "a message has the keys",
               b'{"messages": [{"role": "user", "content": "a"}]}': "no target token",
               b'{"messages": [{"role": "bot", "content": "a"}]}': "the role 'bot'",
               b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}': "is empty",
               b'{"prompt": "a", "completion": ""}': "completion is empty"}
        for line, reason in bad.items():
            with self.subTest(line=line[:60]):
                _, message = self.prepare(good + line + b"\n", code=65)
                self.assertIn(f"in.jsonl, line 2 (byte {len(good)}): ", message)
                self.assertIn(reason, message)
                self.assertFalse((self.folder / "out.h5").exists())

    def test_a_token_that_straddles_the_generation_prompt_is_no_target(self):
        self.prepare([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]}])
        tokens, mask = self.samples()[0]
        ids = byte_ids("<s>user\na<e>\n<s>assistant")
        self.assertEqual(tokens, [*ids, VOCABULARY.index("\u010a\u010a"), *byte_ids("\nb<e>\n")])
        self.assertEqual(mask, [*[0] * (len(ids) + 1), 1, 1, 1, 0])

    def test_template_extras(self):
        template = ("{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
                    "{{ bos_token }}{{ strftime_now('%Y') }}{{ {'k': 'e'} | tojson }}"
                    "{% for m in messages %}{% if loop.index > 8 %}{% break %}{% endif %}{{ m.role + ':' }}"
                    "{% if m.role == 'user' %}{{ m.content + eos_token }}{% else %}"
                    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
                    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}")
        model = write_model(self.folder / "extras", template=template)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.prepare([{"messages": turns}], model=model, SOURCE_DATE_EPOCH="0")
        self.assert_sample(('<s>1970{"k": "e"}user:a<e>assistant:', 0), ("b<e>", 1))
        refused = {"messages": [{"role": "system", "content": "x"}, *turns]}
        _, message = self.prepare([refused], model=model, code=65)
        self.assertIn("no system turn", message)

    def test_skip_bad(self):
        lines = b'{"text": "abc"}\nx\n{"text": "def"}\ny\n'
        output, _ = self.prepare(lines, "--skip-bad", 2)
        self.assertEqual(len(self.samples()), 2)
        self.assertIn("left out: 2 bad records", output)
        self.assertIn("line 4 (byte 34)", output)
        self.prepare(lines, "--skip-bad", 1, code=65)

    def test_usage(self):
        record = [{"text": "abc"}]
        self.prepare(record, "--eval", self.folder / "eval.h5", code=64)
        self.prepare(record, "--eval-samples", 1, code=64)
        self.prepare(record, "--eval", self.folder / "out.h5", "--eval-samples", 1, code=64)
        self.prepare(record, "--unknown", code=64)
        self.prepare(record, "--max-length", 1, code=64)
        self.prepare(b"\n", code=65)
        self.prepare(record, model=self.folder / "nowhere", code=66)
        tool("data/prepare", self.folder / "no.jsonl", "--model", self.model, "--out", self.folder / "o.h5", code=66)

    def test_tokenizer_of_another_model_is_refused(self):
        (self.model / "config.json").write_text('{"vocab_size": 20}')
        _, message = self.prepare([{"text": "abc"}], code=65)
        self.assertIn("vocab_size is 20", message)

    def test_output_that_cannot_be_written(self):
        (self.folder / "file").write_text("")
        (self.folder / "in.jsonl").write_text('{"text": "abc"}\n')
        tool("data/prepare", self.folder / "in.jsonl", "--model", self.model, "--out", self.folder / "file" / "out.h5",
             code=74)

    def test_output_that_is_no_file_stays(self):
        (self.folder / "in.jsonl").write_text('{"text": "abc"}\n')
        os.mkfifo(self.folder / "pipe")
        tool("data/prepare", self.folder / "in.jsonl", "--model", self.model, "--out", self.folder / "pipe", code=64)
        self.assertTrue((self.folder / "pipe").is_fifo())


class TinyGguf:
    """A llama of 1 layer, width 32, 4 heads and 2 key-value heads, written with gguf's own writer."""

    heads, kv_heads, width, head_dim, inner = 4, 2, 32, 8, 64

    def __init__(self, seed=0):
        random = np.random.default_rng(seed)
        rows = {"attn_q": self.width, "attn_k": self.kv_heads * self.head_dim, "attn_v": self.kv_heads * self.head_dim,
                "attn_output": self.width, "ffn_gate": self.inner, "ffn_up": self.inner}
        self.weights = {f"blk.0.{name}.weight": random.standard_normal((size, self.width), dtype=np.float32)
                        for name, size in rows.items()}
        self.weights["blk.0.ffn_down.weight"] = random.standard_normal((self.width, self.inner), dtype=np.float32)
        self.weights["token_embd.weight"] = random.standard_normal((len(VOCABULARY), self.width), dtype=np.float32)
        for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
            self.weights[f"{name}.weight"] = np.ones(self.width, dtype=np.float32)
        self.architecture, self.pre, self.model, self.add_bos = "llama", "smollm", "gpt2", False
        self.extra, self.quantized, self.template = {}, {}, TEMPLATE

    def write(self, path):
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(1)
        writer.add_context_length(128)
        writer.add_embedding_length(self.width)
        writer.add_feed_forward_length(self.inner)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(1e4)
        for key, value in self.extra.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_string)(key, value)
        self.write_tokenizer(writer)
        for name, weight in self.weights.items():
            kind = self.quantized.get(name)
            data = weight if kind is None else gguf.quants.quantize(weight, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def write_tokenizer(self, writer):
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(VOCABULARY)
        writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 3))
        writer.add_token_merges([" ".join(merge) for merge in MERGES])
        writer.add_bos_token_id(START)
        writer.add_eos_token_id(END)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)
        writer.add_chat_template(self.template)


def llama_cpp_permute(weight, heads):
    """Row by row what llama.cpp's converter does: row (half h, place p) of a head goes to 2 p + h."""
    size = weight.shape[0] // heads
    result = np.empty_like(weight)
    for head in range(heads):
        for half in range(2):
            for place in range(size // 2):
                result[head * size + 2 * place + half] = weight[head * size + half * (size // 2) + place]
    return result


class ImportTest(Scratch):
    def setUp(self):
        super().setUp()
        self.tiny = TinyGguf()

    def load(self, *options, code=0, source=None):
        out = self.folder / "out"
        result = tool("data/import_gguf", source or self.tiny.write(self.folder / "tiny.gguf"), "--out", out, *options,
                      code=code)
        return result[1] if code else out

    def test_query_and_key_rows_are_put_back(self):
        original = {}
        for name, heads in (("q", TinyGguf.heads), ("k", TinyGguf.kv_heads)):
            original[name] = self.tiny.weights[f"blk.0.attn_{name}.weight"]
            self.tiny.weights[f"blk.0.attn_{name}.weight"] = llama_cpp_permute(original[name], heads)
        loaded = load_file(self.load() / "model.safetensors")
        for name, weight in original.items():
            stored = self.tiny.weights[f"blk.0.attn_{name}.weight"]
            found = loaded[f"model.layers.0.self_attn.{name}_proj.weight"]
            np.testing.assert_array_equal(found, weight)
            self.assertFalse(np.array_equal(stored, weight), "the permutation of this test changes nothing")

    def test_other_tensors_and_tied_embeddings(self):
        folder = self.load()
        loaded = load_file(folder / "model.safetensors")
        self.assertEqual(len(loaded), 11)
        for ours, theirs in (("embed_tokens", "token_embd"), ("norm", "output_norm"),
                             ("layers.0.mlp.down_proj", "blk.0.ffn_down"), ("layers.0.mlp.gate_proj", "blk.0.ffn_gate"),
                             ("layers.0.self_attn.v_proj", "blk.0.attn_v"),
                             ("layers.0.self_attn.o_proj", "blk.0.attn_output"),
                             ("layers.0.post_attention_layernorm", "blk.0.ffn_norm")):
            np.testing.assert_array_equal(loaded[f"model.{ours}.weight"], self.tiny.weights[f"{theirs}.weight"])
        config = json.loads((folder / "config.json").read_text())
        expected = {"tie_word_embeddings": True, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2,
                    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None, "vocab_size": len(VOCABULARY),
                    "intermediate_size": 64, "max_position_embeddings": 128, "num_hidden_layers": 1,
                    "bos_token_id": START, "eos_token_id": END, "pad_token_id": END, "dtype": "float32"}
        self.assertEqual({key: config[key] for key in expected}, expected)

    def test_own_output_head(self):
        self.tiny.weights["output.weight"] = self.tiny.weights["token_embd.weight"] + 1
        folder = self.load()
        np.testing.assert_array_equal(load_file(folder / "model.safetensors")["lm_head.weight"],
                                      self.tiny.weights["output.weight"])
        self.assertFalse(json.loads((folder / "config.json").read_text())["tie_word_embeddings"])

    def test_quantized_tensor(self):
        name = "blk.0.ffn_up.weight"
        self.tiny.quantized[name] = gguf.GGMLQuantizationType.Q8_0
        found = load_file(self.load() / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
        error = np.abs(found - self.tiny.weights[name])
        self.assertLess(error.max(), np.abs(self.tiny.weights[name]).max() / 127)
        self.assertGreater(error.max(), 0)

    def test_bfloat16_is_rounded_to_nearest_even(self):
        weight = self.tiny.weights["blk.0.ffn_up.weight"]
        weight[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20]
        raw = (self.load("--dtype", "bfloat16") / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entry = json.loads(raw[8:8 + length])["model.layers.0.mlp.up_proj.weight"]
        self.assertEqual((entry["dtype"], entry["shape"]), ("BF16", [64, 32]))
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        bits = np.frombuffer(raw[begin:end], dtype="<u2").astype(np.uint32)
        found = (bits << 16).view(np.float32).reshape(64, 32)
        self.assertEqual(found[0, :4].tolist(), [1.0, 1 + 2**-6, -1.0, 1 + 2**-7])
        spacing = 2.0 ** (np.floor(np.log2(np.abs(weight))) - 7)
        self.assertTrue((np.abs(found - weight) <= spacing / 2).all())

    def test_tokenizer(self):
        folder = self.load()
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.assertEqual([tokenizer.token_to_id(token) for token in VOCABULARY], list(range(len(VOCABULARY))))
        self.assertEqual(tokenizer.encode("<s>a 21 b<e>").ids, byte_ids("<s>a 21 b<e>"))
        self.assertEqual(tokenizer.decode(tokenizer.encode("a 21 b").ids), "a 21 b")
        self.tiny.pre = "gpt-2"
        folder.rename(self.folder / "first")
        other = Tokenizer.from_file(str(self.load() / "tokenizer.json"))
        self.assertIn(VOCABULARY.index("21"), other.encode("a 21 b").ids)  # not split into digits
        config = json.loads((self.folder / "first" / "tokenizer_config.json").read_text())
        self.assertEqual((config["bos_token"], config["eos_token"], config["chat_template"]), ("<s>", "<e>", TEMPLATE))

    def test_start_token(self):
        self.tiny.add_bos = True
        tokenizer = Tokenizer.from_file(str(self.load() / "tokenizer.json"))
        self.assertEqual(tokenizer.encode("ab").ids, byte_ids("<s>ab"))

    def test_start_token_as_llama_cpp_gives_it_where_the_file_says_nothing(self):
        self.tiny.add_bos = None
        for pre, start in (("llama-bpe", "<s>"), ("smollm", ""), ("gpt-2", "")):
            with self.subTest(pre=pre):
                self.tiny.pre = pre
                folder = self.load()
                tokenizer = AutoTokenizer.from_pretrained(str(folder))
                self.assertEqual(tokenizer("ab 1<e>")["input_ids"], byte_ids(f"{start}ab 1<e>"))
                chat = [{"role": "user", "content": "hi"}]
                self.assertEqual(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"],
                                 byte_ids("<s>user\nhi<e>\n<s>assistant\n"))
                folder.rename(self.folder / pre)

    def test_lengths_beyond_the_file(self):
        kinds = gguf.GGUFValueType

        def text(value):
            return struct.pack("<Q", len(value)) + value

        def header(fields, content=b"", tensors=0):
            return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + content

        array = text(b"k") + struct.pack("<II", kinds.ARRAY, kinds.UINT8)
        for reason, content in {"claim 8,589,934,592 elements": header(1, array + struct.pack("<Q", 1 << 33)),
                                "a length of 4,000,000 bytes": header(1, array + struct.pack("<Q", 4_000_000)),
                                "or hold arrays": header(1, text(b"k") + struct.pack("<IIQ", kinds.ARRAY, kinds.ARRAY, 1)),
                                "bytes is beyond its end": header(1, struct.pack("<Q", 1 << 62)),
                                "claims 1,152,921,504,606,846,976 fields": header(1 << 60),
                                "is not a valid GGUFValueType": header(1, text(b"k") + struct.pack("<I", 99))}.items():
            with self.subTest(reason=reason):
                source = self.folder / "claims.gguf"
                source.write_bytes(content + bytes(64))
                self.assertIn(reason, self.load(source=source, code=65))

    def test_fields_that_no_model_has(self):
        for name, value in (("llama.vocab_size", "x"), ("llama.attention.key_length", 0), ("llama.attention.key_length", "a"),
                            ("llama.rope.dimension_count", "b"), ("tokenizer.ggml.unknown_token_id", 1 << 31),
                            ("tokenizer.ggml.unknown_token_id", "u"), ("llama.rope.scaling.type", "linear"),
                            ("tokenizer.ggml.padding_token_id", "\x1b[31m" * 100000)):
            with self.subTest(name=name, value=str(value)[:10]):
                self.tiny = TinyGguf()
                self.tiny.extra = {name: value}
                message = self.load(code=65)
                self.assertLess(len(message), 2500)
                self.assertNotIn("\x1b", message)

    def test_llama3_frequencies(self):
        factors = []
        for i in range(0, TinyGguf.head_dim, 2):  # as transformers computes them
            wavelength = 2 * math.pi * 1e4 ** (i / TinyGguf.head_dim)
            smooth = (8192 / wavelength - 1) / 3
            factors.append(1 if wavelength < 8192 / 4 else 32 if wavelength > 8192 else
                           1 / ((1 - smooth) / 32 + smooth))
        self.tiny.weights["rope_freqs.weight"] = np.array(factors, dtype=np.float32)
        config = json.loads((self.load() / "config.json").read_text())
        self.assertEqual((config["rope_scaling"]["rope_type"], config["rope_scaling"]["factor"]), ("llama3", 32.0))

    def test_frequencies_of_no_known_kind(self):
        self.tiny.weights["rope_freqs.weight"] = np.full(4, 3, dtype=np.float32)
        self.assertIn("rope_freqs.weight fits no known scaling", self.load(code=65))

    def test_archives(self):
        source = self.tiny.write(self.folder / "tiny.gguf")
        archive = self.folder / "package.whl"
        with zipfile.ZipFile(archive, "w") as file:
            file.write(source, "package/tiny.gguf")
        self.assertTrue((self.load(source=archive) / "model.safetensors").exists())
        with zipfile.ZipFile(archive, "a") as file:
            file.write(source, "package/second.gguf")
        (self.folder / "out").rename(self.folder / "first")
        self.assertIn("holds 2 .gguf files", self.load(source=archive, code=65))

    def test_refusals(self):
        changes = {"the architecture is qwen2": {"architecture": "qwen2"},
                   "unknown pre-tokenizer dbrx": {"pre": "dbrx"},
                   "the tokenizer is of kind llama": {"model": "llama"},
                   "unknown attributes of the model: expert_count": {"extra": {"llama.expert_count": 8}},
                   "llama.rope.dimension_count is 4": {"extra": {"llama.rope.dimension_count": 4}}}
        for reason, change in changes.items():
            with self.subTest(reason=reason):
                self.tiny = TinyGguf()
                vars(self.tiny).update(change)
                self.assertIn(reason, self.load(code=65))
                self.assertFalse((self.folder / "out").exists())

    def test_tensors_that_do_not_fit(self):
        weight = self.tiny.weights.pop("blk.0.attn_v.weight")
        self.assertIn("1 tensors are missing, among them blk.0.attn_v.weight", self.load(code=65))
        self.tiny.weights["blk.0.attn_v.weight"] = weight[:8]
        self.assertIn("tensor blk.0.attn_v.weight is (8, 32), its fields say (16, 32)", self.load(code=65))
        self.tiny.weights["blk.0.attn_v.weight"] = weight
        self.tiny.weights["blk.0.attn_q.bias"] = np.ones(32, dtype=np.float32)
        self.assertIn("1 tensors are unknown, among them blk.0.attn_q.bias", self.load(code=65))
        del self.tiny.weights["blk.0.attn_q.bias"]
        weight[3, 3] = np.nan
        self.assertIn("blk.0.attn_v.weight holds values that are not finite", self.load(code=65))

    def test_damaged_and_missing_files(self):
        source = self.tiny.write(self.folder / "tiny.gguf")
        whole = source.read_bytes()
        for size in (0, 3, 20, 200, len(whole) // 2, len(whole) - 1):
            with self.subTest(size=size):
                source.write_bytes(whole[:size])
                self.assertIn("tiny.gguf: ", self.load(source=source, code=65))
        self.load(source=self.folder / "none.gguf", code=66)
        (self.folder / "out").mkdir()
        self.assertIn("exists already", self.load(code=64))


DICTIONARY = """  1 licence text
00000001 03 n 01 tree 0 001 @ 00000002 n 0000 | a tall plant; it has a trunk; "he climbed a tree"; "an oak"
00000002 03 n 02 Great_Wall 0 wall 0 000 | a long wall: "the wall"
00000003 03 n 02 wall 1 bulwark 0 000 | something strong
00000004 03 n 01 x-ray 0 000 | rays  
00000005 03 n 01 1900s 0 000 | a decade
00000006 03 n 01 saying 0 000 | known as "so" in places
00000007 03 n 01 beam 0 000 | rays
00000008 03 n 01 Tree 0 000 | something else
"""


class GlossaryTest(Scratch):
    def glossary(self, *options, code=0):
        out = self.folder / "out.jsonl"
        result = tool("data/glossary", "--out", out, "--dict", self.folder, *options, code=code)
        return result[1] if code else [json.loads(line) for line in out.read_text().splitlines()]

    def test_single_senses_without_examples(self):
        (self.folder / "data.noun").write_text(DICTIONARY)
        samples = self.glossary()
        found = {sample["messages"][0]["content"]: sample["messages"][1]["content"] for sample in samples}
        self.assertEqual(found, {'Define the noun "Great Wall".': "a long wall",
                                 'Define the noun "bulwark".': "something strong", 'Define the noun "x-ray".': "rays"})
        self.assertEqual([message["role"] for message in samples[0]["messages"]], ["user", "assistant"])

    def test_choice_is_seeded(self):
        words = (f"{i:08} 03 n 01 {chr(97 + i // 26)}{chr(97 + i % 26)} 0 000 | meaning {i}" for i in range(100))
        (self.folder / "data.noun").write_text("\n".join(words) + "\n")
        first = self.glossary("--max-words", 10)
        self.assertEqual(len(first), 10)
        self.assertEqual(self.glossary("--max-words", 10), first)
        self.assertNotEqual(self.glossary("--max-words", 10, "--seed", 1), first)

    def test_refusals(self):
        self.assertIn("wordnet-base", self.glossary(code=66))
        (self.folder / "data.noun").write_text("no entry\n")
        self.assertIn("data.noun, line 1", self.glossary(code=65))
        (self.folder / "data.noun").write_text(DICTIONARY)
        self.glossary("--max-words", 4, code=65)


FAKE_CORANK = """#!{python}
import json, sys
log = open({log!r}, "w")
print(json.dumps(sys.argv[1:]), file=log, flush=True)
for line in sys.stdin:
    print(line, end="", file=log, flush=True)
    if {code}:
        sys.exit({code})
    if json.loads(line)["prompt"] == {refused}:
        print(json.dumps({{"error": "too long for this process"}}), flush=True)
    else:
        print(json.dumps({{"adapter": "x", "tokens": {tokens}}}), flush=True)
"""


class ChatTest(Scratch):
    def setUp(self):
        super().setUp()
        self.run_file = self.folder / "run.yaml"
        self.run_file.write_text(f"model:\n  path: {write_model(self.folder / 'model')}\n")

    def fake(self, tokens=(), exits=0, refused=None):
        fake = self.folder / "corank"
        fake.write_text(FAKE_CORANK.format(python=sys.executable, log=str(self.folder / "log"), tokens=list(tokens),
                                           code=exits, refused=refused))
        fake.chmod(0o700)
        return {"CORANK_BIN": str(fake)}

    def chat(self, *options, code=0, **fake):
        return tool("launch/chat", self.run_file, *options, code=code, **self.fake(**fake))

    def log(self):
        """What corank was started with, and the requests that it got."""
        arguments, *requests = map(json.loads, (self.folder / "log").read_text().splitlines())
        return arguments, requests

    def test_prompt(self):
        output, _ = self.chat("data.seq_len=8", "--prompt", "hi", "--system", "be", "--adapter", "some/adapter",
                              "--max-new-tokens", 5, tokens=byte_ids("yes<e>\nmore"))
        self.assertEqual(output, "yes\n")
        prompt = "<s>system\nbe<e>\n<s>user\nhi<e>\n<s>assistant\n"
        arguments, requests = self.log()
        self.assertEqual(arguments, ["generate", str(self.run_file), "data.seq_len=8", 'adapter.path="some/adapter"',
                                     "--serve", "--max-new-tokens", "5"])
        self.assertEqual(requests, [{"prompt": byte_ids(prompt), "adapter": "default", "stop_tokens": byte_ids("<e>")}])

    def test_answers_end_at_every_token_that_the_configurations_name(self):
        model = self.folder / "model"
        for generation, config, stops in ((None, [5, 7], [END, 5, 7]), ({"eos_token_id": 6}, 5, [END, 6]),
                                          ({"eos_token_id": [6, 8]}, None, [END, 6, 8]), ({"eos_token_id": None}, 5, [END, 5]),
                                          ({}, [5], [END, 5]), ({}, None, [END]), ({"eos_token_id": 0}, 5, [0, END])):
            (model / "config.json").write_text(json.dumps({"vocab_size": 300, "eos_token_id": config}))
            (model / "generation_config.json").unlink(missing_ok=True)
            if generation is not None:
                (model / "generation_config.json").write_text(json.dumps(generation))
            output, _ = self.chat("--prompt", "hi", tokens=[*byte_ids("yes"), stops[-1], *byte_ids("more")])
            self.assertEqual((output, self.log()[1][0]["stop_tokens"]), ("yes\n", stops))
        for outside in (300, -1, "1", True, [1, None], 10**30):
            (model / "generation_config.json").write_text(json.dumps({"eos_token_id": outside}))
            self.assertIn("eos_token_id holds", self.chat("--prompt", "hi", code=65)[1])

    def test_a_model_without_an_end_of_sequence_token(self):
        path = self.folder / "model" / "tokenizer_config.json"
        path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}))
        (self.folder / "model" / "generation_config.json").write_text('{"eos_token_id": 5}')
        self.chat("--prompt", "hi", tokens=byte_ids("yes"))
        self.assertEqual(self.log()[1][0]["stop_tokens"], [5])
        (self.folder / "model" / "generation_config.json").unlink()
        self.assertIn("nothing but --max-new-tokens ends an answer", self.chat("--prompt", "hi", tokens=byte_ids("yes"))[1])
        self.assertEqual(self.log()[1][0]["stop_tokens"], [])

    def test_a_prompt_that_is_no_text_is_refused(self):
        _, error = self.chat("--prompt", os.fsdecode(b"\xff\xfe"), code=64)
        self.assertIn("UTF-8", error)

    def test_adapters_by_name(self):
        config = self.folder / "model" / "config.json"
        config.write_text(json.dumps({"vocab_size": 300, "max_position_embeddings": 777}))
        names = ("--adapter", "a=x/y", "--adapter", "b=p=q")
        for use, adapter in (((), "a"), (("--use", "b"), "b"), (("--use", "base"), "base")):
            self.chat("--prompt", "hi", *names, *use, "--merge", tokens=byte_ids("yes<e>"))
            arguments, requests = self.log()
            self.assertEqual(arguments[-7:], ["--max-positions", "777", *names, "--merge"])
            self.assertEqual(requests[0]["adapter"], adapter)
        for wrong, word in ((("--use", "c"), "default"), (("--adapter", "b=z"), "two adapters"), (("--adapter", "z"), "names")):
            self.assertIn(word, self.chat("--prompt", "hi", "--adapter", "first", *names, *wrong, code=64)[1])

    def test_conversation(self):
        """On a terminal: one process for all answers, commands between them, and what is refused is no part of it."""
        typed = "hi\n/adapters\n/use b\nxx\nho\n/use zzz\n/what\n"
        turns = "<s>user\nhi<e>\n<s>assistant\nyes<e>\n"
        environment = {**os.environ, **self.fake(tokens=byte_ids("yes<e>"),
                                                 refused=byte_ids(turns + "<s>user\nxx<e>\n<s>assistant\n"))}
        parent, child = os.openpty()
        os.write(parent, typed.encode() + b"\x04")
        done = subprocess.run([sys.executable, ROOT / "launch/chat", self.run_file, "--adapter", "a=x", "--adapter", "b=y"], stdin=child,
                              env=environment, capture_output=True, text=True, timeout=60)
        os.close(parent)
        os.close(child)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("a (in use)\nb\nbase\n", done.stdout)
        for words in ("chat: too long for this process", "no adapter is named zzz; there are a, b, base", "/use NAME"):
            self.assertIn(words, done.stderr)
        _, requests = self.log()
        self.assertEqual([request["adapter"] for request in requests], ["a", "b", "b"])
        self.assertEqual(requests[2]["prompt"], byte_ids(turns + "<s>user\nho<e>\n<s>assistant\n"))

    def test_model_without_a_template_continues_text(self):
        plain = write_model(self.folder / "plain", template=None)
        override = f"model.path={plain}"
        output, note = self.chat(override, "--prompt", "ab", tokens=byte_ids("cd"))
        self.assertEqual(output, "cd\n")
        self.assertIn("no chat template", note)
        self.assertEqual(self.log()[1][0]["prompt"], byte_ids("ab"))
        self.chat(override, "--prompt", "ab", "--system", "be", code=64)

    def test_refusals(self):
        self.assertIn("no terminal", self.chat(code=64)[1])
        self.chat("--prompt", "hi", exits=65, code=65)
        self.chat("nonsense", "--prompt", "hi", code=64)
        self.chat("--prompt", "x" * 70000, tokens=[0])  # no argument of a command could hold it
        prompt = byte_ids("<s>user\nhi<e>\n<s>assistant\n")
        self.assertIn("too long", self.chat("--prompt", "hi", refused=prompt, code=64)[1])
        self.chat("model.path=nowhere", "--prompt", "hi", code=66)
        self.run_file.write_text("model: {shape: llama-3-8b}\n")
        self.assertIn("model.path is missing", self.chat("--prompt", "hi", code=64)[1])
        for content in (b"model: {path: 2001-99-99}", b"[" * 5000, b"\xff", b"a: 1\n b: 2"):
            self.run_file.write_bytes(content)
            self.assertIn("is not YAML", self.chat("--prompt", "hi", code=64)[1])
        self.run_file.unlink()
        self.chat("--prompt", "hi", code=66)
        tool("launch/chat", self.run_file, "model.path=" + str(self.folder / "model"), "--prompt", "hi", code=66,
             CORANK_BIN=str(self.folder / "none"))


class EnvironmentTest(Scratch):
    def run_script(self, code):
        script = self.folder / "script"
        script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT / 'data')!r})\nfrom environment import require\n"
                          "require('no_such_module_here')\n")
        return tool(script, "a b", code=code, CORANK_CACHE=str(self.folder))

    def test_without_the_prepared_python(self):
        self.assertIn("not found, or too old: no_such_module_here. Run launch/setup.", self.run_script(66)[1])

    def test_a_library_that_is_too_old(self):
        (self.folder / "transformers.py").write_text("__version__ = '4.57.1'\n")
        script = self.folder / "script"
        script.write_text(f"import sys\nsys.modules.pop('transformers')\nsys.path[:0] = [{str(self.folder)!r}, "
                          f"{str(ROOT / 'data')!r}]\nfrom environment import require\nrequire('transformers')\n")
        self.assertIn("too old: transformers", tool(script, code=66, CORANK_CACHE=str(self.folder))[1])

    def test_with_the_prepared_python(self):
        python = self.folder / "tools" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text('#!/bin/sh\necho "prepared $2"\n')
        python.chmod(0o700)
        self.assertEqual(self.run_script(0)[0], "prepared a b\n")


class CompileFlagsTest(unittest.TestCase):
    def test_lost_options_are_named(self):
        options = {"dropout": "-fopenmp", "random": "-fopenmp", "quantize": "-fopenmp -ffp-contract=off"}

        def wrong(**changed):
            given = {name: flags for name, flags in {**options, **changed}.items() if flags is not None}
            return wrong_flags(json.dumps([{"file": f"/x/trainer/ops/{name}.cpp", "command": f"c++ {flags} -c {name}.cpp"}
                                           for name, flags in given.items()]))

        self.assertEqual(wrong(), [])
        self.assertEqual(wrong(random="-O2"), ["compile flags: random.cpp is not compiled alone with -fopenmp"])
        self.assertEqual(wrong(quantize="-fopenmp"),
                         ["compile flags: quantize.cpp is not compiled alone with -ffp-contract=off"])
        self.assertEqual(wrong(dropout=None),  # in a batch of a unity build
                         ["compile flags: dropout.cpp is not compiled alone with -fopenmp"])


class CountTest(unittest.TestCase):
    def test_the_method_of_a_case(self):
        for suite, case, method in (("Cases/LoraGolden", "LogitsMatch/dora", "dora"),
                                    ("Cases/LoraGolden", "LogitsMatch/llama", "lora"),
                                    ("AdaLoraGolden", "RegularisedGradientsMatch", "adalora"),
                                    ("PissaGolden", "ConversionToPlainLoraMatches", "pissa"),
                                    ("Conformance/Runs", "FullTensors/rslora_nf4", "rslora"),
                                    ("Mutants", "MoraPaddingThatDoesNotWrapAround", "mora"),
                                    ("Settings/Topology", "BytesPredictedEqualBytesCounted/unpacked", "lora"),
                                    ("Settings/Topology", "BytesPredictedEqualBytesCounted/gpt2_full", "full"),
                                    ("Formats", "EveryLayoutHasTheWeightOfOneRank", None)):
            self.assertEqual(method_of(suite, case), method, f"{suite}.{case}")

    def test_the_column_of_a_case(self):
        for program, suite, case, column in (("parity_test", "Cases/LoraGolden", "LogitsMatch/dora", "parity"),
                                             ("parity_test", "Row07", "AdaLoraLayer", "parity"),
                                             ("conformance_mpi_test", "Conformance/Runs", "A/mora_6_nf4", "on nf4"),
                                             ("conformance_mpi_test", "Conformance/Runs", "A/mora_6", "conformance"),
                                             ("methods_mpi_test", "Methods/Topology", "A/nf4", "layouts"),
                                             ("methods_mpi_test", "Methods/Resume", "A/dora", "resume"),
                                             ("data_test", "H5", "A", None)):
            self.assertEqual(column_of(program, suite, case), column, f"{program} {suite}.{case}")

    def test_the_table_adds_up_programs_and_tells_failures(self):
        report = ('<testsuites><testsuite><testcase name="A/dora" classname="Cases/LoraGolden"/>'
                  '<testcase name="A/unheard_of" classname="Methods/Runs"/>'
                  '<testcase name="B/dora" classname="Cases/LoraGolden"><failure/></testcase>'
                  '<testcase name="C/dora" classname="Cases/LoraGolden"><skipped/></testcase></testsuite></testsuites>')
        counts = MethodCounts()
        counts.add("parity_test", report)
        counts.add("parity_test", report)
        lines = counts.lines()
        self.assertEqual(lines[0].split()[:3], ["method", "parity", "conformance"])
        self.assertIn("2 (2 failed)", next(line for line in lines if line.startswith("dora")))
        self.assertEqual(set(lines[1].split()), {"lora", "-"})
        self.assertEqual(lines[-1].split()[:2], ["other", "2"])


if __name__ == "__main__":
    unittest.main()
