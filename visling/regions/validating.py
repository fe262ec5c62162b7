"""Whether the parts of a store fit together, before anything is read from it: a manifest, an index or a shard that was
damaged or forged must not lead to rows that are not there.

Letters  N images.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visling.regions.files import Field
from visling.regions.rows import OPTIONAL

_AT_ONCE = 1 << 20
"""Images that are looked at together: an index may be larger than memory."""


def check_count(value: Any) -> int:
    """A whole number that is not negative.

    Raises:
        ValueError: it is something else.
    """
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"expected a number of 0 or more; found {value!r:.60}")
    return value


def read_fields(described: Any, feature_size: int) -> dict[str, Field]:
    """The fields of a store as its manifest or journal describes them.

    Raises:
        ValueError, TypeError, ...: they are not those of a store (`damage.LAYOUT`).
    """
    fields = {name: Field(**field) for name, field in described.items()}
    types = {"features": ("float16", "float32"), "boxes": ("float32",)}
    types |= {name: (dtype,) for name, dtype in OPTIONAL.items()}
    for name, field in fields.items():
        check_count(field.width)
        if name not in types or field.dtype not in types[name]:
            raise ValueError(f"the field {name!r:.40} of {field.dtype!r:.40} is none of a store")
    if (fields["features"].width, fields["boxes"].width) != (feature_size, 4):
        raise ValueError(
            f"features of width {fields['features'].width} and boxes of width {fields['boxes'].width}; expected "
            f"{feature_size} and 4"
        )
    return fields


def check_manifest(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose entries are of other kinds than a writer's.

    Raises:
        ValueError, KeyError, TypeError, ...: they are (`damage.LAYOUT`).
    """
    for name in ("class_names", "attribute_names"):
        if not isinstance(manifest[name], list) or not all(isinstance(one, str) for one in manifest[name]):
            raise ValueError(f"{name} must be a list of texts; found {manifest[name]!r:.80}")
    settings = manifest["settings"]
    if not isinstance(settings, dict) or not isinstance(settings.get("detector", ""), str | None):
        raise ValueError(f"settings must be an object, and name the folder of the detector; found {settings!r:.80}")
    for name in ("fingerprint", "dtype"):
        if not isinstance(manifest[name], str):
            raise ValueError(f"{name} must be a text; found {manifest[name]!r:.80}")
    read_fields(manifest["fields"], check_count(manifest["feature_size"]))
    check_count(manifest["images"])
    if not isinstance(manifest["shards"], list):
        raise ValueError(f"shards must be a list; found {manifest['shards']!r:.80}")
    end = 0
    for shard in manifest["shards"]:
        if check_count(shard["first_row"]) != end:
            raise ValueError(f"a shard begins at row {shard['first_row']}, where row {end} is expected")
        end += check_count(shard["rows"])
    if end != check_count(manifest["regions"]):
        raise ValueError(f"its shards have {end} regions, its manifest says {manifest['regions']}")


def check_shards(
    fields: Mapping[str, Field],
    described: Sequence[Mapping[str, Any]],
    shards: Sequence[Mapping[str, NDArray[Any]]],
) -> None:
    """Refuse shards whose arrays are not those that the manifest describes.

    Raises:
        ValueError, KeyError: they are not.
    """
    for entry, arrays in zip(described, shards, strict=True):
        for name, field in fields.items():
            array = arrays[name]
            if array.shape != field.shape(entry["rows"]) or array.dtype != field.dtype:
                raise ValueError(
                    f"{entry['file']} has {name} of {array.dtype} and shape {array.shape}; expected {field.dtype} and "
                    f"{field.shape(entry['rows'])}"
                )


def check_index(
    ids: Sequence[str],
    starts: NDArray[Any],
    counts: NDArray[Any],
    sizes: NDArray[Any],
    shard_starts: Sequence[int],
    regions: int,
) -> None:
    """Refuse an index of other images than the ids, or whose images do not lie in a shard each.

    Args:
        ids: (N,).
        starts, counts: (N,) first row and number of rows of each image.
        sizes: (N, 2).
        shard_starts: first row of each shard.
        regions: rows of all shards.
    Raises:
        ValueError: it is.
    """
    number = len(ids)
    for name, array, shape in (
        ("starts", starts, (number,)),
        ("counts", counts, (number,)),
        ("sizes", sizes, (number, 2)),
    ):
        if array.shape != shape or array.dtype.kind != "i":
            raise ValueError(f"its index has {name} of {array.dtype} and shape {array.shape} for {number} images")
    ends = np.array([*shard_starts[1:], regions], np.int64)
    firsts = np.array(shard_starts or [0], np.int64)
    for low, high in itertools.pairwise([*range(0, number, _AT_ONCE), number]):
        start, count = starts[low:high], counts[low:high]
        within = (start >= 0) & (count >= 0) & (start <= regions) & (count <= regions)
        if within.all():
            shard = np.searchsorted(firsts, start, side="right") - 1
            within = (count == 0) | (start + count <= ends[shard])
        if not within.all():
            at = low + int(np.argmin(within))
            raise ValueError(
                f"image {ids[at]!r:.80} lies in rows {starts[at]} to {int(starts[at]) + int(counts[at])} of {regions}, "
                "not in one shard"
            )
