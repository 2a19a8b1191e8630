"""The official checkpoint: find it, download it and verify it."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from xr_anysat.config import DEFAULTS, option
from xr_anysat.errors import OptionError, WeightsError

PICKLED = (".pth", ".pt", ".ckpt", ".bin")  # usual suffixes of files of torch.save

SAFE = ".safetensors"

MIN_FILE_BYTES = 100_000  # every AnySat checkpoint is larger

PREPARE_HINT = (
    "On a dask cluster, xr_anysat.distributed.prepare(client, embedding) sends the weights to every worker."
)


@dataclass(frozen=True)
class Official:
    """The published checkpoint. Only the two ends of its sha256 are known."""

    repo: str = "g-astruc/AnySat"
    filename: str = "models/AnySat.pth"
    model: str = "base"
    sha256_prefix: str = "ce124652"
    sha256_suffix: str = "3d4f"
    min_bytes: int = 500_000_000  # the file has 504 MB

    def has(self, sha256: str) -> bool:
        """Whether `sha256` agrees with the known ends of its hash."""
        return sha256.startswith(self.sha256_prefix) and sha256.endswith(self.sha256_suffix)


OFFICIAL = Official()


def cache_dir() -> Path:
    """Return the folder of converted and manually placed checkpoints (option ``cache_dir``)."""
    given = option("cache_dir", DEFAULTS["cache_dir"])
    if given is None:
        return Path(platformdirs.user_cache_dir("xr_anysat"))
    return Path(str(given)).expanduser().absolute()


def offline() -> bool:
    """Whether option ``offline`` forbids downloads; huggingface_hub itself respects HF_HUB_OFFLINE."""
    given = option("offline", DEFAULTS["offline"])
    known = {"true": True, "yes": True, "on": True, "1": True}
    known |= {"false": False, "no": False, "off": False, "0": False, "": False}
    value = known.get(str(given).strip().lower())
    if value is None:
        raise OptionError(f"offline={given!r} (XR_ANYSAT_OFFLINE): expected 1 or 0, true or false")
    return value


def check_file(
    path: Path,
    min_bytes: int = MIN_FILE_BYTES,
    missing: str = "weights= takes a path, None (the official checkpoint), 'random' or ('random', seed).",
) -> None:
    """Raise a WeightsError if a file cannot be a checkpoint, judged by its name, size and first bytes."""
    try:
        about = path.stat()
        if stat.S_ISDIR(about.st_mode):
            raise WeightsError(f"weights={str(path)!r} is a folder; expected the checkpoint file in it")
        with path.open("rb") as file:
            head = file.read(512)
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(f"there is no weights file {str(path)!r} on this machine. {missing}") from None
    except OSError as error:
        raise WeightsError(
            f"the weights file {str(path)!r} cannot be read: {error}. Fix that, or pass the path of "
            "another copy as weights=PATH."
        ) from error
    if path.suffix.lower() not in (*PICKLED, SAFE):
        raise WeightsError(
            f"weights={str(path)!r} ends in {path.suffix!r}; expected {', '.join(PICKLED)} (a file of "
            f"torch.save) or {SAFE}. If it is one of them, rename it."
        )
    text = head.lstrip().lower()
    instead = None
    if text.startswith(b"version https://git-lfs"):
        instead = "a Git LFS pointer instead of the file; run 'git lfs pull' in the clone"
    elif text.startswith((b"<!doctype html", b"<html", b"<?xml")):
        instead = "a web page instead of the file; download the file itself"
    elif about.st_size < min_bytes:
        instead = (
            f"only {about.st_size:,} bytes, expected at least {min_bytes:,}: the download was cut short; "
            "delete it and download it again"
        )
    if instead is not None:
        raise WeightsError(f"the weights file {str(path)!r} is {instead}")


_hashes: dict[tuple[str, int, int], str] = {}


def file_sha256(path: Path) -> str:
    """Hash a file; a process hashes it again only if its size or modification time has changed."""
    about = path.stat()
    key = (str(path), about.st_size, about.st_mtime_ns)
    if key not in _hashes:
        with path.open("rb") as file:
            _hashes[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _hashes[key]


def find_official() -> Path | None:
    """Find the official checkpoint on this machine, without opening or hashing it.

    Looked up are ``AnySat.pth`` in the cache folder, where a user can place it, and then the cache of
    huggingface_hub.
    """
    from huggingface_hub import try_to_load_from_cache

    placed = manual_path()
    if placed.exists():
        return placed
    cached = try_to_load_from_cache(OFFICIAL.repo, OFFICIAL.filename)
    # otherwise None, or a sentinel for a file that the repository does not have
    return Path(cached) if isinstance(cached, str) else None


def manual_path() -> Path:
    """Where a user can place the official checkpoint."""
    return cache_dir() / Path(OFFICIAL.filename).name


def official_path(download: bool = True) -> Path | None:
    """Find the official checkpoint on this machine, and check its size and sha256.

    It is looked up by :func:`find_official` and then, if `download`, on the hub.

    Parameters
    ----------
    download : bool
        Whether to download it if it is missing.

    Returns
    -------
    Path or None
        None if it is not on this machine and `download` is False.

    Raises
    ------
    WeightsError
        If the file is not the official one, or cannot be downloaded. The message says where to place it.
    """
    path = find_official()
    if path is None and download:
        path = _download()
    return None if path is None else _check_official(path)


def _download() -> Path:
    """Download the official checkpoint to the cache of huggingface_hub."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    remedy = (
        f"Download {hf_hub_url(OFFICIAL.repo, OFFICIAL.filename)} on a machine with a network and place it at "
        f"{str(manual_path())!r}, or pass its path as weights=PATH (or XR_ANYSAT_WEIGHTS=PATH). {PREPARE_HINT}"
    )
    if offline():
        raise WeightsError(
            "the official checkpoint is not on this machine, and option offline (XR_ANYSAT_OFFLINE) "
            f"forbids its download. {remedy}"
        )
    try:
        return Path(hf_hub_download(OFFICIAL.repo, OFFICIAL.filename, library_name="xr_anysat"))
    except Exception as error:  # of huggingface_hub, of its HTTP library, or an OSError of the disk
        cause = error.__cause__ or error
        raise WeightsError(
            f"the official checkpoint ({OFFICIAL.filename} of {OFFICIAL.repo}) could not be downloaded: "
            f"{type(cause).__name__}: {cause}. {remedy}"
        ) from error


def _check_official(path: Path) -> Path:
    """Return `path` if it holds the official checkpoint."""
    check_file(path, OFFICIAL.min_bytes)
    seen = file_sha256(path)
    if not OFFICIAL.has(seen):
        # In the hub's cache `path` is a link. The file behind it must be deleted: otherwise the next
        # download would link the same file again.
        raise WeightsError(
            f"{str(path)!r} is not the official checkpoint: its sha256 is {seen}, expected "
            f"{OFFICIAL.sha256_prefix}…{OFFICIAL.sha256_suffix}. Delete {str(path.resolve())!r} and "
            f"call again to download it, or pass weights={str(path)!r} to use the file as it is."
        )
    return path
