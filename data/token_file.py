"""Writes token files (HDF5)."""

import os
from dataclasses import dataclass

import h5py
import numpy as np

from environment import replace

CHUNK = 1 << 16


@dataclass
class Sample:
    tokens: np.ndarray  # int32
    mask: np.ndarray  # uint8, 1 = target


def write_token_file(path, samples, attributes):
    """Writes beside `path` and returns the name, for the caller to put in place."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    lengths = [len(sample.tokens) for sample in samples]
    columns = {"tokens": np.concatenate([sample.tokens for sample in samples]),
               "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
               "loss_mask": np.concatenate([sample.mask for sample in samples])}
    with h5py.File(aside, "w") as file:
        for name, column in columns.items():
            file.create_dataset(name, data=column, chunks=(min(CHUNK, len(column)),), fletcher32=True,
                                track_times=False)
        file.attrs.update(attributes)
    return aside


def write_all(parts, attributes):
    """All files are complete before the first one is put in place."""
    asides = {}
    try:
        for path, samples in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            asides[path] = write_token_file(path, samples, attributes)
        for path, aside in asides.items():
            replace(aside, path)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)
