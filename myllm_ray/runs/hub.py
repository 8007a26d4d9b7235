"""Upload of an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from myllm_ray.common.progress import Task
from myllm_ray.common.quiet import without_progress_bars
from myllm_ray.config.errors import ConfigError, UserError


def check_push(repository: str) -> None:
    """Checks what can be checked of an upload without a connection, before the export starts.

    Raises:
        ConfigError: the name is not valid, the hub is switched off, or there are no credentials.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(f"--push {repository}: not a name of a repository: {_line(error)}") from None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("--push needs the hub, and HF_HUB_OFFLINE is set: unset it, or export without --push")
    if get_token() is None:
        raise ConfigError("--push needs a login to the hub: set HF_TOKEN, or run `hf auth login`")


def check_adapter_base(run: Path) -> None:
    """Checks that the base model of an adapter is on the hub, so that others can load the adapter.

    Raises:
        ConfigError: the base model is a local folder.
    """
    from myllm_ray.runs.folder import RunFolder

    folder = run.parent.parent if (run / "manifest.json").is_file() else run
    name = RunFolder(folder).get("model.name")
    if name is not None and Path(name).expanduser().exists():
        raise ConfigError(
            f"--push: the base model of the adapter is the local folder {name}, which others can't load: push the "
            "merged model (--to merged)"
        )


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Creates a repository unless it exists, uploads a folder in one commit, and returns the URL of the repository.

    The credentials are those of huggingface_hub: the variable HF_TOKEN, or a login.

    Raises:
        UserError: the upload failed. The folder stays complete.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        with Task("uploading"), without_progress_bars():
            created = api.create_repo(repository, private=private or None, exist_ok=True)
            api.upload_folder(
                folder_path=folder, repo_id=created.repo_id, commit_message="Export of a run of myllm_ray"
            )
    except Exception as error:  # errors of requests, of the file system and of the hub share no base class
        raise UserError(
            f"--push {repository}: the upload failed: {_line(error)}; {folder} is complete: repeat the upload with "
            f"`hf upload {repository} {folder}`"
        ) from None
    return str(created)


def _line(error: Exception) -> str:
    """Returns the messages of an error and of its cause in one line."""
    texts = [" ".join(str(e).split())[:300] or type(e).__name__ for e in (error, error.__cause__) if e is not None]
    return ": ".join(text.rstrip(".:") for text in texts)
