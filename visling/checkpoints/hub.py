"""Model folders on the Hugging Face hub: fetched (offline from its cache) and uploaded."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

from visling import runtime
from visling.errors import CheckpointError

FOLDER_FILES = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "answers.json",
    "README.md",
    "kept.safetensors",
    "detector/*",
)
"""Files of a model folder; nothing else is fetched or uploaded, in particular no pickles."""
RELEASE_FILES = ("config.json", "*.safetensors", "*.bin", "*.pth", "*.th", "*.tar", "*.model")
"""Files in a repository of released weights that a conversion can read."""

_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_id(source: str | Path) -> bool:
    """Whether a text could name a repository (owner/name) and is not the path of a file or folder."""
    text = str(source)
    return _ID.fullmatch(text) is not None and not text.startswith(".") and not Path(text).exists()


def fetch(
    repository: str,
    *,
    files: Sequence[str] = FOLDER_FILES,
    revision: str | None = None,
    offline: bool | None = None,
    into: Path | None = None,
) -> Path:
    """Folder with the files of a repository, in the hub's cache.

    Args:
        repository: owner/name.
        files: patterns of the names wanted.
        offline: use the cache only; None = follow VISLING_OFFLINE and HF_HUB_OFFLINE.
        into: folder to copy the files to; that folder is returned.
    Raises:
        CheckpointError: there is no such repository, it cannot be reached, or it is not in the cache.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    alone = constants.HF_HUB_OFFLINE or runtime.is_offline() if offline is None else offline
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, allow_patterns=list(files), local_files_only=alone, local_dir=into
            )
        )
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a repository on the hub. Check the name; a private one needs "
            "`hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} on the hub has no revision {revision!r}. Check its name.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        if alone:
            raise CheckpointError(
                f"{repository} is neither a folder here nor in the hub's cache; the hub is not asked while offline "
                "(HF_HUB_OFFLINE, VISLING_OFFLINE or --offline). Fetch it once online, or give the path of a folder."
            ) from error
        raise CheckpointError(
            f"{repository} is no folder here, and the hub cannot be reached: {_shorten(error)}. Check the connection."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError) as error:
        raise CheckpointError(f"cannot fetch {repository} from the hub: {_shorten(error)}.") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"cannot fetch {repository}: the hub answered with a page that is not for programs ({_shorten(error)}). A "
            "proxy or a portal may answer in its place; open https://huggingface.co in a browser, and repeat the "
            "command later."
        ) from error


def upload(
    folder: Path,
    repository: str,
    *,
    private: bool = True,
    token: str | None = None,
    message: str = "Upload a visling model",
) -> str:
    """Upload a model folder to a repository, which is created if it does not exist; returns the address of the change.

    Args:
        token: of the account; None = the one stored by `hf auth login`.
    Raises:
        CheckpointError: offline, refused, or unreachable.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    if constants.HF_HUB_OFFLINE or runtime.is_offline():
        raise CheckpointError(
            f"cannot upload {folder} to {repository} while offline (HF_HUB_OFFLINE or VISLING_OFFLINE). Unset the "
            "variable."
        )
    hub = huggingface_hub.HfApi(token=token)
    try:
        hub.create_repo(repository, private=private, exist_ok=True)
        change = hub.upload_folder(
            repo_id=repository, folder_path=folder, allow_patterns=list(FOLDER_FILES), commit_message=message
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"cannot upload {folder} to {repository}: {_shorten(error)}. Log in with `hf auth login`; check the name."
        ) from error
    return str(change)


def _shorten(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text.removeprefix("Got: ")[:200]
