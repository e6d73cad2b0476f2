"""Folders in which diffusers' `save_pretrained` keeps a pipeline or a model, and the cache of Hugging Face."""

import json
import os
from pathlib import Path
import re
from typing import Any

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
"""Names of repositories: owner/name."""


def root_of(folder: str | Path) -> Path:
    """The folder itself, or the newest snapshot of a repository in the cache.

    Raises FileNotFoundError where there is neither.
    """
    path = Path(folder).expanduser()
    if path.is_dir():
        return path
    if not REPOSITORY.fullmatch(str(folder)):
        raise FileNotFoundError(f"there is no folder {folder}: give one that save_pretrained wrote")
    cache = _cache() / f"models--{str(folder).replace('/', '--')}"
    main = cache / "refs" / "main"
    found = [cache / "snapshots" / main.read_text().strip()] if main.is_file() else [*cache.glob("snapshots/*")]
    if not found or not found[-1].is_dir():
        raise FileNotFoundError(
            f"there is no folder {folder}, and no such repository in {_cache()}; nothing is downloaded here. Fetch it "
            f"by pip install huggingface_hub, then hf download {folder}"
        )
    return found[-1]


def _cache() -> Path:
    """Where Hugging Face keeps what it has downloaded."""
    if hub := os.environ.get("HF_HUB_CACHE"):
        return Path(hub).expanduser()
    general = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("HF_HOME", f"{general}/huggingface")).expanduser() / "hub"


def read_json(file: Path, missing: str) -> dict[str, Any]:
    """The settings in a file. FileNotFoundError, saying `missing`, where there is none; ValueError for others."""
    if not file.is_file():
        raise FileNotFoundError(f"{missing}: give a folder that save_pretrained wrote")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): copy it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} holds no settings: copy it again")
    return found


def weights_of(model: Path) -> Path:
    """The file of weights, of full precision where there are several. Raises FileNotFoundError where there is none."""
    stem = "diffusion_pytorch_model"
    found = [model / f"{stem}.safetensors", model / f"{stem}.bin", *sorted(model.glob(f"{stem}.*.safetensors"))]
    file = next((file for file in found if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{model} has no {stem}.safetensors and no {stem}.bin: copy it again, whole")
    return file
