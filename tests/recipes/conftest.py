"""Released weights for tests: the recorded small ones, and names and shapes at full size. Small corpora of the true layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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
    answers: tuple[int, ...] = ()
    """Outputs of its classifiers over answers."""

    def weights(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random values; what is stored twice is equal."""
        made = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in self.shapes.items()}
        _, coverage = models.spec(self.model).keys[self.layout].convert({name: tensor.to("meta") for name, tensor in made.items()})
        return made | {copy: made[original] for copy, original in coverage.tied.items()}


def volta_shapes(
    *, text: Sequence[int], regions: Sequence[int], both: Sequence[int], text_forward: Sequence[int], region_forward: Sequence[int], others: Shapes
) -> Shapes:
    """VOLTA's names at width 768, from its lists of sub-layers (attention within the text, within the regions, across; feed-forward)."""
    shapes = dict(others)
    for mark, attention, forward in (("", {*text, *both}, text_forward), ("v_", {*regions, *both}, region_forward)):
        linear = {f"{n}.attention_self.{mark}{name}": (768, 768) for n in attention for name in ("query", "key", "value")}
        linear |= {f"{n}.attention_output.{mark}dense": (768, 768) for n in attention}
        linear |= {f"{n}.intermediate.{mark}dense": (3072, 768) for n in forward} | {f"{n}.output.{mark}dense": (768, 3072) for n in forward}
        norms = [*(f"{n}.attention_output.{mark}LayerNorm" for n in attention), *(f"{n}.output.{mark}LayerNorm" for n in forward)]
        shapes |= {f"bert.encoder.layer.{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"bert.encoder.layer.{name}.bias": shape[:1] for name, shape in linear.items()}
        shapes |= {f"bert.encoder.layer.{name}.{part}": (768,) for name in norms for part in ("weight", "bias")}
    return shapes


def volta_others(embeddings: Shapes, poolers: Shapes, decoders: Shapes) -> dict[str, tuple[int, ...]]:
    """VOLTA's names outside the layers: what all models have, and what one has beside it."""
    tables = {f"bert.embeddings.{name}_embeddings.weight": (rows, 768) for name, rows in (("word", 30522), ("position", 512), ("token_type", 2))}
    linear = {**embeddings, **poolers, **decoders}
    linear |= {f"cls.{head}.transform.dense": (768, 768) for head in ("predictions", "imagePredictions")}
    norms = ["bert.embeddings.LayerNorm", "cls.predictions.transform.LayerNorm", "cls.imagePredictions.transform.LayerNorm"]
    return {
        **tables,
        "cls.predictions.bias": (30522,),
        "cls.predictions.decoder.weight": (30522, 768),
        **{f"{name}.weight": shape for name, shape in linear.items()},
        **{f"{name}.bias": shape[:1] for name, shape in linear.items()},
        **{f"{name}.{part}": (768,) for name in norms for part in ("weight", "bias")},
    }


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
        # as transformers calls them; the specification's table of names
        names = {"token_type_embeddings_visual": "visual_token_type_embeddings", "position_embeddings_visual": "visual_position_embeddings"}
        names |= {"bert.bert.embeddings.projection": "visual_bert.embeddings.visual_projection", "bert.bert": "visual_bert"}
        names |= {"bert.cls": "cls", "bert.classifier": "cls"}

        def renamed(name: str) -> str:
            for theirs, newer in names.items():
                name = name.replace(theirs, newer)
            return name

        ported = {
            f"transformers_{wanted}": {renamed(key): shape for key, shape in known.items()}
            for wanted in ("vqa_pretraining", "vqa_finetuned")
            for name, known in shapes.items()
            if name.partition(" ")[0] == wanted
        }
        ported["transformers_vqa_pretraining"]["cls.predictions.decoder.bias"] = [30522]
        others = volta_others(
            {"bert.embeddings.projection": (768, 2048)},
            {"bert.t_pooler.dense": (1024, 768), "bert.v_pooler.dense": (1024, 768), "cls.bi_seq_relationship": (2, 1024)},
            {"cls.imagePredictions.decoder_dict.0": (1601, 768)},
        )
        others |= {f"bert.embeddings.{name}_embeddings_visual.weight": (rows, 768) for name, rows in (("position", 512), ("token_type", 2))}
        attention, forward = range(0, 24, 2), range(1, 24, 2)
        volta = volta_shapes(text=(), regions=(), both=attention, text_forward=forward, region_forward=forward, others=others)
        found = {
            name: FullSize(model="visualbert", layout="transformers", preset="vqa", shapes=ported[name], answers=(3129,) * name.endswith("finetuned"))
            for name in ported
        }
        found["volta"] = FullSize(model="visualbert", layout="volta", preset="ctrl", shapes=volta)
        return found | {
            name.partition(" ")[0]: FullSize(
                model="visualbert",
                layout="official",
                preset=presets.get(name.split("_")[0], name.split("_")[0]),
                shapes=known,
                answers=(3129,) if name.startswith("vqa_fine") else (),
            )
            for name, known in shapes.items()
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
        # end to end: also without the whole-image word of text-only rows, and with the network
        tuned = {key: shape for key, shape in trained.items() if key != "aux_text_visual_embedding.weight"} | network | twins
        refcoco = tuned | manifest["base_refcoco_e2e__keys_beyond_base_e2e_pretrain"]
        vcr = {key.replace("vlbert.", "vlbert._module."): shape for key, shape in tuned.items()}
        vcr |= next(shapes for name, shapes in manifest.items() if name.startswith("base_vcr_e2e__keys_beyond"))
        return {
            "prec": FullSize(model="vlbert", layout="official", preset="base_prec", shapes=prec),
            "e2e": FullSize(model="vlbert", layout="official", preset="base_e2e", shapes=e2e),
            "large": FullSize(model="vlbert", layout="official", preset="large_prec", shapes=large),
            "vqa": FullSize(model="vlbert", layout="vqa", preset="base_vqa", shapes=vqa, answers=(3129,)),
            "refcoco": FullSize(model="vlbert", layout="refcoco", preset="base_refcoco", shapes=refcoco),
            "vcr": FullSize(model="vlbert", layout="vcr", preset="base_vcr", shapes=vcr),
        }

    def vilbert() -> dict[str, FullSize]:
        pretraining = read("vilbert")
        extra = json.loads((golden / "vilbert" / "manifest_full_vltasks_extra.json").read_text())
        first = {f"vil_prediction.main.{number}.weight_g": () for number in (0, 3)}
        first |= {"vil_prediction.main.0.weight_v": (2048, 1024), "vil_prediction.main.3.weight_v": (3129, 2048)}
        first |= {"vil_prediction.main.0.bias": (2048,), "vil_prediction.main.3.bias": (3129,)}
        first |= {key: shape for key, shape in extra.items() if key.startswith(("vil_logit.", "vision_logit.", "linguisic_logit."))}
        others = volta_others(
            {"bert.v_embeddings.image_embeddings": (768, 2048), "bert.v_embeddings.image_location_embeddings": (768, 5)},
            {"bert.t_pooler.dense": (1024, 768), "bert.v_pooler.dense": (1024, 768), "cls.bi_seq_relationship": (2, 1024)},
            {"cls.imagePredictions.decoder_dict.0": (1601, 768)},
        )
        both, region_layers = range(12, 36, 4), range(14, 36, 4)
        ctrl = volta_shapes(
            text=[*range(0, 12, 2), *region_layers],
            regions=region_layers,
            both=both,
            text_forward=range(1, 36, 2),
            region_forward=range(13, 36, 2),
            others={**others, "bert.v_embeddings.LayerNorm.weight": (768,), "bert.v_embeddings.LayerNorm.bias": (768,)},
        )
        return {
            "pretraining": FullSize(model="vilbert", layout="multitask", preset="connect6", shapes=pretraining),
            "multitask": FullSize(model="vilbert", layout="multitask", preset="multitask", shapes=pretraining | extra, answers=(3129, 1533)),
            "first": FullSize(model="vilbert", layout="first", preset="vqa", shapes=pretraining | first, answers=(3129,)),
            "volta": FullSize(model="vilbert", layout="volta", preset="ctrl", shapes=ctrl),
        }

    def lxmert() -> dict[str, FullSize]:
        shapes = {name: tuple(about["shape"]) for name, about in read("lxmert")["official"]["state_dict"].items()}
        renamed = {f"lxmert.{name.removeprefix('bert.')}" if name.startswith("bert.") else name: shape for name, shape in shapes.items()}
        answers = {name: (3129, *shape[1:]) if ".3." in name else shape for name, shape in shapes.items() if name.startswith("answer_head.")}
        tuned = {f"lxrt_encoder.model.{name}": shape for name, shape in shapes.items() if name.startswith("bert.")}
        tuned |= {name.removeprefix("answer_head."): shape for name, shape in answers.items()}
        others = volta_others(
            {"bert.v_embeddings.image_embeddings": (768, 2048), "bert.v_embeddings.image_location_embeddings": (768, 4)},
            {"bert.t_pooler.dense": (768, 768), "cls.bi_seq_relationship": (2, 768)},
            {f"cls.imagePredictions.decoder_dict.{number}": (rows, 768) for number, rows in ((3, 1600), (4, 400), (5, 2048))},
        )
        others |= {f"bert.v_embeddings.{name}LayerNorm.{part}": (768,) for name in ("Img", "Loc") for part in ("weight", "bias")}
        volta = volta_shapes(
            text=[*range(0, 18, 2), *range(19, 33, 3)],
            regions=[*range(0, 10, 2), *range(19, 33, 3)],
            both=range(18, 33, 3),
            text_forward=[*range(1, 18, 2), *range(20, 33, 3)],
            region_forward=[*range(1, 10, 2), *range(20, 33, 3)],
            others=others,
        )
        return {
            "volta": FullSize(model="lxmert", layout="volta", preset="volta", shapes=volta),
            "official": FullSize(model="lxmert", layout="official", preset="base", shapes=shapes),
            "transformers": FullSize(model="lxmert", layout="transformers", preset="base", shapes=renamed),
            "vqa": FullSize(model="lxmert", layout="official_finetuned", preset="base", shapes=tuned, answers=(3129,)),
        }

    def cvlp() -> dict[str, FullSize]:
        shapes = dict(lxmert()["official"].shapes)
        for head in ("visual_embed_head", "lang_embed_head"):
            for number, weight in ((0, (1536, 768)), (2, (1536,)), (3, (128, 1536))):
                shapes |= {f"{head}.logit_fc.{number}.weight": weight, f"{head}.logit_fc.{number}.bias": weight[:1]}
        return {
            "official": FullSize(model="cvlp", layout="official", preset="base", shapes=shapes),
            "vqa": FullSize(model="cvlp", layout="official_finetuned", preset="base", shapes=lxmert()["vqa"].shapes, answers=(3129,)),
        }

    makers = {"visualbert": visualbert, "vlbert": vlbert, "vilbert": vilbert, "lxmert": lxmert, "cvlp": cvlp}
    return lambda family: makers[family]()


BOX = {"x": 0, "y": 0, "width": 9, "height": 9}
STREET, SKY = "http://a.org/street.jpg", "http://a.org/sky.jpg"


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def files() -> Callable[..., Path]:
    """Writes a split of a kind of corpus into a folder: two sentences of images 1 and 2 (or their addresses), and, where data sets may be incomplete,
    one of image 3."""

    def conceptual_captions(folder: Path, split: str) -> None:
        name = {"train": "Train_GCC-training.tsv", "val": "Validation_GCC-1.1.0-Validation.tsv"}[split]
        save(folder / name, f"the street\t{STREET}\nthe sky\t{SKY}\n\t{SKY}\nno address\ngone\thttp://a.org/gone.jpg\n")

    def vilbert_captions(folder: Path, split: str) -> None:
        save(folder / f"caption_{split}.json", {"1": "the street", "2": "the sky", "3": "gone", "4": ""})

    def sbu(folder: Path, split: str) -> None:
        addresses = [f"http://static.flickr.com/{image}.jpg" for image in (1, 2, 3, 1)]
        content = {"image_urls": addresses, "user_ids": list("abcd"), "captions": ["the street", "the sky", "gone", " "]}
        save(folder / "sbu-captions-all.json", content)

    def flickr30k(folder: Path, split: str) -> None:
        save(folder / "results_20130124.token", "1.jpg#0\tthe street\n2.jpg#0\tthe sky\n3.jpg#0\tgone\n9.jpg#0\tof another split\n2.jpg#1\t\n")
        save(folder / f"{split}.txt", "1\n2\n3\n")

    def vg_regions(folder: Path, split: str) -> None:
        phrases = [(1, "the street"), (2, "the sky"), (3, "gone"), (9, "held"), (2, "")]
        regions = [
            {"id": image, "regions": [{"region_id": at, "image_id": image, "phrase": text, **BOX}]} for at, (image, text) in enumerate(phrases)
        ]
        save(folder / "region_descriptions.json", regions)
        save(folder / "val_images.txt", "9\n")

    def vg_qa(folder: Path, split: str) -> None:
        pairs = [(1, "the street", "The man."), (2, "the sky", "blue"), (3, "gone", "Blue."), (9, "held", "no"), (2, "what", "")]
        asked = [
            {"id": image, "qas": [{"qa_id": at, "image_id": image, "question": question, "answer": answer}]}
            for at, (image, question, answer) in enumerate(pairs)
        ]
        save(folder / "question_answers.json", asked)
        save(folder / "val_images.txt", "9\n")

    def gqa(folder: Path, split: str) -> None:
        asked = {
            "07": {"question": "the street", "imageId": "1", "answer": "man"},
            "8": {"question": "the sky", "imageId": "2", "answer": "blue"},
            "9": {"question": "gone", "imageId": "3", "answer": "blue"},
            "10": {"question": None, "imageId": "1", "answer": "blue"},
        }
        save(folder / f"{split}_balanced_questions.json", asked)

    def vqa(folder: Path, split: str, images: tuple[int, ...]) -> None:
        said = {1: ("the street", "man"), 2: ("the sky", "Blue"), 3: ("gone", "blue"), 0: (" \u0301", "blue")}
        questions = [{"question_id": image, "image_id": image or 1, "question": said[image][0]} for image in images]
        annotations = [
            {"question_id": image, "image_id": image or 1, "answers": [{"answer": said[image][1]}] * 10, "multiple_choice_answer": said[image][1]}
            for image in images
        ]
        save(folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json", {"questions": questions})
        save(folder / f"v2_mscoco_{split}2014_annotations.json", {"annotations": annotations})

    def lxmert(folder: Path, split: str) -> None:
        merged = [
            {"img_id": "1", "sentf": {"vqa": ["the street"]}, "labelf": {"vqa": [{"A man.": 1.0}]}},
            {"img_id": "2", "sentf": {"mscoco": [""], "gqa": ["the sky"]}, "labelf": {"gqa": [{"blue": 1.0}]}},
            {"img_id": "3", "sentf": {"mscoco": ["gone"]}},
        ]
        names = {"train": ("mscoco_train", "mscoco_nominival", "vgnococo"), "val": ("mscoco_minival",)}[split]
        for number, name in enumerate(names):
            save(folder / f"{name}.json", [] if number else merged)

    def captions(folder: Path, split: str) -> None:
        images = [{"id": image, "file_name": f"COCO_{split}2014_{image:012d}.jpg"} for image in (1, 2)]
        said = {10: (1, "the street"), 11: (1, "a street"), 20: (2, "the sky"), 21: (2, "")}
        told = [{"id": number, "image_id": image, "caption": text} for number, (image, text) in said.items()]
        save(folder / "annotations" / f"captions_{split}2014.json", {"images": images, "annotations": told})

    def statements(folder: Path, split: str) -> None:
        said = [("1-0", "the street", "true"), ("2-0", "the sky", "false")]
        rows = [{"identifier": name, "sentence": text, "label": label, "directory": "0", "evals": {}} for name, text, label in said]
        save(folder / split / f"{split}.json", "".join(json.dumps(row) + "\n" for row in rows))

    def nlvr2(folder: Path, split: str) -> None:
        said = [("1-0-0", "the street", "True"), ("2-0-0", "the sky", "False")]
        rows = [{"identifier": f"{split}-{name}", "sentence": text, "label": label} for name, text, label in said]
        save(folder / "data" / f"{split}.json", "".join(json.dumps(row) + "\n" for row in rows))

    def vcr(folder: Path, split: str) -> None:
        """Two questions; objects of one picture in its metadata. A third question without a word, one that comes twice, a blank line."""

        def line(number: int, image: int, question: list[Any], answers: list[list[Any]]) -> dict[str, Any]:
            name = f"movie_{image}/{image}"
            return {
                "movie": f"movie_{image}", "objects": ["person", "dog", "person"], "img_fn": f"{name}.jpg", "metadata_fn": f"{name}.json",
                "question": question, "answer_choices": answers, "answer_label": 1, "rationale_choices": [["because"], [[2, 1]], ["so"], ["look"]],
                "rationale_label": 2, "question_number": number, "annot_id": f"{split}-{number}", "img_id": f"{split}-{number}",
            }  # fmt: skip

        answers = [["yes", "."], [[0], "pets", [1]], ["no"], ["unbelievably", [2]]]
        first, second = line(0, 1, ["Why", "is", [0], "here", "?"], answers), line(1, 2, ["Where", "?"], answers)
        rows = [first, line(2, 2, [" ", []], answers), second, first]
        save(folder / f"{split}.jsonl", "\n".join(json.dumps(row) + "\n" for row in rows))
        boxes = [[0, 0, 30, 30, 0.9], [10, 10, 50, 40, 0.8], [40.4, 0, 60, 60, 0.7]]
        objects = {"boxes": boxes, "segms": [[], [], []], "names": ["person", "dog", "person"], "width": 64, "height": 64}
        for image in (1, 2):
            save(folder / "vcr1images" / f"movie_{image}" / f"{image}.json", objects)

    def text(folder: Path, split: str) -> None:
        save(folder / "en_corpus" / ("wiki.doc" if split == "train" else f"wiki_{split}.doc"), "a street .\n\nthe sky above .\n")

    writers: dict[str, Callable[[Path, str], None]] = {
        "conceptual_captions": conceptual_captions,
        "vilbert_captions": vilbert_captions,
        "sbu": sbu,
        "flickr30k": flickr30k,
        "vg_regions": vg_regions,
        "vg_qa": vg_qa,
        "gqa": gqa,
        "answered_questions": lambda folder, split: vqa(folder, split, (1, 2, 3, 0)),
        "questions": lambda folder, split: vqa(folder, split, (1, 2, 0)),
        "lxmert": lxmert,
        "captions": captions,
        "caption_pairs": captions,
        "single_captions": captions,
        **dict.fromkeys(("statements", "unmasked_statements", "true_statements"), statements),
        "nlvr2": nlvr2,
        "vcr": vcr,
        "text": text,
    }

    def write(folder: Path, kind: str, split: str = "train") -> Path:
        writers[kind](folder, split)
        return folder

    return write
