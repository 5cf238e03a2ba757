"""A stored teacher as a data set on the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..redaction import shareable
from .store_format import HEAD, MANIFEST, SHARDS


CARD = "README.md"
_FILES = (MANIFEST, HEAD, f"{SHARDS}/*.arrow")


def store_card(store) -> str:
    """Text of the card: what is stored, of which teacher, and how it is used."""
    manifest = store.manifest
    teacher = shareable(manifest.teacher.get("name")) or manifest.teacher["class"]
    columns = "\n".join(f"| `{own.column}` | {own.layout} | {tuple(own.shape)} | {own.dtype} |" for own in manifest.signals)
    versions = ", ".join(f"{name} {version}" for name, version in manifest.fingerprint.get("versions", {}).items())
    return f"""---
tags:
- hfdistill
- knowledge-distillation
configs:
- config_name: default
  data_files: data/*.arrow
---

# Stored answers of a teacher

{len(store)} answers of **{teacher}** ({manifest.examples} examples, {manifest.epochs} epoch{"s" if manifest.epochs > 1 else ""}), stored
with hfdistill ({versions}). A student is trained from them without the teacher:

```python
from hfdistill import DistillationTrainer, StoredTeacher

trainer = DistillationTrainer(model=student, teacher=StoredTeacher("hf://datasets/<this data set>"), ...)
```

An answer is used only where the student's batch holds the very inputs the teacher was asked (`input_hash`); `manifest.json` holds the
fingerprint of weights, processors, collator and libraries. bfloat16 is stored bit by bit as int16.

| column | layout | shape of one entry | dtype |
|---|---|---|---|
{columns}
"""


def upload_store(store, repo_id: str, private: bool | None, token: str | None, revision: str | None) -> str:
    """See `TeacherStore.push_to_hub`.

    Raises:
        ValueError: for a store that is not complete.
    """
    if not store.complete:
        raise ValueError(f"{store!r} is not complete: others could not train from it. Let the run with the teacher finish first.")
    api = HfApi(token=token)
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    # not through a file in the folder, which may be a link into the cache of the Hub
    api.upload_file(
        path_or_fileobj=store_card(store).encode(),
        path_in_repo=CARD,
        repo_id=repo_id,
        repo_type="dataset",
        revision=revision,
        commit_message="Card of stored answers",
    )
    done = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=store.folder,
        revision=revision,
        commit_message="Stored answers of a teacher",
        allow_patterns=list(_FILES),
    )
    return str(getattr(done, "commit_url", done))


def download_store(repo_id: str) -> Path:
    """The folder of a data set on the Hub, from the cache where it is there already.

    Raises:
        ValueError: when it cannot be found or reached.
    """
    name, _, revision = repo_id.partition("@")
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision or None, allow_patterns=list(_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = json.dumps(str(error).strip().splitlines()[0][:160]) if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{repo_id!r} is neither a folder with a stored teacher nor a data set on the Hub that can be reached ({first}). Check the "
            "spelling, or download it where there is a network (`hf download --repo-type dataset`) and give the folder."
        ) from error
