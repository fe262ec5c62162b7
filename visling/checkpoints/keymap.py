"""Key maps: how the tensors of a released file become the parameters of our modules, as rules.

A key is a dotted name. Our keys start with the name of a part ("encoder.layers.0...", "vocabulary.bias"); the
caller says which module is which part. In a rule `*` stands for one dotted component and `**` for any number of them;
both sides of a rule use the same wildcards in the same order. Rules are tried in order; the first that matches a key
applies. The inverse (`invert`) is derived from the same rules.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from visling.errors import CheckpointError

_NAMES_SHOWN = 12
"""Keys that an error message lists before it only counts the rest."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of a key map; made by the functions below."""

    kind: Literal["move", "tie", "drop", "fresh", "repair"]
    theirs: tuple[str, ...] = ()
    ours: tuple[str, ...] = ()
    transpose: bool = False
    reason: str = ""
    """Why a key is dropped, or keeps its initial value."""
    part: str = ""
    """Our part that a tied copy is written with."""


def rename(theirs: str, ours: str) -> Rule:
    """The same tensor under another name."""
    return Rule(kind="move", theirs=(theirs,), ours=(ours,))


def fuse(theirs: Sequence[str], ours: str) -> Rule:
    """Several tensors stacked along their first axis into one of ours, in the given order; all have one shape."""
    return Rule(kind="move", theirs=tuple(theirs), ours=(ours,))


def split(theirs: str, ours: Sequence[str]) -> Rule:
    """One tensor cut along its first axis into equal parts."""
    return Rule(kind="move", theirs=(theirs,), ours=tuple(ours))


def transpose(theirs: str, ours: str) -> Rule:
    """A matrix stored with its axes swapped."""
    return Rule(kind="move", theirs=(theirs,), ours=(ours,), transpose=True)


def tie(copy: str, original: str, *, part: str) -> Rule:
    """A tensor of their file that must equal another one; not read, and written back whenever `part` is."""
    return Rule(kind="tie", theirs=(copy, original), part=part)


def drop(theirs: str, reason: str) -> Rule:
    """A tensor that we do not need."""
    return Rule(kind="drop", theirs=(theirs,), reason=reason)


def fresh(ours: str, reason: str) -> Rule:
    """A parameter of ours that their file cannot fill: it keeps its initial value."""
    return Rule(kind="fresh", ours=(ours,), reason=reason)


def repair(old: str, new: str) -> Rule:
    """A spelling of older files, corrected before any other rule applies; `invert` writes the new one."""
    return Rule(kind="repair", theirs=(old, new))


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What became of every key of a file and of every parameter of the target. Prints as a table."""

    mapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Our key -> their keys."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Their copy -> their original."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Their key -> reason."""
    fresh: Mapping[str, str] = field(default_factory=dict)
    """Our key -> reason."""
    missing: tuple[str, ...] = ()
    """Our keys that the file does not fill."""
    unexpected: tuple[str, ...] = ()
    """Their keys that no rule matches."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)
    """Our key -> (shape in the file, shape in the model) where they differ."""

    @property
    def complete(self) -> bool:
        """Whether every key on both sides is accounted for."""
        return not (self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        rows = [("mapped", len(self.mapped), ""), ("tied", len(self.tied), "")]
        for name, reasons in (("dropped", self.dropped), ("fresh", self.fresh)):
            rows += [
                (name, list(reasons.values()).count(reason), reason) for reason in dict.fromkeys(reasons.values())
            ] or [(name, 0, "")]
        rows += [
            (name, len(keys), _list_names(keys))
            for name, keys in (("missing", self.missing), ("unexpected", self.unexpected))
        ]
        rows += [
            (
                "shape differs",
                len(self.shapes),
                _list_names(f"{key} {theirs} -> {ours}" for key, (theirs, ours) in self.shapes.items()),
            )
        ]
        return "\n".join(f"{name:<14}{count:>6}  {note}".rstrip() for name, count, note in rows)


@dataclass(frozen=True)
class KeyMap:
    """The rules of one released layout."""

    rules: tuple[Rule, ...]

    def convert(
        self, source: Mapping[str, Tensor], parts: Iterable[str] | None = None
    ) -> tuple[dict[str, Tensor], Coverage]:
        """Their tensors under our names, and what became of their keys.

        Args:
            source: a released state dict.
            parts: names of the parts wanted; tensors of others are dropped with a reason. None = all.
        Raises:
            CheckpointError: some but not all tensors of a `fuse` rule are present, or a tied copy differs from its
                original.
        """
        names: dict[str, str] = {}
        for stored in source:
            name = self.repaired(stored)
            if name in names:
                raise CheckpointError(
                    f"{stored!r} and {names[name]!r} are two spellings of one key, {name!r}. The file is damaged."
                )
            names[name] = stored
        wanted = None if parts is None else set(parts)
        tensors: dict[str, Tensor] = {}
        mapped: dict[str, tuple[str, ...]] = {}
        tied: dict[str, str] = {}
        dropped: dict[str, str] = {}
        unexpected = []
        for name, stored in names.items():
            found = self._find_rule(name)
            if found is None:
                unexpected.append(stored)
                continue
            rule, wild = found
            theirs, ours = (
                [_fill(pattern, wild) for pattern in rule.theirs],
                [_fill(pattern, wild) for pattern in rule.ours],
            )
            if rule.kind == "drop":
                dropped[stored] = rule.reason
            elif rule.kind == "tie":
                original = names.get(theirs[1])
                if original is None or not _are_equal(source[stored], source[original]):
                    raise CheckpointError(
                        f"{stored!r} should be a copy of {theirs[1]!r}, which is missing or differs. The file is of "
                        "another layout or damaged."
                    )
                tied[stored] = original
            elif wanted is not None and ours[0].split(".")[0] not in wanted:
                dropped[stored] = f"part {ours[0].split('.')[0]!r} was not requested"
            elif name == theirs[0]:
                if absent := [key for key in theirs if key not in names]:
                    raise CheckpointError(
                        f"{ours[0]!r} is built from {len(theirs)} tensors, but the file lacks {_list_names(absent)}."
                    )
                pieces = [source[names[key]] for key in theirs]
                whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
                whole = whole.t() if rule.transpose else whole
                tensors.update(zip(ours, whole.chunk(len(ours)) if len(ours) > 1 else [whole], strict=True))
                mapped.update(dict.fromkeys(ours, tuple(names[key] for key in theirs)))
            elif theirs[0] not in names:
                raise CheckpointError(
                    f"{ours[0]!r} is built from {len(theirs)} tensors, but the file lacks {theirs[0]}."
                )
        return tensors, Coverage(mapped=mapped, tied=tied, dropped=dropped, unexpected=tuple(unexpected))

    def load(self, source: Mapping[str, Tensor], parts: Mapping[str, nn.Module], *, strict: bool = True) -> Coverage:
        """Copy released weights into modules.

        Args:
            source: a released state dict.
            parts: part name ("encoder", "vocabulary", "matching", "classifier", ...) -> module.
            strict: raise unless every key on both sides is accounted for.
        Raises:
            CheckpointError: `strict` and a key is missing, unexpected or of another shape; then nothing has been
                copied.
        """
        tensors, coverage = self.convert(source, parts)
        targets = {
            f"{part}.{name}": tensor
            for part, module in parts.items()
            for name, tensor in module.state_dict(keep_vars=True).items()
        }
        unfilled = [name for name in targets if name not in tensors]
        reasons = {name: reason for name in unfilled if (reason := self._find_fresh_reason(name)) is not None}
        coverage = Coverage(
            mapped=coverage.mapped,
            tied=coverage.tied,
            dropped=coverage.dropped,
            fresh=reasons,
            missing=tuple(name for name in unfilled if name not in reasons),
            unexpected=(
                *coverage.unexpected,
                *(key for name in tensors if name not in targets for key in coverage.mapped[name]),
            ),
            shapes={
                name: (tuple(tensor.shape), tuple(targets[name].shape))
                for name, tensor in tensors.items()
                if name in targets and tensor.shape != targets[name].shape
            },
        )
        if strict and not coverage.complete:
            raise CheckpointError(
                f"the weights do not cover the model:\n{coverage}\nUse the preset, the layout and the heads that the "
                "file was made for (docs/models)."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                if name in targets and name not in coverage.shapes:
                    targets[name].copy_(tensor)
        return coverage

    def invert(self, ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names, tied copies included, without what `convert` dropped.

        Raises:
            CheckpointError: a tensor of ours has no name in this layout.
        """
        theirs: dict[str, Tensor] = {}
        for name, tensor in ours.items():
            found = self._find_inverse_rule(name)
            if found is None:
                raise CheckpointError(f"{name!r} has no name in this layout, so it cannot be written in it.")
            rule, wild = found
            keys = [_fill(pattern, wild) for pattern in rule.ours]
            if name != keys[0]:
                continue
            if absent := [key for key in keys if key not in ours]:
                raise CheckpointError(
                    f"{rule.theirs[0]!r} is built from {len(keys)} of our tensors; {_list_names(absent)} was not given."
                )
            whole = torch.cat([ours[key] for key in keys]) if len(keys) > 1 else tensor
            whole = whole.t() if rule.transpose else whole
            pieces = whole.chunk(len(rule.theirs)) if len(rule.theirs) > 1 else [whole]
            theirs.update(zip((_fill(pattern, wild) for pattern in rule.theirs), pieces, strict=True))
        written = {name.split(".")[0] for name in ours}
        for copy, original in (rule.theirs for rule in self.rules if rule.kind == "tie" and rule.part in written):
            if original in theirs:
                theirs[copy] = theirs[original]
            elif self._part_of(original) not in written:
                # If it is in a written part, that part lacks the layer: the smallest networks have fewer.
                raise CheckpointError(f"{copy!r} is a copy of {original!r}, which was not given.")
        return theirs

    def modules(self, source: Iterable[str]) -> dict[str, str]:
        """Their module name -> ours, for every module of a released file that holds parameters under one name on both
        sides.

        Args:
            source: keys of the released file.
        """
        pairs = {}
        for name in source:
            found = self._find_rule(self.repaired(name))
            if found is not None and found[0].kind == "move" and len(found[0].theirs) == len(found[0].ours) == 1:
                pairs[_parent_of(name)] = _parent_of(_fill(found[0].ours[0], found[1]))
        return pairs

    def repaired(self, name: str) -> str:
        """A name of theirs in the current spelling."""
        for rule in self.rules:
            if rule.kind == "repair" and (wild := _match(rule.theirs[0], name)) is not None:
                name = _fill(rule.theirs[1], wild)
        return name

    def _part_of(self, name: str) -> str:
        """Our part that a tensor of theirs belongs to; empty if none."""
        found = self._find_rule(name)
        return found[0].ours[0].split(".")[0] if found is not None and found[0].ours else ""

    def _find_rule(self, name: str) -> tuple[Rule, tuple[str, ...]] | None:
        for rule in self.rules:
            for pattern in rule.theirs[: 1 if rule.kind == "tie" else None]:
                if rule.kind != "repair" and (wild := _match(pattern, name)) is not None:
                    return rule, wild
        return None

    def _find_inverse_rule(self, name: str) -> tuple[Rule, tuple[str, ...]] | None:
        for rule in self.rules:
            for pattern in rule.ours:
                if rule.kind == "move" and (wild := _match(pattern, name)) is not None:
                    return rule, wild
        return None

    def _find_fresh_reason(self, name: str) -> str | None:
        for rule in self.rules:
            if rule.kind == "fresh" and _match(rule.ours[0], name) is not None:
                return rule.reason
        return None


def _match(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the wildcards of a pattern stand for in a name; None if it does not match."""
    found = _compile_pattern(pattern).fullmatch(name)
    return None if found is None else found.groups()


@functools.cache
def _compile_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern as a regular expression; cached, since every rule is tried on every name."""
    return re.compile(re.escape(pattern).replace(r"\*\*", "(.*)").replace(r"\*", r"([^.]+)"))


def _fill(pattern: str, wild: tuple[str, ...]) -> str:
    """A pattern with its wildcards filled in."""
    given = iter(wild)
    return re.sub(r"\*\*?", lambda _: next(given), pattern)


def _parent_of(name: str) -> str:
    return name.rpartition(".")[0]


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree; by shape only where there are no values (meta device)."""
    return first.shape == second.shape and (first.is_meta or torch.equal(first, second))


def _list_names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more
