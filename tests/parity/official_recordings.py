"""Sets recorded from the official releases under their own names, read as recordings of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from visling.boxes import to_unit
from visling.pretrained.verify import Recording
from visling.types import Batch, Regions, Text


def read_official(model: str, folder: Path) -> Recording:
    """The pre-training set of a family under our names and in our order."""
    subfolder, read = _READERS[model]
    inputs, outputs = (load_file(folder / subfolder / f"{name}.safetensors") for name in ("inputs", "outputs"))
    return read(inputs, outputs)


def _whole_image_boxes(like: Tensor) -> Tensor:
    """Whole-image boxes (B, R, 4), for models that read none."""
    return torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(*like.shape[:2], 4)


def _number_layers(pattern: str, ours: str, recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
            regions=Regions(
                features=features, boxes=_whole_image_boxes(features), mask=mask, size=torch.ones(len(mask), 2)
            ),
        ),
        values={
            "embeddings": recorded["embedding_output"],
            **_number_layers("layer_{}", "layers.{}", recorded),
            "pooled": recorded["pooled"],
            "vocabulary": recorded["prediction_scores"][:, :tokens],
            "matching": recorded["seq_relationship_score"],
        },
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
    layers = _number_layers("layer_{}", "layers.{}", recorded)
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
            **{name: _unpack(states, text_mask, mask) for name, states in layers.items()},
            "vocabulary": recorded["mlm_logits"],
            "region_targets.classes": recorded["mvrc_logits"][:, 1:],
            "matching": recorded["relationship_logits"],
        },
    )


def _unpack(states: Tensor, text: Tensor, regions: Tensor) -> Tensor:
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
    own_inputs = {
        name.removeprefix("pretrain."): tensor for name, tensor in inputs.items() if name.startswith("pretrain.")
    }
    recorded = {
        name.removeprefix("pretrain."): tensor for name, tensor in outputs.items() if name.startswith("pretrain.")
    }
    features, mask = (
        own_inputs["image_feat"],
        own_inputs["image_attention_mask"].bool(),
    )  # the whole image is the first region

    def put_whole_last(states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cat([tensor[:, 1:], tensor[:, :1]], dim=1) for name, tensor in states.items()}

    return Recording(
        batch=Batch(
            text=Text(
                ids=own_inputs["input_ids"],
                mask=own_inputs["attention_mask"].bool(),
                segments=own_inputs["token_type_ids"],
            ),
            regions=Regions(
                features=features[:, 1:],
                boxes=own_inputs["image_loc"][:, 1:, :4],
                mask=mask[:, 1:],
                size=torch.ones(len(mask), 2),
                whole=features[:, 0],
            ),
        ),
        values={
            "text_embeddings": recorded["emb.text"],
            **_number_layers("text_layer.{}", "text_layers.{}", recorded),
            **_number_layers("co_layer.{}.text", "co_attention_layers.{}.text", recorded),
            **put_whole_last({"region_embeddings": recorded["emb.image"]}),
            **put_whole_last(_number_layers("image_layer.{}", "region_layers.{}", recorded)),
            **put_whole_last(_number_layers("co_layer.{}.image", "co_attention_layers.{}.regions", recorded)),
            "pooled": recorded["pooled_output_t"] * recorded["pooled_output_v"],
            "vocabulary": recorded["prediction_scores_t"],
            "region_targets.classes": recorded["prediction_scores_v"][:, 1:],
            "matching": recorded["seq_relationship_score"].flip(-1),  # class 0 = fits, there
        },
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
        batch=lxmert_batch(inputs, inputs["visual_feats"]),
        values={
            "text_embeddings": outputs["hidden.embeddings"],
            **_number_layers("hidden.l_layer.{}", "text_layers.{}", outputs),
            "region_embeddings": outputs["hidden.visn_fc"],
            **_number_layers("hidden.r_layer.{}", "region_layers.{}", outputs),
            **_number_layers("hidden.x_layer.{}.language", "cross_layers.{}.text", outputs),
            **_number_layers("hidden.x_layer.{}.vision", "cross_layers.{}.regions", outputs),
            "pooled": outputs["pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
    )


def _cvlp(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Recording:
    heads = {"vocabulary": "query.logits_lm", "matching": "query.logits_matched", "projection": "query.visn_embed_raw"}
    return Recording(
        batch=lxmert_batch(inputs, inputs["query_visual_feats"]),
        values={
            "text": outputs["query.language_output"],
            "regions": outputs["query.vision_output"],
            "pooled": outputs["query.pooled_output"],
            **{ours: outputs[theirs] for ours, theirs in heads.items()},
        },
    )


def lxmert_batch(inputs: Mapping[str, Tensor], features: Tensor) -> Batch:
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


_READERS: Mapping[str, tuple[str, Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Recording]]] = {
    "visualbert": ("pretraining", _visualbert),
    "vlbert": ("pretrain_single", _vlbert),
    "vilbert": ("", _vilbert),
    "lxmert": ("", _lxmert),
    "cvlp": ("", _cvlp),
}
"""Family -> folder of its pre-training set, and what its official names mean."""
