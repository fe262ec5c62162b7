"""Zero-shot retrieval from files to files: recorded weights of both ViLBERT releases are converted, recorded regions
become a store, and `visling evaluate --zero-shot` ranks Flickr30K's JSON lines as the releases' own script did.

Compared are the scores of the images that the releases and we read alike: no more regions than the model takes, no box
that leaves the image (`test_vilbert_retrieval.py` compares the others, converted). The first release cuts long captions
differently; its uncut ones are compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from visling.cli.app import app
from visling.models.vilbert import VilbertConfig
from visling.pretrained.convert import convert
from visling.regions.writer import StoreWriter
from visling.runs.retrieve import Retrieved, retrieve
from visling.types import RegionArray

LAYOUTS = {"beta": "first", "mt": "multitask"}


class Files:
    """The recorded evaluation of one release as what a user has: a model folder, annotations and a store."""

    def __init__(self, golden: Path, release: str, folder: Path) -> None:
        self.recorded = golden / "vilbert_tasks" / "retrieval"
        self.data, self.release = self.recorded / "data" / "flickr30k", release
        self.about = json.loads((self.recorded / f"rows_{release}_val.json").read_text(encoding="utf-8"))
        self.store, self.model = folder / "regions", folder / "model"
        self._write_store(self.store)
        sizes = json.loads((golden / "vilbert" / "config.json").read_text(encoding="utf-8"))["hyper_parameters"]
        shutil.copyfile(golden / "vilbert_tasks" / "vocab.txt", folder / "vocab.txt")
        config = VilbertConfig(
            vocab_size=sizes["vocab_size"],
            hidden_size=sizes["hidden_size"],
            num_layers=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            intermediate_size=sizes["intermediate_size"],
            max_positions=sizes["max_position_embeddings"],
            region_hidden_size=sizes["v_hidden_size"],
            num_region_layers=sizes["v_num_hidden_layers"],
            num_region_heads=sizes["v_num_attention_heads"],
            region_intermediate_size=sizes["v_intermediate_size"],
            co_attention_size=sizes["bi_hidden_size"],
            num_co_attention_heads=sizes["bi_num_attention_heads"],
            pooled_size=sizes["bi_hidden_size"],
            text_layers_before=tuple(sizes["t_biattention_id"]),
            region_layers_before=tuple(sizes["v_biattention_id"]),
            feature_size=sizes["v_feature_size"],
            max_tokens=self.about["max_seq_length"],
            max_regions=self.about["max_region_num"] - 1,
            vocabulary=str(folder / "vocab.txt"),
        )
        weights = load_file(golden / "vilbert" / "state_dict.safetensors")
        weights.pop("bert.embeddings.task_embeddings.weight", None)
        save_file(weights, folder / "released.safetensors")
        convert(
            folder / "released.safetensors", self.model,
            model="vilbert", layout=LAYOUTS[release], config=config, features=self.store,
        )  # fmt: skip

    def _write_store(self, path: Path) -> None:
        """The recorded regions of every image, in the precision of the recording."""
        with np.load(self.recorded / "data" / "features.npz") as content:
            arrays = dict(content)
        images = sorted({name.partition("/")[0] for name in arrays})
        width = arrays[f"{images[0]}/features"].shape[1]
        with StoreWriter(path, feature_size=width, fingerprint="recorded", dtype="float32") as writer:
            for image in images:
                tall, wide = arrays[f"{image}/size"].tolist()
                corners = np.array([wide, tall, wide, tall], np.float32)
                boxes = arrays[f"{image}/boxes"].clip(0, corners)
                features = arrays[f"{image}/features"]
                writer.add(image, RegionArray(features=features, boxes=boxes, size=(int(wide), int(tall))))
                writer.commit()

    def read_alike(self, images: tuple[str, ...]) -> NDArray[np.bool_]:
        """Which images the releases and we read alike."""
        with np.load(self.recorded / "data" / "features.npz") as content:

            def is_alike(image: str) -> bool:
                boxes, (tall, wide) = content[f"{image}/boxes"], content[f"{image}/size"].tolist()
                inside = bool((boxes >= 0).all() and (boxes <= [wide, tall, wide, tall]).all())
                return inside and len(boxes) < self.about["max_region_num"]

            return np.array([is_alike(image) for image in images])

    def uncut(self) -> NDArray[np.bool_]:
        """Which captions end with [SEP], as all of ours do."""
        with np.load(self.recorded / f"eval_inputs_{self.release}.npz") as content:
            tokens, mask = content["tokens"], content["input_mask"].astype(bool)
        pieces = (self.model / "vocab.txt").read_text(encoding="utf-8").split("\n")
        last = tokens[np.arange(len(tokens)), mask.sum(1) - 1]
        return np.array([pieces[piece] == "[SEP]" for piece in last])

    def scores(self) -> tuple[Retrieved, NDArray[Any], NDArray[Any]]:
        """Our ranking, our probabilities and the recorded ones, of what is read alike."""
        found = retrieve(self.model, data=self.data, store=self.store, split="test", device="cpu", batch_size=60)
        images, captions = self.read_alike(found.images), self.uncut()
        with np.load(self.recorded / f"eval_{self.release}_zero_shot.npz") as content:
            theirs = content["score_matrix"].T
        ours = 1 / (1 + np.exp(-found.scores.astype(float)))
        assert ours.shape == theirs.shape
        return found, ours[np.ix_(images, captions)], theirs[np.ix_(images, captions)]


@pytest.mark.parametrize("release", LAYOUTS)
def test_a_converted_model_ranks_as_the_release(golden: Path, tmp_path: Path, release: str) -> None:
    files = Files(golden, release, tmp_path)
    found, ours, theirs = files.scores()
    assert min(ours.shape) > 2, "too little is read alike"
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(ours[::-1], theirs, rtol=1e-5, atol=1e-5)

    asked = ["--zero-shot", "--split", "test", "--batch-size", "60", "--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        app(["evaluate", str(files.model), *asked, "--data", str(files.data), "--store", str(files.store)])
    assert not ended.value.code
    scored = json.loads((files.model / "evaluation_test.json").read_text(encoding="utf-8"))
    assert scored["variants"]["score"] == "alignment"
    assert {name: score["value"] for name, score in scored["scores"].items()} == {
        name: score.value for name, score in found.report.scores.items()
    }
    rows = [json.loads(line) for line in (files.model / "details_test.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [found.images[at] for at in found.scores.argmax(0)]
