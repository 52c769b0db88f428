#!/usr/bin/env python3
"""Makes the reference values of tests/golden with the real transformers and PEFT (CPU, fp32).

    make_golden.py --out DIR [--only CASE] [--smollm2 MODEL_DIR]

One thread and fixed seeds: the same packages on the same kind of CPU give the same bytes.
The package versions are written to DIR/VERSIONS.json.

Model cases, each a folder: llama, llama_tied_llama3rope, llama_biased_headdim, smollm2.
  model/                  Hugging Face folder (not stored for smollm2)
  adapter/                PEFT folder as PEFT saves it, before training (not stored for smollm2)
  batch.json              "samples", "micro_batches", "adapter" (what LoraConfig got), "training"
                          (how the *_20 or *_5 series were made) and, for llama_biased_headdim,
                          "full_training"
  reference.safetensors   logits.<sample> F32 [T, V]; loss, grad_norm F64 [1];
                          grad.<file name>, after_1.<file name> F32;
                          losses_20, learning_rates_20, grad_norms_20 F64 [20]
  full.safetensors        llama_biased_headdim only: full.grad.<Hugging Face name> F32, full.loss,
                          full.grad_norm F64 [1], full.losses_20, full.learning_rates_20,
                          full.grad_norms_20 F64 [20]
loss = sum of the token losses over all targets of all samples / number of targets, in double from
the fp32 logits. Every sample runs alone, with positions from 0. after_1 is one AdamW step at
lr 1e-3, weight decay 0.01, without clipping, from the stored adapter. grad_norm and grad_norms_*
are norms before clipping.

smollm2: tensor number n, 0-based, in the byte order of the adapter's file names
(base_model.model.model.layers.0.mlp.down_proj.lora_A.weight is 0; layers.10 comes before
layers.2), has at flat row-major index i the value
    (((i * 7919 + n * 104729) mod 2003) - 1001) * c,  c = 2^-15 for lora_A, 2^-14 for lora_B
which is exact in fp32. reference.safetensors holds logits_last.<sample> F32 [V], loss, grad_norm
(over all adapter tensors), losses_5, learning_rates_5, grad_norms_5; gradients.safetensors holds
grad.<file name> of layers 0 and 29. VERSIONS.json has the SHA-256 of the model it was made with:
over its tensors in byte order of their names, each name followed by its fp32 little-endian bytes.

single_layer.safetensors: x [33, 80], W [96, 80], A, B, g F32; y, dA, dB, dx in float64 rounded to
F32; loss = sum(g * y) F64, for s = 2 (alpha 16, r 8); the same with prefix "rslora." for
s = 16 / sqrt(8); scaling.alpha, scaling.r, scaling.lora, scaling.rslora F64: PEFT's numbers.

peft_targets.json: which modules of the llama case PEFT adapts, with r, alpha and scaling, or the
class name of PEFT's exception. "saved" is what a reader of the adapter_config.json gets, where that
differs: PEFT sorts the keys of the patterns when it saves, and the first match wins.

python_patterns.json: names of modules, and of each pattern which of them re.fullmatch and PEFT's
rule for keys of patterns find; null where Python refuses the expression.

rope_inverse_frequencies.json: transformers' fp32 values for shapes of published models.
"""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import re
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy
import peft
import safetensors
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

# With rope_theta 100 each of llama3's three ranges holds at least one of the four frequencies; with
# 500000 and a head size of 8 none falls between the two bounds.
CASES = {
    "llama": {
        "seed": 1,
        "model": dict(
            hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=172,
            vocab_size=130, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        ),
        "lora": dict(r=8, lora_alpha=16, target_modules=LINEARS),
        "lengths": [5, 24, 9, 13, 7, 18, 11, 21, 6, 15, 8, 12],
    },
    "llama_tied_llama3rope": {
        "seed": 2,
        "model": dict(
            hidden_size=48, num_attention_heads=6, num_key_value_heads=2, intermediate_size=100,
            vocab_size=101, tie_word_embeddings=True, rms_norm_eps=1e-5,
            rope_parameters={**LLAMA3_ROPE, "rope_theta": 100.0},
        ),
        "lora": dict(
            r=4, lora_alpha=8, use_rslora=True,
            rank_pattern={"q_proj": 2, "layers.1.mlp.down_proj": 6}, alpha_pattern={"v_proj": 7},
            target_modules=r".*\.(q|k|v|o|up|down)_proj",
        ),
        "lengths": [60, 5, 33, 13, 47, 18, 11, 28, 6, 52, 8, 24],
    },
    "llama_biased_headdim": {
        "seed": 3,
        "model": dict(
            hidden_size=64, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
            intermediate_size=84, vocab_size=97, attention_bias=True, mlp_bias=True,
            rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        ),
        "lora": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "lengths": [10, 22, 5, 16, 24, 7, 12, 19, 9, 6, 14, 8],
    },
}

MICRO_BATCHES = [[0, 1], [2], [3, 4, 5], [6], [7, 8], [9, 10, 11]]
LOGITS_OF = [0, 1, 11]

TRAINING = {
    "steps": 20, "learning_rate": 1e-3, "lr_scheduler_type": "cosine", "warmup_steps": 3,
    "max_steps": 20, "weight_decay": 0.01, "max_grad_norm": 1.0,
    "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8,
}
FULL_TRAINING = {
    **TRAINING, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0,
    "weight_decay": 0.0, "max_grad_norm": None,
}
SMOLLM2_TRAINING = {
    **TRAINING, "steps": 5, "learning_rate": 2e-4, "warmup_steps": 1, "max_steps": 5,
}


# Models, adapters, batches

def fill_model(model, generator):
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            noise = torch.randn(value.shape, generator=generator) * 0.1
            value.copy_(1 + noise if "norm" in name else noise)


def write_config_as_transformers_4(path):
    """Published folders have rope_theta and rope_scaling, and many no head_dim."""
    config = json.loads(path.read_text())
    del config["head_dim"]
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    write_json(path, dict(sorted(config.items())))


def save_model(case, folder, generator):
    config = transformers.LlamaConfig(
        **case["model"], num_hidden_layers=2, max_position_embeddings=64, dtype="float32")
    model = transformers.LlamaForCausalLM(config)
    fill_model(model, generator)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if config.tie_word_embeddings:
        write_config_as_transformers_4(folder / "config.json")


def load_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")


def file_name(name):
    name = name.replace(".default", "").replace(".modules_to_save", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def trainable(model):
    return {file_name(n): p for n, p in sorted(model.named_parameters()) if p.requires_grad}


def fill_adapter(model, generator):
    with torch.no_grad():
        for name, value in trainable(model).items():
            if "lora_A" in name:
                bound = 1 / math.sqrt(value.shape[1])
                value.copy_((2 * torch.rand(value.shape, generator=generator) - 1) * bound)
            else:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.02)


def save_adapter(model, folder, base_name):
    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # a set has no fixed order
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def make_mask(length, index):
    """A prompt of its own length, then targets, in every third sample with a gap among them."""
    prompt = 1 + (index * 5) % (length - 1)
    mask = [int(t >= prompt) for t in range(length)]
    if index % 3 == 2 and length - prompt > 3:
        mask[prompt + 1] = 0
    return mask


def make_samples(lengths, vocab_size, generator):
    samples = []
    for index, length in enumerate(lengths):
        tokens = torch.randint(0, vocab_size, (length,), generator=generator).tolist()
        samples.append({"tokens": tokens, "loss_mask": make_mask(length, index)})
    return samples


# Loss, gradients, steps

def run_sample(model, sample):
    return model(input_ids=torch.tensor([sample["tokens"]]), use_cache=False).logits[0]


def sum_of_token_losses(model, sample):
    """In double: torch's fp32 log-softmax on CPU is off by 1e-5 a token at 49152 entries."""
    targets = torch.tensor(sample["loss_mask"]).nonzero()[:, 0]
    tokens = torch.tensor(sample["tokens"])
    logits = run_sample(model, sample).double()
    return torch.nn.functional.cross_entropy(logits[targets - 1], tokens[targets], reduction="sum")


def loss_and_gradients(model, samples):
    model.zero_grad()
    targets = sum(sum(sample["loss_mask"]) for sample in samples)
    total = 0.0
    for sample in samples:
        loss = sum_of_token_losses(model, sample)
        (loss / targets).backward()
        total += loss.item()
    return total / targets


def gradients(model):
    return {name: p.grad.clone() for name, p in trainable(model).items()}


def gradient_norm(model, limit=None):
    limit = math.inf if limit is None else limit
    return torch.nn.utils.clip_grad_norm_(list(trainable(model).values()), limit).item()


def make_optimizer(model, training):
    return torch.optim.AdamW(
        trainable(model).values(), lr=training["learning_rate"],
        betas=(training["adam_beta1"], training["adam_beta2"]), eps=training["adam_epsilon"],
        weight_decay=training["weight_decay"])


def make_schedule(optimizer, training):
    if training["lr_scheduler_type"] == "constant":
        return transformers.get_constant_schedule(optimizer)
    return transformers.get_cosine_schedule_with_warmup(
        optimizer, training["warmup_steps"], training["max_steps"])


def train(model, samples, training, make=make_optimizer):
    optimizer = make(model, training)
    schedule = make_schedule(optimizer, training)
    losses, rates, norms = [], [], []
    for _ in range(training["steps"]):
        losses.append(loss_and_gradients(model, samples))
        norms.append(gradient_norm(model, training["max_grad_norm"]))
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    n = training["steps"]
    return {f"losses_{n}": doubles(losses), f"learning_rates_{n}": doubles(rates),
            f"grad_norms_{n}": doubles(norms)}


def one_step(model, samples, make=make_optimizer):
    model = copy.deepcopy(model)
    loss_and_gradients(model, samples)
    make(model, TRAINING).step()
    return {name: p.detach() for name, p in trainable(model).items()}


# Files

def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def prefixed(prefix, tensors):
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def write_rows(path, rows):
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", "ascii")


def write_batch(path, batch):
    """One sample a line."""
    samples = ",\n".join("  " + json.dumps(sample) for sample in batch["samples"])
    rest = [f' {json.dumps(k)}: {json.dumps(v)}' for k, v in batch.items() if k != "samples"]
    rest = ",\n".join(rest)
    path.write_text(f'{{\n "samples": [\n{samples}\n ],\n{rest}\n}}\n', "ascii")


def write_tensors(path, tensors):
    tensors = {name: value.detach().contiguous().clone() for name, value in tensors.items()}
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


# Cases

def adapter_reference(model, samples, logits_of=LOGITS_OF, make=make_optimizer):
    out = {f"logits.{i}": run_sample(model, samples[i]) for i in logits_of}
    out["loss"] = doubles([loss_and_gradients(model, samples)])
    out["grad_norm"] = doubles([gradient_norm(model)])
    out |= prefixed("grad", gradients(model))
    out |= prefixed("after_1", one_step(model, samples, make))
    return out | train(model, samples, TRAINING, make)


def full_reference(model, samples):
    out = {"loss": doubles([loss_and_gradients(model, samples)])}
    out["grad_norm"] = doubles([gradient_norm(model)])
    out |= prefixed("grad", gradients(model))
    return prefixed("full", out | train(model, samples, FULL_TRAINING))


def make_llama_case(name, out):
    case, folder = CASES[name], out / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(case["seed"])
    save_model(case, folder / "model", generator)
    model = get_peft_model(load_model(folder / "model"), lora_config(**case["lora"]))
    fill_adapter(model, generator)
    save_adapter(model, folder / "adapter", f"corank-golden/{name}")
    samples = make_samples(case["lengths"], case["model"]["vocab_size"], generator)
    batch = {"samples": samples, "micro_batches": MICRO_BATCHES, "adapter": case["lora"],
             "training": TRAINING}
    if name == "llama_biased_headdim":
        batch["full_training"] = FULL_TRAINING
        write_tensors(folder / "full.safetensors",
                      full_reference(load_model(folder / "model"), samples))
    write_batch(folder / "batch.json", batch)
    write_tensors(folder / "reference.safetensors", adapter_reference(model, samples))


# SmolLM2

SMOLLM2_LORA = dict(r=8, lora_alpha=16, target_modules="all-linear")
SMOLLM2_SAMPLES = [
    {"tokens": [504, 3575, 282, 4649, 314, 7042, 30], "loss_mask": [0, 1, 1, 1, 1, 1, 1]},
    {"tokens": [12615, 36411, 418, 216, 33, 32, 32, 5027, 20590, 418, 3426, 1106, 30],
     "loss_mask": [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1]},
    {"tokens": [1604, 803, 24, 81, 28, 278, 727, 472, 1003, 253, 1232, 278, 198],
     "loss_mask": [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]},
    {"tokens": [2705, 28, 827, 28, 1296, 28, 1876, 28, 2531, 28, 2976, 28, 4962, 30],
     "loss_mask": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1]},
]


def closed_formula(shape, number, c):
    i = torch.arange(math.prod(shape), dtype=torch.int64)
    value = ((i * 7919 + number * 104729) % 2003 - 1001).to(torch.float64) * c
    return value.to(torch.float32).reshape(shape)


def fill_adapter_by_formula(model):
    with torch.no_grad():
        for number, (name, value) in enumerate(trainable(model).items()):
            c = 2.0 ** (-15 if "lora_A" in name else -14)
            value.copy_(closed_formula(value.shape, number, c))


def weights_digest(model):
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(value.detach().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def make_smollm2(out, model_dir):
    base = load_model(model_dir)
    digest = weights_digest(base)
    model = get_peft_model(base, lora_config(**SMOLLM2_LORA))
    fill_adapter_by_formula(model)
    samples = SMOLLM2_SAMPLES
    reference = {f"logits_last.{i}": run_sample(model, samples[i])[-1] for i in (0, 3)}
    reference["loss"] = doubles([loss_and_gradients(model, samples)])
    reference["grad_norm"] = doubles([gradient_norm(model)])
    kept = {n: g for n, g in gradients(model).items() if ".layers.0." in n or ".layers.29." in n}
    reference |= train(model, samples, SMOLLM2_TRAINING)
    folder = out / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    write_batch(folder / "batch.json", {
        "samples": samples, "micro_batches": [[0], [1, 2], [3]], "adapter": SMOLLM2_LORA,
        "training": SMOLLM2_TRAINING})
    write_tensors(folder / "reference.safetensors", reference)
    write_tensors(folder / "gradients.safetensors", prefixed("grad", kept))
    return digest


# One layer

def layer_reference(x, w, a, b, g, s):
    x, w, a, b, g = (t.double() for t in (x, w, a, b, g))
    u, du = x @ a.T, s * (g @ b)
    y = x @ w.T + s * (u @ b.T)
    out = {"y": y, "dA": du.T @ x, "dB": s * (g.T @ u), "dx": g @ w + du @ a}
    out = {name: value.float() for name, value in out.items()}
    return out | {"loss": (g * y).sum().reshape(1)}


def peft_scaling(alpha, r, rslora):
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    config = LoraConfig(target_modules=["0"], r=r, lora_alpha=alpha, use_rslora=rslora)
    return get_peft_model(layer, config).base_model.model[0].scaling["default"]


def scaling_table():
    alphas, ranks = (16, 7, 0.5, 16 * math.sqrt(2)), (1, 2, 3, 6, 8, 64, 256)
    pairs = list(itertools.product(alphas, ranks))
    return {
        "scaling.alpha": doubles([alpha for alpha, _ in pairs]),
        "scaling.r": doubles([r for _, r in pairs]),
        "scaling.lora": doubles([peft_scaling(*pair, False) for pair in pairs]),
        "scaling.rslora": doubles([peft_scaling(*pair, True) for pair in pairs]),
    }


def make_single_layer(out):
    generator = torch.Generator().manual_seed(4)
    shapes = {"x": (33, 80), "W": (96, 80), "A": (8, 80), "B": (96, 8), "g": (33, 96)}
    given = {n: torch.randn(shape, generator=generator) * 0.5 for n, shape in shapes.items()}
    plain = layer_reference(*given.values(), 2.0)
    rslora = layer_reference(*given.values(), 16 / math.sqrt(8))
    write_tensors(out / "single_layer.safetensors",
                  given | plain | prefixed("rslora", rslora) | scaling_table())


# Targets

FULL_NAME = "model.layers.0.self_attn.q_proj"
SETTINGS = {
    "suffix list": dict(target_modules=["q_proj", "v_proj"]),
    "longer suffix": dict(target_modules=["self_attn.o_proj", "0.mlp.up_proj"]),
    "suffix must start at a dot": dict(target_modules=["proj", "_proj", "k_proj"]),
    "some suffixes match nothing": dict(target_modules=["q_proj", "nonsense"]),
    "full names": dict(target_modules=[FULL_NAME, "model.layers.1.mlp.down_proj"]),
    "entries of a list are no regex": dict(target_modules=["q_proj", ".*v_proj"]),
    "regex": dict(target_modules=r"model\.layers\.\d+\.self_attn\.(q|k)_proj"),
    "regex must match the whole name": dict(target_modules=r"q_proj|.*\.mlp\.gate_proj"),
    "regex of one layer": dict(target_modules=r".*\.1\..*_proj"),
    "regex with lookahead": dict(target_modules=r"(?!.*layers\.0).*self_attn\..*_proj"),
    "all-linear": dict(target_modules="all-linear"),
    "all-linear in capitals": dict(target_modules="ALL-LINEAR"),
    "all-linear in a list": dict(target_modules=["all-linear"]),
    "all-linear without some": dict(
        target_modules="all-linear", exclude_modules=["k_proj", "mlp.up_proj"]),
    "all-linear of one layer": dict(target_modules="all-linear", layers_to_transform=[1]),
    "none given": dict(target_modules=None),
    "the head": dict(target_modules=["q_proj", "lm_head"]),
    "exclude by suffix": dict(
        target_modules=LINEARS, exclude_modules=["q_proj", "0.mlp.down_proj"]),
    "exclude by full name": dict(target_modules=["q_proj"], exclude_modules=[FULL_NAME]),
    "exclude by regex": dict(target_modules=LINEARS, exclude_modules=r".*\.layers\.0\..*"),
    "exclude regex must match the whole name": dict(
        target_modules=["q_proj"], exclude_modules=r"layers\.0"),
    "exclude that matches nothing": dict(target_modules=["q_proj"], exclude_modules=["nonsense"]),
    "modules_to_save is never adapted": dict(
        target_modules=["q_proj", "lm_head"], modules_to_save=["lm_head"]),
    "layers_to_transform number": dict(target_modules=["q_proj"], layers_to_transform=1),
    "layers_to_transform zero": dict(target_modules=["q_proj"], layers_to_transform=0),
    "layers_to_transform list": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[0]),
    "layers_to_transform empty": dict(target_modules=["q_proj"], layers_to_transform=[]),
    "layers_to_transform partly absent": dict(
        target_modules=["q_proj"], layers_to_transform=[1, 7]),
    "full name passes layers_to_transform": dict(
        target_modules=[FULL_NAME, "v_proj"], layers_to_transform=[1]),
    "layers_pattern": dict(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["layers"]),
    "rank_pattern": dict(target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 4}),
    "rank_pattern is a regex": dict(
        target_modules=["q_proj", "v_proj"], rank_pattern={r"layers\.1\..*": 3}),
    "rank_pattern must reach the end": dict(
        target_modules=["q_proj"], rank_pattern={"self_attn": 4}),
    "rank_pattern must start at a dot": dict(target_modules=["q_proj"], rank_pattern={"_proj": 4}),
    "rank_pattern with alternatives": dict(
        target_modules=LINEARS, rank_pattern={"q_proj|mlp.down_proj": 5}),
    "rank_pattern with caret": dict(
        target_modules=["q_proj"], rank_pattern={"^model.layers.1.self_attn.q_proj": 4}),
    "alpha_pattern": dict(target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 7}),
    "alpha_pattern fraction": dict(target_modules=["q_proj"], alpha_pattern={"q_proj": 7.5}),
    "both patterns, rslora": dict(
        target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 7, "0.self_attn.q_proj": 3}, use_rslora=True),
    "two matching keys, short first": dict(
        target_modules=["q_proj"], rank_pattern={"q_proj": 2, "layers.0.self_attn.q_proj": 5}),
    "two matching keys, long first": dict(
        target_modules=["q_proj"], rank_pattern={"layers.0.self_attn.q_proj": 5, "q_proj": 2}),
    "two matching alphas": dict(
        target_modules=["v_proj"], alpha_pattern={"v_proj": 3, "1.self_attn.v_proj": 9}),
    "pattern of an untargeted module": dict(target_modules=["q_proj"], rank_pattern={"k_proj": 2}),
    "rslora": dict(target_modules=["o_proj"], use_rslora=True),
    "odd rank": dict(target_modules=["o_proj"], r=3, lora_alpha=10),
    "rslora, odd rank": dict(target_modules=["o_proj"], r=3, lora_alpha=10, use_rslora=True),
    "nothing matched, list": dict(target_modules=["nonsense"]),
    "nothing matched, regex": dict(target_modules="q_proj"),
    "nothing matched, empty list": dict(target_modules=[]),
    "nothing matched, absent layer": dict(target_modules=["q_proj"], layers_to_transform=[7]),
    "everything excluded": dict(target_modules=["q_proj"], exclude_modules=["q_proj"]),
    "not a linear": dict(target_modules=["q_proj", "input_layernorm"]),
    "a whole block": dict(target_modules=["mlp"]),
    "regex with layers_to_transform": dict(target_modules=".*q_proj", layers_to_transform=[0]),
    "regex with layers_pattern": dict(target_modules=".*q_proj", layers_pattern="layers"),
    "layers_pattern alone": dict(target_modules=["q_proj"], layers_pattern=["layers"]),
    "regex, ignoring case": dict(target_modules=r"(?i).*\.Q_PROJ"),
    "regex with lookbehind": dict(target_modules=r".*(?<=self_attn\.)[qv]_proj"),
    "regex with a named group": dict(target_modules=r".*\.(?P<n>[0-9])\.mlp\.(up|down)_proj(?(n)|x)"),
    "regex with a reference": dict(target_modules=r"model\.(?P<n>l)ayers\.0\.m(?P=n)p\.\w+_proj"),
    "regex with Python's end": dict(target_modules=r"\A.*_attn\..*proj\Z"),
    "regex that is not greedy": dict(target_modules=r".*?\.0\..*?proj"),
    "regex, fixed start of layers": dict(target_modules=r"^model\.layers\.[0-0]\..*proj"),
    "regex, counted": dict(target_modules=r"(\w+\.){3,4}[a-z]{1,5}_proj"),
    "regex with PCRE's syntax": dict(target_modules=r".*(?<n>q)_proj"),
    "regex with a bad end": dict(target_modules=r".*q_proj\z"),
    "exclude regex, ignoring case": dict(target_modules=LINEARS, exclude_modules=r"(?i).*\.MLP\..*"),
    "rank_pattern with lookbehind": dict(target_modules=LINEARS, rank_pattern={r"(?<=self_attn\.)\w+": 3}),
    "rank_pattern, ignoring case inside": dict(target_modules=LINEARS, rank_pattern={r"(?i:Q_PROJ)": 3}),
    "rank_pattern, ignoring case": dict(target_modules=LINEARS, rank_pattern={r"(?i)Q_PROJ": 3}),
    "rank_pattern with Python's end": dict(target_modules=LINEARS, rank_pattern={r"q_proj\Z": 3}),
    "rank_pattern, parentheses closed": dict(target_modules=LINEARS, rank_pattern={"q_proj)|(.*k_proj": 3}),
    "rank_pattern of the first layers": dict(target_modules=LINEARS, rank_pattern={r"^model\.layers\.[0]\..*": 3}),
    "layers_pattern is a regex": dict(
        target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=[r"l\w+s"]),
    "layers_pattern, the first that matches": dict(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["blocks", "(?i:LAYERS)"]),
    "layers_pattern with alternatives": dict(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h|layers"]),
    "layers_pattern of no layer": dict(
        target_modules=["q_proj"], layers_to_transform=[1], layers_pattern=["h"]),
    "rank zero": dict(target_modules=["q_proj"], r=0),
    "rank negative": dict(target_modules=["q_proj"], r=-1),
    "rank_pattern zero": dict(target_modules=["q_proj"], rank_pattern={"q_proj": 0}),
    "unknown init": dict(target_modules=["q_proj"], init_lora_weights="nonsense"),
    "unknown task": dict(target_modules=["q_proj"], task_type="NONSENSE"),
    "unknown bias": dict(target_modules=["q_proj"], bias="nonsense"),
}


def lora_config(**fields):
    fields = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"} | copy.deepcopy(fields)
    return LoraConfig(**fields)


def adapted_modules(model):
    out = []
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and "default" in layer.r:
            out.append({"name": name, "r": layer.r["default"], "alpha": layer.lora_alpha["default"],
                        "scaling": layer.scaling["default"]})
    return sorted(out, key=lambda module: module["name"])


def report(base, config):
    try:
        return {"modules": adapted_modules(get_peft_model(copy.deepcopy(base), config()))}
    except Exception as error:
        return {"error": type(error).__name__}


def reread(fields):
    with tempfile.TemporaryDirectory() as folder:
        lora_config(**fields).save_pretrained(folder)
        config = LoraConfig.from_pretrained(folder)
    config.inference_mode = False
    return config


def describe(base, title, fields):
    out = {"title": title, "config": {"r": 8, "lora_alpha": 16} | fields}
    out |= report(base, lambda: lora_config(**fields))
    saved = report(base, lambda: reread(fields))
    if saved != {key: out[key] for key in saved if key in out}:
        out["saved"] = saved
    return out


def make_peft_targets(out):
    config = transformers.LlamaConfig(**CASES["llama"]["model"], num_hidden_layers=2)
    base = transformers.LlamaForCausalLM(config)
    rows = [describe(base, *item) for item in SETTINGS.items()]
    write_rows(out / "peft_targets.json", rows)


# Python's regular expressions

PATTERN_NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.10.mlp.down_proj",
    "model.layers.3.mlp.gate_proj", "transformer.h.0.attn.c_attn", "lm_head"]
PATTERNS = [
    r".*q_proj", r"(?i).*Q_PROJ", r"(?i:.*Q_)proj", r".*(?=q_proj).*", r".*(?<=self_attn\.)[qv]_proj",
    r"(?P<a>.*)\.(?P<b>q)_proj", r".*(?P<x>l)ayers\.(?P=x)?.*", r".*proj\Z", r"\Amodel.*", r".*?proj",
    r".*layers\.\d+\.mlp.*", r".*\d{1,2}.*", r".*\d{,2}\..*", r".*[0-9]{2}.*", r"^model\.layers\.[0-3]\..*", r".*$",
    r".*\z", r"model\.layers\.(1[0-9]|2[0-9])\..*", r"(?>.*)q_proj", r".*+", r".*\v", r"[\w.]+", r"[[:alpha:]]+",
    r"[]a-z._0-9]+", r"[^]]+", r"(?a).*\w", r"(?u).*", r"(?L).*", r"(?s).*", r"(?m)^.*$", r"a(?i).*",
    r"(.)(.).*\2\1.*", r".*(l)\1.*", r".*\x6c.*", r".*\u006c.*", r".*\154ayers.*", r".*\0", r".*\8", r"\1(.*)",
    r"(\1.*)", r"(?(1)a|.*)", r"(m)?(?(1)odel|trans).*", r"(?P<n>m)?(?(n)odel|trans).*", r"(?<n>.*)", r"(?|a|b)",
    r"(?R)", r"(?1)(.*)", r"(?&n)", r"(*ACCEPT).*", r"(?C).*", r"\Qmodel\E.*", r"\p{L}.*", r"\R", r"\K.*", r"\h",
    r"\N", r"\Gmodel.*", r".*(?#comment)proj", r".*proj(?#", r"{,}", r"m{,}odel.*", r"m{}odel.*", r"m{a}.*",
    r"m{1}o{1,1}d{0,1}.*", r"m{1, 2}odel", r"m{2,1}", r"*", r"+a", r"(", r")", r"a)(b", r"[", r"[a", 'a\\\\', r"",
    r"|", r"q_proj|.*v_proj", r".*(q_proj|v_proj)", r"(?:.*\.)?q_proj", r".*[\d].*", r".*[\-_].*", r".*[\b].*",
    r"\bmodel\b.*", r".*\B_proj", r"(?!transformer).*", r".*(?<!self_attn)\.[a-z]+_proj", r"(?i-s:MODEL).*",
    r"(?-i:model).*", r"(?i)(?s)MODEL.*", r"(?i)MODEL(?-i:.*)", r"m{0}odel.*", r"(?:m{1,}o)+.*",
    r"model\.layers\.[0-9]+\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj|v_proj)))",
    r".*\_proj", r".*\ü?.*", r"[a-z\]_.0-9]+", r"[\1]", r"[\12]", r"\400", r"\777", r".*\.\d*\..*?_(?:proj|attn)",
    r"q_proj", r"layers\.[01]\.self_attn\.q_proj", r"^model\.layers\.0.*", r"self_attn.*", r"_proj", r"a)|(.*q_proj",
    r"layers.(0|1).*", r"(?i)q_proj", r"[^.]*", r"down_proj|mlp.down_proj", r"(?:q|v)_proj$", r"(?<=attn\.)q_proj",
    r"[\1-\5a-z._]+", r"(?i)MODEL\.LAYERS\.\d+\.[A-Z_]+\.[QV]_PROJ", r".*\Bproj", r"(?:model|transformer)(?:\.\w+)*",
    r"(?P<a>\w)(?P<b>\w)(?P=b)?.*", r"(?P<a>.)(?P<a>.)", r"(?P<1a>.)", r"(?P=a)", r".*{2}", r"x**", r"\w{3,1}", r"(?",
    r"(?P", r"(?P<a", r"(?i", r"(?:", r"a(?=", r"[z-a]", r"\x6", r"\u00", r"\U0000006dodel.*",
    r"m\odel",]


def matches(match, pattern):
    try:
        return [bool(match(pattern, name)) for name in PATTERN_NAMES]
    except re.error:
        return None


def make_patterns(out):
    """What re.fullmatch and PEFT's rule for keys find in PATTERN_NAMES; null: not a regular expression."""
    rows = [{"pattern": pattern, "names": matches(re.fullmatch, pattern),
             "keys": matches(lambda key, name: re.match(rf"(.*\.)?({key})$", name), pattern)}
            for pattern in PATTERNS]
    write_rows(out / "python_patterns.json", [{"modules": PATTERN_NAMES}, *rows])


# Rotary frequencies

def rope_llama3(factor, theta=500000.0, original=8192):
    return {**LLAMA3_ROPE, "factor": factor, "original_max_position_embeddings": original,
            "rope_theta": theta}


ROPES = {
    "llama2-7b": (128, {"rope_type": "default", "rope_theta": 10000.0}),
    "llama3.1-8b": (128, rope_llama3(8.0)),
    "llama3.2-1b": (64, rope_llama3(32.0)),
    "smollm2-135m": (64, {"rope_type": "default", "rope_theta": 100000.0}),
    "llama_tied_llama3rope": (8, rope_llama3(8.0, 100.0, 32)),
    "linear": (64, {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
}


def inverse_frequencies(head_dim, rope):
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim,
        rope_parameters=dict(rope), max_position_embeddings=131072)
    return LlamaRotaryEmbedding(config).inv_freq.tolist()


def make_ropes(out):
    rows = [{"title": title, "head_dim": head_dim, "rope_parameters": rope,
             "inverse_frequencies": inverse_frequencies(head_dim, rope)}
            for title, (head_dim, rope) in ROPES.items()]
    write_rows(out / "rope_inverse_frequencies.json", rows)


def write_versions(out, digest):
    path = out / "VERSIONS.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    modules = [numpy, peft, safetensors, torch, transformers]
    versions = {module.__name__: module.__version__ for module in modules}
    digest = digest or old.get("smollm2_weights_sha256")
    write_json(path, versions | ({"smollm2_weights_sha256": digest} if digest else {}))


def main():
    others = {"single_layer": make_single_layer, "peft_targets": make_peft_targets,
              "patterns": make_patterns, "rope": make_ropes}
    names = [*CASES, *others, "smollm2"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=names)
    parser.add_argument("--smollm2", type=Path, metavar="MODEL_DIR")
    options = parser.parse_args()
    if options.only == "smollm2" and not options.smollm2:
        parser.error("--only smollm2 needs --smollm2 MODEL_DIR")

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    digest = None
    for name in [options.only] if options.only else names:
        if name in CASES:
            make_llama_case(name, options.out)
        elif name in others:
            others[name](options.out)
        elif options.smollm2:
            digest = make_smollm2(options.out, options.smollm2)
    write_versions(options.out, digest)
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves 0600


if __name__ == "__main__":
    main()
