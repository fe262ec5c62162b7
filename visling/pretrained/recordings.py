"""Values that were recorded from official code, read into batches and outputs of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from visling.boxes import to_unit
from visling.errors import CheckpointError
from visling.pretrained.folder import ModelFolder
from visling.types import Batch, Regions, Text


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Inputs, and what was recorded of them, under our names and in our order."""

    batch: Batch
    values: Mapping[str, Tensor]
    optional: tuple[str, ...] = field(default=())
    """Heads: compared where the checkpoint has them."""


def read_official(saved: ModelFolder, folder: Path) -> Recording:
    name, read = _OFFICIAL[saved.model]
    place = folder / name if (folder / name).is_dir() else folder
    try:
        inputs, outputs = load_file(place / "inputs.safetensors"), load_file(place / "outputs.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"no recording in {folder}: {error}. Expected recording.json (visling verify --record), or inputs.safetensors and outputs.safetensors "
            "of an official set."
        ) from error
    try:
        return read(inputs, outputs)
    except KeyError as error:
        raise CheckpointError(
            f"{place} holds no recording of {saved.model}: it lacks {error}. Name the set that was recorded from its release."
        ) from error


def _boxes(like: Tensor) -> Tensor:
    """Whole-image boxes (B, R, 4), for models that read none."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*like.shape[:2], 4)


def _numbered(pattern: str, ours: str, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Layers 0, 1, 2, ... of a recording under our names."""
    found: dict[str, Tensor] = {}
    while (name := pattern.format(len(found))) in recorded:
        found[ours.format(len(found))] = recorded[name]
    return found


def _visualbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    features, mask = inputs["image_feat_variable"], inputs["image_mask"].bool()
    recorded = {name.removeprefix("plain/"): tensor for name, tensor in outputs.items() if name.startswith("plain/")}
    tokens = inputs["bert_input_ids"].shape[1]
    return Recording(
        batch=Batch(
            text=Text(
                ids=inputs["bert_input_ids"],
                mask=inputs["bert_input_mask"].bool(),
                segments=inputs["bert_input_type_ids"],
            ),
            regions=Regions(features=features, boxes=_boxes(features), mask=mask, size=torch.ones(len(mask), 2)),
        ),
        values={
            "embeddings": recorded["embedding_output"],
            **_numbered("layer_{}", "layers.{}", recorded),
            "pooled": recorded["pooled"],
            "vocabulary": recorded["prediction_scores"][:, :tokens],
            "matching": recorded["seq_relationship_score"],
        },
        optional=("vocabulary", "matching"),
    )


def _vlbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    boxes, ids, size = (
        inputs["boxes"],
        inputs["text"],
        inputs["im_info"][:, :2],
    )  # the whole image is the first box; padding is -2
    mask = boxes[:, 1:, 0] > -1.5
    text_mask = ids > 0
    recorded = {name.removeprefix("rel_on/"): tensor for name, tensor in outputs.items() if name.startswith("rel_on/")}
    layers = _numbered("layer_{}", "layers.{}", recorded)
    return Recording(
        batch=Batch(
            text=Text(ids=ids, mask=text_mask, segments=torch.zeros_like(ids)),
            regions=Regions(
                features=boxes[:, 1:, 4:],
                boxes=to_unit(boxes[:, 1:, :4], size) * mask[..., None],
                mask=mask,
                size=size,
                whole=boxes[:, 0, 4:],
                hidden=inputs["mvrc_ops"][:, 1:] == 1,
            ),
        ),
        values={
            **{name: _unpacked(states, text_mask, mask) for name, states in layers.items()},
            "vocabulary": recorded["mlm_logits"],
            "region_targets.classes": recorded["mvrc_logits"][:, 1:],
            "matching": recorded["relationship_logits"],
        },
        optional=("vocabulary", "region_targets.classes", "matching"),
    )


def _unpacked(states: Tensor, text: Tensor, regions: Tensor) -> Tensor:
    """VL-BERT's rows without gaps (text, whole image, regions, [END]) -> (B, T + R + 2, D): text, regions, whole image,
    [END], each in its place."""
    spread = states.new_zeros(len(states), text.shape[1] + regions.shape[1] + 2, states.shape[-1])
    for row, packed in enumerate(states):
        words, count = int(text[row].sum()), int(regions[row].sum())
        spread[row, :words] = packed[:words]
        spread[row, text.shape[1] : text.shape[1] + count] = packed[words + 1 : words + 1 + count]
        spread[row, -2], spread[row, -1] = packed[words], packed[words + 1 + count]
    return spread


def _vilbert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    given = {name.removeprefix("pretrain."): tensor for name, tensor in inputs.items() if name.startswith("pretrain.")}
    recorded = {
        name.removeprefix("pretrain."): tensor for name, tensor in outputs.items() if name.startswith("pretrain.")
    }
    features, mask = given["image_feat"], given["image_attention_mask"].bool()  # the whole image is the first region

    def whole_last(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([tensor[:, 1:], tensor[:, :1]], dim=1) for name, tensor in states.items()}

    return Recording(
        batch=Batch(
            text=Text(ids=given["input_ids"], mask=given["attention_mask"].bool(), segments=given["token_type_ids"]),
            regions=Regions(
                features=features[:, 1:],
                boxes=given["image_loc"][:, 1:, :4],
                mask=mask[:, 1:],
                size=torch.ones(len(mask), 2),
                whole=features[:, 0],
            ),
        ),
        values={
            "text_embeddings": recorded["emb.text"],
            **_numbered("text_layer.{}", "text_layers.{}", recorded),
            **_numbered("co_layer.{}.text", "co_attention_layers.{}.text", recorded),
            **whole_last({"region_embeddings": recorded["emb.image"]}),
            **whole_last(_numbered("image_layer.{}", "region_layers.{}", recorded)),
            **whole_last(_numbered("co_layer.{}.image", "co_attention_layers.{}.regions", recorded)),
            "pooled": recorded["pooled_output_t"] * recorded["pooled_output_v"],
            "vocabulary": recorded["prediction_scores_t"],
            "region_targets.classes": recorded["prediction_scores_v"][:, 1:],
            "matching": recorded["seq_relationship_score"].flip(-1),  # class 0 = fits, there
        },
        optional=("vocabulary", "region_targets.classes", "matching"),
    )


def _lxmert(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    heads = {
        "vocabulary": "logits.lm",
        "matching": "logits.matched",
        "region_targets.classes": "logits.obj",
        "region_targets.attributes": "logits.attr",
        "region_targets.features": "logits.feat",
        "answers": "logits.answer",
    }
    return Recording(
        batch=_lxmert_batch(inputs, inputs["visual_feats"]),
        values={
            "text_embeddings": outputs["hidden.embeddings"],
            **_numbered("hidden.l_layer.{}", "text_layers.{}", outputs),
            "region_embeddings": outputs["hidden.visn_fc"],
            **_numbered("hidden.r_layer.{}", "region_layers.{}", outputs),
            **_numbered("hidden.x_layer.{}.language", "cross_layers.{}.text", outputs),
            **_numbered("hidden.x_layer.{}.vision", "cross_layers.{}.regions", outputs),
            "pooled": outputs["pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
        optional=tuple(heads),
    )


def _cvlp(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    heads = {"vocabulary": "query.logits_lm", "matching": "query.logits_matched", "projection": "query.visn_embed_raw"}
    return Recording(
        batch=_lxmert_batch(inputs, inputs["query_visual_feats"]),
        values={
            "text": outputs["query.language_output"],
            "regions": outputs["query.vision_output"],
            "pooled": outputs["query.pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
        optional=tuple(heads),
    )


def _lxmert_batch(inputs: Mapping[str, Tensor], features: Tensor) -> Batch:
    """All regions are real."""
    return Batch(
        text=Text(ids=inputs["input_ids"], mask=inputs["attention_mask"].bool(), segments=inputs["token_type_ids"]),
        regions=Regions(
            features=features,
            boxes=inputs["visual_pos"],
            mask=torch.ones(features.shape[:2], dtype=torch.bool),
            size=torch.ones(len(features), 2),
        ),
    )


_OFFICIAL: Mapping[str, tuple[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Recording]]] = {
    "visualbert": ("pretraining", _visualbert),
    "vlbert": ("pretrain_single", _vlbert),
    "vilbert": ("", _vilbert),
    "lxmert": ("", _lxmert),
    "cvlp": ("", _cvlp),
}
"""Family -> folder of its pre-training set, and what its official names mean."""
