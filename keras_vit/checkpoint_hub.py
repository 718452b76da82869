"""Checkpoints on the Hugging Face hub."""

import json
from pathlib import Path

from keras_vit.checkpoint_files import WEIGHTS
from keras_vit.model_file import sha256

CONFIGS = ("config.json", "preprocessor_config.json")


def download(source: str) -> Path:
    """Fetch a model of the hub, or find it in the cache; return its folder.

    Args:
        source: `hf:OWNER/NAME`, perhaps with `@REVISION`.

    Raises:
        ValueError: If the name is none, or a cached file is not what was published.
        FileNotFoundError: If there is no such model, or it holds no weights.
        ImportError: If huggingface_hub is not installed.
        OSError: If the hub cannot be reached and the model is not in the cache.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ImportError(
            f"{source} is on the Hugging Face hub: pip install huggingface_hub."
        ) from error
    name, _, revision = source.removeprefix("hf:").partition("@")
    if "/" not in name:
        raise ValueError(f"A model of the hub is hf:OWNER/NAME, got {source!r}.")
    unreachable = []  # then only the cache is asked: the hub's client waits long

    def fetch(file):
        """The file, or None where the repository has none of that name."""
        try:
            path = hf_hub_download(
                name,
                file,
                revision=revision or None,
                local_files_only=bool(unreachable),
            )
            return Path(path)
        except LocalEntryNotFoundError as error:
            unreachable.append(error)  # or known not to be there
            return None
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            raise ValueError(
                f"A model of the hub is hf:OWNER/NAME, got {source!r}."
            ) from error
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise FileNotFoundError(
                f"The hub has no public model {source}; a private one needs "
                "`hf auth login`."
            ) from error
        except HfHubHTTPError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{source} cannot be fetched: {reason}") from error

    for file in CONFIGS:
        fetch(file)
    for file in WEIGHTS:
        path = fetch(file)
        if path is None:
            continue
        _check(path, source)
        for shard in _shards(path) if file.endswith(".index.json") else ():
            shard = fetch(shard)
            if shard is not None:
                _check(shard, source)
        return path.parent
    if unreachable:
        raise OSError(
            f"{source} is not in the cache, and the hub cannot be reached."
        ) from unreachable[0]
    raise FileNotFoundError(f"{source} holds none of {', '.join(WEIGHTS)}.")


def _shards(index):
    """Names of the files that an index lists; `checkpoint_files` refuses a bad one."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _check(path, source):
    """Compare a large file with its checksum, which is its name in the hub's cache."""
    name = path.resolve().name
    if len(name) == 64 and sha256(path) != name:
        path.resolve().unlink()
        raise ValueError(
            f"{source} is damaged in the cache (SHA-256) and was removed there; run it "
            "again to fetch it anew."
        )
