#!/usr/bin/env python3
"""Makes the reference values of tests/golden/methods: every method but plain LoRA.

    make_methods.py --out DIR [--only CASE]

DIR is tests/golden/methods. Model and samples are those of ../llama: this script reads
llama/model and llama/batch.json beside itself. One thread and fixed seeds, as make_golden.py; the
package versions are written to DIR/VERSIONS.json.

Whole models, each a folder: dora, adalora.
  adapter/                PEFT folder, all values non-trivial (B, E not 0, magnitudes off the norms)
  reference.safetensors   logits.0, logits.11 F32 [T, V]; loss, grad_norm F64 [1];
                          grad.<file name>, after_1.<file name> F32;
                          losses_20, learning_rates_20, grad_norms_20 F64 [20]
Loss, steps and "training" as in ../llama/batch.json; see make_golden.py.

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
"""

import argparse
import contextlib
import copy
import json
import types
import warnings
from pathlib import Path

import make_golden as golden
import numpy
import peft
import safetensors
import torch
import transformers
from make_golden import doubles, prefixed, trainable, write_json, write_tensors
from peft import AdaLoraConfig, PeftModel, get_peft_model

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
    golden_like = {n: p for n, p in trainable(model).items() if ".lora_A." in n or ".lora_B." in n}
    with torch.no_grad():
        for name, value in trainable(model).items():
            if name in golden_like:
                bound = value.shape[1] ** -0.5
                if "lora_A" in name:
                    value.copy_((2 * torch.rand(value.shape, generator=generator) - 1) * bound)
                else:
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

def make_dora(out):
    generator = torch.Generator().manual_seed(101)
    model = adapted(r=4, lora_alpha=8, target_modules=golden.LINEARS, use_dora=True)
    fill(model, generator)
    samples = llama_samples()
    save_whole(model, out / "dora" / "adapter")
    check_reload(model, out / "dora" / "adapter", samples)
    write_tensors(out / "dora" / "reference.safetensors",
                  golden.adapter_reference(model, samples, LOGITS_OF))


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
    path.write_text(f'{{\n{rest} "steps": [\n{steps}\n ],\n "rank_pattern": {{\n{pattern}\n }}\n}}\n',
                    "ascii")


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


def write_versions(out):
    modules = [numpy, peft, safetensors, torch, transformers]
    write_json(out / "VERSIONS.json", {m.__name__: m.__version__ for m in modules})


CASES = {"dora": make_dora, "adalora": make_adalora}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=list(CASES))
    options = parser.parse_args()

    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in [options.only] if options.only else CASES:
        CASES[name](options.out)
    write_versions(options.out)
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves 0600


if __name__ == "__main__":
    main()
