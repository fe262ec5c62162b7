"""The command line: it parses, calls and prints. Plain text for people, `--json` for programs."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from visling import config as configs
from visling import runtime
from visling.errors import ConfigError, RunError, VislingError, nearest

T = TypeVar("T")

_INTERRUPTED = 130
"""Status with which typer ends a command that was stopped with Ctrl-C."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Region-based vision-and-language Transformers.")
detect_app = typer.Typer(no_args_is_help=True, help="Train and score a region detector.")
regions_app = typer.Typer(no_args_is_help=True, help="Make and look at stores of region features.")
recipes_app = typer.Typer(help="What can be trained, with every setting.")
app.add_typer(detect_app, name="detect")
app.add_typer(regions_app, name="regions")
app.add_typer(recipes_app, name="recipes")

Out = Annotated[Path, typer.Option("--out", help="Folder to write; a folder that already holds something is refused.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run into --out stopped.")]
OtherFeatures = Annotated[bool, typer.Option("--other-features", help="Accept a model that was trained on features of another detector.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change one setting: a.b=value. May be given several times.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads; torch's choice if left out. A second one gains nothing at width 96.")
]
Processes = Annotated[
    int, typer.Option("--processes", min=1, help="Processes that train side by side, one device each; every one reads batches of batch_size.")
]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of every random choice; the recipe's own if left out.")]


def run() -> None:
    """Run the command line; an error that the user can mend is printed without a trace and ends with status 2."""
    try:
        app()
    except VislingError as error:
        print(f"visling: {error}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:
        if end.code == _INTERRUPTED:
            print("visling: stopped. What was saved is kept; training and extraction go on with --resume.", file=sys.stderr)
        raise


@app.command()
def scenes(
    out: Out,
    images: Annotated[int, typer.Option(help="Number of pictures over all splits.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same files, byte for byte.")] = 0,
    style: Annotated[str, typer.Option(help="plain or sketch.")] = "plain",
    panels: Annotated[int, typer.Option(help="Pictures of two or three boxes with true and false statements, as in NLVR.")] = 0,
    answer_noise: Annotated[float, typer.Option(help="Share of the ten answers to each question that are replaced by another plausible one.")] = 0.0,
    set_: Settings = None,
    json_: Json = False,
) -> None:
    """Draw pictures with boxes, captions, questions, statements and text, in the official file formats.

    Example: visling scenes --out scenes --images 200 --seed 1
    """
    from visling.data.scenes import ScenesConfig, write_scenes

    chosen = {"images": images, "seed": seed, "style": style, "panels": panels, "answer_noise": answer_noise, "processes": os.cpu_count() or 1}
    config = configs.override(configs.from_dict(ScenesConfig, chosen), set_ or ())
    with _bar("Drawing") as step:
        counts = write_scenes(out, config, progress=step)
    if json_:
        print(json.dumps(counts))
        return
    panel_counts = counts["counts"].pop("nlvr", {})
    tables = {**counts["counts"], **{f"panels, {split}": found for split, found in panel_counts.items()}}
    numbers = {
        name: [f"{value} {what.replace('_', ' ')}" for what, value in found.items() if isinstance(value, int)] for name, found in tables.items()
    }
    _show({name: ", ".join(parts) for name, parts in numbers.items()}, json_, f"Wrote {out}")


@detect_app.command("train")
def detect_train(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON (boxes, categories, optional attributes), or SPLIT/SPLIT.json of NLVR v1.")],
    out: Out,
    preset: Annotated[str, typer.Option(help="Size and input of the detector: default, scenes or nlvr.")] = "default",
    seconds: Annotated[float | None, typer.Option(help="Training time; the preset's own if left out.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates instead of time, which makes a run repeatable.")] = None,
    set_: Settings = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of every random choice.")] = 0,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Train a small Faster R-CNN on any folder with boxes.

    Example: visling detect train scenes/images/train --annotations scenes/annotations/instances_train.json --preset scenes --out detector
    """
    from visling.recipes import detection

    given = {"seconds": seconds, "steps": steps}
    settings = [*(f"{name}={value}" for name, value in given.items() if value is not None), *(set_ or [])]
    training = detection.settings_from(settings, preset)

    def say(now: detection.DetectionProgress) -> None:
        speed, left = f"{now.images_per_second:.0f} images/s", timedelta(seconds=round(now.seconds_left))
        print(f"{now.share:>4.0%}  step {now.step}  loss {now.loss:.3f}  {speed}  {left} left", file=sys.stderr)

    where = runtime.pick_device(device)
    found = detection.train_detector(
        images,
        detection.read_annotations(annotations),
        out,
        training,
        seed=seed,
        device=str(where),
        precision=runtime.resolve(_precision(precision), where),
        progress=say,
        resume=resume,
    )
    counts = {"images": found.images, "steps": found.steps, "epochs": round(found.epochs, 2), "seconds": round(found.seconds, 1)}
    _show_with_unreadable(counts, found.unreadable, json_, f"Wrote {out}")


@detect_app.command("eval")
def detect_eval(
    images: Annotated[Path, typer.Argument(help="Folder of images.")],
    annotations: Annotated[Path, typer.Option(help="COCO instances JSON, or SPLIT/SPLIT.json of NLVR v1.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Score the first images only.")] = None,
    json_: Json = False,
) -> None:
    """Score a detector: mean average precision at IoU 0.5, recall, attributes.

    Example: visling detect eval scenes/images/val --annotations scenes/annotations/instances_val.json --detector detector
    """
    from visling.recipes import detection

    found = detection.evaluate_detector(detector, images, detection.read_annotations(annotations), device=device, limit=limit)
    scores = {
        "images": found.images,
        "mean average precision at IoU 0.5": _rounded(found.scores.mean_ap),
        "recall at IoU 0.5": _rounded(found.scores.recall),
        "attribute accuracy": _rounded(found.scores.attribute_accuracy),
        "images per second": round(found.images_per_second, 1),
        **{f"average precision of {name}": _rounded(value) for name, value in sorted(found.ap.items())},
    }
    _show_with_unreadable(scores, found.unreadable, json_)


@regions_app.command("extract")
def regions_extract(
    images: Annotated[list[Path], typer.Argument(help="Folders of images (searched recursively) or image files.")],
    detector: Annotated[Path, typer.Option(help="Folder of a trained detector.")],
    out: Out,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step.")] = 32,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="Of the detector: fp32 or bf16; fp32 features do not depend on the device.")] = "fp32",
    dtype: Annotated[str, typer.Option(help="How features are stored: float16, or float32 in twice the space.")] = "float16",
    probs: Annotated[
        bool | None, typer.Option("--probs/--no-probs", help="Keep class distributions (soft region losses need them). Default: up to 100 classes.")
    ] = None,
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn images into a store of region features. Unreadable images are listed at the end, never a crash.

    Example: visling regions extract scenes/images --detector detector --out regions
    """
    from visling.data.store import StoreWriter
    from visling.vision.detector import Detector
    from visling.vision.extract import extract, list_images

    where = runtime.pick_device(device)
    model = Detector.load(detector, device=where)
    files = list_images(images)
    in_ = runtime.resolve(_precision(precision), where)
    _claim_store(out, resume)
    with (
        StoreWriter(
            out,
            feature_size=model.config.feature_size,
            fingerprint=model.fingerprint,
            class_names=model.config.class_names,
            attribute_names=model.config.attribute_names,
            dtype=_dtype(dtype),
            settings={"detector": str(detector.resolve()), "precision": in_},
            may_differ=("detector",),  # the fingerprint says whether a detector that moved is the same
            resume=resume,
        ) as writer,
        _bar("Extracting") as step,
    ):
        report = extract(files, model, writer, batch_size=batch_size, precision=in_, probs=probs, progress=step)
    counts = {"images": report.done, "regions": report.regions, "found already": report.skipped_existing}
    _show_with_unreadable(counts, report.unreadable, json_, f"Wrote {out}")


@regions_app.command("import")
def regions_import(
    files: Annotated[list[Path], typer.Argument(metavar="TSV...", help="Files of LXMERT (obj36) or of bottom-up attention, unpacked.")],
    out: Out,
    fingerprint: Annotated[
        str | None,
        typer.Option(help="Name of the detector that made the features, if not the layout's own: models tell the features they know by it."),
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the object classes, one a line.")] = None,
    attributes: Annotated[Path | None, typer.Option(help="Names of the attributes, one a line.")] = None,
    dtype: Annotated[str, typer.Option(help="How features are stored: float16, or float32 in twice the space.")] = "float16",
    resume: Resume = False,
    json_: Json = False,
) -> None:
    """Turn released files of region features into a store. Of an image that comes twice the first line counts.

    Example: visling regions import train2014_obj36.tsv val2014_obj36.tsv --classes objects_vocab.txt --attributes attributes_vocab.txt --out regions
    """
    from visling.data.formats.tsv import import_regions, read_names

    class_names, attribute_names = (() if names is None else read_names(names) for names in (classes, attributes))
    _claim_store(out, resume)
    with _bar("Importing, MB") as step:
        found = import_regions(
            files,
            out,
            fingerprint=fingerprint,
            class_names=class_names,
            attribute_names=attribute_names,
            dtype=_dtype(dtype),
            resume=resume,
            progress=lambda done, total: step(done // 10**6, total // 10**6),
        )
    counts = {"images": found.images, "regions": found.regions, "found already": found.existing, "repeated lines": found.repeated}
    _show(counts, json_, f"Wrote {out}")


@regions_app.command("inspect")
def regions_inspect(
    store: Annotated[Path, typer.Argument(help="Region store.")],
    image: Annotated[Path | None, typer.Option(help="Draw this image with its boxes.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to draw it; beside the command's working folder if left out.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Read everything and compare the SHA-256 of every shard.")] = False,
    json_: Json = False,
) -> None:
    """Show what a region store holds, and draw an image with its boxes.

    Example: visling regions inspect regions --image scenes/images/test/scene_000000002251.png
    """
    from visling.analysis.drawing import draw_regions
    from visling.data.store import NativeStore
    from visling.vision.images import read_image

    found = NativeStore.open(store)
    if check:
        found.check()
    counts = [found.count(image_id) for image_id in found.ids]
    described = {
        "images": len(found),
        "regions": sum(counts),
        "regions per image": f"{min(counts, default=0)} to {max(counts, default=0)}, mean {sum(counts) / max(len(counts), 1):.1f}",
        "images without regions": counts.count(0),
        "feature width": found.feature_size,
        "fingerprint": found.fingerprint,
        "classes": len(found.class_names),
        "attributes": len(found.attribute_names),
        "first ids": ", ".join(found.ids[:3]),
        **{f"setting {name}": value for name, value in found.settings.items()},
        **({"digests": "all match"} if check else {}),
    }
    if image is not None:
        target = out if out is not None else Path(f"{image.stem}-regions.png")
        _refuse(target)
        drawn = draw_regions(
            Image.fromarray(read_image(image)), found[image.stem], class_names=found.class_names, attribute_names=found.attribute_names
        )
        _save_picture(drawn, target)
        described["drawing"] = str(target)
    _show(described, json_)


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context) -> None:
    """What can be trained, with every setting; without a further word, the list.

    Example: visling recipes
    """
    if context.invoked_subcommand is None:
        recipes_list()


@recipes_app.command("list")
def recipes_list(json_: Json = False) -> None:
    """List the recipes of pretrain and finetune.

    Example: visling recipes list
    """
    from visling.recipes import finetuning, pretraining

    def about(recipe: Callable[[], Any]) -> str:
        # recipes shared by several models are partial functions
        return (getattr(recipe, "func", recipe).__doc__ or "").splitlines()[0]

    tables = {"pretrain": pretraining.RECIPES, "finetune": finetuning.RECIPES}
    _show({f"{verb} {name}": about(recipe) for verb, table in tables.items() for name, recipe in table.items()}, json_)


@recipes_app.command("show")
def recipes_show(
    name: Annotated[str, typer.Argument(help="Name of a recipe.")],
    set_: Settings = None,
    estimate: Annotated[
        bool, typer.Option("--estimate/--no-estimate", help="Add parameters, operations, memory and hours; an estimate that takes seconds.")
    ] = True,
    gpu: Annotated[list[str] | None, typer.Option("--gpu", help="Estimate for this GPU; may be given several times. A100 if left out.")] = None,
) -> None:
    """Print every setting of a recipe, after changes, where it differs from the paper, and what it costs, as JSON by verb.

    A verb whose recipe of this name lacks a changed setting is left out.

    Example: visling recipes show lxmert-20epochs-qa --set train.epochs=12 --gpu H100
    """
    from visling.recipes import estimates, finetuning, pretraining, releases

    tables: dict[str, Mapping[str, Callable[[], Any]]] = {"pretrain": pretraining.RECIPES, "finetune": finetuning.RECIPES}
    having = {verb: table for verb, table in tables.items() if name in table}
    if not having:
        raise ConfigError(f"no recipe {name!r}. {nearest(name, {known for table in tables.values() for known in table})}")
    found, refused = {}, []
    for verb, table in having.items():
        try:
            run = _recipe(table, name, set_, None)
            if verb == "pretrain":
                pretraining.check_names(run)
            found[verb] = run
        except ConfigError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    shown = {verb: configs.to_dict(run) | releases.differences(run, having[verb][name]()) for verb, run in found.items()}
    if estimate:
        gpus = tuple(gpu or (estimates.DEFAULT_GPU,))
        for one in gpus:
            estimates.find_gpu(one)  # before anything is traced
        for verb, run in found.items():
            shown[verb]["estimate"] = estimates.estimate(run).described(gpus)
    print(json.dumps(shown, indent=2))


@app.command()
def pretrain(
    recipe: Annotated[str, typer.Option(help="Name of a recipe; `visling recipes list` shows them.")],
    data: Annotated[list[str], typer.Option(help="Folder of annotations; may be given several times. DIR@SPLIT reads that split for training only.")],
    store: Annotated[Path, typer.Option(help="Region store of every image.")],
    out: Out,
    init: Annotated[Path | None, typer.Option(help="Model or run folder to start from.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, for recipes that train their region extractor along (e2e).")] = None,
    backbone: Annotated[
        Path | None, typer.Option(help="Weight file of a ResNet, or of a VL-BERT end to end, that the region extractor starts from.")
    ] = None,
    other_features: OtherFeatures = False,
    set_: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
    resume: Resume = False,
) -> None:
    """Pre-train an encoder on sentences about images.

    Example: visling pretrain --recipe visualbert-scenes --data scenes --store regions --out pretrained
    """
    from visling.recipes import pretraining

    run = _recipe(pretraining.RECIPES, recipe, set_, seed)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        state = pretraining.pretrain(
            run,
            out,
            data=data,
            store=store,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            images=images,
            backbone=backbone,
            stream=sys.stderr,
            command=["visling", *sys.argv[1:]],
        )
    _say_where("Pre-trained", out, state.stopped)


@app.command()
def finetune(
    recipe: Annotated[str, typer.Option(help="Name of a recipe; `visling recipes list` shows them.")],
    data: Annotated[Path, typer.Option(help="Folder of annotations.")],
    out: Out,
    store: Annotated[Path | None, typer.Option(help="Region store of every image; not needed with --text-only.")] = None,
    init: Annotated[Path | None, typer.Option(help="Pre-trained model or run folder; from scratch if left out.")] = None,
    other_features: OtherFeatures = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Hide every region: what the words alone give away.")] = False,
    set_: Settings = None,
    seed: Seed = None,
    device: Device = "auto",
    threads: Threads = None,
    processes: Processes = 1,
    resume: Resume = False,
) -> None:
    """Fine-tune a model on a task.

    Example: visling finetune --recipe visualbert-vqa-scenes --data scenes --store regions --init pretrained --out vqa
    """
    from visling.recipes import finetuning

    run = _recipe(finetuning.RECIPES, recipe, [*(set_ or []), *(["text_only=true"] if text_only else [])], seed)
    runtime.limit_threads(threads)
    with runtime.process_group(processes):
        state = finetuning.finetune(
            run,
            out,
            data=data,
            store=store,
            init=init,
            device=device,
            resume=resume,
            other_features=other_features,
            stream=sys.stderr,
            command=["visling", *sys.argv[1:]],
        )
    _say_where("Fine-tuned", out, state.stopped)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder that finetune wrote; or a model folder, with --data and --store.")],
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    data: Annotated[Path | None, typer.Option(help="Folder of annotations; the training run's if left out.")] = None,
    store: Annotated[Path | None, typer.Option(help="Region store; the training run's if left out.")] = None,
    other_features: OtherFeatures = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier evaluation of this split.")] = False,
    device: Device = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    json_: Json = False,
) -> None:
    """Score a run by the official metric and write the official submission file.

    Example: visling evaluate vqa --split test
    """
    from visling.recipes import finetuning

    found = finetuning.evaluate(
        run,
        split=split,
        data=data,
        store=store,
        device=device,
        precision=_precision(precision),
        other_features=other_features,
        overwrite=overwrite,
    )
    if json_:
        print(json.dumps(found))
        return
    for name, score in found["scores"].items():
        print(f"{name:<24}{score['value']:>8.2f}   ({score['count']})")
    for category, rows in found["by"].items():
        print(f"by {category.replace('_', ' ')}")
        for name, score in sorted(rows.items()):
            print(f"  {name:<22}{score['value']:>8.2f}   ({score['count']})")
    if found["truncated"]:
        print(f"{found['truncated']} texts were longer than the model reads and were cut")


@app.command()
def predict(
    words: Annotated[list[str], typer.Argument(metavar="IMAGE... TEXT", help="Image files, then the question or sentence.")],
    run: Annotated[Path, typer.Option(help="Run or model folder, or owner/name on the hub.")],
    detector: Annotated[Path | None, typer.Option(help="Detector folder; the one kept beside the model if left out.")] = None,
    other_features: OtherFeatures = False,
    out: Annotated[Path | None, typer.Option(help="Folder for the pictures; RUN/answers if left out, ./answers for a model on the hub.")] = None,
    device: Device = "auto",
    json_: Json = False,
) -> None:
    """Answer a question about raw images, and draw what the model saw.

    Example: visling predict --run vqa scenes/images/test/scene_000000002251.png "what colour is the star?"
    """
    from visling import api
    from visling.analysis.drawing import prediction_card

    *images, text = words
    if not images:
        raise typer.BadParameter('give one or more images and then the text: visling predict --run RUN picture.png "how many stars are there?"')
    model = api.load(run, detector=detector, other_features=other_features, device=device)
    folder = out if out is not None else (run / "answers" if run.exists() else Path("answers"))  # a name on the hub is no folder here
    for image in images:
        answer = model.answer(image, text)
        target = _free_name(folder, Path(image).stem)
        card = prediction_card(answer.image, answer.regions, text, answer.top, class_names=model.class_names, attribute_names=model.attribute_names)
        _save_picture(card, target)
        if json_:
            found = {"image": image, "text": text, "answer": answer.text, "top": answer.top, "regions": len(answer.regions)}
            print(json.dumps({**found, "truncated": answer.truncated, "picture": str(target)}))
            continue
        print(f"{image}: {', '.join(f'{name} {share:.0%}' for name, share in answer.top)}")
        print(f"  {len(answer.regions)} regions, drawn in {target}")
        if answer.truncated:
            print(f"  the text was cut to {model.spec.max_tokens} word pieces")


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    compare: Annotated[list[Path] | None, typer.Option(help="Another run whose scores stand beside; may be given several times.")] = None,
    examples: Annotated[int, typer.Option(min=0, help="Answers shown.")] = 24,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures, if they are no longer where the run read them.")] = None,
    store: Annotated[Path | None, typer.Option(help="Region store to draw from; the run's own if left out.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; RUN/report.html if left out.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier page.")] = False,
) -> None:
    """Write one self-contained HTML page about a run: curves, scores, right and wrong answers with boxes, the exact configuration.

    Example: visling report vqa --compare question-only
    """
    from visling.analysis.report import write_report
    from visling.data.store import NativeStore

    regions = None if store is None else NativeStore.open(store)
    page = write_report(run, out=out, examples=examples, images=images, store=regions, compare=compare or [], overwrite=overwrite)
    print(f"Wrote {page}")


@app.command(name="compare")
def compare_models(
    families: Annotated[str, typer.Option("--models", metavar="NAME,NAME", help="Families, separated by commas.")],
    phase: Annotated[str, typer.Option("--recipe", help="Pre-training: every model's recipe MODEL-RECIPE.")],
    tasks: Annotated[str, typer.Option("--tasks", metavar="TASK,TASK", help="Fine-tuning: every model's recipes MODEL-TASK, separated by commas.")],
    data: Annotated[Path, typer.Option(help="Folder of annotations.")],
    store: Annotated[Path, typer.Option(help="Region store of every image.")],
    out: Out,
    seeds: Annotated[int, typer.Option(min=1, help="How often everything is repeated, from seed 0 on.")] = 3,
    split: Annotated[str, typer.Option(help="Split to score.")] = "test",
    without_pretraining: Annotated[bool, typer.Option("--without-pretraining", help="Fine-tune from fresh weights, too.")] = False,
    text_only: Annotated[bool, typer.Option("--text-only", help="Fine-tune without any region, too: what the words alone give away.")] = False,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change one setting of every fine-tuning: a.b=value. May be repeated.")] = None,
    pretrain_set: Annotated[list[str] | None, typer.Option(help="Change one setting of every pre-training: a.b=value. May be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs side by side, each on one thread.")] = 1,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where a comparison into --out stopped, or add seeds or starts to it.")] = False,
    json_: Json = False,
) -> None:
    """Pre-train and fine-tune models on the same data, budget and features, and write one table as Markdown, JSON and HTML.

    Example: visling compare --models visualbert,lxmert --recipe scenes --tasks vqa-scenes --data scenes --store regions --out comparison
    """
    from visling.analysis.comparison import write_comparison
    from visling.recipes import comparison

    asked = comparison.Comparison(
        models=_names(families),
        recipe=phase,
        tasks=_names(tasks),
        seeds=seeds,
        split=split,
        pretrain_settings=tuple(pretrain_set or ()),
        finetune_settings=tuple(set_ or ()),
        without_pretraining=without_pretraining,
        text_only=text_only,
    )
    runtime.limit_threads(1)

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)
        write_comparison(out)

    found = comparison.compare(asked, out, data=data, store=store, device=device, jobs=jobs, resume=resume, stream=sys.stderr, progress=say)
    table, page = write_comparison(out)
    print(json.dumps(found) if json_ else f"{table.read_text(encoding='utf-8')}\nWrote {table}, {page} and {out / comparison.FILE}")


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(help="Weight file, folder with one, or owner/name on the hub; with --to-layout a model or run folder of visling.")
    ],
    to: Annotated[Path, typer.Option("--to", help="Model folder to write; with --to-layout a weight file (transformers: a folder).")],
    from_: Annotated[str | None, typer.Option("--from", help="Layout of the file; found by its names if left out.")] = None,
    to_layout: Annotated[str | None, typer.Option("--to-layout", help="Write back: official, transformers, or another layout of the family.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Family, for example vilbert; found by the names in the file if left out.")] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="Preset of the family; found by the shapes in the file if only one fits.")] = None,
    set_: Settings = None,
    release: Annotated[str | None, typer.Option("--release", help="Name in visling catalog: says family, layout and preset.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="Task whose head the file holds; told by the number of answers if left out.")] = None,
    answers: Annotated[
        list[Path] | None, typer.Option("--answers", help="Answers in the order of a classifier: .json, .pkl or one a line. May be repeated.")
    ] = None,
    other_answers: Annotated[bool, typer.Option("--other-answers", help="Accept answers that are not the release's list.")] = False,
    encoder_only: Annotated[bool, typer.Option("--encoder-only", help="Leave all heads out.")] = False,
    features: Annotated[Path | None, typer.Option("--features", help="Region store of the features that the weights were trained on.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of parameters that the file does not hold.")] = 0,
    offline: Annotated[bool, typer.Option("--offline", help="Look into the hub's cache only, as HF_HUB_OFFLINE does.")] = False,
    json_: Json = False,
) -> None:
    """Turn released weights into a model folder, or a model folder into a released layout.

    Example: visling convert model_LXRT.pth --release model_LXRT --to lxmert
    """
    from visling.recipes import conversion

    if to_layout is not None:
        if (from_, model, preset, set_, release, task, answers, features) != (None,) * 8 or encoder_only or other_answers:
            raise ConfigError("--to-layout writes a model folder back as it is: give only SOURCE, --to and --to-layout.")
        done = conversion.export(Path(source), to, layout=to_layout)
        _show({"layout": done.layout, "tensors": done.tensors, **done.left_out}, json_, f"Wrote {to}")
        return
    made = conversion.convert(
        source,
        to,
        layout=from_,
        model=model,
        preset=preset,
        settings=set_ or (),
        release=release,
        task=task,
        answers=answers or (),
        other_answers=other_answers,
        encoder_only=encoder_only,
        features=features,
        seed=seed,
        offline=offline or None,
    )
    read_as = {"model": made.model, "preset": made.preset, "layout": made.layout, "release": made.release or None, "task": made.task}
    heads = {place: f"{saved.head.kind}, {saved.head.outputs} outputs" for place, saved in made.heads.items()}
    if json_:
        print(json.dumps({**read_as, "heads": heads, "path": str(made.path), "coverage": configs.to_dict(made.coverage)}))
        return
    _show({**read_as, **heads}, json_, f"Read {source} as")
    print(made.coverage)
    print(f"Model in {made.path}")


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="Model or run folder.")],
    recording: Annotated[Path, typer.Argument(help="Folder of recorded values: of an official set, or written with --record.")],
    record: Annotated[bool, typer.Option("--record", help="Write the recording: a made-up batch and what comes out of every layer.")] = False,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest absolute difference that passes; 5e-5 if left out.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up batch.")] = 0,
    json_: Json = False,
) -> None:
    """Compare every layer of a model with recorded values and name the first that differs; status 1 if one does.

    Example: visling verify vqa recording --record
    """
    from visling.recipes import verification

    if record:
        layers = verification.record(checkpoint, recording, seed=seed)
        _show({"layers": len(layers)}, json_, f"Recorded in {recording}")
        return
    found = verification.verify(checkpoint, recording, atol=verification.ATOL if tolerance is None else tolerance)
    if json_:
        layers_ = {layer.name: {"largest": layer.largest if math.isfinite(layer.largest) else None, "agrees": layer.agrees} for layer in found.layers}
        print(json.dumps({"first": found.first, "tolerance": {"absolute": found.atol, "relative": found.rtol}, "layers": layers_}))
    else:
        print(found)
    if found.first is not None:
        raise typer.Exit(1)


@app.command(name="catalog")
def list_releases(
    model: Annotated[str | None, typer.Option("--model", help="One family only.")] = None,
    layout: Annotated[str | None, typer.Option("--layout", help="One layout only.")] = None,
    json_: Json = False,
) -> None:
    """List the released weight files that convert knows: what each holds, where it is, under which terms.

    Example: visling catalog --model lxmert
    """
    from visling.checkpoints import catalog

    chosen = [entry for entry in catalog.RELEASES if model in (None, entry.family) and layout in (None, entry.layout)]
    if not chosen:
        pairs = {f"--model {entry.family} --layout {entry.layout}" for entry in catalog.RELEASES}
        raise ConfigError(f"the catalogue has no such file. {nearest(f'--model {model} --layout {layout}', pairs)}")
    if json_:
        print(json.dumps([configs.to_dict(entry) for entry in chosen]))
        return
    for entry in chosen:
        heads = ", ".join(f"{part} {head.outputs}" for part, head in entry.heads.items()) or "none"
        rounded = "unknown" if entry.megabytes is None else f"about {entry.megabytes} MB"
        size = rounded if entry.size is None else f"{entry.size / 1e6:.0f} MB"
        facts = {"model": f"{entry.family}, preset {entry.preset}, layout {entry.layout}", "heads": heads, "at": entry.source}
        facts |= {"licence": entry.licence, "size": size, "SHA-256": entry.sha256 or "unknown", "known dead": entry.dead or "nothing known"}
        facts |= {"note": entry.note} if entry.note else {}
        _show(facts, False, entry.name)


@app.command()
def doctor(json_: Json = False) -> None:
    """Show versions, threads, devices, optional extras, the data folder and free space.

    Example: visling doctor
    """
    import torch

    home = runtime.home()
    place = next(folder for folder in (home, *home.parents) if folder.exists())
    extras = {"lmdb": "lmdb", "h5": "h5py", "plot": "matplotlib", "serve": "fastapi", "log": "tensorboard", "hf": "transformers"}
    found: dict[str, Any] = {
        "visling": metadata.version("visling"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": str(runtime.pick_device()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16 matrix units (AMX)": torch.cpu._is_amx_tile_supported(),
        "data folder (VISLING_HOME)": str(home),
        "free space there, GB": round(shutil.disk_usage(place).free / 1e9, 1),
        **{f"extra {extra}": _version(package) for extra, package in extras.items()},
    }
    _show(found, json_)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rounded(score: float | None) -> float | None:
    """A score as it is shown; None where nothing could be scored (JSON knows no NaN)."""
    return None if score is None or math.isnan(score) else round(score, 4)


def _show(values: dict[str, Any], json_: bool, title: str = "") -> None:
    if json_:
        print(json.dumps(values))
        return
    if title:
        print(title)
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        print(f"  {name:<{width}}  {'-' if value is None else value}")


def _show_with_unreadable(values: dict[str, Any], unreadable: Sequence[tuple[Path, str]], json_: bool, title: str = "") -> None:
    """`_show`, with the number of images left out; every one is named on stderr, for programs in the object."""
    values = {**values, "unreadable": len(unreadable)}
    if json_:
        values["unreadable_images"] = [{"image": str(image), "reason": reason} for image, reason in unreadable]
    _show(values, json_, title)
    for _, reason in unreadable:
        print(f"left out: {reason}", file=sys.stderr)


def _recipe(table: Mapping[str, Callable[[], T]], name: str, settings: Sequence[str] | None, seed: int | None) -> T:
    if name not in table:
        raise ConfigError(f"no recipe {name!r}. {nearest(name, table)}")
    chosen = configs.override(table[name](), settings or ())
    return chosen if seed is None else configs.override(chosen, [f"train.seed={seed}"])


def _precision(name: str) -> runtime.Precision:
    if name not in ("auto", "fp32", "bf16"):
        raise ConfigError(f"precision is {name!r}; expected auto, fp32 or bf16.")
    return name  # type: ignore[return-value]


def _dtype(name: str) -> Literal["float16", "float32"]:
    if name not in ("float16", "float32"):
        raise ConfigError(f"dtype is {name!r}; expected float16 or float32.")
    return name  # type: ignore[return-value]


def _say_where(what: str, out: Path, stopped: str) -> None:
    """Where a run's model is, or how to go on with a run that its time limit stopped."""
    if stopped == "max_seconds":
        print(f"Stopped by train.max_seconds. The best model so far is in {out / 'model'}; the same command with --resume goes on.")
    else:
        print(f"{what} model in {out / 'model'}")


def _claim_store(out: Path, resume: bool) -> None:
    """Refuse a place that is taken, or where no folder can be made, before regions are extracted into it."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a region store needs a folder. Use another --out.")
    held = sorted(entry.name for entry in out.iterdir()) if out.exists() else []
    is_store = "manifest.json" in held or "journal.jsonl" in held
    if held and not (resume and is_store):
        mend = "add to it with --resume, " if is_store else ""
        raise RunError(f"{out} is not empty: it holds {', '.join(held[:5])}. Use another --out, {mend}or delete the folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {out}: {error}. Use another --out.") from error


def _save_picture(picture: Image.Image, target: Path) -> None:
    try:
        picture.save(target)
    except (OSError, ValueError) as error:  # ValueError: no picture format is called like the file
        raise RunError(
            f"cannot write the picture {target}: {error}. Name another file with --out, in a folder that exists, ending in .png."
        ) from error


def _refuse(target: Path) -> None:
    if target.exists():
        raise RunError(f"{target} exists. Name another file with --out, or remove it.")


def _free_name(folder: Path, stem: str) -> Path:
    """A picture's name in the folder that is not taken yet."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to {folder}: {error}. Name another folder with --out.") from error
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for path in (folder / f"{name}.png" for name in names) if not path.exists())


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, nothing otherwise; called with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
