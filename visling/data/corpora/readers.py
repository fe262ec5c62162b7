"""Kinds of corpora by name: each module of this package offers some in its `READERS`; anyone's module can, too."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from visling.data.corpora.base import Corpus, CorpusReader, TextReader
from visling.errors import ConfigError, nearest

Reader = CorpusReader | TextReader


@functools.cache
def readers() -> Mapping[str, Reader]:
    """Kinds of corpora of this package."""
    offered: dict[str, Reader] = {}
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        more = getattr(importlib.import_module(f"{__package__}.{module.name}"), "READERS", {})
        twice = sorted(offered.keys() & more.keys())
        assert not twice, f"two modules of {__package__} offer the corpus {twice[0]!r}"
        offered.update(more)
    return offered


def names() -> list[str]:
    """Kinds of corpora of this package."""
    return sorted(readers())


def find_reader(kind: str) -> Reader:
    """The reader of a kind ("captions"), or of one's own by dotted path ("my_package.my_module.kind").

    Raises:
        ConfigError: no such kind, no such module, or one that does not offer the kind.
    """
    path, _, name = kind.rpartition(".")
    if not path:
        if kind not in readers():
            raise ConfigError(
                f"no corpus {kind!r}. {nearest(kind, readers())} "
                "A corpus of your own is given as my_package.my_module.kind."
            )
        return readers()[kind]
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{path}.".startswith(f"{error.name}."):
            raise  # the module is present; something that it imports is not
        raise ConfigError(
            f"no corpus {kind!r}: there is no module {path}. {nearest(name, readers())} "
            "A corpus of your own is given as my_package.my_module.kind."
        ) from error
    offered = getattr(module, "READERS", None)
    if not isinstance(offered, Mapping) or not isinstance(offered.get(name), Reader):
        valid = offered if isinstance(offered, Mapping) else ()
        raise ConfigError(
            f"module {path} offers no corpus {name!r}: expected READERS = a mapping from {name!r} to a "
            f"visling.data.corpora.base.CorpusReader or TextReader. {nearest(name, valid)}"
        )
    reader: Reader = offered[name]
    return reader


def check_corpora(corpora: Sequence[Corpus]) -> None:
    """Refuse kinds that do not exist, and settings that a kind does not read, before any data is read.

    Raises:
        ConfigError: names the nearest kind, or the kinds that have the setting.
    """
    for corpus in corpora:
        reader = find_reader(corpus.kind)
        for setting in dataclasses.fields(corpus):
            unchanged = setting.name in ("kind", "weight") or getattr(corpus, setting.name) == setting.default
            if not unchanged and setting.name not in reader.settings:
                owners = ", ".join(kind for kind, other in readers().items() if setting.name in other.settings)
                raise ConfigError(
                    f"{setting.name} is a setting of {owners}; found it with {corpus.kind}. Leave it out."
                )


def are_text(corpora: Sequence[Corpus]) -> bool:
    """Whether no corpus shows an image.

    Raises:
        ConfigError: an unknown kind.
    """
    return bool(corpora) and all(isinstance(find_reader(corpus.kind), TextReader) for corpus in corpora)


def without_objectives(corpora: Sequence[Corpus], dropped: Collection[str]) -> tuple[Corpus, ...]:
    """The corpora without those that only serve objectives which a run does not learn; if no other has images, these
    stay for their sentences."""
    kept = tuple(corpus for corpus in corpora if find_reader(corpus.kind).serves not in dropped)
    if any(isinstance(find_reader(corpus.kind), CorpusReader) for corpus in kept):
        return kept
    return tuple(corpora)
