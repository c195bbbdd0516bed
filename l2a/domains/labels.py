"""Matching the labels of two domains by name."""

from dataclasses import replace

import numpy as np

from l2a.cards import did_you_mean
from l2a.domains.domain import Domain
from l2a.errors import UsageError
from l2a.examples import Examples


def align_labels(source: Domain, target: Domain) -> tuple[Domain, Domain]:
    """Give two domains one label set in one order, matched by name and never by integer.

    Args:
        source: The domain rich in labels.
        target: The scarce domain; its order of names is kept.

    Returns:
        The source with the target's label order, and the target.

    Raises:
        UsageError: If one domain has a label that the other lacks, or only one of them has pairs of texts.
    """
    if source.is_pair != target.is_pair:
        pair, single = (source, target) if source.is_pair else (target, source)
        raise UsageError(
            f"{pair.name} has pairs of texts and {single.name} single ones; "
            "both domains need the same kind, name the columns by --text-column and --text-pair-column"
        )
    problems = _lacking(source, target) + _lacking(target, source)
    if problems:
        raise UsageError("; ".join(problems) + "; labels are matched by name, so rename or remove them")
    return relabel(source, target.label_names), target


def _lacking(domain: Domain, other: Domain) -> list[str]:
    return [
        f"{other.name} lacks the label {name!r} of {domain.name}{did_you_mean(name, other.label_names)}"
        for name in domain.label_names
        if name not in other.label_names
    ]


def relabel(domain: Domain, label_names: tuple[str, ...]) -> Domain:
    """Put a domain's labels in another order.

    Args:
        domain: The domain.
        label_names: The same names in the wanted order.

    Returns:
        The domain with that order; its texts are the same.
    """
    new_index = np.array([label_names.index(name) for name in domain.label_names], dtype=np.int64)

    def convert(examples: Examples) -> Examples:
        return Examples(examples.inputs, new_index[examples.labels], label_names)

    test = domain.test.converted(convert)
    return replace(domain, label_names=label_names, train=convert(domain.train), dev=convert(domain.dev), test=test)
