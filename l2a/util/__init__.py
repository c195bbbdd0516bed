"""Helpers that know nothing of texts or models: errors, files, cache, cards, progress, training, clusters.

What most modules need is here by name; training.py and cluster.py, which import torch and Dask, are imported
themselves.
"""

from l2a.util.cards import Allowed, Checked, build, find_card, list_cards, load_yaml
from l2a.util.errors import RunError, UsageError, did_you_mean, logger, os_error_sentence
from l2a.util.files import Checkpoint, atomic_write_text, cache_root, cached_folder, fingerprint, sha256_file, to_json
from l2a.util.progress import SILENT, Advance, Progress, process_count, process_rank

__all__ = [
    "SILENT", "Advance", "Allowed", "Checked", "Checkpoint", "Progress", "RunError", "UsageError", "atomic_write_text",
    "build", "cache_root", "cached_folder", "did_you_mean", "find_card", "fingerprint", "list_cards", "load_yaml",
    "logger", "os_error_sentence", "process_count", "process_rank", "sha256_file", "to_json",
]  # fmt: skip
