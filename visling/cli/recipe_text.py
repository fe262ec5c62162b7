"""A recipe as a short text: what it is, data, size, main numbers, what differs. `recipes show --json` has the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def describe_recipe(verb: str, about: str, recipe: Mapping[str, Any]) -> str:
    """The text of one recipe.

    Args:
        verb: pretrain, finetune or multitask.
        about: what it is, in a sentence.
        recipe: as `recipes show --json` prints it: the config, its differences and, if made, its estimate.
    """
    rows = dict(_list_rows(recipe))
    width = max(map(len, rows))
    lines = [f"{recipe['recipe']}, for visling {verb}", about, ""]
    lines += [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    titles = {
        "changed": ("Changed", "recipe"),
        "paper": ("The paper differs", "paper"),
        "release": ("The released code differs", "release"),
    }
    for part, (title, source) in titles.items():
        if recipe.get(part):
            lines += ["", title]
            lines += [f"  {name}: {_say_difference(values, source)}" for name, values in recipe[part].items()]
    return "\n".join(lines)


def _list_rows(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    encoder, train = recipe["encoder"], recipe["train"]
    sizes = [f"{name} {value}" for name, value in encoder.items() if name == "hidden_size" or _counts_layers(name)]
    yield "model", f"{recipe['model']}: {', '.join(sizes)}"
    width = "of any width" if recipe["any_features"] else f"of width {encoder.get('feature_size')}"
    words = f"{encoder.get('max_tokens')} word pieces ({encoder.get('vocabulary')})"
    yield "reads", f"up to {words} and {encoder.get('max_regions')} regions {width}"
    if "tasks" in recipe:
        yield from _list_tasks(recipe)
    elif "task" in recipe:
        settings = "".join(f", {name} {_say(value)}" for name, value in recipe["task_settings"].items())
        yield "task", f"{recipe['task']}{settings}"
        yield "data", f"train on {recipe['train_split']}, best weights by {train['metric']} on {recipe['valid_split']}"
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
    yield "starts from", "random weights" if recipe["start"] == "random" else recipe["start"]
    if "tasks" not in recipe:
        batches = f"batches of {recipe['batch_size']}{_say_accumulation(train['accumulation'])}"
        yield "length", f"{_say_length(train)}, {batches}"
    yield "optimiser", _say_optimiser(train["optim"])
    yield "schedule", _say_schedule(train["optim"])
    yield "precision", train["precision"]
    if "estimate" in recipe:
        yield from _list_costs(recipe["estimate"])


def _list_tasks(recipe: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Rows of a run over several tasks: what each is, its numbers, and how they take turns."""
    for name, task in recipe["tasks"].items():
        parts = [
            task["task"] + "".join(f", {key} {_say(value)}" for key, value in task["task_settings"].items()),
            f"train on {task['train_split']}, validate on {task['valid_split']}",
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
    yield (
        "parameters",
        f"{estimate['parameters'] / 1e6:.1f} million, {estimate['trained parameters'] / 1e6:.1f} trained",
    )
    yield "memory", f"about {estimate['GB']['total']} GB"
    if estimate["updates"] is not None:
        yield "updates", f"{estimate['updates']:,}"
    for gpu, hours in estimate["hours"].items():
        yield f"hours on {gpu}", ", ".join(f"{kind} {value:g}" for kind, value in hours.items()) + " (an estimate)"


def _counts_layers(name: str) -> bool:
    return name.startswith("num_") and name.endswith(("layers", "heads"))


def _say_weight(weight: float) -> str:
    return "" if weight == 1 else f" x {weight:g}"


def _say_length(train: Mapping[str, Any]) -> str:
    if train["max_steps"] is not None:
        return f"{train['max_steps']} updates"
    return f"{train['epochs']} epochs" if train["seconds"] is None else f"{train['seconds']:g} s"


def _say_accumulation(count: int) -> str:
    return "" if count == 1 else f", {count} of them per update"


def _say_optimiser(optim: Mapping[str, Any]) -> str:
    """Its settings, without those that it does not read."""
    parts = [
        optim["name"],
        f"lr {optim['lr']:g}",
        f"betas {' and '.join(map(_say, optim['betas']))}",
        f"eps {optim['eps']:g}",
    ]
    if optim["name"] == "release_adamw":
        parts.append(f"{'with' if optim['bias_correction'] else 'without'} bias correction")
    parts.append(f"weight decay {optim['weight_decay']:g}")
    clips = optim["clip"] != "none"
    parts.append(f"gradients clipped to {optim['clip_norm']:g} ({optim['clip']})" if clips else "no gradient clipping")
    return ", ".join(parts)


def _say_schedule(optim: Mapping[str, Any]) -> str:
    if optim["schedule"] == "constant":
        return "constant"
    by_steps = optim["warmup_steps"] is not None
    warm = f"{optim['warmup_steps']} updates" if by_steps else f"{optim['warmup_share']:.3g} of the run"
    fall = f", falls in the last {optim['decay_share']:g}" if optim["schedule"] == "warmup_stable_decay" else ""
    return f"{optim['schedule']}, warm-up {warm}{fall}"


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
