"""The catalogue of releases: every entry can be built and read with what its family offers."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlparse

import pytest
import torch
from torch import nn

from visling import models
from visling.checkpoints import catalog
from visling.checkpoints.catalog import ReleasedFile
from visling.checkpoints.keymap import KeyMap
from visling.errors import CheckpointError
from visling.models.base import ModelSpec
from visling.nn.heads import build

RELEASES = [pytest.param(release, id=release.name) for release in catalog.RELEASED_FILES]
GROUPS = {"pair": 2, "score": 4}
"""Kind -> rows of an example."""
EXPECTED: Mapping[str, Mapping[str, int]] = {
    "visualbert": {"official": 9, "transformers": 9, "volta": 1},
    "vlbert": {"official": 4},
    "vilbert": {"first": 8, "multitask": 2, "volta": 2},
    "lxmert": {"official": 1 + 12 + 20, "transformers": 3, "volta": 2},
    "cvlp": {"official": 1},
}
"""Family -> layout -> files that are published."""


def style_of(spec: ModelSpec, layout: str, part: str, kind: str) -> str:
    """As the layout names it for the part or the kind, otherwise as the family's main layout does."""
    named = (spec.head_styles.get((place, name)) for place in (layout, spec.layout) for name in (part, kind))
    return next(style for style in named if style is not None)


def test_every_published_file_is_there_once() -> None:
    names = [release.name for release in catalog.RELEASED_FILES]
    assert len(set(names)) == len(names)
    found: dict[str, dict[str, int]] = {}
    for release in catalog.RELEASED_FILES:
        layouts = found.setdefault(release.family, {})
        layouts[release.layout] = layouts.get(release.layout, 0) + 1
    assert found == EXPECTED
    assert found.keys() == set(models.names())
    sources = [release.source for release in catalog.RELEASED_FILES]
    assert len(set(sources)) == len(sources)


@pytest.mark.parametrize("release", RELEASES)
def test_an_entry_names_a_preset_a_layout_and_a_source(release: ReleasedFile) -> None:
    spec = models.spec(release.family)
    assert release.preset in spec.presets
    assert release.preset not in ("tiny", "scenes"), "not a released configuration"
    assert release.layout in spec.keys
    address = urlparse(release.source)
    assert address.scheme in ("http", "https")
    assert address.netloc
    assert address.path.strip("/")
    assert not any(letter.isspace() for letter in release.source), (
        "an address and nothing else; the rest belongs into the note"
    )
    assert release.licence
    assert release.size is None or release.size > 0
    assert release.megabytes is None or release.size is None, "an exact size needs no rounded one"
    assert release.sha256 is None or len(bytes.fromhex(release.sha256)) == 32


@pytest.mark.parametrize("release", RELEASES)
def test_every_parameter_of_an_entrys_heads_has_a_name_in_its_layout(release: ReleasedFile) -> None:
    spec = models.spec(release.family)
    with torch.device("meta"):
        encoder = models.build_tiny(release.family)
        parts = {
            part: build(
                head,
                encoder.dims,
                style=style_of(spec, release.layout, part, head.kind),
                words=nn.Embedding(head.outputs, encoder.dims.text),
                group=GROUPS.get(head.kind, 1),
            )
            for part, head in release.heads.items()
        }
    ours = {f"{part}.{name}": tensor for part, head in parts.items() for name, tensor in head.state_dict().items()}
    keys = KeyMap(
        tuple(rule for rule in spec.keys[release.layout].rules if rule.kind != "tie")
    )  # second copies are of the encoder's tensors
    assert len(keys.invert(ours)) == len(ours) > len(parts) > 0


@pytest.mark.parametrize("release", RELEASES)
def test_widths_of_an_entrys_heads(release: ReleasedFile) -> None:
    for part, head in release.heads.items():
        if head.kind == "vocabulary":
            assert head.outputs == models.spec(release.family).presets[release.preset].vocab_size
        if head.kind == "region_targets":
            assert head.outputs == sum(head.options.values())
            assert (
                head.options.get("features", 2048) == models.spec(release.family).presets[release.preset].feature_size
            )
        if part in ("matching", "pair"):
            assert head.outputs == 2


def test_an_unknown_name_is_told_the_nearest() -> None:
    assert catalog.find("vqa_fine_tuned").heads["classifier"].outputs == 3129
    with pytest.raises(CheckpointError, match="Did you mean 'vqa_fine_tuned'"):
        catalog.find("vqa_fine_tune")
