#!/usr/bin/env python3
"""Makes tests/golden/config_variants.json with the real transformers (CPU, fp32).

    make_variants.py --golden DIR

DIR is tests/golden, whose models it loads with changes to their config.json. A row of the result:
model, the change (of "absent" keys: a list of names), and the mean loss of the model's longest sample,
or null where transformers itself refuses or crashes. ACCEPTED and REFUSED say which of them is meant,
so that a mistake here does not pass for a refusal.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import transformers

ROPED = ["llama", "families/qwen2", "families/mistral"]
NEW = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
LINEAR = {"type": "linear", "factor": 4.0}
LENGTH = "original_max_position_embeddings"


def without(scaling, *keys):
    return {key: value for key, value in scaling.items() if key not in keys}


def old(theta=100.0, **change):
    """As versions before 5 wrote it."""
    return {"absent": ["rope_parameters"], "rope_theta": theta, **change}


def scaled(scaling, theta=100.0, **change):
    return old(theta, rope_scaling=scaling, **change)


ACCEPTED = [
    *[(model, change) for model in ROPED for change in [
        {},
        old(), {"absent": ["rope_parameters"]}, {"rope_theta": 100.0}, {"rope_theta": None},
        {"rope_parameters": None, "rope_theta": 100}, {"rope_parameters": {}, "rope_theta": 100},
        {"rope_parameters": {"rope_theta": 100.0}, "rope_theta": 7.0},
        {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR, "rope_theta": 100.0},
        {"rope_scaling": {**LINEAR, "rope_theta": 100.0}, "rope_theta": 7.0},
        {"rope_scaling": None}, {"rope_scaling": False}, {"rope_scaling": {}, "rope_theta": 100.0},
        scaled(LINEAR), scaled({"rope_type": "linear", "type": "yarn", "factor": 4}),
        scaled({"rope_type": "default", "factor": 8.0}), scaled({"factor": 8.0}),
        scaled({"type": "dynamic", "factor": 4.0}), scaled({"type": "dynamic", "factor": 1.3}),
        scaled(LLAMA3), scaled(without(LLAMA3, LENGTH)), scaled(LLAMA3, **{LENGTH: 16}),
        scaled(without(LLAMA3, LENGTH), **{LENGTH: 16}), scaled({**LLAMA3, "low_freq_factor": 4.0}),
        {"rope_parameters": LLAMA3, "rope_theta": 100.0},
        *[scaled({**YARN, **more}, 10.0) for more in [
            {}, {"attention_factor": 1.5}, {"attention_factor": None}, {"mscale": 0.7},
            {"mscale": 0.7, "mscale_all_dim": 1.3}, {"mscale": 0, "mscale_all_dim": 1.3}, {"beta_fast": 2},
            {"beta_fast": None, "beta_slow": 0}, {"beta_slow": 0.5}, {"truncate": False}, {"truncate": None},
            {"beta_fast": 1, "beta_slow": 1}, {"beta_fast": 1, "beta_slow": 4}, {"factor": None},
            {"factor": 0.5}, {"finetuned": True}]],
        scaled(without(YARN, LENGTH), 10.0), scaled(YARN, 10.0, **{LENGTH: 32}),
        {"rope_parameters": {**YARN, "rope_theta": 10.0}},
        {"hidden_act": "swish"}, {"rms_norm_eps": 0.01}, {"pretraining_tp": 2}, {"rope_interleaved": True},
        {"layer_types": None}, {"architectures": None}, {"use_cache": False, "temperature": 0.5},
        {"tie_word_embeddings": True}]],
    ("llama", {"head_dim": None}), ("llama", {"layer_types": ["full_attention"] * 2}),
    ("families/mistral", {"sliding_window": None}), ("families/mistral", {"absent": ["sliding_window"]}),
    ("families/mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("families/mistral", {"attention_bias": True, "use_sliding_window": False}),
    *[(model, {"absent": ["layer_types"], "use_sliding_window": True, **change})
      for model in ["families/qwen2", "families/qwen3"] for change in [
          {"sliding_window": None, "max_window_layers": 0}, {"sliding_window": 6, "max_window_layers": 0},
          {"sliding_window": 6, "max_window_layers": 1}, {"sliding_window": 6, "max_window_layers": -1},
          {"sliding_window": 6}]],
    ("families/qwen2", {"use_sliding_window": False, "sliding_window": 6}),
    ("families/phi3", {"sliding_window": 5}), ("families/phi3", {"absent": ["sliding_window"]}),
    ("families/phi3", {"absent": ["rope_parameters"], "rope_theta": 100.0}),
    ("families/gpt2", {"absent": ["n_embd", "n_head"], "hidden_size": 32, "num_attention_heads": 2}),
    ("families/gpt2", {"n_layer": 3, "num_hidden_layers": 2}), ("families/gpt2", {"n_ctx": 8}),
    ("families/gpt2", {"absent": ["n_positions"], "max_position_embeddings": 64}),
    ("families/gpt2", {"activation_function": "gelu_fast"}), ("families/gpt2", {"layer_norm_epsilon": 0.01}),
]

REFUSED = [
    *[(model, change) for model in ROPED for change in [
        old(None), old("100"), {"rope_parameters": {**NEW, "rope_theta": None}}, {"rope_parameters": False},
        {"rope_parameters": ["linear"]}, {"rope_scaling": ["linear"]}, {"rope_scaling": "linear"},
        {"rope_scaling": True}, {"rope_scaling": 2.5},
        scaled({"type": "linear"}), scaled({**LINEAR, "factor": None}), scaled({**LINEAR, "factor": "4"}),
        scaled({"type": "dynamic"}), scaled({"type": "yarn"}), scaled({"type": "su", "factor": 4.0}),
        scaled({"type": None, "factor": 4.0}), scaled({**LINEAR, "rope_type": None}), scaled({"type": 3}),
        scaled({**LINEAR, "type": "LINEAR"}), scaled({**LINEAR, "rope_theta": None}),
        *[scaled(without(LLAMA3, key)) for key in ["factor", "low_freq_factor", "high_freq_factor"]],
        scaled({**LLAMA3, "low_freq_factor": None}), scaled({**LLAMA3, LENGTH: None}),
        scaled(LLAMA3, **{LENGTH: None}), scaled({**YARN, LENGTH: None}), scaled({**YARN, LENGTH: 0}),
        scaled({**YARN, "beta_fast": "32"}), scaled({**YARN, "attention_factor": "1"}), scaled(YARN, 1.0),
        {"hidden_act": None}, {"hidden_act": "SiLU"}, {"num_key_value_heads": 0}, {"num_key_value_heads": 2.0},
        {"head_dim": 8.0}, {"num_hidden_layers": 3}, {"vocab_size": None}, {"vocab_size": 7},
        {"rms_norm_eps": None}, {"rms_norm_eps": 1}, {"rms_norm_eps": "1e-6"}, {"tie_word_embeddings": None},
        {"tie_word_embeddings": 1}, {"absent": ["model_type"]}, {"max_position_embeddings": None},
        {"layer_types": ["full_attention"]}, {"quantization_config": {}}]],
    ("llama", {"attention_bias": None}), ("llama", {"head_dim": 0}),
    ("families/qwen2", {"head_dim": None}), ("families/qwen2", {"use_sliding_window": None}),
    ("families/qwen2", {"use_sliding_window": True, "sliding_window": None,
                        "layer_types": ["full_attention", "sliding_attention"]}),
    ("families/qwen2", {"absent": ["num_key_value_heads"]}), ("families/qwen3", {"head_dim": None}),
    ("families/mistral", {"num_key_value_heads": None}),
    ("families/mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}),
    ("families/phi3", {"rope_scaling": LINEAR}), ("families/phi3", {"rope_scaling": YARN}),
    ("families/gpt2", {"hidden_size": None}), ("families/gpt2", {"n_head": 5}),
    ("families/gpt2", {"tie_word_embeddings": False}), ("families/gpt2", {"attn_pdrop": None}),
    ("families/gpt2", {"activation_function": None}), ("families/gpt2", {"layer_norm_epsilon": 1}),
]


def loss(golden, model, change):
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((golden / model / "model/config.json").read_text()) | change
        for key in config.pop("absent", []):
            del config[key]
        (Path(folder) / "config.json").write_text(json.dumps(config))
        (Path(folder) / "model.safetensors").symlink_to((golden / model / "model/model.safetensors").resolve())
        loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True)
    if any(info[key] for key in ("missing_keys", "mismatched_keys", "unexpected_keys")):
        raise ValueError("the weights are not those of this configuration")
    samples = json.loads((golden / model / "batch.json").read_text())["samples"]
    tokens = torch.tensor([max((sample["tokens"] for sample in samples), key=len)])
    with torch.no_grad():
        logits = loaded.eval()(tokens, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()


def refuses(golden, model, change):
    try:
        loss(golden, model, change)
    except Exception:  # its own errors, and those that it runs into
        return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--golden", type=Path, required=True)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = [{"model": model, "change": change, "loss": loss(options.golden, model, change)}
            for model, change in ACCEPTED]
    for model, change in REFUSED:
        if not refuses(options.golden, model, change):
            raise SystemExit(f"transformers accepts {model} with {change}")
        rows.append({"model": model, "change": change, "loss": None})
    lines = ",\n".join(json.dumps(row) for row in rows)
    (options.golden / "config_variants.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
