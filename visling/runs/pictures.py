"""The region extractor of a run: its initial weights, and the image files that it reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from visling.data.batches.examples import Source
from visling.data.batches.pixels import Pictures
from visling.data.corpora.base import Corpus, CorpusReader, is_genome_number
from visling.data.corpora.readers import find_reader
from visling.data.corpora.reading import record_sources
from visling.errors import ConfigError, DataError, RunError
from visling.image_ids import Aliases
from visling.pretrained.features import load_backbone
from visling.pretrained.folder import ModelFolder, load_part
from visling.recipes.configs import FinetuneConfig, PretrainConfig
from visling.regions.store import NativeStore
from visling.tasks.base import list_images
from visling.types import Record
from visling.vision.image_files import find_images
from visling.vision.pictures import PictureFiles


def check_images_option(config: PretrainConfig | FinetuneConfig, images: Path | None, backbone: Path | None) -> None:
    """Refuse a recipe with an extractor without images, and images without one.

    Raises:
        ConfigError: one without the other.
    """
    if config.extractor is not None and images is None:
        raise ConfigError(
            f"recipe {config.recipe} computes region features from pixels: name the folder of the images with --images."
        )
    options = [option for option, value in (("--images", images), ("--backbone", backbone)) if value is not None]
    if config.extractor is None and options:
        raise ConfigError(
            f"recipe {config.recipe} reads the features of the store and no image: leave out "
            f"{' and '.join(options)}, or use a recipe with an extractor (vlbert-base-e2e, vlbert-base-refcoco+)."
        )


def build_extractor(
    config: PretrainConfig | FinetuneConfig, start: ModelFolder | None, backbone: Path | None
) -> tuple[nn.Module | None, list[str]]:
    """The region extractor with its initial weights, and notes on them for the log.

    Raises:
        ConfigError: two sources of weights.
        CheckpointError: they do not fit.
    """
    if config.extractor is None:
        return None, []
    extractor = config.extractor.build()
    if start is not None and start.extractor is not None:
        if backbone is not None:
            raise ConfigError(
                f"the region extractor can start from {start.path}, which has one, or from {backbone}: give --init or "
                "--backbone."
            )
        load_part(extractor, start.weights, "extractor.", start.path)
        return extractor, []
    if backbone is not None:
        return extractor, [load_backbone(extractor, config.extractor.kind, backbone)]
    return extractor, [
        "the region extractor is randomly initialised, and what the recipe freezes of it stays so; to start from a "
        "trained network, as published runs do, name its file with --backbone"
    ]


def open_pictures(
    saved: ModelFolder, records: Sequence[Record], images: str | Path | None, store: NativeStore
) -> Pictures | None:
    """Pictures of all images of the records, for a model that computes features from them; None for other models.

    Raises:
        RunError: no folder of images.
        DataError: see `find_pictures`.
    """
    if saved.extractor is None:
        return None
    if images is None:
        raise RunError(
            f"{saved.path} computes the features of regions from pixels: name the folder of the images with --images."
        )
    return PictureFiles(find_pictures(list_images(records), Path(images), store), saved.extractor)


def find_corpus_pictures(
    corpora: Iterable[Corpus], folder: Path, sources: Iterable[Source], store: NativeStore
) -> dict[str, Path]:
    """File of every image in the examples of corpora; see `find_pictures`."""
    readers = [find_reader(corpus.kind) for corpus in corpora]
    images = (
        image
        for source in sources
        for part in record_sources(source)
        for record in part.records
        for image in record.images
    )
    numbered = any(isinstance(reader, CorpusReader) and reader.numbered for reader in readers)
    return find_pictures(images, folder, store, numbered=numbered)


def find_pictures(
    images: Iterable[str], folder: Path, store: NativeStore, *, numbered: bool = False
) -> dict[str, Path]:
    """File of every image, found by the image's id, by the store's spelling of it, or by another spelling.

    Args:
        numbered: images with numbers of Visual Genome are found by these numbers alone, which other data sets use too.
    Raises:
        DataError: the folder is missing or empty, lacks a picture, or has several with the same name.
    """
    found: dict[str, list[Path]] = {}
    for path in find_images(folder):
        found.setdefault(path.stem, []).append(path)
    files, stored = Aliases(found), Aliases(store.ids)
    wanted = dict.fromkeys(images)
    pictures: dict[str, Path] = {}
    missing: list[str] = []
    for image in wanted:
        name = image if image in found else stored.find(image)
        if name not in found:
            name = None if numbered and is_genome_number(image) else files.find(image)
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
            f"{folder} lacks {len(missing)} of the {len(wanted)} pictures that the run reads, such as "
            f"{missing[0]!r}. Pictures are named like their image, with any image suffix, in the folder or below "
            "it. Name the folder that the regions were extracted from, or leave out the sentences about missing "
            "pictures."
        )
    return pictures
