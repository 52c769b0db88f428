#!/usr/bin/env python3
"""Tests of the samples that data/prepare makes: python3 tests/samples_test.py. Templates have the traits of published
ones; the right token ids are those of transformers' apply_chat_template, the right targets stand here as text."""

import copy
import json
import os
import tempfile
import unittest
from datetime import datetime

import data_tools_test as common
from data_tools_test import MERGES, VOCABULARY, Scratch, tool

import h5py
from fingerprint import fingerprint
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

setUpModule = common.setUpModule

LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set turns = messages[1:] %}"
    "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% else %}{% set turns = messages %}{% set first = '' %}{% endif %}"
    "{% for m in turns %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('user and assistant take "
    "turns') }}{% endif %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}")
LLAMA_3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if tools %}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{% endif %}{{ system + '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% if m.tool_calls %}"
    "{{ m.tool_calls[0].function | tojson }}{% else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
QWEN_25 = (
    "{% if messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content }}{% else %}"
    "{{ '<|im_start|>system\nBe of help.' }}{% endif %}{% if tools %}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}{% for m in messages %}{% if m.role == 'user' or (m.role == 'system' and not loop.first) "
    "or (m.role == 'assistant' and not m.tool_calls) %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    "{% for c in m.tool_calls %}{{ '\n<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + "
    "'\n</tool_response><|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
QWEN_3 = (
    "{% set ns = namespace(last=messages | length - 1) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{% if content %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and enable_thinking is "
    "false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.index0 >= turns | length - 2 and (loop.last or "
    "turns[-1].role == 'assistant') else '') + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}")
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}")
SMOLLM_2 = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}{{ '<|im_start|>system\nBe small.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}")
GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + "
    "'<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
HEADERS = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")


def turns(*contents, system=None, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    begin = [{"role": "system", "content": system}] if system else []
    return begin + [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


TWO = turns("two plus two?", "four", "plus one?", "five")
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
CALLING = [*turns("2+2?"), {"role": "assistant", "content": "", "tool_calls": CALL}, {"role": "tool", "content": "4"},
           {"role": "assistant", "content": "four"}]
CALLED = '{"name": "add", "arguments": {"a": 2}}'
THINKING = turns("2?", "<think>\nhm\n</think>\n\nfour", "3?", "<think>\nso\n</think>\n\nfive")

# family -> (marks, bos, eos, template, [(messages, texts of the targets)])
FAMILIES = {
    "llama 2": (("[INST]",), "<s>", "</s>", LLAMA_2, [
        (turns("two?", "four"), [" four </s>"]),
        ([*turns(" two? ", " four", system="be"), *TWO], [" four </s>", " four </s>", " five </s>"])]),
    "llama 3": (HEADERS, "<|begin_of_text|>", "<|eot_id|>", LLAMA_3, [
        (TWO, ["four<|eot_id|>", "five<|eot_id|>"]),
        (turns("two?", " four\n", system="be"), ["four<|eot_id|>"]),
        (CALLING, [CALLED + "<|eot_id|>", "four<|eot_id|>"])]),
    "qwen 2.5": (CHATML, None, "<|im_end|>", QWEN_25, [
        (TWO, ["four<|im_end|>", "five<|im_end|>"]),
        (turns("Hello", "two?", "four", first="assistant"), ["Hello<|im_end|>", "four<|im_end|>"]),
        (CALLING, [f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>", "four<|im_end|>"]),
        ([*turns("a?", "b"), *turns("c", first="assistant")], ["b<|im_end|>", "c<|im_end|>"]),
        ([*turns("a?", "b"), *turns("bye", system="be")], ["b<|im_end|>"])]),
    "qwen 3": (CHATML, None, "<|im_end|>", QWEN_3, [
        (TWO, ["four<|im_end|>", "<think>\n\n</think>\n\nfive<|im_end|>"]),
        (THINKING, ["<think>\nso\n</think>\n\nfive<|im_end|>"]),
        ([*turns("2?"), {"role": "assistant", "reasoning_content": "hm", "content": "four"}],
         ["<think>\nhm\n</think>\n\nfour<|im_end|>"]),
        (CALLING, [f"<tool_call>\n{CALLED}\n</tool_call><|im_end|>", "<think>\n\n</think>\n\nfour<|im_end|>"])]),
    "mistral": (("[INST]", "[/INST]"), "<s>", "</s>", MISTRAL, [
        (TWO, [" four</s>", " five</s>"]),
        (turns("2?", "four", system="be"), [" four</s>"]),
        ([*turns("2?", "four", system="be"), *TWO[2:]], [" five</s>"])]),
    "phi 3": (("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"), None, "<|endoftext|>", PHI_3, [
        (TWO, ["four<|end|>", "five<|end|>\n<|endoftext|>"]),
        (turns("2?", "four", "bye", system="be"), ["four<|end|>"])]),
    "smollm 2": (CHATML, None, "<|im_end|>", SMOLLM_2, [
        (TWO, ["four<|im_end|>", "five<|im_end|>"]),
        (turns("Hello", "two?", "four", first="assistant"), ["Hello<|im_end|>", "four<|im_end|>"])]),
    "r1": (("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>", "<think>", "</think>"), "<|bos|>", "<|eos|>", R1, [
        (TWO, ["four<|eos|>", "five<|eos|>"]), (turns("2?", "four", "3?", system="be"), ["four<|eos|>"])]),
    "generation": (CHATML, None, "<|im_end|>", GENERATION, [(TWO, ["four<|im_end|>", "five<|im_end|>"])]),
}


def byte_level(marks):
    vocabulary = [*VOCABULARY[3:], *marks]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_piece(marks):
    """Letters with a space mark before the text, and bytes for all else: the kind of Llama 2 and Mistral."""
    letters = ["\u2581", *map(chr, range(33, 127)), "\n", "\u2581t", "\u2581f"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, *marks]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(dict.fromkeys(vocabulary))},
                                     merges=[("\u2581", "t"), ("\u2581", "f")], unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return tokenizer


def write_model(folder, tokenizer, marks, template=None, **config):
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 600}))
    return folder


class Samples(Scratch):
    def prepare(self, model, *records, code=0, options=()):
        source, out = self.folder / "in.jsonl", self.folder / "out.h5"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        self.output, self.error = tool("data/prepare", source, "--model", model, "--out", out, *options, code=code,
                                       SOURCE_DATE_EPOCH=str(86400 * 365))
        if code:
            return self.error
        with h5py.File(out) as file:
            ends = file["offsets"][:]
            return [(file["tokens"][a:b].tolist(), file["loss_mask"][a:b].tolist()) for a, b in zip(ends, ends[1:])]

    def targets(self, tokenizer, sample):
        """The text of each run of targets."""
        runs, before = [], 0
        for token, target in zip(*sample):
            if target and not before:
                runs.append([])
            if target:
                runs[-1].append(token)
            before = target
        return [tokenizer.decode(run) for run in runs]


class FamilyTest(Samples):
    def test_whole_conversations(self):
        for name, (marks, bos, eos, template, cases) in FAMILIES.items():
            kind = sentence_piece if bos == "<s>" else byte_level
            model = write_model(self.folder / name.replace(" ", ""), kind(marks), [*marks, *filter(None, (bos, eos))],
                                template, bos_token=bos, eos_token=eos)
            tokenizer = AutoTokenizer.from_pretrained(str(model))
            samples = self.prepare(model, *({"messages": messages} for messages, _ in cases))
            for sample, (messages, targets) in zip(samples, cases):
                with self.subTest(family=name, messages=messages):
                    ids = tokenizer.apply_chat_template(messages, chat_template=template.replace(
                        "strftime_now('%d %b %Y')", "'01 Jan 1971'"))["input_ids"]
                    self.assertEqual(sample[0], ids)
                    self.assertEqual([text.lstrip() for text in self.targets(tokenizer, sample)],
                                     [text.lstrip() for text in targets])

    def test_generation_marks_are_the_masks_of_transformers(self):
        marks, _, eos, _, _ = FAMILIES["generation"]
        cases = [TWO, turns("a", "b\n\n", "c", " \n d"), turns("Hello", "a", "\U0001f600 21", first="assistant")]
        for number, template in enumerate((GENERATION, GENERATION.replace("+ '<|im_end|>' }}{% end", "}}{% end").replace(
                "{{ '\n' }}", "{{ '<|im_end|>\n' }}").replace("assistant\n' }}{% gen", "assistant' }}{% gen"))):
            model = write_model(self.folder / str(number), byte_level(marks), marks, template, eos_token=eos)
            tokenizer = AutoTokenizer.from_pretrained(str(model))
            for sample, messages in zip(self.prepare(model, *({"messages": m} for m in cases)), cases):
                right = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
                self.assertEqual(sample, (right["input_ids"], right["assistant_masks"]))


def chatml(folder, template=GENERATION.replace("{% generation %}", "").replace("{% endgeneration %}", ""), **config):
    return write_model(folder, byte_level(CHATML), CHATML, template, **{"eos_token": "<|im_end|>", **config})


class TemplateTest(Samples):
    def test_a_turn_that_loses_its_thinking_is_no_target_and_alone_is_refused(self):
        marks, bos, eos, template, _ = FAMILIES["r1"]
        model = write_model(self.folder / "model", byte_level(marks), [*marks, bos, eos], template, bos_token=bos,
                            eos_token=eos)
        message = self.prepare(model, {"messages": THINKING}, code=65)
        self.assertIn("none of its answers can be told apart: message 2: the template leaves out or rewrites", message)
        mixed = [*THINKING[:2], {"role": "user", "content": "3?"}, {"role": "assistant", "content": "five"}]
        sample = self.prepare(model, {"messages": mixed})[0]
        self.assertEqual(self.targets(AutoTokenizer.from_pretrained(str(model)), sample), ["five<|eos|>"])
        self.assertIn("answers that are no targets: 1", self.output)

    def test_templates_that_are_rewritten_in_other_ways(self):
        header = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
        asked = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        chat = header.replace("CONTENT", "m.content")
        first = turns("Hi", "a", "b", first="assistant")
        for name, template, messages, targets in (
                ("a count of the messages", "{{ messages | length }}" + chat + asked, TWO, ["four<|im_end|>", "five<|im_end|>"]),
                ("a prompt within the loop", chat.replace("{% endfor", "{% if loop.last and add_generation_prompt %}"
                 "{{ '<|im_start|>assistant\n' }}{% endif %}{% endfor"), first, ["Hi<|im_end|>", "b<|im_end|>"]),
                ("old answers left out", header.replace("CONTENT", "(m.content if loop.last or m.role == 'user' else '')") + asked,
                 TWO, ["five<|im_end|>"]),
                ("no generation prompt", chat, TWO, ["<|im_start|>assistant\nfour<|im_end|>",
                                                     "<|im_start|>assistant\nfive<|im_end|>"]),
                ("other letters", header.replace("CONTENT", "m.content | upper") + asked, TWO, None),
                ("contents repeated", chat + "{% for m in messages %}{{ m.content }}{% endfor %}<|endoftext|>", TWO, None)):
            with self.subTest(template=name):
                model = chatml(self.folder / name, template)
                result = self.prepare(model, {"messages": messages}, code=0 if targets else 65)
                if targets:
                    self.assertEqual(self.targets(AutoTokenizer.from_pretrained(str(model)), result[0]), targets)
                else:
                    self.assertIn("none of its answers can be told apart", result)

    def test_template_options(self):
        model = write_model(self.folder / "model", byte_level(CHATML), CHATML, QWEN_3, eos_token="<|im_end|>")
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        record = {"messages": TWO[:2], "chat_template_kwargs": {"enable_thinking": False}}
        sample = self.prepare(model, record)[0]
        self.assertEqual(sample[0], tokenizer.apply_chat_template(TWO[:2], enable_thinking=False)["input_ids"])
        self.assertEqual(self.targets(tokenizer, sample), ["four<|im_end|>"])
        self.prepare(model, {**record, "chat_template_kwargs": {"messages": []}}, code=65)

    def test_where_templates_stand(self):
        """chat_template.jinja, additional_chat_templates and lists of templates, as transformers takes them."""
        one, two = (f"{{% for m in messages %}}{{{{ '{name}' + m.content + eos_token }}}}{{% endfor %}}" for name in "AB")
        tool = [{"type": "function", "function": {"name": "f"}}]
        model = chatml(self.folder / "model", one)

        def texts():
            tokenizer = AutoTokenizer.from_pretrained(str(model))
            samples = self.prepare(model, {"messages": TWO[:2]}, {"messages": TWO[:2], "tools": tool},
                                   {"messages": TWO[:2], "tools": json.dumps(tool)})
            expected = [tokenizer.apply_chat_template(TWO[:2], tools=tools)["input_ids"] for tools in (None, tool, tool)]
            self.assertEqual([ids for ids, _ in samples], expected)
            return "".join(tokenizer.decode(ids)[0] for ids in expected)

        self.assertEqual(texts(), "AAA")
        (model / "chat_template.jinja").write_text(two)
        self.assertEqual(texts(), "BBB")
        (model / "additional_chat_templates").mkdir()
        (model / "additional_chat_templates" / "tool_use.jinja").write_text(one)
        self.assertEqual(texts(), "BAA")
        named = [{"name": "default", "template": one}, {"name": "tool_use", "template": two}]
        model = chatml(self.folder / "list", named)
        self.assertEqual(texts(), "ABB")
        self.assertIn("multiple chat templates", self.prepare(chatml(self.folder / "none", named[1:]), {"text": "a"}, code=65))

    def test_a_template_that_ends_no_turn_is_warned_of(self):
        model = chatml(self.folder / "model", "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
                                              "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}")
        sample = self.prepare(model, {"messages": TWO})[0]
        self.assertEqual(self.targets(AutoTokenizer.from_pretrained(str(model)), sample), ["four\n", "five\n"])
        self.assertIn("warning: no answer ends with a token at which generation stops", self.error)
        self.prepare(chatml(self.folder / "other"), {"messages": TWO})
        self.assertEqual(self.error, "")

    def test_messages_that_the_template_refuses(self):
        marks, bos, eos, template, _ = FAMILIES["mistral"]
        model = write_model(self.folder / "model", sentence_piece(marks), [*marks, bos, eos], template, bos_token=bos,
                            eos_token=eos)
        for messages in (turns("Hello", "two?", first="assistant"), [*TWO[:2], *TWO[1:2]]):
            self.assertIn("refuses it: TemplateError: roles must alternate",
                          self.prepare(model, {"messages": messages}, code=65))

    def test_templates_that_never_end_or_take_all_memory(self):
        """65 and a message: one loops, one doubles a text without end, one counts up a huge number, one nests deeply."""
        loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
        double = "{% set ns = namespace(t='x' * 1000000) %}{% for i in range(99) %}{% set ns.t = ns.t + ns.t %}{% endfor %}"
        for name, template, reason in (
                ("loop", loop, "did not come to an end within 10 s"), ("double", double, "more than 2 GiB of memory"),
                ("text", "{% for i in range(70) %}{{ 'x' * 1000000 }}{% endfor %}", "more than 67,108,864 characters"),
                ("center", "{{ 'x'.center(20000000000) }}", "more than 2 GiB of memory"),
                ("nested", "{{ " + "(" * 100000 + ")" * 100000 + " }}", "the chat template does not compile"),
                ("escape", "{{ ''.__class__.__mro__ }}", "refuses it: SecurityError"),
                ("words", "{{ raise_exception('\x1b[31m' * 1000000) }}", "refuses it: TemplateError")):
            with self.subTest(template=name):
                message = self.prepare(chatml(self.folder / name, template), {"messages": TWO}, code=65)
                self.assertIn(reason, message)
                self.assertLess(len(message), 2500)
                self.assertNotIn("\x1b", message)


class RecordTest(Samples):
    def setUp(self):
        super().setUp()
        self.model = chatml(self.folder / "model")

    def same(self, *records):
        """All records give one sample."""
        samples = self.prepare(self.model, *records)
        for sample, record in zip(samples, records):
            self.assertEqual(sample, samples[0], record)
        return samples[0]

    def test_other_columns_names_parts_and_sharegpt(self):
        messages = [{"role": "system", "content": "be"}, *TWO]
        speakers = {"system": "system", "user": "human", "assistant": "gpt"}
        self.same({"messages": messages}, {"id": 1, "source": None, "score": [1.5], "messages": messages},
                  {"messages": [{**message, "name": "Ann"} for message in messages]},
                  {"messages": [{**m, "content": [{"type": "text", "text": m["content"][:2]},
                                                  {"type": "text", "text": m["content"][2:]}]} for m in messages]},
                  {"conversations": messages, "text": None}, {"text": "a rendering", "messages": messages},
                  {"conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in messages]})
        for left_out in ("id (1)", "source (1)", "score (1)", "name of messages (1)"):
            if left_out != "source (1)":  # null is absent
                self.assertIn(left_out, self.output)

    def test_lists_of_messages_as_prompt_and_completion(self):
        tokenizer = AutoTokenizer.from_pretrained(str(self.model))
        whole, pair = self.prepare(self.model, {"messages": TWO}, {"prompt": TWO[:3], "completion": TWO[3:]})
        self.assertEqual(pair[0], whole[0])
        self.assertEqual(self.targets(tokenizer, pair), ["five<|im_end|>"])
        self.model = chatml(self.folder / "marked", GENERATION)
        whole, pair = self.prepare(self.model, {"messages": TWO}, {"prompt": TWO[:3], "completion": TWO[3:]})
        self.assertEqual((pair[0], self.targets(tokenizer, pair)), (whole[0], ["five<|im_end|>"]))

    def test_weight_0_is_no_target(self):
        record = {"messages": [TWO[0], {**TWO[1], "weight": 0}, *TWO[2:]]}
        for model in (self.model, chatml(self.folder / "marked", GENERATION)):
            sample = self.prepare(model, record)[0]
            self.assertEqual(self.targets(AutoTokenizer.from_pretrained(str(model)), sample), ["five<|im_end|>"])
        self.assertIn("weight is '0'", self.prepare(self.model, {"messages": [TWO[0], {**TWO[1], "weight": "0"}]}, code=65))

    def test_variables_that_would_render_something_else(self):
        for name in ("continue_final_message", "chat_template", "return_assistant_tokens_mask"):
            with self.subTest(name):
                record = {"messages": TWO, "chat_template_kwargs": {name: True}}
                self.assertIn("chat_template_kwargs is no object, or holds", self.prepare(self.model, record, code=65))

    def test_keys_that_the_template_does_not_read(self):
        thoughtful = [{**m, "reasoning_content": "hm", "tool_calls": None} if m["role"] == "assistant" else m for m in TWO]
        self.same({"messages": TWO}, {"messages": thoughtful}, {"messages": TWO, "tools": [{"name": "f"}]})
        self.assertIn("reasoning_content of messages (1)", self.output)
        self.assertIn("tools (1)", self.output)

    def test_calls_of_functions(self):
        call = {"name": "add", "arguments": {"a": 2}}
        spoken = [{"from": "human", "value": "2+2?"}, {"from": "function_call", "value": json.dumps(call)},
                  {"from": "observation", "value": "4"}, {"from": "gpt", "value": "four"}]
        self.assertIn("tool_calls, which the model's chat template does not read",
                      self.prepare(self.model, {"messages": CALLING}, code=65))
        self.model = chatml(self.folder / "tools", QWEN_25)
        self.same({"messages": CALLING}, {"conversations": spoken})
        empty = [{**m, "content": None} if m.get("tool_calls") else m for m in CALLING]
        without = [{k: v for k, v in m.items() if k != "content"} if m.get("tool_calls") else m for m in CALLING]
        self.same({"messages": CALLING}, {"messages": empty}, {"messages": without})

    def test_refusals(self):
        turn = {"role": "user", "content": "a"}

        def chat(**message):
            return {"messages": [turn, {"role": "assistant", "content": "b", **message}]}

        for record, reason in (
                ({"messages": TWO, "conversations": TWO}, "more than one kind"), ({"question": "a", "answer": "b"}, "no known kind"),
                ({"instruction": "a", "response": "b"}, "known records are"),
                ({"prompt": "a", "response": "b"}, "known records are"),
                ({"messages": {"role": "user"}}, "not a list of objects"), ({"messages": [[turn]]}, "not a list of objects"),
                ({"messages": [turn, {"role": "assistant"}]}, "role and content are needed"),
                (chat(content=[{"type": "image_url", "image_url": "x"}]), "of type 'image_url'"),
                (chat(content=["b"]), "of type 'b'"), (chat(content={"text": "b"}), "content is not a string"),
                (chat(content=None), "content is not a string"), (chat(content=1), "content is not a string"),
                (chat(role=["assistant"]), "the role ['assistant']"), (chat(tool_calls="x"), "tool_calls is not a list"),
                (chat(tool_calls=[{"function": {"name": 1}}]), "tool_calls is not a list"),
                (chat(name="\ud800"), "half a surrogate pair"), ({**chat(), "tools": "nonsense"}, "not a JSON object"),
                ({**chat(), "tools": [1]}, "tools is not a list"), ({"prompt": [turn], "completion": "b"}, "not a string"),
                ({"prompt": [turn], "completion": [1]}, "a message is not an object"),
                ({"conversations": [{"from": "bot", "value": "a"}]}, "from is 'bot'"),
                ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "from is ['gpt']"),
                ({"conversations": [{"from": "function_call", "value": "x"}]}, "not a JSON object"),
                ({"conversations": [{"from": "function_call", "value": "[1]"}]}, "tool_calls is not a list"),
                ({"x\x1b[31m" * 100000: 1}, "its keys are")):
            with self.subTest(record=str(record)[:80]):
                message = self.prepare(self.model, record, code=65)
                self.assertIn(reason, message)
                self.assertLess(len(message), 2500)
                self.assertNotIn("\x1b", message)

    def test_deep_nesting_in_any_column(self):
        deep = json.loads("[" * 400 + "]" * 400)
        self.same({"messages": TWO}, {"messages": TWO, "extra": deep}, {"messages": TWO, "tools": [{"a": deep}]})


class TextTest(Samples):
    """BOS and EOS once, and no boundary where the text has none."""

    def check(self, model, record, tokens, targets):
        sample = self.prepare(model, record)[0]
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        self.assertEqual(tokenizer.convert_ids_to_tokens(sample[0]), tokens, record)
        self.assertEqual("".join(map(str, sample[1])), targets, record)

    def test_bos_and_eos_once(self):
        model = write_model(self.folder / "model", byte_level(("<b>", "<e>")), ("<b>", "<e>"), bos_token="<b>", eos_token="<e>")
        text = json.loads((model / "tokenizer.json").read_text())
        start, end = (text["model"]["vocab"][mark] for mark in ("<b>", "<e>"))
        text["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<b>", "type_id": 0}},
                                  {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
                                  {"Sequence": {"id": "B", "type_id": 1}}], "special_tokens": {
                                      "<b>": {"id": "<b>", "ids": [start], "tokens": ["<b>"]}}}
        (model / "tokenizer.json").write_text(json.dumps(text))
        self.assertNotEqual(start, end)
        for record, tokens, targets in (
                ({"text": "ab"}, "<b> a b <e>", "0111"), ({"text": "<b>ab"}, "<b> a b <e>", "0111"),
                ({"text": "ab<e>"}, "<b> a b <e>", "0111"), ({"text": "<b>ab<e>"}, "<b> a b <e>", "0111"),
                ({"text": "ab<e>\n"}, "<b> a b <e> \u010a", "01110"), ({"text": "a<e>b"}, "<b> a <e> b <e>", "01111"),
                ({"text": " <b>ab"}, "\u0120 <b> a b <e>", "01111"),
                ({"prompt": "<b>a", "completion": "b<e>"}, "<b> a b <e>", "0011"),
                ({"prompt": "<b>", "completion": "b"}, "<b> b <e>", "011"),
                ({"prompt": "", "completion": "b"}, "<b> b <e>", "011"),
                ({"prompt": "a ", "completion": "b"}, "<b> a \u0120 b <e>", "00011"),
                ({"prompt": "a\n", "completion": "\nb"}, "<b> a \u010a \u010a b <e>", "000111"),
                ({"prompt": "a", "completion": " b"}, "<b> a \u0120 b <e>", "00111"),
                ({"prompt": "2", "completion": "1"}, "<b> 21 <e>", "001"),
                ({"prompt": "e", "completion": "\u0301"}, "<b> e \u00cc \u0123 <e>", "00111"),
                ({"prompt": "a", "completion": "\U0001f600"}, "<b> a \u00f0 \u0141 \u013a \u0122 <e>", "0011111")):
            self.check(model, record, tokens.split(" "), targets)

    def test_no_space_between_prompt_and_completion(self):
        marks = ("<s>", "</s>")
        model = write_model(self.folder / "model", sentence_piece(()), marks, bos_token="<s>", eos_token="</s>")
        for record, tokens, targets in (
                ({"prompt": "a:\n", "completion": "f"}, "\u2581 a : \n f </s>", "000011"),
                ({"prompt": "x = [", "completion": "1]"}, "\u2581 x \u2581 = \u2581 [ 1 ] </s>", "000000111"),
                ({"prompt": "a:", "completion": " four"}, "\u2581 a : \u2581f o u r </s>", "00011111"),
                ({"prompt": "a ", "completion": "four"}, "\u2581 a \u2581f o u r </s>", "0001111"),
                ({"prompt": "a", "completion": "\u6f22"}, "\u2581 a <0xE6> <0xBC> <0xA2> </s>", "001111")):
            self.check(model, record, tokens.split(" "), targets)

    def test_instruction_without_a_template(self):
        model = write_model(self.folder / "model", sentence_piece(()), ("<s>", "</s>"), bos_token="<s>", eos_token="</s>")
        sample = self.prepare(model, {"instruction": "a", "output": "four"})[0]
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        self.assertTrue(tokenizer.decode(sample[0]).endswith("### Response:\nfour</s>"))
        self.assertEqual(self.targets(tokenizer, sample), ["four</s>"])


class TokenizerTest(Samples):
    """The tokenizer is what transformers makes of the folder."""

    def unmarked(self, name, **config):
        """A model folder whose tokenizer.json does not hold the chat's marks, and the id that the next token will have."""
        model = write_model(self.folder / name, byte_level(()), (), SMOLLM_2, eos_token="<e>", **config)
        text = json.loads((model / "tokenizer.json").read_text())
        text["added_tokens"] = [{"id": len(text["model"]["vocab"]), "content": "<e>", "single_word": False, "lstrip": False,
                                 "rstrip": False, "normalized": False, "special": True}]
        (model / "tokenizer.json").write_text(json.dumps(text))
        return model, len(text["model"]["vocab"]) + 1

    def check(self, model):
        tokenizer = AutoTokenizer.from_pretrained(str(model))
        sample = self.prepare(model, {"messages": TWO})[0]
        self.assertEqual(sample[0], tokenizer.apply_chat_template(TWO)["input_ids"])
        return tokenizer, sample

    def test_marks_outside_of_tokenizer_json(self):
        marks = ("<|im_start|>", "<|im_end|>")
        added = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
        _, first = self.unmarked("base")
        numbers = {mark: first + i for i, mark in enumerate(marks)}
        decoder = {str(number): {"content": mark, **added} for mark, number in numbers.items()}
        for name, config, files in (
                ("decoder", {"added_tokens_decoder": decoder}, {}), ("extra", {"extra_special_tokens": marks}, {}),
                ("named", {"extra_special_tokens": {"start_token": marks[0], "end_token": marks[1]}}, {}),
                ("additional", {"additional_special_tokens": marks}, {}), ("file", {}, {"added_tokens.json": numbers}),
                ("map", {}, {"special_tokens_map.json": {"additional_special_tokens": marks}})):
            with self.subTest(where=name):
                model, _ = self.unmarked(name, **config)
                for file, content in files.items():
                    (model / file).write_text(json.dumps(content))
                _, (ids, targets) = self.check(model)
                self.assertEqual([ids.count(number) for number in numbers.values()], [5, 5])
                self.assertEqual([target for i, target in zip(ids, targets) if i == numbers[marks[1]]], [0, 0, 1, 0, 1])

    def test_how_added_tokens_are_found(self):
        """lstrip, rstrip, single_word and normalized are the tokenizers library's business."""
        for flags in ({"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"normalized": True}):
            with self.subTest(flags=flags):
                first = self.unmarked("base" + next(iter(flags)))[1]
                decoder = {str(first + i): {"content": mark, "special": True, "normalized": False, "lstrip": False,
                                            "rstrip": False, "single_word": False, **flags}
                           for i, mark in enumerate(("<|im_start|>", "<|im_end|>"))}
                tokenizer, sample = self.check(self.unmarked(next(iter(flags)), added_tokens_decoder=decoder)[0])
                self.assertIn("four", self.targets(tokenizer, sample)[0])

    def test_space_before_text(self):
        for flag, first in ((True, "\u2581"), (False, "a")):
            model = write_model(self.folder / str(flag), sentence_piece(()), ("<s>", "</s>"), SMOLLM_2, bos_token="<s>",
                                eos_token="</s>", tokenizer_class="LlamaTokenizer", add_prefix_space=flag)
            tokenizer, _ = self.check(model)
            self.assertEqual(tokenizer.convert_ids_to_tokens(self.prepare(model, {"text": "ab"})[0][0][0]), first)

    def test_marks_that_the_model_has_never_seen(self):
        model, first = self.unmarked("beyond", additional_special_tokens=["<|im_start|>", "<|im_end|>"], pad_token="<pad>")
        (model / "config.json").write_text(json.dumps({"vocab_size": first}))
        self.prepare(model, {"text": "ab"})  # holds none of them
        message = self.prepare(model, {"messages": TWO}, code=65)
        self.assertIn(f"beyond the model's {first} tokens: the model has never seen it", message)
        model = write_model(self.folder / "eos", byte_level(()), (), SMOLLM_2, eos_token="<|eot|>")
        message = self.prepare(model, {"text": "a"}, code=65)
        self.assertIn("eos_token is '<|eot|>', which no vocabulary of the folder holds", message)
        model = write_model(self.folder / "none", byte_level(()), (), SMOLLM_2)
        self.assertIn("names no usable eos_token", self.prepare(model, {"text": "a"}, code=65))
        self.assertEqual(len(self.prepare(model, {"messages": TWO})), 1)

    def test_a_class_that_loses_text_yields_to_the_file(self):
        """LlamaTokenizerFast over a byte-level vocabulary: the R1 distillates of Llama."""
        marks, bos, eos, template, _ = FAMILIES["r1"]
        model = write_model(self.folder / "model", byte_level(marks), [*marks, bos, eos], template, bos_token=bos,
                            eos_token=eos, tokenizer_class="LlamaTokenizerFast")
        (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 600}))
        sample = self.prepare(model, {"messages": turns("two plus two?", "it is four")})[0]
        plain = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.assertEqual(plain.decode(sample[0], skip_special_tokens=False),
                         "<|bos|><|User|>two plus two?<|Assistant|>it is four<|eos|>")
        self.assertIn("loses text", self.error)

    def test_folders_without_some_files(self):
        model = chatml(self.folder / "model")
        (model / "tokenizer_config.json").unlink()
        self.assertIn("no chat template", self.prepare(model, {"messages": TWO}, code=65))
        (model / "chat_template.jinja").write_text(SMOLLM_2)
        self.check(model)
        (model / "tokenizer.json").unlink()
        (model / "tokenizer.model").write_bytes(b"\x0a\x0e")
        self.assertIn("save_pretrained(DIR) of transformers", self.prepare(model, {"text": "a"}, code=66))
        (model / "config.json").unlink()
        self.assertIn("config.json does not exist", self.prepare(model, {"text": "a"}, code=66))

    def test_code_of_a_model_is_never_run(self):
        model = chatml(self.folder / "model", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.Own"]})
        (model / "own.py").write_text(f"open({str(self.folder / 'ran')!r}, 'w')\n")
        self.assertIn("transformers cannot load the tokenizer", self.prepare(model, {"text": "a"}, code=65))
        self.assertFalse((self.folder / "ran").exists())

    def test_nested_and_large_files(self):
        for name, content, reason in (("tokenizer.json", "[" * 300000, "cannot be read as JSON"),
                                      ("tokenizer_config.json", '{"a":' * 300000, "cannot be read as JSON"),
                                      ("added_tokens.json", " " * (17 << 20), "at most 16 MiB"),
                                      ("special_tokens_map.json", '{"bos_token": {"\\u001b[31m": 1}}', "control characters"),
                                      ("chat_template.jinja", " " * (17 << 20), "at most 16 MiB")):
            with self.subTest(file=name):
                model = chatml(self.folder / name)
                (model / name).write_text(content)
                self.assertIn(reason, self.prepare(model, {"text": "a"}, code=65))
        model = chatml(self.folder / "huge")
        with open(model / "tokenizer.json", "wb") as file:
            file.truncate(200 << 20)
        self.assertIn("at most 128 MiB", self.prepare(model, {"text": "a"}, code=65))

    def test_a_pattern_that_backtracks_without_end(self):
        model = chatml(self.folder / "model")
        text = json.loads((model / "tokenizer.json").read_text())
        text["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
        (model / "tokenizer.json").write_text(json.dumps(text))
        self.assertIn("transformers cannot use the tokenizer", self.prepare(model, {"text": "a" * 3000 + "b"}, code=65))

    def test_every_field_with_every_kind_of_value(self):
        """0, 65 or 66, soon, and a message that a terminal can show: never a trace."""
        deep = json.loads("[" * 300 + "]" * 300)
        values = (None, [], {}, "", "\x1b[31m" * 50000, -1, 10**30, 1.5, [1], {"a": 1}, {"content": 5}, deep)
        fields = {"tokenizer_config.json": (
            "bos_token", "eos_token", "pad_token", "additional_special_tokens", "extra_special_tokens",
            "added_tokens_decoder", "chat_template", "tokenizer_class", "add_prefix_space", "model_max_length",
            "clean_up_tokenization_spaces", "padding_side", "split_special_tokens", "auto_map", "model_input_names"),
            "generation_config.json": ("eos_token_id",), "config.json": ("vocab_size", "model_type", "eos_token_id"),
            "special_tokens_map.json": ("eos_token",), "added_tokens.json": ("<x>",)}
        model = chatml(self.folder / "model")
        for file, names in fields.items():
            whole = (model / file).read_text() if (model / file).exists() else "{}"
            for name in names:
                for value in values:
                    (model / file).write_text(json.dumps({**json.loads(whole), name: value}))
                    code, output = load_and_use(model)
                    with self.subTest(file=file, name=name, value=str(value)[:40]):
                        self.assertIn(code, (0, 65, 66), output)
                        self.assertLess(len(output), 3000)
                        self.assertNotIn("\x1b", output)
            (model / file).write_text(whole)


def load_and_use(model):
    """How a process ends that does with the tokenizer what prepare does, and what it prints."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            common.in_child(lambda: use(model), output, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        return code, output.read().decode()


def use(model):
    from templates import TemplateRefusal
    from tokenizer import ModelTokenizer

    tokenizer = ModelTokenizer(model, datetime(2020, 1, 1))
    tokenizer.encode_plain("ab<|im_end|>")
    tokenizer.fingerprints()
    try:
        if tokenizer.templates:
            tokenizer.conversation(TWO, {}, 0)
    except TemplateRefusal:
        raise SystemExit(65) from None


class FingerprintTest(unittest.TestCase):
    TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
                 "added_tokens": [{"id": 3, "content": "<s>"}]}

    def test_literals(self):
        self.assertEqual(fingerprint(self.TOKENIZER), "91ad71f3c2edf682b0f21074fb05a057b39276fc72b77c111f505749a7fae0f7")
        unigram = {"model": {"type": "Unigram", "vocab": [["a", -1.5], ["\u2581b", 0.0]]},
                   "added_tokens": [{"id": 0, "content": "a"}, {"id": 7, "content": "<s>"}]}
        self.assertEqual(fingerprint(unigram), "0d4ac38b3d72d705a79c9093ae8fc0604fd8a404eaa3cdead9baf38c0add69d4")

    def test_what_counts(self):
        same = copy.deepcopy(self.TOKENIZER)
        same["model"]["merges"] = [["a", "b"]]
        same["model"]["vocab"] = {"ab": 2, "b": 1, "a": 0, "<s>": 3}
        same["normalizer"] = {"type": "NFC"}
        self.assertEqual(fingerprint(same), fingerprint(self.TOKENIZER))
        for change in ({"vocab": {"a": 1, "b": 0, "ab": 2}}, {"merges": []}, {"merges": ["b a"]}):
            other = {**self.TOKENIZER, "model": {**self.TOKENIZER["model"], **change}}
            self.assertNotEqual(fingerprint(other), fingerprint(self.TOKENIZER), change)
        self.assertNotEqual(fingerprint({**self.TOKENIZER, "added_tokens": []}), fingerprint(self.TOKENIZER))


class AttributesTest(Samples):
    def test_both_fingerprints_stand_in_the_file(self):
        model = chatml(self.folder / "model", additional_special_tokens=["<new>"])
        self.prepare(model, {"messages": TWO})
        with h5py.File(self.folder / "out.h5") as file:
            attributes = dict(file.attrs)
        on_disk = json.loads((model / "tokenizer.json").read_text())
        self.assertEqual(attributes["tokenizer_content"], "sha256:" + fingerprint(on_disk))
        AutoTokenizer.from_pretrained(str(model)).save_pretrained(str(self.folder / "saved"))
        saved = json.loads((self.folder / "saved" / "tokenizer.json").read_text())
        self.assertEqual(attributes["tokenizer_loaded"], "sha256:" + fingerprint(saved))
        self.assertNotEqual(attributes["tokenizer_loaded"], attributes["tokenizer_content"])


if __name__ == "__main__":
    unittest.main()
