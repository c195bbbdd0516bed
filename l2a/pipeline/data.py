"""The data of one run: both domains with their labels matched, and the labelled part of the target; without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from l2a.config import DistillConfig, settle
from l2a.data import Domain, Examples, TextInput, domains, examples, load_domain, normalised_hash, read_bank
from l2a.util import SILENT, Progress, UsageError, logger


@dataclass(frozen=True)
class RunData:
    """What a run may read.

    Attributes:
        source: Labelled source examples, free of every held-out target text.
        target: The target domain; its test split is opened by the final evaluation alone.
        splits: The few labelled target examples.
        unlabelled: Texts without labels, free of every held-out target text.
        forbidden: Normalised hashes of the target's test, reward and validation texts: none may be trained on.
        files: Names of the files read, with their sha256.
    """

    source: Examples
    target: Domain
    splits: examples.TargetSplits
    unlabelled: Sequence[TextInput]
    forbidden: frozenset[str]
    files: dict[str, str]

    @property
    def label_names(self) -> tuple[str, ...]:
        """The C class names."""
        return self.target.label_names

    @property
    def held_out_labels(self) -> Examples:
        """Labelled target examples that no student and no teacher is trained on: those of reward and validation."""
        return examples.concatenate(self.splits.reward, self.splits.validation)

    @property
    def target_labels(self) -> Examples:
        """All labelled target examples, for methods that need no splits."""
        return examples.concatenate(self.splits.train, self.splits.reward, self.splits.validation)


def load_run_data(config: DistillConfig, progress: Progress = SILENT, in_memory: Mapping[str, Any] = {}) -> RunData:
    """Read both domains and draw the few labels.

    Args:
        config: Names the domains, the shots and the seed.
        progress: Shows downloads.
        in_memory: Data by side, "source", "target" or "unlabelled", in place of what the configuration names.

    Raises:
        UsageError: If a domain cannot be read or the two do not fit together.
        RunError: If a domain cannot be fetched.
    """
    config = settle(config)
    with progress.stage("read the domains"):
        source, target = (_domain(side, config, in_memory, progress) for side in ("source", "target"))
        source, target = examples.align_labels(source, target)
        rng = np.random.default_rng([config.seed, 1])
        splits = examples.few_shot_splits(target, config.shots, config.dev_shots, rng)
        held_out = (*splits.reward.inputs, *splits.validation.inputs)
        forbidden = target.test.hashes.union(map(normalised_hash, held_out))
        _refuse_same_texts(source, target)
        words = target.test.words | examples.held_out_words(held_out)
        allowed = np.flatnonzero(~examples.seen_in("source", source.train.inputs, forbidden, words))
        if config.source_size is not None and config.source_size < len(allowed):
            chosen = np.random.default_rng([config.seed, 6]).choice(len(allowed), config.source_size, replace=False)
            allowed = allowed[np.sort(chosen)]
        learned = source.train.take(allowed)
        examples.warn_of_absent_classes("source", learned)
        sides = [("source", source.files), ("target", target.files)]
        unlabelled: Sequence[TextInput] = ()
        if references := [in_memory["unlabelled"]] if "unlabelled" in in_memory else config.unlabelled:
            unlabelled = bank = read_bank(references, target.is_pair, forbidden, config.data_root, progress, words)
            if examples.HELD_OUT in bank.summary:
                logger.warning(bank.summary)
            else:
                progress.say(bank.summary)
            sides.append(("unlabelled", bank.files))
        files = {f"{side}: {name}": digest for side, files in sides for name, digest in files.items()}
        return RunData(learned, target, splits, unlabelled, forbidden, files)


def _domain(side: str, config: DistillConfig, in_memory: Mapping[str, Any], progress: Progress) -> Domain:
    columns = getattr(config, f"{side}_columns")
    if side in in_memory:
        return domains.as_domain(in_memory[side], side, columns)
    flag = f"--{side}-{{}}-column of l2a distill or {side}_columns in a --config file"
    return load_domain(getattr(config, side), columns, config.data_root, progress, flag)


def _refuse_same_texts(source: Domain, target: Domain) -> None:
    known = {normalised_hash(text) for text in source.train.inputs}
    shared = sum(normalised_hash(text) in known for text in target.train.inputs)
    if shared > len(target.train) / 2:
        fix = "with their labels, so that the labels would not be few; give another source"
        found = f"which holds {shared} of the {len(target.train)} training texts of the target"
        raise UsageError(f"source is {source.name!r}, {found} {fix}")
