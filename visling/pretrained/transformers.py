"""Model folders as transformers reads them: config.json per family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from visling.pretrained.folder import ModelFolder


def _visualbert_for_transformers(saved: ModelFolder, names: Mapping[str, str]) -> dict[str, Any]:
    config, found = saved.config, set(names.values())
    labels = next(
        (len(saved.weights[f"{place}.linear.bias"]) for place, part in names.items() if part == "classifier"), 2
    )
    if "slots_regions" in found:
        architecture = "VisualBertForRegionToPhraseAlignment"  # has the pre-training heads too
    elif {"vocabulary", "matching"} & found:
        architecture = "VisualBertForPreTraining"
    elif labels == 1:
        architecture = "VisualBertForMultipleChoice"
    elif "classifier" in found:
        architecture = (
            "VisualBertForQuestionAnswering" if config.answer_slot != "none" else "VisualBertForVisualReasoning"
        )
    else:
        architecture = "VisualBertModel"
    return {
        "architectures": [architecture],
        "model_type": "visual_bert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "visual_embedding_dim": config.feature_size + (6 if config.append_spatial else 0),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "layer_norm_eps": config.norm_eps,
        "bypass_transformer": config.bypass,
        "special_visual_initialize": True,
        "pad_token_id": 0,
        **_labels(saved, labels),
    }


def _lxmert_for_transformers(saved: ModelFolder, names: Mapping[str, str]) -> dict[str, Any]:
    config, places = saved.config, {part: place for place, part in names.items()}

    def rows(part: str, output: str, otherwise: int) -> int:
        key = f"{places.get(part, '')}.{output}.bias"
        return len(saved.weights[key]) if key in saved.weights else otherwise

    if places.keys() & {"vocabulary", "matching", "region_targets"}:
        architecture = "LxmertForPreTraining"
    else:
        architecture = "LxmertForQuestionAnswering" if "answers" in places else "LxmertModel"
    answers = rows("answers", "linear", 9500)
    return {
        "architectures": [architecture],
        "model_type": "lxmert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "num_qa_labels": answers,
        "num_object_labels": rows("region_targets", "outputs.classes", 1600),
        "num_attr_labels": rows("region_targets", "outputs.attributes", 400),
        "intermediate_size": config.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout_rate,
        "attention_probs_dropout_prob": config.attention_dropout_rate,
        "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.num_segments,
        "initializer_range": config.init_std,
        "l_layers": config.num_text_layers,
        "r_layers": config.num_region_layers,
        "x_layers": config.num_cross_layers,
        "visual_feat_dim": config.feature_size,
        "visual_pos_dim": 4,
        "task_mask_lm": "vocabulary" in places,
        "task_matched": "matching" in places,
        "task_obj_predict": "region_targets" in places,
        "task_qa": "answers" in places,
        **_labels(saved, answers),
    }


def _labels(saved: ModelFolder, count: int) -> dict[str, Any]:
    """Names of a classifier's outputs, where they are known."""
    answers = list(saved.state.get("answers", []))
    if len(answers) != count:
        return {"num_labels": count} if count != 2 else {}
    return {
        "id2label": {str(number): answer for number, answer in enumerate(answers)},
        "label2id": {answer: n for n, answer in enumerate(answers)},
    }


CONFIGS: Mapping[str, Callable[[ModelFolder, Mapping[str, str]], dict[str, Any]]] = {
    "visualbert": _visualbert_for_transformers,
    "lxmert": _lxmert_for_transformers,
}
"""Family -> config.json of its classes in transformers, from a model folder and the part that each place became."""
