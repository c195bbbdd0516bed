"""Domains: labelled texts of one kind, with fixed splits."""

from l2a.domains.domain import Columns, Domain, HeldOut
from l2a.domains.labels import align_labels
from l2a.domains.load import load_domain
from l2a.domains.splits import TargetSplits, few_shot_splits

__all__ = ["Columns", "Domain", "HeldOut", "TargetSplits", "align_labels", "few_shot_splits", "load_domain"]
