"""Names of object classes and attributes, and the lists that the Visual Genome detector was trained with."""

from __future__ import annotations

from pathlib import Path

from visling.errors import DataError

_SHIPPED = Path(__file__).parent / "data/vocabularies"

VISUAL_GENOME_CLASSES = _SHIPPED / "visual_genome_classes.txt"
VISUAL_GENOME_ATTRIBUTES = _SHIPPED / "visual_genome_attributes.txt"
"""1,600 classes and 400 attributes, line by line the ids of released features (`objects_vocab.txt` and
`attributes_vocab.txt` of the release)."""


def read_names(path: str | Path) -> tuple[str, ...]:
    """Names of classes or attributes in the order of their ids, one per line; the first of several synonyms separated
    by commas.

    Raises:
        DataError: the file is missing or not text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the names in {path}: {error}. Expected a text file with one name per line."
        ) from error
    return tuple(line.partition(",")[0].strip() for line in lines)
