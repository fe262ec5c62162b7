"""What `regions check` finds: each kind of problem, with the image that has it, and nothing in a sound store."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures.region_stores import COUNTS, F, regions, write

from visling.regions.checking import Problem, find_problems
from visling.regions.files import INDEX, MANIFEST, describe_file, read_tensors, write_tensors
from visling.regions.store import NativeStore
from visling.regions.writer import StoreWriter
from visling.types import RegionArray


def image(count: int = 3, **changes: Any) -> RegionArray:
    """Regions with labels among 9 classes and 4 attributes, and distributions."""
    found = regions(0, count, details=True)
    probs = np.random.default_rng(0).dirichlet(np.ones(9), count).astype(np.float16)
    fields: dict[str, Any] = {
        name: np.array(getattr(found, name)) for name in ("features", "boxes", "classes", "class_confidence")
    }
    fields |= {name: np.array(getattr(found, name)) for name in ("attributes", "attribute_confidence")}
    fields |= {"probs": probs, "size": found.size, **changes}
    fields["classes"] = np.minimum(fields["classes"], 7) if "classes" not in changes else fields["classes"]
    return RegionArray(**fields)


def store_of(path: Path, images: dict[str, RegionArray], **settings: Any) -> NativeStore:
    with StoreWriter(path, feature_size=F, fingerprint="x", **settings) as writer:
        for image_id, found in images.items():
            writer.add(image_id, found)
    return NativeStore.open(path)


def overwrite(store: NativeStore, field: str, change: Callable[[np.ndarray[Any, Any]], None]) -> NativeStore:
    """The store with some numbers of its only shard changed, and the digest that belongs to them."""
    (shard,) = store.path.glob("shard-*.safetensors")
    arrays = {name: np.array(array) for name, array in read_tensors(shard).items()}
    change(arrays[field])
    write_tensors(shard, arrays)
    manifest = json.loads((store.path / MANIFEST).read_text())
    manifest["shards"] = [manifest["shards"][0] | describe_file(shard)]
    (store.path / MANIFEST).write_text(json.dumps(manifest))
    return NativeStore.open(store.path)


def put(rows: Any, value: Any) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(array: np.ndarray[Any, Any]) -> None:
        array[rows] = value

    return change


def test_a_sound_store_has_no_problem(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    assert not list(find_problems(write(tmp_path / "plain", shard_bytes=100), lambda *now: shown.append(now)))
    assert shown == [(number, len(COUNTS)) for number in range(1, len(COUNTS) + 1)]
    store = store_of(tmp_path / "all", {"a": image(), "b": image(0), "c": image(2)}, class_names=list("abcdefgh"))
    assert not list(find_problems(store))
    assert not list(find_problems(store_of(tmp_path / "empty", {})))


@pytest.mark.parametrize(
    ("field", "rows", "value", "kind", "what"),
    [
        ("features", (1, 2), np.nan, "number", "1 of 3 regions have features that are not finite"),
        ("features", 0, np.inf, "number", "1 of 3 regions have features"),
        ("probs", (2, 3), np.nan, "number", "1 of 3 regions have probs"),
        ("boxes", (0, 2), -3, "box", "1 of 3 boxes are inverted"),
        ("boxes", (1, 2), 999, "box", r"1 of 3 boxes leave the image of 120 x 100, by up to 879\.0 pixels\.$"),
        ("boxes", 0, [50, 50, 90, 110], "box", "by up to 10.0 pixels. They fit an image of swapped width and height"),
        ("boxes", slice(3), [0, 0, 1, 1], "box", "look like unit corners"),
        ("classes", 1, 8, "label", "has classes from . to 8; expected 0 to 7"),
        ("classes", 1, -1, "label", "has classes from -1 to"),
        ("attributes", (2, 1), 4, "label", "has attributes from -?. to 4; expected -1 to 3"),
        ("probs", 1, 0.25, "distribution", r"1 of 3 class distributions do not sum to 1; found 2\.250"),
    ],
)
def test_each_problem_is_found_with_its_image(
    tmp_path: Path, field: str, rows: Any, value: Any, kind: str, what: str
) -> None:
    names = {"class_names": list("abcdefgh"), "attribute_names": list("abcd")}
    store = store_of(tmp_path / "store", {"first": image(), "other": image(2)}, **names)
    found = list(find_problems(overwrite(store, field, put(rows, value))))
    assert {problem.image for problem in found} == {"first"}
    assert (kind, True) in {(problem.kind, says(problem, what)) for problem in found}, found


def says(problem: Problem, what: str) -> bool:
    return re.search(what, problem.what) is not None


def test_labels_are_compared_with_the_distribution_where_they_have_no_names(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", {"first": image()})
    (found,) = find_problems(overwrite(store, "classes", put(0, 8)))
    assert (found.kind, found.image) == ("label", "first")
    assert "expected 0 to 7" in found.what, "the last of nine columns is the background"


def test_an_image_that_is_stored_twice_is_found(tmp_path: Path) -> None:
    """Visual Genome's image 9 is another than COCO's, COCO's names of one image are not."""
    one = regions(1, 3)
    images = {"COCO_val2014_000000000009": one, "COCO_train2014_000000000009": one, "9": regions(2, 3), "10": one}
    (found,) = find_problems(store_of(tmp_path / "store", images))
    assert (found.kind, found.image) == ("alias", "COCO_val2014_000000000009")
    assert "is stored as 'COCO_train2014_000000000009' too" in found.what


@pytest.mark.parametrize(
    ("array", "place", "value", "kind", "image_id"),
    [
        ("starts", 1, 1, "index", "b"),
        ("counts", 1, 1, "index", None),
        ("sizes", (0, 0), 0, "size", "a"),
        ("ids", -1, ord("a"), "id", "a"),
    ],
)
def test_a_wrong_index_is_found(
    tmp_path: Path, array: str, place: Any, value: int, kind: str, image_id: str | None
) -> None:
    store = store_of(tmp_path, {"a": regions(0, 2), "b": regions(1, 3)})
    index = {name: np.array(found) for name, found in read_tensors(tmp_path / INDEX).items()}
    index[array][place] = value
    write_tensors(tmp_path / INDEX, index)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["index"] = describe_file(tmp_path / INDEX)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    found = {(problem.kind, problem.image) for problem in find_problems(NativeStore.open(store.path))}
    assert (kind, image_id) in found
