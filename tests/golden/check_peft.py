#!/usr/bin/env python3
"""Loads an adapter that corank wrote with the real transformers and PEFT and compares logits.

    check_peft.py ADAPTER_DIR MODEL_DIR LOGITS.safetensors [--merged DIR] [--tolerance 1e-5]
                  [--allow TEXT]

LOGITS.safetensors holds tokens int64 [T] and logits F32 [T, V], both as corank has them; DIR, the
adapter merged into the model, must load as an ordinary model and give the same. Any
warning, any tensor that PEFT would leave out or make up, and a difference above the tolerance
(relative L2, and largest difference over largest logit) make it fail: exit 1 and the reasons.
"""

import argparse
import logging
import os
import sys
import warnings
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch
import torch
import transformers
from peft import PeftModel, get_peft_model_state_dict

LIBRARIES = ("", "py", "transformers", "peft")


class Collector(logging.Handler):
    def __init__(self, lines):
        super().__init__(logging.WARNING)
        self.lines = lines

    def emit(self, record):
        self.lines.append(f"{record.name} logged: {record.getMessage()}")


def watch_logs(lines):
    collector = Collector(lines)
    transformers.utils.logging.set_verbosity_warning()
    transformers.utils.logging.disable_progress_bar()
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.setLevel(logging.WARNING)
        logger.handlers = [collector]
        logger.propagate = False
    logging.captureWarnings(False)


def load_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager").eval()


def load(options):
    return PeftModel.from_pretrained(load_model(options.model), options.adapter).eval()


def check_tensors(model, adapter):
    """PEFT ignores unexpected tensors silently."""
    stored = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    lines = [f"PEFT does not know {name}" for name in sorted(stored.keys() - loaded.keys())]
    lines += [f"the file lacks {name}" for name in sorted(loaded.keys() - stored.keys())]
    for name in sorted(stored.keys() & loaded.keys()):
        if not torch.equal(stored[name].to(loaded[name].dtype), loaded[name]):
            lines.append(f"PEFT changed {name} on loading")
    return lines


def check_logits(model, path, tolerance):
    given = safetensors.torch.load_file(path)
    with torch.no_grad():
        expected = model(input_ids=given["tokens"][None], use_cache=False).logits[0].double()
    logits = given["logits"].double()
    if logits.shape != expected.shape:
        return [f"logits have shape {list(logits.shape)}, PEFT's {list(expected.shape)}"]
    difference = logits - expected
    relative = (difference.norm() / expected.norm()).item()
    largest = (difference.abs().max() / expected.abs().max()).item()
    print(f"logits differ by {relative:.2e} relative L2, {largest:.2e} of the largest logit")
    if relative <= tolerance and largest <= tolerance:
        return []
    return [f"logits differ by more than {tolerance:g}"]


def check(options):
    lines = []
    watch_logs(lines)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            model = load(options)
            lines += check_tensors(model, options.adapter)
            lines += check_logits(model, options.logits, options.tolerance)
            if options.merged:
                lines += check_logits(load_model(options.merged), options.logits, options.tolerance)
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
    return [f"{w.category.__name__}: {w.message}" for w in caught] + lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("logits", type=Path, metavar="LOGITS.safetensors")
    parser.add_argument("--merged", type=Path, metavar="DIR")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--allow", action="append", default=[], metavar="TEXT",
                        help="a warning that holds TEXT is no fault: PEFT gives it for its own folders too")
    options = parser.parse_args()
    lines = [line for line in check(options) if not any(text in line for text in options.allow)]
    for line in lines:
        print(f"check_peft: {line}")
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
