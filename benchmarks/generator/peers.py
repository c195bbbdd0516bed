"""Times word-substitution augmenters of nlpaug and TextAttack; run.py starts it in their own process.

Only what loads without a download is measured. Of nlpaug: RandomWordAug with the file's own words, or its default
mark, in a word's place, and SpellingAug. Of TextAttack: WordSwap classes that put a misspelling in a word's place; its
synonym, embedding and masked-LM swaps fetch their data at run time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest.mock import MagicMock


def main() -> None:
    """Measure one library and print JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("library", choices=["nlpaug", "textattack"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--texts", type=int, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--nltk", type=Path, required=True)
    options = parser.parse_args()
    texts = options.file.read_text("utf-8").splitlines()[: options.texts]
    started = time.perf_counter()
    augmenters = {"nlpaug": nlpaug_augmenters, "textattack": textattack_augmenters}[options.library](
        texts, options.nltk
    )
    start_up = time.perf_counter() - started
    measured = {}
    for name, augment in augmenters.items():
        augment(texts[:20])
        rates = [rate(augment, texts) for _ in range(options.rounds)]
        changed = sum(old != new for old, new in zip(texts, augment(texts), strict=True)) / len(texts)
        wall, cpu = zip(*rates, strict=True)
        measured[name] = {"per_second": max(wall), "per_cpu_second": max(cpu), "changed_share_of_texts": changed}
    facts = {"version": version(options.library), "start_up_seconds": start_up, "texts": len(texts)}
    json.dump({**facts, "augmenters": measured}, sys.stdout)


def rate(augment: Callable[[list[str]], list[str]], texts: list[str]) -> tuple[float, float]:
    """Sentences a second of wall and of processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    augment(texts)
    return len(texts) / (time.perf_counter() - wall), len(texts) / (time.process_time() - cpu)


def nlpaug_augmenters(texts: list[str], nltk_folder: Path) -> dict[str, Callable[[list[str]], list[str]]]:
    """What nlpaug substitutes words by, at the degree that l2a uses."""
    import nlpaug.augmenter.word as word

    words = sorted({token for text in texts for token in text.split()})
    made = {
        "RandomWordAug(substitute, words of the file)": word.RandomWordAug(
            action="substitute", aug_p=0.15, aug_max=None, target_words=words
        ),
        "RandomWordAug(substitute, '_')": word.RandomWordAug(action="substitute", aug_p=0.15, aug_max=None),
        "SpellingAug": word.SpellingAug(aug_p=0.15, aug_max=None),
    }
    return {name: augmenter.augment for name, augmenter in made.items()}


def textattack_augmenters(texts: list[str], nltk_folder: Path) -> dict[str, Callable[[list[str]], list[str]]]:
    """What TextAttack substitutes words by, at the degree that l2a uses."""
    stand_in_for_flair()
    import nltk

    nltk.data.path.insert(0, str(nltk_folder))
    nltk.download = lambda *arguments, **named: True
    import textattack.transformations as swaps
    from textattack.augmentation import Augmenter

    names = ("NeighboringCharacterSwap", "RandomCharacterSubstitution", "RandomCharacterDeletion", "QWERTY")
    made = {}
    for name in names:
        augmenter = Augmenter(getattr(swaps, f"WordSwap{name}")(), pct_words_to_swap=0.15, fast_augment=True)
        made[f"WordSwap{name}"] = lambda batch, one=augmenter: [one.augment(text)[0] for text in batch]
    return made


def stand_in_for_flair() -> None:
    """TextAttack imports flair, for taggers that nothing here calls and whose pins rule out current packages."""
    for name in ("flair", "flair.data", "flair.models"):
        sys.modules[name] = MagicMock()
    sys.modules["flair"].data = sys.modules["flair.data"]
    sys.modules["flair.data"].Tokenizer = object


if __name__ == "__main__":
    main()
