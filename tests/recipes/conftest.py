"""Released weights for tests: the recorded small ones, and names and shapes at full size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from visling import models

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A small file in a released layout, and the settings of its model."""

    model: str
    layout: str
    config: Any
    weights: Mapping[str, Tensor]
    folder: Path
    """Its recorded set."""
    answers: int = 0
    """Outputs of its classifier over answers."""

    def save(self, path: Path) -> Path:
        """The file as a training script writes it."""
        torch.save({f"module.{name}": tensor for name, tensor in self.weights.items()}, path)
        return path


@dataclass(frozen=True, kw_only=True)
class FullSize:
    """A released file at full size: names and shapes."""

    model: str
    layout: str
    preset: str
    shapes: Shapes
    answers: int = 0

    def weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values; what is stored twice is equal."""
        made = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in self.shapes.items()}
        for name in made:
            if name.endswith("predictions.decoder.weight"):
                (words,) = (key for key in made if key.endswith("word_embeddings.weight"))
                made[name] = made[words]
        return made


@pytest.fixture(scope="session")
def word_pieces(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Path of a vocabulary of so many entries."""
    folder = tmp_path_factory.mktemp("word_pieces")

    def write(size: int) -> str:
        path = folder / f"{size}.txt"
        path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(size - 5))]) + "\n")
        return str(path)

    return write


@pytest.fixture
def recorded(golden: Path, word_pieces: Callable[[int], str]) -> Callable[[str], Recorded]:
    """The small file of a name: a family's pre-trained weights, or one of its fine-tuned for VQA."""

    def sizes(folder: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((golden / folder / "config.json").read_text())["hyper_parameters"]
        return found

    def common(found: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "vocab_size": found["vocab_size"],
            "hidden_size": found["hidden_size"],
            "num_heads": found["num_attention_heads"],
            "intermediate_size": found["intermediate_size"],
            "max_positions": found["max_position_embeddings"],
            "max_tokens": found["max_position_embeddings"],
            "vocabulary": word_pieces(found["vocab_size"]),
        }

    def visualbert(task: str) -> Recorded:
        folder, found = golden / "visualbert", sizes("visualbert")
        config = models.spec("visualbert").config(**common(found), num_layers=found["num_hidden_layers"], feature_size=found["visual_embedding_dim"])
        weights = load_file(folder / "state_dict.safetensors")
        if task:
            head = load_file(folder / task / "head_state.safetensors")
            bare = {name: tensor for name, tensor in weights.items() if not name.startswith("bert.cls.")}
            weights = (weights if task == "flickr" else bare) | head
            config = replace(config, answer_slot="same_segment" if task == "vqa" else "none")
        answers = found["vqa_answers"] if task == "vqa" else 0
        return Recorded(model="visualbert", layout="official", config=config, weights=weights, folder=folder, answers=answers)

    def vlbert(task: str) -> Recorded:
        folder, found = golden / "vlbert", sizes("vlbert")
        settings = {
            **common(found),
            "max_tokens": found["max_position_embeddings"] - 2,
            "num_layers": found["num_hidden_layers"],
            "feature_size": found["appearance_feature_dim"],
            "coordinate_size": found["coordinate_embedding_dim"],
            "visual_size": found["visual_size"],
        }
        weights = load_file(folder / "pretrain_single" / "state_dict.safetensors")
        if task:
            kept = ("image_feature_extractor.", "object_linguistic_embeddings.", "vlbert.")
            left = ("_head.", "vlbert.pooler.")
            weights = {name: tensor for name, tensor in weights.items() if name.startswith(kept) and not any(word in name for word in left)}
            weights |= load_file(folder / task / "head_state.safetensors")
        config = models.spec("vlbert").config(**settings, answer_slot="second_segment" if task == "vqa" else "none")
        answers = found["vqa_answers"] if task == "vqa" else 0
        return Recorded(model="vlbert", layout=task or "official", config=config, weights=weights, folder=folder, answers=answers)

    def vilbert(task: str) -> Recorded:
        folder, found = golden / "vilbert", sizes("vilbert")
        config = models.spec("vilbert").config(
            **common(found),
            num_layers=found["num_hidden_layers"],
            region_hidden_size=found["v_hidden_size"],
            num_region_layers=found["v_num_hidden_layers"],
            num_region_heads=found["v_num_attention_heads"],
            region_intermediate_size=found["v_intermediate_size"],
            co_attention_size=found["bi_hidden_size"],
            num_co_attention_heads=found["bi_num_attention_heads"],
            pooled_size=found["bi_hidden_size"],
            text_layers_before=tuple(found["t_biattention_id"]),
            region_layers_before=tuple(found["v_biattention_id"]),
            feature_size=found["v_feature_size"],
        )
        answers = json.loads((folder / "config.json").read_text())["answer_vocabulary_sizes"]["vqa"] if task else 0
        weights, layout = load_file(folder / "state_dict.safetensors"), "multitask"
        if task == "vqa":
            extras = load_file(folder / "state_dict_extras.safetensors")
            weights = {name: tensor for name, tensor in weights.items() if name.startswith("bert.")}
            added = {name.split(":")[1]: tensor for name, tensor in extras.items() if name.startswith("beta_vqa_head:")}
            weights, layout = (
                weights | {name if name.startswith("vil_") else f"vil_prediction.{name}": tensor for name, tensor in added.items()},
                "first",
            )
        elif task == "multitask":
            weights = load_file(folder / "state_dict_vltasks.safetensors")
            config = replace(config, num_tasks=len(weights["bert.embeddings.task_embeddings.weight"]))
        return Recorded(model="vilbert", layout=layout, config=config, weights=weights, folder=folder, answers=answers)

    def lxmert(task: str, model: str = "lxmert") -> Recorded:
        folder, found = golden / model, sizes(model)
        config = models.spec(model).config(
            **common(found),
            num_text_layers=found["l_layers"],
            num_region_layers=found["r_layers"],
            num_cross_layers=found["x_layers"],
            feature_size=found["visual_feat_dim"],
        )
        weights = load_file(folder / ("state_dict.safetensors" if model == "lxmert" else "query_state_dict.safetensors"))
        if task:
            heads = load_file(folder / "finetune_heads.safetensors")
            weights = {f"lxrt_encoder.model.{name}": tensor for name, tensor in weights.items() if name.startswith("bert.")}
            weights |= {name.removeprefix(f"{task}."): tensor for name, tensor in heads.items() if name.startswith(task)}
        layout = "official_finetuned" if task else "official"
        answers = found["num_vqa_answers"] if task == "vqa" else 0
        return Recorded(model=model, layout=layout, config=config, weights=weights, folder=folder, answers=answers)

    makers = {"visualbert": visualbert, "vlbert": vlbert, "vilbert": vilbert, "lxmert": lxmert, "cvlp": lambda task: lxmert(task, "cvlp")}

    def find(name: str) -> Recorded:
        family, _, task = name.partition(" ")
        return makers[family](task)

    return find


@pytest.fixture
def full_size(golden: Path) -> Callable[[str], dict[str, FullSize]]:
    """Variant -> released file of a family at full size, from its manifest; CVLP's follows from LXMERT's."""

    def read(family: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((golden / family / "manifest_full.json").read_text())
        return found

    def visualbert() -> dict[str, FullSize]:
        first, *others = (manifest := read("visualbert")).items()
        shapes = {first[0]: first[1]}
        for name, about in others:
            added = about.get("changed_or_added", about)
            shapes[name] = {key: shape for key, shape in {**first[1], **added}.items() if key not in about.get("removed", ())}
        assert len(shapes) == len(manifest)
        presets = {"flickr": "flickr30k", "bypass": "vqa_bypass"}
        return {
            name.partition(" ")[0]: FullSize(
                model="visualbert",
                layout="official",
                preset=presets.get(name.split("_")[0], name.split("_")[0]),
                shapes=found,
                answers=3129 if name.startswith("vqa_fine") else 0,
            )
            for name, found in shapes.items()
        }

    def vlbert() -> dict[str, FullSize]:
        manifest = read("vlbert")
        prec = manifest["base_prec_pretrain_multitask"]
        network = next(shapes for name, shapes in manifest.items() if name.startswith("base_e2e_pretrain_multitask__beyond_prec"))
        twins = {key.replace("roi_head_feature_extractor", "head.0"): shape for key, shape in network.items() if "roi_head_feature_extractor" in key}
        e2e = (
            {key: shape for key, shape in prec.items() if key not in manifest["base_e2e_pretrain_multitask__not_present_but_in_prec"]}
            | network
            | twins
        )
        large = manifest["large_prec_pretrain_multitask__non_encoder_and_layer0"]
        layer = {key: shape for key, shape in large.items() if ".layer.0." in key}
        large = large | {key.replace(".layer.0.", f".layer.{number}."): shape for key, shape in layer.items() for number in range(24)}
        trained = {
            key: shape for key, shape in prec.items() if not key.startswith(("vlbert.mlm_head.", "vlbert.mvrc_head.", "object_mask_", "aux_text_"))
        }
        vqa = trained | manifest["base_vqa_prec__keys_beyond_base_prec_pretrain"]
        return {
            "prec": FullSize(model="vlbert", layout="official", preset="base_prec", shapes=prec),
            "e2e": FullSize(model="vlbert", layout="official", preset="base_e2e", shapes=e2e),
            "large": FullSize(model="vlbert", layout="official", preset="large_prec", shapes=large),
            "vqa": FullSize(model="vlbert", layout="vqa", preset="base_vqa", shapes=vqa, answers=3129),
        }

    def vilbert() -> dict[str, FullSize]:
        pretraining = read("vilbert")
        extra = json.loads((golden / "vilbert" / "manifest_full_vltasks_extra.json").read_text())
        return {
            "pretraining": FullSize(model="vilbert", layout="multitask", preset="connect6", shapes=pretraining),
            "multitask": FullSize(model="vilbert", layout="multitask", preset="multitask", shapes=pretraining | extra, answers=3129),
        }

    def lxmert() -> dict[str, FullSize]:
        shapes = {name: tuple(about["shape"]) for name, about in read("lxmert")["official"]["state_dict"].items()}
        renamed = {f"lxmert.{name.removeprefix('bert.')}" if name.startswith("bert.") else name: shape for name, shape in shapes.items()}
        answers = {name: (3129, *shape[1:]) if ".3." in name else shape for name, shape in shapes.items() if name.startswith("answer_head.")}
        tuned = {f"lxrt_encoder.model.{name}": shape for name, shape in shapes.items() if name.startswith("bert.")}
        tuned |= {name.removeprefix("answer_head."): shape for name, shape in answers.items()}
        return {
            "official": FullSize(model="lxmert", layout="official", preset="base", shapes=shapes),
            "transformers": FullSize(model="lxmert", layout="transformers", preset="base", shapes=renamed),
            "vqa": FullSize(model="lxmert", layout="official_finetuned", preset="base", shapes=tuned, answers=3129),
        }

    def cvlp() -> dict[str, FullSize]:
        shapes = dict(lxmert()["official"].shapes)
        for head in ("visual_embed_head", "lang_embed_head"):
            for number, weight in ((0, (1536, 768)), (2, (1536,)), (3, (128, 1536))):
                shapes |= {f"{head}.logit_fc.{number}.weight": weight, f"{head}.logit_fc.{number}.bias": weight[:1]}
        return {"official": FullSize(model="cvlp", layout="official", preset="base", shapes=shapes)}

    makers = {"visualbert": visualbert, "vlbert": vlbert, "vilbert": vilbert, "lxmert": lxmert, "cvlp": cvlp}
    return lambda family: makers[family]()
