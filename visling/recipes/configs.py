"""What a recipe returns: everything a pre-training or fine-tuning run depends on, apart from where its files are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from visling import config as configs
from visling.data.batches.masking import RegionMasking, TokenMasking
from visling.data.corpora.base import Corpus, TextReader
from visling.data.corpora.readers import are_text, check_corpora, find_reader, without_objectives
from visling.errors import ConfigError, Conflicts, VislingError, nearest, refuse
from visling.models import encoder_config, head_styles
from visling.objectives.masked_regions import RegionLosses
from visling.train.config import TrainConfig
from visling.vision.extractors import ExtractorSettings
from visling.vision.vcr_network import VcrNetworkConfig

OBJECTIVES = ("masked_lm", "matching", "masked_regions", "image_qa", "region_contrast")
"""What a pre-training may learn."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """One pre-training run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
    any_features: bool = False
    """Whether the encoder's feature width follows the region store; a published run reads features of one width."""
    corpora: tuple[Corpus, ...]
    """What is read. Text without images comes in batches next to those with images, or alone if there is no other
    corpus; the model is then trained without any region."""
    objectives: Mapping[str, float]
    """Objective (`OBJECTIVES`) -> weight in the loss. Weight 0 leaves an objective out, with all that only it needs."""
    from_epoch: Mapping[str, int] = field(default_factory=dict)
    """Objective -> epochs that pass before it counts; until then its weight is 0 (LXMERT's paper: image_qa 10)."""
    objective_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Objective -> settings that are not its defaults (region_contrast: temperature, clip, momentum, queue_size;
    image_qa: num_answers)."""
    min_answer_count: int = 9
    """Training questions whose best answer an answer must be to be asked for by image_qa, where no file lists the
    answers."""
    answer_sources: tuple[str, ...] = ()
    """Data sets whose answers image_qa keeps of LXMERT's table: vqa, gqa, visual7w; none = all. Questions whose answers
    are all left out are read as captions (LXMERT's release, `--qaSets`)."""
    masking: TokenMasking = field(default_factory=TokenMasking)
    """Which word pieces are masked."""
    region_masking: RegionMasking | None = None
    """Which regions are masked; None = none."""
    region_losses: RegionLosses | None = None
    """What the objective masked_regions predicts about them."""
    extractor: ExtractorSettings | None = None
    """Network that computes the features of regions from images, masked regions cut out, and is trained jointly
    (VL-BERT end to end, VisualBERT for VCR); None = stored features."""
    flip: float = 0.0
    """Share of the images that are mirrored in training: their boxes, and their pixels if an extractor reads them.
    Stored features and texts stay as they are (VL-BERT's release)."""
    batch_size: int = 128
    """Examples per step and process."""
    workers: int = 0
    """Processes that prepare training batches; 0 = a thread, which is fast enough for stored features. Batches are the
    same. Where a GPU waits for pictures and cores are free, try 2."""
    store_on_device: bool = False
    """Keep the features of the whole store in the device's memory while training: batches then carry row numbers, a few
    bytes per region. Batches are the same. A GPU with room for them never waits for the disk or the host."""
    sort_by_length: int = 1
    """Batches of all processes whose training examples are sorted by text length together, before they are cut and
    shuffled: less padding, but losses are means over a batch, so words of long texts count for less. 1 = plain random
    batches, as in all releases."""
    train_split: str = "train"
    """One split, or several joined by "+" (train+val)."""
    valid_split: str = "val"
    start: str = "random"
    """What the weights start from: random (initialisation), released text weights (bert-base-uncased), or the
    recipe whose model `--init` names."""
    train: TrainConfig
    """How long and how."""
    from_init: Mapping[str, Any] | None = None
    """Setting (dotted) of the encoder that is that of the model which `--init` names -> what the recipe has instead;
    None = the encoder is still the recipe's own, and a run takes that of the model first (`runs.configure`)."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the paper has instead, where it is known."""
    release: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the released code has instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", encoder_config(self.model, self.encoder))
        conflicts = Conflicts()
        text_only = False
        with conflicts.collect():
            check_corpora(self.corpora)
            text_only = self.text_only
            conflicts.errors += self._find_text_problems()
        conflicts.errors += self._find_problems(text_only)
        conflicts.refuse()
        self._drop_unread()

    @property
    def text_only(self) -> bool:
        """Whether it trains without any region: text is all that it reads."""
        return are_text(self.corpora)

    def _find_text_problems(self) -> Iterator[ConfigError]:
        """What text without images cannot train."""
        texts = [corpus.kind for corpus in self.corpora if isinstance(find_reader(corpus.kind), TextReader)]
        learned = [name for name, weight in self.objectives.items() if weight > 0]
        # Next to other corpora, text is left out with an objective of weight 0
        if texts and "masked_lm" not in (learned if self.text_only else self.objectives):
            yield ConfigError(
                "text without images trains only masked_lm, which the recipe's objectives lack. Add it, or leave the "
                "text corpus out."
            )
        if not self.text_only:
            return
        if others := [name for name in learned if name != "masked_lm"]:
            zeros = " ".join(f"--set objectives.{name}=0" for name in others)
            yield ConfigError(
                f"the objectives {', '.join(others)} need images, but the only corpus is text without any. Leave them "
                f"out with {zeros}, or add a corpus of sentences about images, for example captions."
            )
        if self.extractor is not None:
            yield ConfigError(
                "text alone shows no region, so that the recipe's extractor would have nothing to compute. Use "
                "--set extractor=none."
            )

    def _find_problems(self, text_only: bool) -> Iterator[ConfigError]:
        for name, weight in self.objectives.items():
            if name not in OBJECTIVES:
                yield ConfigError(f"unknown objective {name!r}. {nearest(name, OBJECTIVES)}")
            elif weight < 0:
                yield ConfigError(f"objectives.{name} is a weight, 0 or more; found {weight:g}. 0 leaves it out.")
        if self.objectives and not any(self.objectives.values()):
            yield ConfigError(
                f"no objective has a weight above 0; found {', '.join(self.objectives)}. "
                f"Add one, for example --set objectives.masked_lm=1."
            )
        for what, named in (("from_epoch", self.from_epoch), ("objective_settings", self.objective_settings)):
            if unknown := sorted(named.keys() - self.objectives.keys()):
                yield ConfigError(
                    f"{what} names {', '.join(unknown)}, which the objectives {', '.join(self.objectives)} lack. "
                    "Take it out, or add it."
                )
        yield from _check_batches(self, text_only)
        if self.extractor is not None:
            yield from _check_extractor(self.extractor, self.encoder)
            yield from self._check_computed_features()

    def _drop_unread(self) -> None:
        """Leave out objectives of weight 0 with their settings and with what only they read: corpora, region losses and
        masked regions; the last two also where there is nothing but text."""
        dropped = {name for name, weight in self.objectives.items() if not weight}
        if not dropped and not self.text_only:
            return
        for field_name in ("objectives", "from_epoch", "objective_settings"):
            named = getattr(self, field_name)
            object.__setattr__(self, field_name, {name: value for name, value in named.items() if name not in dropped})
        object.__setattr__(self, "corpora", without_objectives(self.corpora, dropped))
        if "masked_regions" in dropped or self.text_only:
            object.__setattr__(self, "region_losses", None)
            if "region_contrast" not in self.objectives:
                object.__setattr__(self, "region_masking", None)

    def _check_computed_features(self) -> Iterator[ConfigError]:
        """Objectives and maskings that need stored features, and a network that needs more than boxes."""
        if isinstance(self.extractor, VcrNetworkConfig):
            yield ConfigError(
                "VisualBERT's network for VCR reads the class and the outline of every object, which examples of "
                "pre-training do not have. Pre-train on stored features, or use extractor.kind=vlbert."
            )
        if self.region_masking is not None and self.region_masking.random:
            yield ConfigError(
                "region_masking.random takes stored features of other images, which an extractor does not read. "
                "Set it to 0."
            )
        if self.objectives.get("region_contrast") or (
            self.region_losses is not None and self.region_losses.features != "none"
        ):
            yield ConfigError(
                "region_contrast and region_losses.features compare with stored features, but the recipe's extractor "
                "makes others while it trains. Leave them out, or set extractor=none."
            )

        yield from self._check_hidden_pixels()

    def _check_hidden_pixels(self) -> Iterator[ConfigError]:
        """Hidden regions are cut out of the pictures, or the encoder replaces their features."""
        cut = self.region_masking is None or self.region_masking.cut_pixels
        replaces = getattr(self.encoder, "masks_features", False)
        if cut and replaces:
            yield ConfigError(
                "encoder.masks_features hides features, but here pixels are hidden. Use --set "
                "encoder.masks_features=false, or --set region_masking.cut_pixels=false to leave the pictures whole."
            )
        if self.region_masking is not None and not cut and not (replaces and self.region_masking.learned):
            yield ConfigError(
                "region_masking.cut_pixels=false leaves the pictures whole, and the encoder does not hide the features "
                "that are computed from them. Use --set encoder.masks_features=true and "
                "--set region_masking.learned=true, which vlbert has."
            )

    def weights(self, epoch: int) -> dict[str, float]:
        """Weight of every objective in an epoch, counted from 0."""
        return {
            name: weight if epoch >= self.from_epoch.get(name, 0) else 0.0 for name, weight in self.objectives.items()
        }


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """One fine-tuning run; saved in run.json."""

    recipe: str
    model: str
    """Family."""
    encoder: Any
    """The family's config."""
    any_features: bool = False
    """Whether the encoder's feature width follows the region store; a published run reads features of one width."""
    task: str
    """A module of `visling.tasks`, or a dotted path."""
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the task that differ from its defaults."""
    batch_size: int = 128
    """Examples per step and process."""
    workers: int = 0
    """Processes that prepare training batches; 0 = a thread, which is fast enough for stored features. Batches are the
    same. Where a GPU waits for pictures and cores are free, try 2."""
    store_on_device: bool = False
    """Keep the features of the whole store in the device's memory while training: batches then carry row numbers, a few
    bytes per region. Batches are the same. A GPU with room for them never waits for the disk or the host."""
    sort_by_length: int = 1
    """Batches of all processes whose training examples are sorted by text length together, before they are cut and
    shuffled: less padding, but losses are means over a batch, so words of long texts count for less. 1 = plain random
    batches, as in all releases."""
    train_split: str = "train"
    """One split, or several joined by "+" (train+nominival)."""
    valid_split: str = "val"
    """Split by which the best weights are chosen."""
    task_token: int | None = None
    """Number of the task among the model's task tokens, which every text names (ViLBERT's multi-task release: that of
    its task file); None for a model without them."""
    train_limit: int | None = None
    """Use only the first so many training examples (in a random order of the run's seed)."""
    valid_images: int | None = None
    """Validate on the examples of the first so many images only: a task that ranks scores all pairs of them."""
    without_images: Path | None = None
    """List of images (`.npy`, `.json`, or text with one per line) that are left out of training because other tasks
    test on them: `coco_test_ids.npy` of ViLBERT's multi-task release."""
    extractor: ExtractorSettings | None = None
    """Network that computes the features of regions from images and is trained jointly (VL-BERT's RefCOCO+ and VCR,
    VisualBERT's VCR); None = stored features."""
    flip: float = 0.0
    """Share of the training images that are mirrored: the boxes, and the pixels if an extractor reads them. Stored
    features stay as they are (VL-BERT: 0.5)."""
    swap_sides: bool = True
    """Whether left and right are exchanged in questions and answers about mirrored images (VL-BERT: not in VCR)."""
    text_only: bool = False
    """Train without any region: what the words alone give away."""
    head_layout: str | None = None
    """Released layout of the family whose heads the task gets (ViLBERT's first release: "first"); None = the main
    one."""
    carry_answers: bool = True
    """Whether the answer head starts from that of pre-training, in the families whose release does so (LXMERT, CVLP),
    or from that of a model that was fine-tuned on the same task with the same answers."""
    start: str = "random"
    """What the weights start from: random (initialisation), released text weights (bert-base-uncased), or the
    recipe whose model `--init` names."""
    release_start: bool = True
    """Whether a fine-tuning from a pre-trained model does what its family's release does first (VL-BERT: answers start
    from their word vectors, VCR's second segment from the first)."""
    train: TrainConfig
    """How long and how."""
    from_init: Mapping[str, Any] | None = None
    """Setting (dotted) of the encoder that is that of the model which `--init` names -> what the recipe has instead;
    None = the encoder is still the recipe's own, and a run takes that of the model first (`runs.configure`)."""
    paper: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the paper has instead, where it is known."""
    release: Mapping[str, Any] = field(default_factory=dict)
    """Setting (dotted) or topic -> what the released code has instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", encoder_config(self.model, self.encoder))
        refuse(self._find_problems())

    def _find_problems(self) -> Iterator[VislingError]:
        conflicts = Conflicts()
        with conflicts.collect():
            head_styles(self.model, self.head_layout)
        yield from conflicts.errors
        yield from _check_batches(self, self.text_only)
        if self.extractor is not None:
            yield from _check_extractor(self.extractor, self.encoder)
            if self.text_only:
                yield ConfigError(
                    "text_only shows no region, so that the recipe's extractor would have nothing to compute. Use "
                    "--set extractor=none."
                )


def _check_extractor(extractor: ExtractorSettings, encoder: Any) -> Iterator[ConfigError]:
    """What keeps an encoder from reading the features of an extractor."""
    if encoder.feature_size != extractor.feature_size:
        yield ConfigError(
            f"the extractor makes features of width {extractor.feature_size}, but encoder.feature_size is "
            f"{encoder.feature_size}. "
            f"Use --set encoder.feature_size={extractor.feature_size}."
        )
    if getattr(encoder, "whiten_features", False):
        yield ConfigError(
            "encoder.whiten_features measures stored features; the recipe's extractor makes features while it trains. "
            "Use --set encoder.whiten_features=false."
        )


def _check_batches(run: PretrainConfig | FinetuneConfig, text_only: bool) -> Iterator[ConfigError]:
    """What is wrong with how examples are put into batches."""
    if run.batch_size < 1:
        yield ConfigError(f"batch_size must be at least 1; found {run.batch_size}.")
    if run.sort_by_length < 1:
        yield ConfigError(
            f"sort_by_length counts batches that are sorted together; found {run.sort_by_length}. For plain random "
            "batches set it to 1."
        )
    if run.workers < 0:
        yield ConfigError(f"workers must be 0 or more; found {run.workers}. 0 prepares batches in a thread.")
    if run.store_on_device and (run.extractor is not None or text_only):
        yield ConfigError(
            "store_on_device=true keeps stored features on the device, and this run reads none: it "
            f"{'sees the words alone' if text_only else 'computes features while it trains'}. Leave it out."
        )
    if not 0 <= run.flip <= 1:
        yield ConfigError(f"flip is a share of the images, from 0 to 1; found {run.flip:g}.")


BERT_BASE, BERT_LARGE = "bert-base-uncased", "bert-large-uncased"


def differences(
    run: PretrainConfig | FinetuneConfig, recipe: PretrainConfig | FinetuneConfig
) -> dict[str, dict[str, Any]]:
    """Where a run differs from its recipe, from the paper and from the released code, as far as that is known.

    Args:
        run: the recipe after changes of settings.
        recipe: as it was made.
    Returns:
        "changed" (only if anything is), "paper" and "release": setting (dotted) or topic -> its value `here`, unless it
        is a topic, and in the `recipe`, `paper` or `release`.
    """
    plain = configs.to_dict(run)
    changed = {name: {"here": new, "recipe": old} for name, (old, new) in configs.difference(run, recipe).items()}
    found: dict[str, dict[str, Any]] = {"changed": changed} if changed else {}
    for source in ("paper", "release"):
        told = plain.get(source, {})
        here = {name: value_at(plain, name) for name in told}
        found[source] = {
            name: {**here[name], source: value} for name, value in told.items() if here[name] != {"here": value}
        }
    return found


def value_at(plain: Any, name: str) -> dict[str, Any]:
    """The value of a dotted setting under `here`; nothing if it is not one."""
    for part in name.split("."):
        if not isinstance(plain, Mapping) or part not in plain:
            return {}
        plain = plain[part]
    return {"here": plain}
