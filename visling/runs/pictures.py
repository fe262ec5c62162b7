"""Image files of a run whose region extractor is trained end to end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from visling.data.batches.loader import Source
from visling.data.corpora.base import CorpusReader, is_genome_number
from visling.data.corpora.readers import find_reader
from visling.data.corpora.reading import record_sources
from visling.errors import DataError
from visling.image_ids import Aliases
from visling.recipes.configs import PretrainConfig
from visling.regions.store import NativeStore
from visling.vision.extract import find_images


def find_pictures(run: PretrainConfig, folder: Path, sources: Iterable[Source], store: NativeStore) -> dict[str, Path]:
    """File of every image in the examples, found by the image's id, by the store's spelling of it, or by another
    spelling.

    Raises:
        DataError: the folder is missing or empty, lacks a picture, or has several with the same name.
    """
    found: dict[str, list[Path]] = {}
    for path in find_images(folder):
        found.setdefault(path.stem, []).append(path)
    files, stored = Aliases(found), Aliases(store.ids)
    readers = [find_reader(corpus.kind) for corpus in run.corpora]
    exact = any(isinstance(reader, CorpusReader) and reader.numbered for reader in readers)
    images = dict.fromkeys(
        image
        for source in sources
        for part in record_sources(source)
        for record in part.records
        for image in record.images
    )
    pictures: dict[str, Path] = {}
    missing: list[str] = []
    for image in images:
        name = image if image in found else stored.find(image)
        if name not in found:
            name = None if exact and is_genome_number(image) else files.find(image)
        if name is None:
            missing.append(image)
            continue
        if len(found[name]) > 1:
            first, second = found[name][:2]
            raise DataError(
                f"{first} and {second} are both called {name}: either could be image {image!r}. Name a folder with "
                "--images in which no two pictures share a name."
            )
        pictures[image] = found[name][0]
    if missing:
        raise DataError(
            f"{folder} lacks {len(missing)} of the {len(images)} pictures that the run reads, such as "
            f"{missing[0]!r}. Pictures are named like their image, with any image suffix, in the folder or below "
            "it. Name the folder that the regions were extracted from, or leave out the sentences about missing "
            "pictures."
        )
    return pictures
