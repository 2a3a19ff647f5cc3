"""A finished output to the hub. The upload itself is huggingface_hub's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from structprune.checkpoint.reader import CheckpointReader
from structprune.errors import CheckpointError, InputError, first_line
from structprune.files import read_json

_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def push(
    directory: Path, report_name: str, repo_id: str, *, private: bool, revision: str | None, note: Callable[[str], None]
) -> str:
    """Upload `directory` as one commit to the model repository `repo_id`, made if it is not there; returns the address.

    `report_name` is the file that a finished run leaves. Raises CheckpointError for a directory that is not such a
    run's, InputError for a repository that cannot be written.
    """
    message = _checked(directory, report_name)
    api = HfApi()
    try:
        # `private=False` would override what an organisation has set.
        repository = api.create_repo(repo_id, private=True if private else None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise InputError(
                "the repository exists and is public", where=repo_id, wanted="--private", do="choose another name"
            )
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        note(f"uploading {directory} to {repository}")
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            commit_message=message,
            # Leftovers of programs that write beside their target.
            ignore_patterns=[".*"],
        )
    except InputError:
        raise
    except HFValidationError as error:
        raise InputError("this is no name of a repository", got=repo_id, wanted=first_line(error)) from None
    except Exception as error:
        # The HTTP library's own types come through; which library that is changes with huggingface_hub's version.
        raise _refusal(error, repo_id) from error
    return str(done.commit_url)


def _checked(directory: Path, report_name: str) -> str:
    """Return the commit's message, from the report of a finished run whose files are all there."""
    path = directory / report_name
    if not path.exists():
        raise CheckpointError(
            "the directory is not a finished output of structprune",
            where=str(directory),
            got=f"no {report_name}",
            do="push what `structprune prune` wrote; other directories upload with `hf upload`",
        )
    report = read_json(path)
    size: Any = report.get("size")
    share = size.get("removed_share_of_model") if isinstance(size, dict) else None
    if not isinstance(share, float | int) or not isinstance(report.get("method"), str):
        raise CheckpointError("the report is not as it was written", where=str(path))
    # Headers of every shard that the index names.
    CheckpointReader(directory)
    return f"{report['method']}: {share:.1%} of the model removed"


def _refusal(error: Exception, repo_id: str) -> InputError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return InputError("the hub does not know who is asking", where=repo_id, do=_LOG_IN)
    if status == 403:
        return InputError("the hub refuses the upload", where=repo_id, got=first_line(error), do=_LOG_IN)
    if isinstance(error, OfflineModeIsEnabled):
        return InputError("the hub client is set to work offline", where=repo_id, do="unset HF_HUB_OFFLINE")
    if status is None:
        # An upload of several files at once hides what went wrong behind which file it was.
        cause = error.__cause__ or error
        got = f"{type(cause).__name__}: {first_line(cause).rstrip('.')}"
        return InputError("the hub cannot be reached", where=repo_id, got=got, do="check the network, and try again")
    return InputError("the hub refuses the upload", where=repo_id, got=first_line(error))
