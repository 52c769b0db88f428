#!/usr/bin/env python3
"""Makes tests/golden/families with the real transformers and PEFT (CPU, fp32).

    make_families.py --out DIR [--only CASE]

Every case is a folder laid out like the llama cases of make_golden.py: model/, adapter/, batch.json,
reference.safetensors and full.safetensors, with the same keys. Models have two layers and random
weights; adapters sit on all linears of the blocks and none of their factors is zero.
"""

import argparse
from pathlib import Path

import torch
import transformers
from make_golden import (
    FULL_TRAINING, LINEARS, MICRO_BATCHES, TRAINING, adapter_reference, fill_adapter, fill_model,
    full_reference, get_peft_model, load_model, lora_config, make_samples, save_adapter,
    write_batch, write_tensors)

LENGTHS = [5, 24, 9, 13, 7, 18, 11, 21, 6, 15, 8, 12]
LORA = dict(r=4, lora_alpha=8, target_modules=LINEARS)


def sizes():
    return dict(
        vocab_size=61, hidden_size=32, intermediate_size=52, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0})  # Phi-3 adds to it


CASES = {
    "qwen2": (transformers.Qwen2Config(**sizes(), tie_word_embeddings=True), LORA),
    "qwen2_window": (  # of the second layer only
        transformers.Qwen2Config(
            **sizes(), use_sliding_window=True, sliding_window=6, max_window_layers=1), LORA),
    "qwen3": (transformers.Qwen3Config(**sizes(), head_dim=16), LORA),
    "mistral": (transformers.MistralConfig(**sizes(), sliding_window=8), LORA),
    "phi3": (
        transformers.Phi3Config(**sizes(), sliding_window=20, pad_token_id=None, eos_token_id=None),
        dict(r=4, lora_alpha=8, target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])),
    "gpt2": (
        transformers.GPT2Config(
            vocab_size=61, n_positions=64, n_embd=32, n_layer=2, n_head=4, n_inner=52,
            embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, bos_token_id=None, eos_token_id=None),
        dict(r=4, lora_alpha=8, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "qwen2_yarn": (  # with cos and sin scaled
        transformers.Qwen2Config(**{**sizes(), "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3,
            "original_max_position_embeddings": 16}}), LORA),
}


def save_model(config, folder, generator):
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config)
    fill_model(model, generator)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                value.add_(1)  # what fill_model does to weights that are called norm
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def make_case(name, out):
    config, lora = CASES[name]
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(100 + list(CASES).index(name))
    save_model(config, folder / "model", generator)
    model = get_peft_model(load_model(folder / "model"), lora_config(**lora))
    fill_adapter(model, generator)
    save_adapter(model, folder / "adapter", f"corank-golden/{name}")
    samples = make_samples(LENGTHS, config.vocab_size, generator)
    write_batch(folder / "batch.json", {
        "samples": samples, "micro_batches": MICRO_BATCHES, "adapter": lora, "training": TRAINING,
        "full_training": FULL_TRAINING})
    write_tensors(folder / "full.safetensors",
                  full_reference(load_model(folder / "model"), samples))
    write_tensors(folder / "reference.safetensors", adapter_reference(model, samples))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=CASES)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in [options.only] if options.only else CASES:
        make_case(name, options.out)
    for path in options.out.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors leaves 0600


if __name__ == "__main__":
    main()
