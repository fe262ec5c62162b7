"""A recipe as a short text: what it is, data, size, main numbers, what differs. `recipes show --json` has the rest."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from visling.cli.printing import format_rows


def describe_recipe(verb: str, recipe: Mapping[str, Any], width: int | None = None) -> str:
    """The text of one recipe.

    Args:
        verb: pretrain, finetune or multitask.
        recipe: as `recipes show --json` prints it: the config, what it is in words, its differences and, if made, its
            estimate.
        width: columns of the terminal; None = lines are not wrapped.
    """
    lines = [f"{recipe['recipe']}, for visling {verb}", *_wrap(recipe["about"], width)]
    if recipe.get("more"):
        lines += ["", *_wrap(recipe["more"], width)]
    lines += ["", *format_rows(dict(_list_rows(recipe)), width)]
    titles = {
        "changed": ("Changed", "recipe"),
        "paper": ("The paper differs", "paper"),
        "release": ("The released code differs", "release"),
    }
    for part, (title, source) in titles.items():
        if recipe.get(part):
            lines += ["", title]
            for name, values in recipe[part].items():
                lines += _wrap(f"  {name}: {_say_difference(values, source)}", width)
    if recipe.get("release_in_all_runs"):
        lines += ["", "The released code differs in every run"]
        for name, value in recipe["release_in_all_runs"].items():
            lines += _wrap(f"  {name}: {value}", width)
    return "\n".join(lines)


def _wrap(text: str, width: int | None) -> list[str]:
    """Lines of a paragraph, or of an indented entry, which continues a little further to the right."""
    if width is None:
        return [text]
    indent = "    " if text.startswith(" ") else ""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _list_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    encoder, train = recipe["encoder"], recipe["train"]
    sizes = [f"{name} {value}" for name, value in encoder.items() if name == "hidden_size" or _counts_layers(name)]
    yield "model", f"{recipe['model']}: {', '.join(sizes)}"
    width = "of any width" if recipe["any_features"] else f"of width {encoder.get('feature_size')}"
    words = f"{encoder.get('max_tokens')} word pieces ({encoder.get('vocabulary')})"
    yield "reads", f"up to {words} and {encoder.get('max_regions')} regions {width}"
    if recipe.get("extractor"):
        yield (
            "features",
            "computed from the pictures (--images) by a network that is trained jointly and starts from --backbone",
        )
    if "tasks" in recipe:
        yield from _list_tasks(recipe)
    elif "task" in recipe:
        settings = "".join(
            f", {name} {_say(value)}" for name, value in recipe["task_settings"].items() if value is not None
        )
        yield "task", f"{recipe['task']}{settings}"
        if recipe.get("files"):
            yield "files", recipe["files"]
        if "answers" in recipe:
            yield "answers", recipe["answers"]
        yield "trains on", recipe["train_split"] + _say_examples(recipe)
        yield "validates", _say_validation(recipe)
    else:
        corpora = [corpus["kind"] + _say_weight(corpus["weight"]) for corpus in recipe["corpora"]]
        yield "data", ", ".join(corpora)
        learnt = [
            name
            + _say_weight(weight)
            + (f" from epoch {first + 1}" if (first := recipe["from_epoch"].get(name)) else "")
            for name, weight in recipe["objectives"].items()
        ]
        yield "learns", ", ".join(learnt)
    by_init = f"{recipe['start']}, which --init has to name; without it from random weights"
    yield "starts from", "random weights" if recipe["start"] == "random" else by_init
    if "tasks" not in recipe:
        batches = f"batches of {recipe['batch_size']}{_say_accumulation(train['accumulation'])}"
        yield "length", f"{_say_length(train)}, {batches}"
    yield "optimiser", _say_optimiser(train["optim"])
    yield "parameters", _say_parameters(train["optim"])
    yield "rate", _say_schedule(train["optim"])
    yield "keeps", _say_kept(train)
    if recipe.get("flip"):
        yield "mirrors", f"{recipe['flip']:.0%} of the training images"
    yield "precision", train["precision"]
    yield "seed", str(train["seed"])
    if recipe.get("source"):
        yield "source", recipe["source"]
    if "estimate" in recipe:
        yield from _list_costs(recipe["estimate"])


def _list_tasks(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a run over several tasks: what each is, its numbers, and how they take turns."""
    for name, task in recipe["tasks"].items():
        parts = [
            task["task"] + "".join(f", {key} {_say(value)}" for key, value in task["task_settings"].items()),
            f"train on {task['train_split']}, validate on {task['valid_split']}" + _say_images(task["valid_images"]),
            f"batches of {task['batch_size']}",
        ]
        for key, what in (("max_tokens", "word pieces"), ("max_regions", "regions")):
            parts += [f"{task[key]} {what}"] if task[key] is not None else []
        parts += [f"loss x {task['loss_scale']:g}"] if task["loss_scale"] != 1 else []
        parts += [f"token {task['task_token']}"] if task["task_token"] is not None else []
        parts += [f"shares its heads ({task['shares']})"] if task["shares"] is not None else []
        parts += [f"without the images in {task['without_images']}"] if task["without_images"] is not None else []
        yield f"task {name}", "; ".join(parts)
    longest = max(task["epochs"] for task in recipe["tasks"].values())
    times = "" if recipe["multiplier"] == 1 else f", times {recipe['multiplier']:g}"
    yield "length", f"{longest} epochs of the longest task{times}, in {recipe['train']['epochs']} parts"
    yield "turns", f"an update of every task in every iteration{_say_pauses(recipe['stop_and_go'])}"
    yield "cost", "not estimated; `visling recipes show` estimates what one of the tasks costs alone"


def _say_pauses(rule: Mapping[str, Any] | None) -> str:
    """When a task of several leaves out its turn."""
    if rule is None:
        return ""
    often = "none" if rule["every"] is None else f"one in every {rule['every']} iterations"
    return (
        f"; of one whose best score has not risen by {100 * rule['threshold']:g} % in {rule['patience'] + 1} "
        f"validations {often}, until it falls {100 * rule['resume_below']:g} % below it"
    )


def _list_costs(estimate: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sizes = (estimate["parameters"], estimate["trained parameters"])
    yield "size", "{:.1f} million parameters, {:.1f} million trained".format(*(size / 1e6 for size in sizes))
    yield "memory", f"about {estimate['GB']['total']} GB"
    if estimate["updates"] is not None:
        yield "updates", f"{estimate['updates']:,}"
    for gpu, hours in estimate["hours"].items():
        yield f"hours on {gpu}", ", ".join(f"{kind} {value:g}" for kind, value in hours.items()) + " (an estimate)"


def _counts_layers(name: str) -> bool:
    return name.startswith("num_") and name.endswith(("layers", "heads"))


def _say_weight(weight: float) -> str:
    return "" if weight == 1 else f" x {weight:g}"


def _say_examples(recipe: Mapping[str, Any]) -> str:
    """How many examples an epoch has, where an estimate knows it."""
    number = recipe.get("estimate", {}).get("assumed", {}).get("examples per epoch")
    return "" if number is None else f", {number:,} examples"


def _say_validation(recipe: Mapping[str, Any]) -> str:
    train, best = recipe["train"], "highest" if recipe["train"]["direction"] == "max" else "lowest"
    chosen = f"where the {best} {train['metric']} is the best" if "best" in train["keep"] else f"by {train['metric']}"
    return f"on {recipe['valid_split']}{_say_images(recipe['valid_images'])}, {chosen}"


def _say_images(number: int | None) -> str:
    return "" if number is None else f" (the first {number} images)"


def _say_length(train: Mapping[str, Any]) -> str:
    if train["max_steps"] is not None:
        length = f"{train['max_steps']} updates"
    else:
        length = f"{train['epochs']} epochs" if train["seconds"] is None else f"{train['seconds']:g} s"
    patience = train["patience"]
    return length if patience is None else f"{length}, or until the best is more than {patience} validations old"


def _say_accumulation(count: int) -> str:
    return "" if count == 1 else f", {count} of them per update"


def _say_optimiser(optim: Mapping[str, Any]) -> str:
    """Its settings, without those that it does not read."""
    parts = [optim["name"], f"lr {optim['lr']:g}"]
    if optim["name"] == "sgd":
        parts.append(f"momentum {optim['momentum']:g}")
    else:
        parts += [f"betas {' and '.join(map(_say, optim['betas']))}", f"eps {optim['eps']:g}"]
    if optim["name"] == "release_adamw":
        parts.append(f"{'with' if optim['bias_correction'] else 'without'} bias correction")
    return ", ".join([*parts, _say_clipping(optim)])


def _say_clipping(optim: Mapping[str, Any]) -> str:
    if optim["clip"] == "none":
        return "no gradient clipping"
    whose = "each gradient" if optim["clip"] == "per_tensor" else "all gradients together"
    return f"{whose} clipped to a norm of {optim['clip_norm']:g}"


def _say_parameters(optim: Mapping[str, Any]) -> str:
    """Which parameters are decayed, left out, or have a rate of their own."""
    spared = ", ".join([*optim["no_decay"], *(() if optim["decay_vectors"] else ("vectors",))])
    if spared and optim["no_decay_except"]:
        spared += f" (except {', '.join(optim['no_decay_except'])})"
    if optim["swap_decay"]:
        which = f"those named {spared} alone" if spared else "none"
    else:
        which = f"all parameters but {spared}" if spared else "all parameters"
    parts = [f"weight decay {optim['weight_decay']:g} on {which}" if optim["weight_decay"] else "no weight decay"]
    for factor in dict.fromkeys(optim["rates"].values()):
        names = ", ".join(name for name, other in optim["rates"].items() if other == factor)
        parts.append(f"{names} at {factor:g} times the rate")
    if optim["exclude"]:
        parts.append(f"{', '.join(optim['exclude'])} left out")
    return "; ".join(parts)


_FALLS: Mapping[str, str] = {
    "constant": "constant",
    "warmup_constant": "then stays",
    "warmup_linear": "then falls linearly to 0",
    "triangle": "then falls linearly to 0",
    "warmup_cosine": "then falls by half a cosine",
    "warmup_stable_decay": "then stays",
    "cosine": "while it falls by half a cosine",
}
"""Schedule -> what the rate does after the warm-up."""


def _say_schedule(optim: Mapping[str, Any]) -> str:
    """How the rate changes over a run."""
    parts = []
    if optim["schedule"] != "constant":
        by_steps = optim["warmup_steps"] is not None
        warm = f"{optim['warmup_steps']:,} updates" if by_steps else f"{optim['warmup_share']:.3g} of the run"
        parts.append(f"rises over {warm}")
    parts.append(_FALLS[optim["schedule"]])
    if optim["schedule"] == "warmup_stable_decay":
        parts.append(f"and falls to 0 in the last {optim['decay_share']:g} of it")
    if optim["restarts"]:
        parts.append(f"{optim['restarts']} times from the peak again")
    if optim["drop_epochs"]:
        epochs = " and ".join(f"{epoch:g}" for epoch in optim["drop_epochs"])
        parts.append(f"times {optim['drop_factor']:g} after epoch {epochs}")
    if optim["plateau"]:
        parts.append(f"times {optim['plateau']['factor']:g} where the validation score stops improving")
    return ", ".join(parts)


def _say_kept(train: Mapping[str, Any]) -> str:
    """Which weights a run leaves."""
    names = {"best": "the best weights", "last": "the last", "epochs": "those of every epoch"}
    parts = [names[kept] for kept in train["keep"]]
    if train["average"] is not None:
        parts.append(f"the best of a second model, the average of all updates with momentum {train['average']:g}")
    return ", ".join(parts)


def _say_difference(values: Mapping[str, Any], source: str) -> str:
    if "here" in values:
        return f"{_say(values['here'])} here, {_say(values[source])} in the {source}"
    value = values[source]
    # A topic is explained in words; a bare value belongs to a setting that this recipe leaves out.
    return value if isinstance(value, str) else f"not set here, {_say(value)} in the {source}"


def _say(value: Any) -> str:
    """A value of a config as people write it."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_say, value)) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_say(inner)}" for name, inner in value.items()) or "none"
    return str(value)
