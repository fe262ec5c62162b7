"""Reading weight files of any age without executing anything in them, and writing them whole or not at all."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import pickle
import pickletools
import re
import shutil
import sys
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors_bytes
from safetensors.torch import load_file as load_safetensors
from safetensors.torch import save_file
from torch import Tensor

from visling import damage
from visling.checked_weights import write_checked
from visling.errors import CheckpointError
from visling.pickles import cut_pickle, decode

_CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which training scripts keep the weights, next to other entries."""

_WRAPPERS = ("module.", "_orig_mod.")
"""Prefixes that data-parallel and compiled modules put before every name."""

_ZIP = b"PK\x03\x04"
"""First bytes of current PyTorch files. (A tar archive that holds one ends like a zip file, so the end is no
evidence.)"""

_LEGACY_PICKLES = 5
"""Number of pickles that a file before PyTorch 1.6 begins with: a magic number, the protocol, sizes of numbers, the
saved object, and the list of its storages."""

_WEIGHTS_IN_ARCHIVE = (".bin", ".pth", ".pt", ".th", ".safetensors")

_PACKED: Mapping[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
"""First bytes of a compressed archive -> what unpacks it."""

_LEAST_UNPACKED, _TIMES_UNPACKED = 1 << 26, 50
"""Most bytes that an archive may unpack to: so many, or so many times its own size. Weights shrink by a tenth."""

_LONGEST_NAME = 300
"""Letters of a class or a module."""

_STYLE = re.compile(r"\x1b\[\d*m")
"""What sets letters of a message in bold."""


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
        except (SafetensorError, *damage.TORCH) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}. Fetch it again.") from error
    with _open_archive(path) as archive:
        if archive is not None:
            try:
                return _read_archive(archive, path)
            except CheckpointError:
                raise
            except (SafetensorError, *damage.TAR) as error:
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


class _SparingReader:
    """An open file of which no more is asked for at once than an archive may hold: tarfile allocates what a header
    claims before it looks whether it follows."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file, self._most = file, most
        self.seek, self.tell, self.close = file.seek, file.tell, file.close

    def read(self, size: int) -> bytes:
        if size > self._most:
            raise tarfile.ReadError(f"a member claims {size} bytes, more than {self._most}")
        return self._file.read(size)


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[tarfile.TarFile | None]:
    """The tar archive that a file is, compressed or not; None if it is none."""
    with path.open("rb") as file:
        beginning = file.read(6)
    unpack = next((opens for magic, opens in _PACKED.items() if beginning.startswith(magic)), None)
    with path.open("rb") if unpack is None else unpack(path) as plain:
        try:
            archive = tarfile.open(fileobj=_SparingReader(plain, _count_allowed(path)), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
        except damage.TAR:
            archive = None
        yield archive


def _count_allowed(path: Path) -> int:
    """Most bytes that a file may unpack to."""
    return max(_LEAST_UNPACKED, _TIMES_UNPACKED * path.stat().st_size)


def _read_archive(archive: tarfile.TarFile, path: Path) -> dict[str, Tensor]:
    """The single weight file inside a tar archive; nothing is written to disk."""
    members = [
        member for member in archive.getmembers() if member.isfile() and member.name.endswith(_WEIGHTS_IN_ARCHIVE)
    ]
    if len(members) != 1:
        found = ", ".join(member.name for member in members) or "none"
        raise CheckpointError(f"{path} should hold one weight file; found {found[:500]}. Unpack it and name the file.")
    if members[0].size > (most := _count_allowed(path)):
        raise CheckpointError(
            f"{path}: {members[0].name[:200]} unpacks to {members[0].size} bytes, more than {most}, "
            f"{_TIMES_UNPACKED} times the archive. Unpack it yourself if you trust it, and name the file."
        )
    opened = archive.extractfile(members[0])
    assert opened is not None
    content = opened.read()
    if members[0].name.endswith(".safetensors"):
        return strip_wrappers(load_safetensors_bytes(content))
    return strip_wrappers(_find_state_dict(_load_pickle(io.BytesIO(content), path), path))


def _load_pickle(file: Path | IO[bytes], path: Path) -> Any:
    """Contents of a PyTorch file, by torch's weights-only reader; classes of other packages become inert stubs."""
    try:
        _check_claims(file, path)
        stubs = _make_stubs(file) if isinstance(file, Path) else []
        with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
            # The reader stops by itself at what it does not support.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights, and reading it might run code ({_shorten(error)}). "
            "Get the weights as .safetensors, or save only its state dict where you trust the file."
        ) from error
    except damage.TORCH as error:
        raise CheckpointError(f"cannot read {path}: {_shorten(error)}. It may be truncated; fetch it again.") from error


class _Inert:
    """Stands for every class and function that a pickle names while its tensors are counted: takes anything, does
    nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Inert:
        return super().__new__(cls)

    def __call__(self, *_: Any, **__: Any) -> _Inert:
        return self

    def __setstate__(self, state: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def add(self, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class _AnyName(Mapping[tuple[str, str], Any]):
    """Every name -> `_Inert`."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: tuple[str, str]) -> Any:
        if max(map(len, name)) > _LONGEST_NAME:  # torch looks for it in its message, in a time that grows as its square
            raise pickle.UnpicklingError(f"it names a class of {max(map(len, name))} letters")
        return _Inert

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _check_claims(file: Path | IO[bytes], path: Path) -> None:
    """Refuse a PyTorch file whose tensors claim more numbers than the file has bytes: torch makes room for them before
    it reads them.

    Raises:
        CheckpointError: it claims more, or its pickles are damaged.
    """
    claimed: dict[str, int] = {}

    def count(reference: Any) -> _Inert:
        _, _, key, _, numbers, *_ = reference
        claimed[str(key)] = int(numbers)
        return _Inert()

    with file.open("rb") if isinstance(file, Path) else contextlib.nullcontext(file) as opened:
        size = opened.seek(0, io.SEEK_END)
        try:
            for content in _list_pickles(opened):
                decode(content, names=_AnyName(), load_persistent=count)
        except damage.TORCH as error:
            raise CheckpointError(
                f"cannot read {path}: {_shorten(error)}. It may be truncated; fetch it again."
            ) from error
        opened.seek(0)
    if (total := sum(claimed.values())) > size or min(claimed.values(), default=0) < 0:
        raise CheckpointError(
            f"cannot read {path}: its tensors claim {total} numbers, but it has {size} bytes. It is damaged; fetch it "
            "again."
        )


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
    """Name and argument of every operation of the pickles inside a PyTorch file of any age; nothing is executed."""
    with path.open("rb") as file:
        return [
            (operation.name, argument)
            for content in _list_pickles(file)
            for operation, argument, _ in pickletools.genops(content)
        ]


def _list_pickles(file: IO[bytes]) -> Iterator[bytes]:
    """The pickles inside a PyTorch file of any age: `data.pkl` of an archive, or what an older file begins with."""
    file.seek(0)
    if file.read(len(_ZIP)) == _ZIP:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.filename.rpartition("/")[2] == "data.pkl":
                    if member.compress_type != zipfile.ZIP_STORED:
                        raise ValueError("its data.pkl is compressed, which torch.save does not do")
                    yield archive.read(member)
        return
    file.seek(0)
    for _ in range(_LEGACY_PICKLES):
        yield cut_pickle(cast(BinaryIO, file))


class _Stub:
    """Takes any arguments and state, does nothing."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Stub:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def _shorten(error: Exception) -> str:
    """First line of an error's message, or its kind where it has none."""
    return _STYLE.sub("", (str(error).splitlines() or [type(error).__name__])[0])[:200]


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
