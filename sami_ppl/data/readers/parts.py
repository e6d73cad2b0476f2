"""Parts of a data set by the names that are usual for them, as the `split` of training and testing."""

from collections.abc import Iterable, Sequence

import numpy as np

NAMES = {
    "train": "train", "training": "train", "t10k": "test", "test": "test", "testing": "test",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
}  # fmt: skip


def are_parts(names: Iterable[str]) -> bool:
    """Whether these are names of parts, of training and of something else."""
    parts = [NAMES.get(name.lower()) for name in names]
    return None not in parts and "train" in parts and len(set(parts)) > 1


def split_labels(parts: Sequence[str] | np.ndarray) -> np.ndarray:
    """The part of each observation as "train" or "test".

    Images for validation are for training where others are for testing, since a fit takes its own from there; else
    they are for testing.
    """
    named, where = np.unique(np.asarray(parts, str), return_inverse=True)
    known = np.array([NAMES[name.lower()] for name in named])
    validation = "train" if "test" in known else "test"
    return np.where(known == "validation", validation, known)[where]
