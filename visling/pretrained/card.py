"""The model card: README.md of a model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from visling.feature_kinds import describe_kind


def write_card(described: Mapping[str, Any], trained: str, answers: Sequence[str]) -> str:
    """The model card, with the hub's header."""
    model, task, source = described["model"], described["task"], described.get("source", {})
    heads = [
        f"{place} ({about['head']['kind']}, {about['head']['outputs']})"
        for place, about in described.get("heads", {}).items()
    ]
    if described["text_only"]:
        features = "It was trained without regions."
    elif "extractor" in described:
        features = (
            "It computes them from pixels with its own network, whose weights are included (`extractor.`); others give "
            "wrong answers without an error. Boxes and classes were those of the regions "
            f"`{described['fingerprint']}`."
        )
    elif "features" in described:
        features = (
            f"It was trained on region features of the kind {describe_kind(described['features'])}; others give wrong "
            "answers without an error."
        )
    elif described["fingerprint"]:
        features = (
            f"It was trained on region features `{described['fingerprint']}`; others give wrong answers without an "
            "error."
        )
    else:
        features = (
            "Which region features it was trained on is not recorded; others give wrong answers without an error."
        )
    facts = [
        f"- Trained {trained}.",
        f"- Task: {task or 'none; pre-trained encoder'}.",
        f"- Features: {features} {source.get('note', '')}".rstrip(),
        *([f"- Answers: {len(answers)}, in `answers.json`; their order is part of the model."] if answers else []),
        *([f"- Heads: {', '.join(heads)}."] if heads else []),
        *([f"- Licence of the weights: {source['licence']}."] if "licence" in source else []),
        *([f"- From: {source['address']}."] if "address" in source else []),
    ]
    use = "api.load(FOLDER)" if task and not source else "api.from_pretrained(FOLDER).encoder()"
    return "\n".join(
        [
            "---",
            "library_name: visling",
            f"tags: [vision-and-language, {model}{', ' + task if task else ''}]",
            "---",
            "",
            f"# {model}{', ' + task if task else ''}",
            "",
            *facts,
            "",
            f"Use: `from visling import api; {use}`. Settings are in `config.json`, the word pieces in `vocab.txt`.",
            "",
        ]
    )
