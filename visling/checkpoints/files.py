"""Reading weight files of any age without executing anything in them, and writing them whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import pickle
import pickletools
import shutil
import struct
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors_bytes
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from visling.checked_weights import write_checked
from visling.errors import CheckpointError

_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the weights, next to other entries."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel and compiled modules put before every name."""

_ZIP = b"PK\x03\x04"
"""First bytes of current PyTorch files. (A tar archive that holds one ends like a zip file, so the end is no
evidence.)"""

_LEGACY_PICKLES = 4
"""Number of pickles that a file before PyTorch 1.6 begins with: a magic number, the protocol, sizes of numbers, and the
saved object."""

_WEIGHTS_IN_ARCHIVE = (".bin", ".pth", ".pt", ".th", ".safetensors")


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a released weight file, on the CPU, wrapper prefixes removed.

    Args:
        path: a .safetensors file, or a PyTorch file under any name (.bin, .pth, .model, .th, .tar), or a .tar archive
            that holds one of these.
    Raises:
        CheckpointError: no such file, truncated, holds no weights, or asks for code to be run.
    """
    if not path.is_file():
        raise CheckpointError(f"no weight file {path}. Check the path.")
    if path.suffix == ".safetensors":
        try:
            return strip_wrappers(load_safetensors(path))
        except SafetensorError as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error
    if tarfile.is_tarfile(path):
        try:
            return _read_archive(path)
        except (tarfile.TarError, EOFError, zlib.error, SafetensorError) as error:
            raise CheckpointError(f"{path} is not a whole archive: {_shorten(error)}. Fetch it again.") from error
    return strip_wrappers(_find_state_dict(_load_pickle(path, path), path))


def digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def add_tensors(hashed: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Add names, types, shapes and values of tensors to a digest, in the order of their names."""
    for name, value in sorted(tensors.items()):
        hashed.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        hashed.update(value.detach().cpu().contiguous().numpy().tobytes())


def strip_wrappers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefixes of wrapping modules; a prefix goes only if every name has it."""
    names = list(tensors)
    stripped = True
    while stripped and names:
        stripped = False
        for prefix in _WRAPPERS:
            if all(name.startswith(prefix) for name in names):
                names, stripped = [name.removeprefix(prefix) for name in names], True
    return dict(zip(names, tensors.values(), strict=True))


def _read_archive(path: Path) -> dict[str, Tensor]:
    """The single weight file inside a .tar or .tar.gz archive; nothing is written to disk."""
    with tarfile.open(path) as archive:
        members = [
            member for member in archive.getmembers() if member.isfile() and member.name.endswith(_WEIGHTS_IN_ARCHIVE)
        ]
        if len(members) != 1:
            found = ", ".join(member.name for member in members) or "none"
            raise CheckpointError(f"{path} should hold one weight file; found {found}. Unpack it and name the file.")
        file = archive.extractfile(members[0])
        assert file is not None
        if members[0].name.endswith(".safetensors"):
            return strip_wrappers(load_safetensors_bytes(file.read()))
        return strip_wrappers(_find_state_dict(_load_pickle(file, path), path))


def _load_pickle(file: Path | IO[bytes], path: Path) -> Any:
    """Contents of a PyTorch file, by torch's weights-only reader; classes of other packages become inert stubs."""
    try:
        stubs = _make_stubs(file) if isinstance(file, Path) else []
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
            # The reader stops by itself at what it does not support.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights, and reading it might run code ({_shorten(error)}). "
            "Get the weights as .safetensors, or save only its state dict where you trust the file."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"cannot read {path}: {_shorten(error)}. It may be truncated; fetch it again.") from error


def _make_stubs(path: Path) -> list[Any]:
    """Empty stand-ins for classes that the file names, so that settings and loggers saved with the weights do not
    prevent reading.

    Names outside the standard library, torch and numpy qualify if they are capitalised, or if the file only creates an
    object from them without arguments (`tbLogger` in VOLTA's training states); functions (`os.system`,
    ...) are still refused.
    """
    return [(type(name.rpartition(".")[2], (_Stub,), {}), name) for name in _find_classes(_list_operations(path))]


def _find_classes(operations: Sequence[tuple[str, Any]]) -> list[str]:
    """Dotted names of the foreign classes in the operations of a pickle."""
    made: dict[str, bool] = {}
    for number, (operation, argument) in enumerate(operations):
        if operation == "GLOBAL":
            module, _, last = argument.partition(" ")
            if module.partition(".")[0] in {*sys.stdlib_module_names, "torch", "numpy"}:
                continue
            following = [
                name for name, _ in operations[number + 1 : number + 4] if "PUT" not in name and name != "MEMOIZE"
            ]
            name = f"{module}.{last}"
            made[name] = made.get(name, True) and (last[:1].isupper() or following[:2] == ["EMPTY_TUPLE", "NEWOBJ"])
    return [name for name, is_class in made.items() if is_class]


def _list_operations(path: Path) -> list[tuple[str, Any]]:
    """Name and argument of every operation of the pickle inside a PyTorch file of any age; nothing is executed.
    Empty if it is damaged."""
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) == _ZIP:
                with zipfile.ZipFile(path) as archive:
                    pickles = [
                        archive.read(name) for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"
                    ]
                return [operation for content in pickles for operation in _parse_pickle(io.BytesIO(content))]
            file.seek(0)
            return [operation for _ in range(_LEGACY_PICKLES) for operation in _parse_pickle(file)]
    except (OSError, ValueError, IndexError, UnicodeDecodeError, zipfile.BadZipFile, struct.error):
        return []  # damaged: torch reports it when it reads the file


def _parse_pickle(file: IO[bytes]) -> list[tuple[str, Any]]:
    return [(operation.name, argument) for operation, argument, _ in pickletools.genops(file)]


class _Stub:
    """Takes any arguments and state, does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _shorten(error: Exception) -> str:
    """First line of an error's message, or its kind where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _find_state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    """The name -> tensor mapping in what a file holds."""
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected names and tensors.")
    found = _collect_tensors(loaded)
    if not found:
        raise CheckpointError(
            f"{path} holds no weights: found {', '.join(map(str, list(loaded)[:8])) or 'nothing'}; expected names "
            "and tensors."
        )
    return found


def _collect_tensors(loaded: Mapping[Any, Any]) -> dict[str, Tensor]:
    """Tensors of the first container that holds any, else those next to it: a training state may keep its loss or its
    step as a tensor."""
    for key in _CONTAINERS:
        inner = loaded.get(key)
        if isinstance(inner, Mapping) and (found := _collect_tensors(inner)):
            return found
    return {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}


def check_absent(out: Path) -> None:
    """Refuse to overwrite a file or a folder that holds something."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise CheckpointError(f"{out} exists. Name another place, or remove it: nothing is overwritten.")


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write to that is renamed to `out` at the end, or removed if anything fails."""
    partial = out.with_name(f"{out.name}.part")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except OSError as error:
        raise CheckpointError(f"cannot write {out}: {error}. Free space or use another place.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Wait until no other process writes `target`, and keep the others waiting. The system releases the lock of a
    process that ends, however it ends; on Windows nothing is locked."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    with target.with_name(f".{target.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_tensors(tensors: Mapping[str, Tensor], path: Path, *, checked: bool = False) -> None:
    """Write a weight file whole or not at all; the suffix says which kind.

    Args:
        checked: with its digest in its header (`checked_weights`), as model folders have it; else as others expect it.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            whole = _separate_storage(whole)
            write_checked(whole, part) if checked else save_file(whole, part, metadata={"format": "pt"})
        else:
            torch.save(whole, part)
        part.replace(path)
    except (OSError, SafetensorError, RuntimeError) as error:  # a full disk, by the name that each writer gives it
        raise CheckpointError(f"cannot write {path}: {error}. Free space or use another place.") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _separate_storage(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without shared memory, as safetensors requires."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return found
