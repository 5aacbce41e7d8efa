"""A run on the Hugging Face hub: its weights, a config that timm reads, recipe, card and report."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

from r2kit.errors import RunError
from r2kit.report import write_report
from r2kit.report.card import card_of, timm_owner
from r2kit.run import Run

_FAILURES = (OSError, HTTPError)  # of the disk, of the network, and what the hub answers


def push(run: Run, repo_id: str, *, private: bool = False, dry_run: bool = False) -> list[tuple[str, int]]:
    """Upload a finished run to a repository of the Hugging Face hub, which is made where it does not exist.

    What goes there is enough to predict, explain and export (``hf download REPO --local-dir RUN``), and what is needed
    by ``timm.create_model("hf-hub:REPO")``. Stored predictions, the split and checkpoints stay here, because they name
    the files of the images. recipe.yaml, run.json and report.html do name the folder of the data, and the report shows
    some of the images.

    Args:
        run: A finished and evaluated run.
        repo_id: ``OWNER/NAME``.
        private: Whether a repository that is made is private.
        dry_run: Say what would be uploaded, and send nothing; needs no token.

    Returns:
        (name, bytes) of each file.

    Raises:
        RunError: If the name is none, there is no token, the run was not evaluated, or the hub does not take it.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RunError(f"'{repo_id}' is no name of a repository: {str(error).splitlines()[0]}") from None
    if repo_id.count("/") != 1:
        raise RunError(f"'{repo_id}' is no name of a repository: give OWNER/NAME")
    token = huggingface_hub.get_token()
    if token is None and not dry_run:
        raise RunError("r2kit push needs a token of the Hugging Face hub: run hf auth login, or set HF_TOKEN")
    with tempfile.TemporaryDirectory(prefix="r2kit-push-") as folder:
        staged = Path(folder)
        _stage(run, staged, repo_id)
        files = sorted((file.name, file.stat().st_size) for file in staged.iterdir())
        if not dry_run:
            _upload(staged, run, repo_id, private, token)
    return files


def _stage(run: Run, folder: Path, repo_id: str) -> None:
    """Lay the files out as the repository will hold them."""
    if not run.report.is_file():
        write_report(run)
    needed = [run.weights_file, run.preprocess_file, run.recipe_file, run.info_file, run.metrics_json, run.report]
    for file in (*needed, run.structure_file, run.metrics_csv):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    (folder / "README.md").write_text(card_of(run, repo_id), encoding="utf-8")
    if timm_owner(run) is not None:
        (folder / "config.json").write_text(json.dumps(timm_config(run), indent=2) + "\n", encoding="utf-8")


def timm_config(run: Run) -> dict[str, Any]:
    """Return what timm's ``hf-hub:`` and ``local-dir:`` read: how to build the network, and what its images are like.

    ``first_conv`` is left out on purpose: timm would take the stem for one of three bands and replace its weights.
    """
    preprocess, bands = run.preprocess, len(run.preprocess.bands)
    height, width = preprocess.size
    return {
        "architecture": run.recipe.model.name,
        "num_classes": len(preprocess.classes),
        "label_names": list(preprocess.classes),
        "model_args": {"in_chans": bands},
        "pretrained_cfg": {
            "num_classes": len(preprocess.classes),
            "input_size": [bands, height, width],
            "fixed_input_size": False,
            "interpolation": preprocess.interpolation,
            "crop_pct": 1.0,
            "crop_mode": {"squash": "squash", "crop": "center", "pad": "border", "tile": "center"}[preprocess.resize],
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
        },
    }


def _upload(folder: Path, run: Run, repo_id: str, private: bool, token: str | None) -> None:
    """Send the files in one commit."""
    api = huggingface_hub.HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"{run.recipe.name}, by r2kit push")
    except _FAILURES as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{repo_id}: the hub did not take it: {reason}; see hf auth whoami, and try again") from None
