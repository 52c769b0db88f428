#!/usr/bin/env python3
"""Makes the reference values of tests/golden/methods: every method but plain LoRA.

    make_methods.py --out DIR [--only CASE] [--mora CHECKOUT]

DIR is tests/golden/methods. Model and samples are those of ../llama: this script reads
llama/model and llama/batch.json beside itself. One thread and fixed seeds, as make_golden.py; the
package versions are written to DIR/VERSIONS.json.

Whole models, each a folder: dora, rslora, modules_to_save, loraplus, adalora, pissa.
  adapter/                PEFT folder, all values non-trivial (B, E not 0, magnitudes off the norms)
  reference.safetensors   logits.0, logits.11 F32 [T, V]; loss, grad_norm F64 [1];
                          grad.<file name>, after_1.<file name> F32;
                          losses_20, learning_rates_20, grad_norms_20 F64 [20]
Loss, steps and "training" as in ../llama/batch.json; see make_golden.py.

rslora: r 4, lora_alpha 8, rank_pattern {"down_proj": 6}. modules_to_save: r 4 on all linears and
modules_to_save ["lm_head", "model.norm"], whose tensors are in the folder as
base_model.model.lm_head.weight and base_model.model.model.norm.weight, moved off the base.

loraplus: r 4; after_1 and the *_20 series are steps of the optimizer that PEFT's
create_loraplus_optimizer makes, with loraplus_lr_ratio 16 and loraplus_weight_decay 0.01, all else
as in "training"; learning_rates_20 are those of group A, learning_rates_B_20 those of group B.
loraplus_groups.json: what create_loraplus_optimizer(lr=2e-4, loraplus_lr_ratio=16,
loraplus_weight_decay=0.1, loraplus_lr_embedding=5e-6) makes of several adapters: a list of
{"title", "base": folder of tests/golden, "adapter": what LoraConfig (AdaLoraConfig where it has
init_r) got, "groups": {group: {"lr", "weight_decay", "parameters": [file names, sorted]}}}. Biases
of the base that train have the names they have in PEFT files.

adalora: init_r 6, target_r 3, total_step 20, tinit 3, tfinal 5, deltaT 2, lora_alpha 16. A step is
PEFT's: backward of task loss + regulariser, clip, optimizer.step, schedule.step,
update_and_allocate(step) with step from 1, zero_grad. reference.safetensors holds moreover
  regulariser             F64 [1]: orth_reg_weight * mean of the Frobenius norms, at the adapter
  grad.*, grad_norm       of the task loss alone
  grad_regularised.*, grad_norm_regularised   of task loss + regulariser; after_1 is with these
  losses_20, reg_20       F64 [20] task loss alone, and the regulariser alone, before each step
  grad_norms_20           of both together, before clipping
  final.logits.0, .11     after step 20
adapter_final/ is the folder that PEFT saves after step 20. schedule.json has
  "modules"               names without prefix, in PEFT's order
  "init_budget", "target_budget"
  "steps"                 one a step: "budget", "masked" (whether PEFT masked anew in this step),
                          "kept": for each module a string of init_r characters, 1 where E != 0
                          after update_and_allocate, "margin": only where masked: (score of the
                          worst kept triplet - threshold) / threshold
  "rank_pattern"          of the configuration after step 20

pissa: init_lora_weights "pissa", r 4, lora_alpha 8 (so A and B carry 1/sqrt(2)).
  adapter_init/           A_0, B_0, saved as PEFT's guide says, with init_lora_weights true: on top
                          of the residual base
  adapter/                A, B moved from there; init_lora_weights "pissa": PEFT repeats the SVD of
                          the original base when it loads this. reference.safetensors is of this
  adapter_lora/           adapter/ as PEFT converts it to LoRA on the original base, r 8
                          (save_pretrained with path_initial_model_for_weight_conversion)
reference.safetensors as for dora, and "lora.logits.0", "lora.logits.11" of adapter_lora/.
init.safetensors: of the base of llama, for modules layers.0.self_attn.q_proj,
layers.1.self_attn.k_proj, layers.0.mlp.down_proj:
  singular_values.<module>     F32 [min(d, k)], torch.linalg.svd
  product.<module>             F32 [d, k]: s B_0 A_0
  residual.<module>            F32 [d, k]: the base that PEFT leaves
  bf16.residual.<module>       BF16: the same from the base rounded to bf16 before
  bf16.product.<module>        F32: s B_0 A_0 with the bf16-rounded factors that PEFT then trains;
                               not of down_proj
Factors are never to be compared entry by entry: signs are free.
"pissa_niter_4" with s = 1 on W = U diag(q^i) V^T, twice: "slow." W [96, 80], q = 0.8, r 8; "fast."
W [48, 40], q = 0.3, r 4. What random start was drawn shows in the slow case (another draw gives
another angle), and hardly in the fast one. Each has
  W F32; singular_values F64: exact, of the stored W; found F64 [r]: those of PEFT's B A
  sine_left, sine_right F64 [20]: sine of the largest angle between PEFT's column (row) space and
                          the exact leading one, for torch seeds 0 to 19; "found" is of seed 0
  left, right F32         exact leading singular vectors [d, r], [k, r] for measuring one's own
  optimum F64 [1], error F64 [20]   norm of W minus its best rank-r approximation; of the residuals

allocator_0.json, allocator_1.json: PEFT's allocator alone over 50 steps, for two settings: "config"
and what adalora/schedule.json has. Modules 0, 1, 2 have (in, out) features
(20, 28), (32, 12), (16, 40), rank 6. Before update_and_allocate(t) every tensor and its gradient
are set by the formula of make_golden.py's smollm2 case (closed_formula(shape, number, c)):
  p     number 1001 + 20 t + n, c = 2^-10     n = 3 * module + {lora_A: 0, lora_B: 1, lora_E: 2}
  grad  number 50000 + 20 t + n, c = 2^-12    A [6, in], B [out, 6], E [6, 1], flat row-major
E keeps no memory of the mask, being set anew; steps that mask nothing have no "kept".

single_layers.safetensors, single_layers.json (the scalars): one layer with bias, in PEFT, by
  x [17, 40], W [48, 40], b [48], g [17, 48], A [6, 40], B [48, 6], m [48], E [6, 1], mask [17, 40]
All F32. loss = sum(g * y); d<name> are its gradients. "lora.", "dora.", "adalora." are computed by
PEFT's layers in double and rounded to F32:
  lora.y, .dA, .dB, .dx       scaling alpha / r; lora_dropout.* with dropout: x * mask / (1 - p)
  dora.y, .dA, .dB, .dm, .dx  with magnitude m; dora.n [48]: norms; dora_dropout.*: with dropout
  adalora.y, .dA, .dB, .dE, .dx; adalora.regulariser F64 [1] (times orth_reg_weight, over A and B
                              of this one layer), .regulariser.dA, .regulariser.dB
  initial.m F32               magnitude that PEFT starts with: B = 0, fp32 W
  initial.m_bf16 F32          the same for W in bf16 (rounded to bf16, stored as float)
  initial.m_nonzero, initial.m_nonzero_bf16   where A and B start as given here (PEFT rounds
                              them to bf16 with a bf16 base)
bf16.lora.*, bf16.dora.*, bf16.dora_dropout.*, bf16.adalora.*: PEFT as it runs with a bf16 base: x,
W, b, g rounded to bf16, adapter F32; y and dx BF16, the other gradients F32.
merged.lora, merged.dora, merged.adalora [48, 40]: weights after PEFT's merge, fp32 throughout;
unmerged.*: after unmerge; bf16.merged.*, bf16.unmerged.* BF16: the same with a bf16 base;
bf16.safe_merged.*: with safe_merge.

mora.safetensors: the layer of the authors' fork of PEFT (github.com/kongds/MoRA, commit de5df312),
run from CHECKOUT; without --mora the case is left out. Parameters are in double, so only the
rotation tables of type 6 are fp32. All tensors F32. For (k, d) of (64, 64), (80, 96), (96, 40),
(40, 96), (64, 176), with shape = "<k>x<d>":
  <shape>.x [4, k], <shape>.g [4, d], <shape>.M [R, R] with R of r = 8
and for mora_type t of 1, 2, 3, 4, 6 and r of 2, 8, with R = the fork's size of M:
  <shape>.type<t>.r<r>.y [4, d], .dM [R, R], .dx [4, k]   the adapter's part alone (W = 0), with
                          the leading R x R block of M; loss = sum(g * y)
  <shape>.type<t>.r8.delta [d, k]   what the fork's merge adds to the weight, for 96x40 and 40x96;
                          for all others it was only checked here that delta x = y
mora.json: R by shape and r, for types 1 to 4 ("sharing") and 6 ("rotation").

nf4.safetensors: 4-bit NormalFloat and double quantization, by formulas in numpy (float32, every
operation rounded); nf4.json says for each result whether bitsandbytes on this CPU gives the same
bits (all it does, but for codes of absmax next to a midpoint, which its CPU code rounds roughly).
  map F32 [16], thresholds F32 [15], dynamic_map F32 [256], dynamic_thresholds F32 [255]
and for "normal" [96, 80], "heavy" [64, 64], "odd" [7, 13], "zeros" [3, 128] with a block of zeros
and "big" [256, 160], three nested blocks:
  <name>.values           F32 [d, k]; those of "big" are closed_formula([256, 160], 7, 2^-14) of
                          make_golden.py, times 1 + row % 7
  <name>.packed           U8 [(n + 1) / 2], element 2i in the high nibble; after an odd count 7; the
                          codes of a block of zeros are 7
  <name>.absmax           F32 [n / 64, rounded up]
  <name>.offset           F32 [1]: torch's float32 mean of absmax
  <name>.nested_codes     U8, .nested_absmax F32 [blocks / 256, rounded up]
  <name>.restored_absmax  F32: dynamic_map[code] * nested_absmax + offset
  <name>.dequantised, .dequantised_bf16   F32, BF16 [d, k]: with restored_absmax; not .dequantised
                          of "big"
  <name>.single_dequantised   F32: with absmax itself, without double quantization; not of "big"

int8.safetensors: one scale per row, for "normal", "heavy", "odd" of nf4.safetensors, and
zeros.values F32 [3, 128]; <name>.scale F32 [d]: absmax / 127, or 1 where the row is zero;
<name>.codes I8 [d, k]: W / scale, rounded half to even.

llama_nf4/model: the model of llama as bitsandbytes quantises and saves it (nf4, double_quant, the
seven linears of a layer; fp32 otherwise). llama_nf4/reference.safetensors: logits.0, logits.11 of
the forward pass in fp32 with weights dequantised by the formulas; dequantised.model.<module>.weight
F32 for the three modules of pissa/init.safetensors; differing.<weight> I64: at which blocks the
folder's codes of absmax are not those of the formulas (all 4-bit codes are).

combine: PEFT's add_weighted_adapter on adapters of the model of llama. The adapters (first, second,
third, rslora_first, rslora_second) and the results are PEFT folders; cases.json has for each result
"adapters", "weights", "combination_type", "svd_rank" (null: not given) and "scaling" by adapted
module as PEFT then has it. products.safetensors: <result>.<module> F32 [d, k], s B A of the result,
for layers.0.self_attn.q_proj, which all adapt, and layers.1.self_attn.v_proj, which second doesn't.
Of an svd result compare products only: signs are free.
linear_rslora: both are rsLoRA, and PEFT keeps the flag with alpha = r, so that the result's scaling
is sqrt(r), not 1; its folder and its product are PEFT's, with that scaling.

merged.safetensors: <case>.<module>.weight F32, as PEFT's merge_and_unload leaves them, of the
adapters and modules in MERGED below (made before this case); bf16.<case>.<module>.weight BF16: the
same on the base rounded to bf16.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import math
import tempfile
import types
import warnings
from functools import partial
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import make_golden as golden
import numpy
import peft
import safetensors
import torch
import transformers
from make_golden import doubles, prefixed, trainable, write_json, write_rows, write_tensors
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora import LoraLayer

HERE = Path(__file__).resolve().parent
LOGITS_OF = [0, 11]
NAME = "corank-golden/llama"


def llama():
    return golden.load_model(HERE / "llama" / "model")


def llama_samples():
    return json.loads((HERE / "llama" / "batch.json").read_text())["samples"]


def adapted(**fields):
    return get_peft_model(llama(), golden.lora_config(**fields))


def normal(generator, shape, scale):
    return torch.randn(shape, generator=generator) * scale


def fill(model, generator):
    """LoRA factors as in make_golden.py; what has trained values already is perturbed."""
    with torch.no_grad():
        for name, value in trainable(model).items():
            if ".lora_A." in name:
                bound = value.shape[1] ** -0.5
                value.copy_((2 * torch.rand(value.shape, generator=generator) - 1) * bound)
            elif ".lora_B." in name:
                value.copy_(normal(generator, value.shape, 0.02))
            elif name.endswith("lora_magnitude_vector"):
                value.mul_(1 + normal(generator, value.shape, 0.1))
            else:
                value.add_(normal(generator, value.shape, 0.02))


def save(model, folder):
    """As PEFT saves it; the names that the reference files use must be those of the folder."""
    golden.save_adapter(model, folder, NAME)
    path = folder / "adapter_model.safetensors"
    path.chmod(0o644)
    return safetensors.torch.load_file(path)


def save_whole(model, folder):
    stored = save(model, folder)
    assert stored.keys() == trainable(model).keys(), stored.keys() ^ trainable(model).keys()


def logits(model, samples, prefix=""):
    with torch.no_grad():
        return {f"{prefix}logits.{i}": golden.run_sample(model, samples[i]) for i in LOGITS_OF}


def check_reload(model, folder, samples):
    again = PeftModel.from_pretrained(llama(), folder)
    for name, value in logits(model, samples).items():
        torch.testing.assert_close(logits(again, samples)[name], value, rtol=1e-5, atol=1e-5)


# Whole models

def make_whole(folder, seed, make=golden.make_optimizer, **fields):
    model, samples = adapted(**fields), llama_samples()
    fill(model, torch.Generator().manual_seed(seed))
    save_whole(model, folder / "adapter")
    check_reload(model, folder / "adapter", samples)
    write_tensors(folder / "reference.safetensors",
                  golden.adapter_reference(model, samples, LOGITS_OF, make))


def make_dora(out):
    make_whole(out / "dora", 101, r=4, lora_alpha=8, target_modules=golden.LINEARS, use_dora=True)


def make_rslora(out):
    make_whole(out / "rslora", 107, r=4, lora_alpha=8, target_modules=golden.LINEARS,
               use_rslora=True, rank_pattern={"down_proj": 6})


def make_modules_to_save(out):
    make_whole(out / "modules_to_save", 108, r=4, lora_alpha=8, target_modules=golden.LINEARS,
               modules_to_save=["lm_head", "model.norm"])


# LoRA+

def loraplus_training(model, training):
    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=training["learning_rate"], loraplus_lr_ratio=16,
        loraplus_weight_decay=training["weight_decay"], eps=training["adam_epsilon"],
        betas=(training["adam_beta1"], training["adam_beta2"]))


def make_loraplus(out):
    make_whole(out / "loraplus", 109, loraplus_training, r=4, lora_alpha=8,
               target_modules=golden.LINEARS)
    path = out / "loraplus" / "reference.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["learning_rates_B_20"] = tensors["learning_rates_20"] * 16
    write_tensors(path, tensors)
    write_rows(out / "loraplus_groups.json",
               [{"title": title, "base": base, "adapter": fields,
                 "groups": loraplus_groups(base, fields)}
                for title, (base, fields) in LORAPLUS_ADAPTERS.items()])


SOME = ["q_proj", "down_proj"]
LORAPLUS_ADAPTERS = {
    "lora": ("llama", dict(r=4, target_modules=SOME)),
    "dora": ("llama", dict(r=4, target_modules=SOME, use_dora=True)),
    "head and norms saved": ("llama", dict(
        r=4, target_modules=SOME, modules_to_save=["lm_head", "model.norm", "input_layernorm"])),
    "embedding adapted": ("llama", dict(r=4, target_modules=[*SOME, "embed_tokens"])),
    "embedding adapted, dora": ("llama", dict(
        r=4, target_modules=[*SOME, "embed_tokens"], use_dora=True)),
    "embedding saved": ("llama", dict(
        r=4, target_modules=SOME, modules_to_save=["embed_tokens"])),
    "all biases": ("llama_biased_headdim", dict(
        r=4, target_modules=["q_proj", "v_proj"], bias="all")),
    "biases of the adapted": ("llama_biased_headdim", dict(
        r=4, target_modules=["q_proj", "v_proj"], bias="lora_only")),
    "bias of B": ("llama", dict(r=4, target_modules=SOME, lora_bias=True)),
    "adalora": ("llama", dict(init_r=4, total_step=10, target_modules=SOME)),
}
LORAPLUS_GROUPS = ["A", "embedding", "B", "B without decay"]


def loraplus_groups(base, fields):
    config = golden.lora_config(**fields) if "r" in fields else AdaLoraConfig(**fields)
    model = get_peft_model(golden.load_model(HERE / base / "model"), config)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1,
        loraplus_lr_embedding=5e-6)
    names = {id(value): name for name, value in trainable(model).items()}
    return {group: {"lr": of["lr"], "weight_decay": of["weight_decay"],
                    "parameters": sorted(names[id(value)] for value in of["params"])}
            for group, of in zip(LORAPLUS_GROUPS, optimizer.param_groups) if of["params"]}


# AdaLoRA

ADALORA = dict(init_r=6, target_r=3, tinit=3, tfinal=5, deltaT=2, total_step=20, lora_alpha=16,
               task_type="CAUSAL_LM")


def fill_adalora(model, generator):
    scales = {"lora_A": 0.125, "lora_B": 0.15, "lora_E": 0.5}
    with torch.no_grad():
        for name, value in trainable(model).items():
            value.copy_(normal(generator, value.shape, scales[name.rsplit(".", 1)[-1]]))


@contextlib.contextmanager
def no_task_loss(adalora):
    """PEFT adds its regulariser to whatever loss the model inside returns."""
    inner, loss = adalora.model, torch.zeros((), dtype=next(adalora.parameters()).dtype)
    inner.forward = lambda: types.SimpleNamespace(loss=loss)
    yield
    del inner.forward


def regulariser(model):
    with no_task_loss(model.base_model):
        return model.base_model.forward().loss


def regularised_gradients(model, samples):
    task = golden.loss_and_gradients(model, samples)
    value = regulariser(model)
    value.backward()
    return task, value.item()


def adalora_after_1(model, samples):
    model = copy.deepcopy(model)
    regularised_gradients(model, samples)
    golden.make_optimizer(model, golden.TRAINING).step()
    return {name: p.detach() for name, p in trainable(model).items()}


def short(name):
    return name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0]


def triplet_scores(allocator, parameters):
    """PEFT's, by (module, tensor) names of the parameters: E plus the means over A and over B."""
    score = {name: allocator._element_score(name) for name, _ in parameters}
    total = []
    for name in score:
        if "lora_E" in name:
            a, b = (score[name.replace("lora_E", other)] for other in ("lora_A", "lora_B"))
            total.append(score[name].view(-1) + a.mean(1) + b.mean(0))
    return torch.cat(total)


class Watch:
    """Notes whether PEFT masks anew, and how near the decision was."""

    def __init__(self, model):
        self.tuner = model.base_model
        self.allocator = self.tuner.rankallocator
        self.mask, self.margin = self.allocator.mask_to_budget, None
        self.allocator.mask_to_budget = self.masked

    def masked(self, model, budget):
        lora = [(n, p) for n, p in model.named_parameters() if "lora_" in n and "ranknum" not in n]
        scores = triplet_scores(self.allocator, lora).sort().values
        cut = self.allocator.init_bgt - budget
        self.margin = ((scores[cut] - scores[cut - 1]) / scores[cut - 1]).item()
        return self.mask(model, budget)

    def step(self, step):
        self.margin = None
        self.tuner.update_and_allocate(step)
        row = {"step": step, "budget": self.allocator.budget_schedule(step)[0],
               "masked": self.margin is not None, "kept": self.kept()}
        return row if self.margin is None else row | {"margin": float(f"{self.margin:.3g}")}

    def kept(self):
        return ["".join(str(int(e != 0)) for e in value.detach().view(-1))
                for name, value in sorted(self.tuner.model.named_parameters()) if "lora_E" in name]

    def summary(self, rows, rank_pattern):
        names = sorted(n for n, _ in self.tuner.model.named_parameters() if "lora_E" in n)
        return {"modules": [short(n) for n in names], "init_budget": self.allocator.init_bgt,
                "target_budget": self.allocator.target_bgt, "steps": rows,
                "rank_pattern": {golden.file_name(k): v for k, v in sorted(rank_pattern.items())}}


def write_schedule(path, schedule):
    """One step and one module of the rank pattern a line."""
    steps = ",\n".join("  " + json.dumps(row) for row in schedule["steps"])
    pattern = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}"
                         for k, v in schedule["rank_pattern"].items())
    rest = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in schedule.items()
            if k not in ("steps", "rank_pattern")]
    rest = "".join(line + ",\n" for line in rest)
    steps, pattern = f"[\n{steps}\n ]", f"{{\n{pattern}\n }}"
    path.write_text(f'{{\n{rest} "steps": {steps},\n "rank_pattern": {pattern}\n}}\n', "ascii")


def train_adalora(model, samples, training):
    optimizer = golden.make_optimizer(model, training)
    schedule = golden.make_schedule(optimizer, training)
    watch, rows, table = Watch(model), [], []
    for step in range(1, training["steps"] + 1):
        losses = regularised_gradients(model, samples)
        norm = golden.gradient_norm(model, training["max_grad_norm"])
        table.append((*losses, schedule.get_last_lr()[0], norm))
        optimizer.step()
        schedule.step()
        rows.append(watch.step(step))
    columns = zip(("losses_20", "reg_20", "learning_rates_20", "grad_norms_20"), zip(*table))
    config = model.peft_config["default"]
    return {name: doubles(column) for name, column in columns}, watch.summary(
        rows, config.rank_pattern)


def adalora_reference(model, samples):
    out = logits(model, samples)
    out["loss"] = doubles([golden.loss_and_gradients(model, samples)])
    out["grad_norm"] = doubles([golden.gradient_norm(model)])
    out |= prefixed("grad", golden.gradients(model))
    out["regulariser"] = doubles([regularised_gradients(model, samples)[1]])
    out["grad_norm_regularised"] = doubles([golden.gradient_norm(model)])
    out |= prefixed("grad_regularised", golden.gradients(model))
    return out | prefixed("after_1", adalora_after_1(model, samples))


def make_adalora(out):
    folder = out / "adalora"
    generator = torch.Generator().manual_seed(102)
    config = AdaLoraConfig(target_modules=golden.LINEARS, **ADALORA)
    model = get_peft_model(llama(), config)
    fill_adalora(model, generator)
    samples = llama_samples()
    save_whole(model, folder / "adapter")
    check_reload(model, folder / "adapter", samples)
    reference = adalora_reference(model, samples)
    series, schedule = train_adalora(model, samples, golden.TRAINING)
    reference |= series | logits(model, samples, "final.")
    save(model, folder / "adapter_final")
    check_reload(model, folder / "adapter_final", samples)
    write_tensors(folder / "reference.safetensors", reference)
    write_schedule(folder / "schedule.json", schedule)


# PiSSA

PISSA = dict(r=4, lora_alpha=8, target_modules=golden.LINEARS)
PISSA_MODULES = ["layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj", "layers.0.mlp.down_proj"]


def module_of(model, name):
    return model.base_model.model.model.get_submodule(name)


def pissa_tensors(model, prefix):
    out = {}
    for name in PISSA_MODULES:
        layer = module_of(model, name)
        out[f"{prefix}product.{name}"] = layer.get_delta_weight("default")
        out[f"{prefix}residual.{name}"] = layer.base_layer.weight
    return out


def pissa_init(model):
    base = llama().model
    out = {f"singular_values.{n}": torch.linalg.svdvals(base.get_submodule(n).weight)
           for n in PISSA_MODULES}
    out |= pissa_tensors(model, "")
    low = llama().bfloat16()
    low = get_peft_model(low, golden.lora_config(**PISSA, init_lora_weights="pissa"))
    out |= pissa_tensors(low, "bf16.")
    del out[f"bf16.product.{PISSA_MODULES[-1]}"]  # large
    return out


def convert(model, initial, folder):
    """PEFT writes a configuration into the folder of the initial adapter, so it gets a copy."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "initial"
        path.mkdir()
        for file in initial.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        model.save_pretrained(folder, save_embedding_layers=False,
                              path_initial_model_for_weight_conversion=str(path))
    (folder / "README.md").unlink(missing_ok=True)


def move(model, generator):
    """By a tenth of each factor's size: what training may do."""
    with torch.no_grad():
        for value in trainable(model).values():
            value.add_(normal(generator, value.shape, 0.1 * value.std().item()))


def make_pissa(out):
    folder, samples = out / "pissa", llama_samples()
    model = adapted(**PISSA, init_lora_weights="pissa")
    config = model.peft_config["default"]
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "init.safetensors", pissa_init(model) | pissa_niters())
    config.init_lora_weights = True
    save_whole(model, folder / "adapter_init")
    config.init_lora_weights = "pissa"
    move(model, torch.Generator().manual_seed(104))
    save_whole(model, folder / "adapter")
    check_reload(model, folder / "adapter", samples)
    convert(model, folder / "adapter_init", folder / "adapter_lora")
    check_reload(model, folder / "adapter_lora", samples)
    converted = PeftModel.from_pretrained(llama(), folder / "adapter_lora")
    reference = logits(converted, samples, "lora.")
    write_tensors(folder / "reference.safetensors",
                  reference | golden.adapter_reference(model, samples, LOGITS_OF))


def sine(found, exact):
    """Of the largest angle between the spaces that the columns span."""
    q = torch.linalg.qr(found.double()).Q
    return torch.linalg.matrix_norm(q - exact @ (exact.T @ q), 2)


def decaying(generator, d, k, q):
    u = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.double)).Q
    v = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.double)).Q
    return (u @ torch.diag(q ** torch.arange(k, dtype=torch.double)) @ v.T).float()


def niter_factors(w, r, seed):
    base = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False))
    base[0].weight.data = w.clone()
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["0"], r=r, lora_alpha=r, init_lora_weights="pissa_niter_4")
    layer = get_peft_model(base, config).base_model.model[0]
    return [part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B)]


def pissa_niter(w, r):
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    u, v = u[:, :r], vh[:r].T
    factors = [niter_factors(w, r, seed) for seed in range(20)]
    a, b = factors[0]
    return {
        "W": w, "singular_values": s, "found": torch.linalg.svdvals(b @ a)[:r],
        "left": u.float(), "right": v.float(), "optimum": s[r:].norm().reshape(1),
        "sine_left": torch.stack([sine(b, u) for a, b in factors]),
        "sine_right": torch.stack([sine(a.T, v) for a, b in factors]),
        "error": torch.stack([(w.double() - b @ a).norm() for a, b in factors])}


def pissa_niters():
    generator = torch.Generator().manual_seed(105)
    slow, fast = decaying(generator, 96, 80, 0.8), decaying(generator, 48, 40, 0.3)
    return prefixed("slow", pissa_niter(slow, 8)) | prefixed("fast", pissa_niter(fast, 4))


# AdaLoRA's allocator

ALLOCATOR_SHAPES = [(20, 28), (32, 12), (16, 40)]
ALLOCATOR_CONFIGS = [
    dict(init_r=6, target_r=2, total_step=50, tinit=5, tfinal=8, deltaT=3, beta1=0.85, beta2=0.85),
    dict(init_r=6, target_r=1, total_step=50, tinit=0, tfinal=0, deltaT=1, beta1=0.9, beta2=0.6),
]


def set_by_formula(model, step):
    with torch.no_grad():
        for name, value in trainable(model).items():
            module, tensor = name.removeprefix("base_model.model.").split(".")
            n = 20 * step + 3 * int(module) + ["lora_A", "lora_B", "lora_E"].index(tensor)
            value.copy_(golden.closed_formula(value.shape, 1001 + n, 2.0 ** -10))
            value.grad = golden.closed_formula(value.shape, 50000 + n, 2.0 ** -12)


def allocator_trace(config):
    layers = torch.nn.Sequential(*(torch.nn.Linear(*shape) for shape in ALLOCATOR_SHAPES))
    model = get_peft_model(layers, AdaLoraConfig(target_modules=["0", "1", "2"], **config))
    watch, rows = Watch(model), []
    for step in range(1, config["total_step"] + 1):
        set_by_formula(model, step)
        row = watch.step(step)
        if "0" not in "".join(row["kept"]):
            del row["kept"]
        rows.append(row)
    pattern = model.peft_config["default"].rank_pattern
    return {"config": config} | watch.summary(rows, pattern)


def make_allocator(out):
    for number, config in enumerate(ALLOCATOR_CONFIGS):
        write_schedule(out / f"allocator_{number}.json", allocator_trace(config))


# One layer

LAYER = {"k": 40, "d": 48, "r": 6, "alpha": 9, "p": 0.25, "adalora_alpha": 16,
         "orth_reg_weight": 0.5}


class Masked(torch.nn.Module):
    """Stands for dropout with a given mask."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * (self.mask / (1 - LAYER["p"])).to(x.dtype)


def layer_given():
    generator = torch.Generator().manual_seed(103)
    k, d, r = (LAYER[n] for n in "kdr")
    shapes = {"x": (17, k), "W": (d, k), "b": (d,), "g": (17, d), "A": (r, k), "B": (d, r)}
    given = {n: normal(generator, shape, 0.5) for n, shape in shapes.items()}
    n = torch.linalg.norm(given["W"] + LAYER["alpha"] / r * given["B"] @ given["A"], dim=1)
    given["m"] = n * (1 + normal(generator, (d,), 0.1))
    given["E"] = normal(generator, (r, 1), 0.5)
    given["mask"] = (torch.rand(17, k, generator=generator) >= LAYER["p"]).float()
    return given


def layer_config(method):
    if method == "adalora":
        return AdaLoraConfig(target_modules=["0"], init_r=LAYER["r"], total_step=10,
                             lora_alpha=LAYER["adalora_alpha"],
                             orth_reg_weight=LAYER["orth_reg_weight"])
    return LoraConfig(target_modules=["0"], r=LAYER["r"], lora_alpha=LAYER["alpha"],
                      use_dora=method == "dora")


def base_layer(given, base):
    layer = torch.nn.Sequential(torch.nn.Linear(LAYER["k"], LAYER["d"]))
    with torch.no_grad():
        layer[0].weight.copy_(given["W"])
        layer[0].bias.copy_(given["b"])
    return layer.to(base)


def make_layer(given, method, base=torch.float32, adapter=torch.float32):
    """PEFT's layer on a base of one dtype, its adapter of another."""
    model = get_peft_model(base_layer(given, base), layer_config(method))
    for name, value in model.named_parameters():
        if "ranknum" in name:
            value.requires_grad_(False)  # PEFT 0.21 lets it train where the base isn't fp32
            value.data = value.data.to(adapter)
    with torch.no_grad():
        for name, value in adapter_parts(model).items():
            value.data = given[name].to(adapter, copy=True)
    return model.train()


def adapter_parts(model):
    letters = {"lora_A": "A", "lora_B": "B", "lora_E": "E", "lora_magnitude_vector": "m"}
    return {letters[name.removeprefix("base_model.model.0.").removesuffix(".weight")]: value
            for name, value in trainable(model).items()}


def layer_values(given, method, base=torch.double, adapter=torch.double, mask=False):
    model = make_layer(given, method, base, adapter)
    if mask:
        model.base_model.model[0].lora_dropout["default"] = Masked(given["mask"])
    x = given["x"].to(base).requires_grad_()
    y = model(x)
    y.backward(given["g"].to(base))
    out = {"y": y.detach(), "dx": x.grad}
    out |= {f"d{name}": value.grad for name, value in adapter_parts(model).items()}
    return {n: v.float() if v.dtype == torch.double else v for n, v in sorted(out.items())}


def layer_norms(given):
    w, a, b = (given[n].double() for n in ("W", "A", "B"))
    layer = make_layer(given, "dora").base_model.model[0].lora_magnitude_vector["default"]
    n = layer.get_weight_norm(w, b @ a, LAYER["alpha"] / LAYER["r"])
    return {"dora.n": n.float()}


def layer_regulariser(given):
    model = make_layer(given, "adalora", torch.double, torch.double)
    value = regulariser(model)
    value.backward()
    parts = adapter_parts(model)
    return {"adalora.regulariser": value.detach().reshape(1),
            "adalora.regulariser.dA": parts["A"].grad.float(),
            "adalora.regulariser.dB": parts["B"].grad.float()}


def initial_magnitude(given, base, nonzero):
    """PEFT draws A and B where init_lora_weights is false, and then takes the norms."""
    config = layer_config("dora")
    config.init_lora_weights = not nonzero
    draw, torch.nn.Linear.reset_parameters = torch.nn.Linear.reset_parameters, draw_given(given)
    try:
        model = get_peft_model(base_layer(given, base), config)
    finally:
        torch.nn.Linear.reset_parameters = draw
    return adapter_parts(model)["m"].detach()


def draw_given(given):
    """Stands for the method that draws a linear's weights."""
    by_shape = {tuple(given[n].shape): given[n] for n in ("W", "A", "B")}

    def fill_by_shape(linear):
        with torch.no_grad():
            linear.weight.copy_(by_shape[tuple(linear.weight.shape)])
    return fill_by_shape


def merged(given, method, base, **how):
    model = make_layer(given, method, base)
    layer = model.base_model.model[0]
    layer.merge(**how)
    merged_weight = layer.base_layer.weight.detach().clone()
    layer.unmerge()
    return merged_weight, layer.base_layer.weight.detach()


def make_single_layers(out):
    given, values = layer_given(), {}
    low = partial(layer_values, given, base=torch.bfloat16, adapter=torch.float32)
    for method in ("lora", "dora", "adalora"):
        values |= prefixed(method, layer_values(given, method))
        values |= prefixed(f"bf16.{method}", low(method))
        if method != "adalora":
            values |= prefixed(f"{method}_dropout", layer_values(given, method, mask=True))
        values[f"merged.{method}"], values[f"unmerged.{method}"] = merged(
            given, method, torch.float32)
        values[f"bf16.merged.{method}"], values[f"bf16.unmerged.{method}"] = merged(
            given, method, torch.bfloat16)
        values[f"bf16.safe_merged.{method}"] = merged(
            given, method, torch.bfloat16, safe_merge=True)[0]
    values |= prefixed("bf16.dora_dropout", low("dora", mask=True))
    values |= layer_norms(given) | layer_regulariser(given)
    for name, base in (("", torch.float32), ("_bf16", torch.bfloat16)):
        values[f"initial.m{name}"] = initial_magnitude(given, base, False)
        values[f"initial.m_nonzero{name}"] = initial_magnitude(given, base, True)
    write_tensors(out / "single_layers.safetensors", given | values)
    write_json(out / "single_layers.json", LAYER)


# MoRA

MORA_SHAPES = [(64, 64), (80, 96), (96, 40), (40, 96), (64, 176)]
MORA_TYPES = [1, 2, 3, 4, 6]
MORA_RANKS = [2, 8]
MORA_DELTAS = [(96, 40), (40, 96)]


def load_mora(checkout):
    """The fork's layer.py amid the modules of today's PEFT, which it imports."""
    path = checkout / "peft-mora" / "src" / "peft" / "tuners" / "lora" / "layer.py"
    spec = importlib.util.spec_from_file_location("peft.tuners.lora.mora_layer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Linear


def mora_layer(linear, shape, mora_type, r):
    base = torch.nn.Linear(*shape, bias=False)
    torch.nn.init.zeros_(base.weight)
    return linear(base, "default", r=r, use_mora=True, mora_type=mora_type).double()


def mora_values(layer, x, m, g):
    weight = layer.lora_A["default"].weight
    weight.data = m.double()
    x = x.double().requires_grad_()
    y = layer(x)
    y.backward(g.double())
    return {"y": y, "dM": weight.grad, "dx": x.grad, "delta": layer.get_delta_weight("default")}


def mora_size(linear, shape, mora_type, r):
    return mora_layer(linear, shape, mora_type, r).r["default"]


def mora_shape(linear, shape, generator):
    (k, d), size = shape, mora_size(linear, shape, 1, 8)
    out = {"x": normal(generator, (4, k), 0.5), "g": normal(generator, (4, d), 0.5),
           "M": normal(generator, (size, size), 0.5)}
    for mora_type, r in itertools.product(MORA_TYPES, MORA_RANKS):
        layer = mora_layer(linear, shape, mora_type, r)
        size = layer.r["default"]
        values = mora_values(layer, out["x"], out["M"][:size, :size], out["g"])
        torch.testing.assert_close(out["x"].double() @ values["delta"].T, values["y"])
        if r != 8 or shape not in MORA_DELTAS:
            del values["delta"]
        out |= prefixed(f"type{mora_type}.r{r}", {n: v.float() for n, v in values.items()})
    return out


def make_mora(out, checkout):
    linear, generator = load_mora(checkout), torch.Generator().manual_seed(106)
    tensors, sizes = {}, {}
    for shape in MORA_SHAPES:
        name = "{}x{}".format(*shape)
        tensors |= prefixed(name, mora_shape(linear, shape, generator))
        sizes[name] = {f"r{r}": {"sharing": mora_size(linear, shape, 1, r),
                                 "rotation": mora_size(linear, shape, 6, r)} for r in MORA_RANKS}
    write_tensors(out / "mora.safetensors", tensors)
    write_json(out / "mora.json", sizes)


# NF4 and int8, by the formulas in numpy; bitsandbytes is run beside them

NF4 = numpy.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0], numpy.float32)
TINY = numpy.float32(1e-38)
NESTED_BLOCK = 256


def midpoints(values):
    return (values[1:] + values[:-1]) / numpy.float32(2)


def dynamic_map():
    """For e = 0 to 6 the midpoints of 2^e equal parts of [0.1, 1], times 10^(e-6), both signs."""
    values = [numpy.array([0, 1], numpy.float32)]
    for e in range(7):
        edges = torch.linspace(0.1, 1, 2 ** e + 1, dtype=torch.float32).numpy()
        part = numpy.float32(10.0 ** (e - 6)) * midpoints(edges)
        values += [part, -part]
    return numpy.sort(numpy.concatenate(values))


def in_blocks(flat, size):
    return [flat[i:i + size] for i in range(0, len(flat), size)]


def block_codes(flat, values, size):
    """Codes (number of midpoints strictly below) and largest magnitude of every block."""
    edges, codes, tops = midpoints(values), [], []
    for block in in_blocks(flat, size):
        tops.append(abs(block).max())
        scaled = block * (numpy.float32(1) / max(tops[-1], TINY))
        codes.append(numpy.searchsorted(edges, scaled, side="left"))
    return numpy.concatenate(codes).astype(numpy.uint8), numpy.array(tops, numpy.float32)


def restore(codes, values, tops, size):
    parts = [values[block] * top for block, top in zip(in_blocks(codes, size), tops)]
    return numpy.concatenate(parts)


def pack(codes):
    codes = numpy.append(codes, numpy.full(len(codes) % 2, 7, numpy.uint8))
    return (codes[::2] << 4) | codes[1::2]


def unpack(packed, count):
    return numpy.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], 1).reshape(-1)[:count]


def quantise_nf4(w):
    """The offset, whose last bit hangs on the order of the sum, is torch's float32 mean."""
    codes, tops = block_codes(w.reshape(-1), NF4, 64)
    offset = torch.from_numpy(tops).mean().numpy()
    nested_codes, nested_tops = block_codes(tops - offset, dynamic_map(), NESTED_BLOCK)
    restored = restore(nested_codes, dynamic_map(), nested_tops, NESTED_BLOCK) + offset
    return {"packed": pack(codes), "absmax": tops, "offset": offset.reshape(1),
            "nested_codes": nested_codes, "nested_absmax": nested_tops, "restored_absmax": restored,
            "dequantised": restore(codes, NF4, restored, 64).reshape(w.shape),
            "single_dequantised": restore(codes, NF4, tops, 64).reshape(w.shape)}


def bitsandbytes_nf4(w):
    """Of the flattened tensor: its CPU code dequantises rows of 80 or 160 numbers wrongly."""
    shape, w = w.shape, w.reshape(-1)
    plain, plain_state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    nested = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(plain, packed)
    values = {"packed": packed.view(-1), "absmax": plain_state.absmax,
              "offset": state.offset.reshape(1), "nested_codes": state.absmax,
              "nested_absmax": state.state2.absmax, "restored_absmax": nested,
              "dequantised": bnb.dequantize_4bit(packed, state).reshape(shape),
              "single_dequantised": bnb.dequantize_4bit(plain, plain_state).reshape(shape)}
    return {name: value.numpy() for name, value in values.items()}


def same_bits(ours, theirs):
    """Zeros may differ in sign."""
    return {name: bool(numpy.array_equal(ours[name], theirs[name])) for name in ours}


def nf4_tensors():
    generator = torch.Generator().manual_seed(110)
    tensors = {"normal": normal(generator, (96, 80), 0.05)}
    tensors["heavy"] = normal(generator, (64, 64), 0.05) * normal(generator, (64, 64), 1).exp()
    tensors["odd"] = normal(generator, (7, 13), 0.02)
    tensors["zeros"] = normal(generator, (3, 128), 0.3)
    tensors["zeros"][1, :64] = 0
    rows = 1 + torch.arange(256)[:, None] % 7
    tensors["big"] = golden.closed_formula((256, 160), 7, 2.0 ** -14) * rows
    return tensors


def make_nf4(out):
    values = {"map": NF4, "thresholds": midpoints(NF4), "dynamic_map": dynamic_map(),
              "dynamic_thresholds": midpoints(dynamic_map())}
    same = {"map": bool((bnb.get_4bit_type("nf4", device="cpu").numpy() == NF4).all()),
            "dynamic_map": bool((bnb.create_dynamic_map().numpy() == dynamic_map()).all())}
    tensors = {name: torch.from_numpy(value) for name, value in values.items()}
    for name, w in nf4_tensors().items():
        ours = quantise_nf4(w.numpy())
        same[name] = same_bits(ours, bitsandbytes_nf4(w))
        parts = {n: torch.from_numpy(v) for n, v in ours.items()}
        parts["dequantised_bf16"] = parts["dequantised"].bfloat16()
        if name == "big":
            del parts["dequantised"], parts["single_dequantised"]
        else:
            parts["values"] = w
        tensors |= prefixed(name, parts)
    write_tensors(out / "nf4.safetensors", tensors)
    write_json(out / "nf4.json", {"same_bits_as_bitsandbytes_on_cpu": same})


def make_int8(out):
    given = nf4_tensors()
    given["zeros"][2] = 0
    tensors = {"zeros.values": given["zeros"]}
    for name in ("normal", "heavy", "odd", "zeros"):
        w = given[name].numpy()
        top = abs(w).max(1)
        scale = numpy.where(top == 0, numpy.float32(1), top / numpy.float32(127))
        codes = numpy.rint(w / scale[:, None])
        parts = {"codes": codes.astype(numpy.int8), "scale": scale}
        tensors |= prefixed(name, {n: torch.from_numpy(v) for n, v in parts.items()})
    write_tensors(out / "int8.safetensors", tensors)


def quantised_llama():
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_pretrained(
        HERE / "llama" / "model", quantization_config=config, device_map="cpu",
        dtype=torch.float32, attn_implementation="eager")


def dequantised_weight(stored, name):
    """By the formulas, from the tensors of a bitsandbytes folder."""
    def part(suffix):
        return stored[f"{name}.{suffix}"].numpy()

    state = json.loads(bytes(part("quant_state.bitsandbytes__nf4").tolist()))
    restored = restore(part("absmax"), part("nested_quant_map"), part("nested_absmax"),
                       state["nested_blocksize"]) + numpy.float32(state["nested_offset"])
    count = math.prod(state["shape"])
    codes = unpack(stored[name].numpy(), count)
    w = restore(codes, part("quant_map"), restored, state["blocksize"]).reshape(state["shape"])
    return torch.from_numpy(w)


def make_llama_nf4(out):
    folder, samples = out / "llama_nf4", llama_samples()
    quantised_llama().save_pretrained(folder / "model")
    (folder / "model" / "generation_config.json").unlink(missing_ok=True)
    stored = safetensors.torch.load_file(folder / "model" / "model.safetensors")
    model, reference = llama(), {}
    for name, value in model.named_parameters():
        if f"{name}.absmax" in stored:
            ours = quantise_nf4(value.detach().numpy())
            assert (ours["packed"] == stored[name].view(-1).numpy()).all()
            differing = ours["nested_codes"] != stored[f"{name}.absmax"].numpy()
            reference[f"differing.{name}"] = torch.from_numpy(differing.nonzero()[0])
            value.data = dequantised_weight(stored, name)
    for name in PISSA_MODULES:
        weight = f"model.{name}.weight"
        reference[f"dequantised.{weight}"] = model.get_parameter(weight)
    write_tensors(folder / "reference.safetensors", reference | logits(model, samples))


# Weighted adapters

COMBINE_ADAPTERS = {
    "first": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "second": dict(r=4, lora_alpha=2, target_modules=["q_proj", "k_proj"]),
    "third": dict(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"],
                  alpha_pattern={"layers.1.self_attn.v_proj": 3}),
    "rslora_first": dict(r=4, lora_alpha=3, target_modules=["q_proj", "v_proj"], use_rslora=True),
    "rslora_second": dict(r=4, lora_alpha=8, target_modules=["q_proj"], use_rslora=True),
}
COMBINE_CASES = {
    "linear": (["first", "second"], [0.7, -0.4], "linear", None),
    "cat": (["first", "second", "third"], [0.7, -0.4, 1.5], "cat", None),
    "svd": (["first", "second", "third"], [0.7, -0.4, 1.5], "svd", None),
    "svd_rank_3": (["first", "second", "third"], [0.7, -0.4, 1.5], "svd", 3),
    "single_svd": (["first"], [-0.5], "svd", None),
    "linear_rslora": (["rslora_first", "rslora_second"], [0.7, -0.4], "linear", None),
}
COMBINE_MODULES = ["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"]


def combine_model():
    generator = torch.Generator().manual_seed(111)
    configs = {name: golden.lora_config(**fields) for name, fields in COMBINE_ADAPTERS.items()}
    model = get_peft_model(llama(), configs["first"], adapter_name="first")
    for name in list(configs)[1:]:
        model.add_adapter(name, configs[name])
    with torch.no_grad():
        for name, value in sorted(model.named_parameters()):
            if "lora_" in name:
                value.copy_(normal(generator, value.shape, 0.2))
    return model


def combined_scaling(model, result):
    return {name: module.scaling[result] for name, module in model.base_model.model.named_modules()
            if isinstance(module, LoraLayer) and result in module.scaling}


def save_combined(model, folder):
    for config in model.peft_config.values():
        config.base_model_name_or_path = NAME
        config.target_modules = sorted(config.target_modules)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)


def make_combine(out):
    folder, model, products, cases = out / "combine", combine_model(), {}, {}
    for result, (adapters, weights, how, rank) in COMBINE_CASES.items():
        model.add_weighted_adapter(adapters, weights, result, combination_type=how, svd_rank=rank)
        cases[result] = {"adapters": adapters, "weights": weights, "combination_type": how,
                         "svd_rank": rank, "scaling": combined_scaling(model, result)}
        for name in COMBINE_MODULES:
            layer = module_of(model, name)
            if result in layer.lora_A:
                products[f"{result}.{name}"] = layer.get_delta_weight(result)
    save_combined(model, folder)
    write_tensors(folder / "products.safetensors", products)
    write_json(folder / "cases.json", cases)


# Merged weights

MERGED = {  # folders of the adapter and of its model, and the modules that are compared
    "llama": ("llama/adapter", "llama", PISSA_MODULES),
    "llama_tied_llama3rope": ("llama_tied_llama3rope/adapter", "llama_tied_llama3rope",
                              PISSA_MODULES[:2]),
    "rslora": ("methods/rslora/adapter", "llama", PISSA_MODULES),
    "dora": ("methods/dora/adapter", "llama", PISSA_MODULES),
    "adalora": ("methods/adalora/adapter", "llama", PISSA_MODULES[:2]),
    "adalora_final": ("methods/adalora/adapter_final", "llama", PISSA_MODULES[:2]),
    "pissa": ("methods/pissa/adapter", "llama", PISSA_MODULES[:2]),
    "modules_to_save": ("methods/modules_to_save/adapter", "llama", PISSA_MODULES[:2]),
    "phi3": ("families/phi3/adapter", "families/phi3",
             ["layers.0.self_attn.qkv_proj", "layers.1.mlp.gate_up_proj"]),
    "gpt2": ("families/gpt2/adapter", "families/gpt2", ["h.0.attn.c_attn", "h.1.mlp.c_proj"]),
}


def merged(adapter, base, modules, dtype=torch.float32):
    model = golden.load_model(HERE / base / "model").to(dtype)
    model = PeftModel.from_pretrained(model, HERE / adapter).merge_and_unload()
    return {f"{name}.weight": model.base_model.get_submodule(name).weight for name in modules}


def make_merged(out):
    tensors = {}
    for name, case in MERGED.items():
        tensors |= prefixed(name, merged(*case))
    for name in ("llama", "dora", "adalora", "gpt2"):
        tensors |= prefixed(f"bf16.{name}", merged(*MERGED[name], torch.bfloat16))
    write_tensors(out / "merged.safetensors", tensors)


def write_versions(out):
    modules = [bitsandbytes, numpy, peft, safetensors, torch, transformers]
    write_json(out / "VERSIONS.json", {m.__name__: m.__version__ for m in modules})


CASES = {"dora": make_dora, "rslora": make_rslora, "modules_to_save": make_modules_to_save,
         "loraplus": make_loraplus, "adalora": make_adalora, "pissa": make_pissa,
         "allocator": make_allocator, "single_layers": make_single_layers,
         "nf4": make_nf4, "int8": make_int8, "llama_nf4": make_llama_nf4,
         "combine": make_combine, "merged": make_merged}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=[*CASES, "mora"])
    parser.add_argument("--mora", type=Path, metavar="CHECKOUT")
    options = parser.parse_args()
    if options.only == "mora" and not options.mora:
        parser.error("--only mora needs --mora CHECKOUT")

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else [*CASES, "mora"]:
        torch.manual_seed(0)  # add_weighted_adapter leaves the signs of drawn numbers on its zeros
        if name in CASES:
            CASES[name](options.out)
        elif options.mora:
            make_mora(options.out, options.mora)
    write_versions(options.out)
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves 0600


if __name__ == "__main__":
    main()
