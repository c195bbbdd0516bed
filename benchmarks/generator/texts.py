"""Writes docs/generated_texts.md: unedited candidates of every text operator, with the texts they were made from.

    python benchmarks/generator/texts.py

Bases are drawn from the shipped domains, half from "movies" (the source), half from the training texts of "tweets"
(the target), and partners from the other domain, as the generator draws them; every setting is the default. AugPro-FGSM
turns an untrained default student against the pretrained encoder, since no run belongs to this page.
"""

from pathlib import Path

import numpy as np

from l2a.config import GeneratorConfig, StudentConfig
from l2a.data.domains import load_domain
from l2a.data.examples import Examples, TextInput
from l2a.generator.operators import OPERATORS, TEXT_OPERATORS, build_operator
from l2a.generator.tokens import TokenSpace, build_neighbour_table, vocabulary
from l2a.kd.trainer import embedding_gradients
from l2a.student.student import build_student
from l2a.teacher.labelling import predict
from l2a.teacher.model import load_encoder
from l2a.util.files import atomic_write_text

PAGE = Path(__file__).parents[2] / "docs" / "generated_texts.md"
SEED, COUNT, LENGTH = 0, 40, 128
HEAD = f"""# Generated texts

{COUNT} candidates of each text operator from movies to tweets, unedited and not selected, with the texts that they were
made from. The settings are the defaults: 15 % of the tokens for AugPro and neighbours, 10 % of the words for EDA and
40 % for TinyBERT's recipe. AugPro-FGSM uses the gradient of an untrained student here. Written by
`python benchmarks/generator/texts.py` (seed {SEED}).
"""


def main() -> None:
    """Write the page."""
    source, target = load_domain("movies").train, load_domain("tweets").train
    rng = np.random.default_rng(SEED)
    in_target = rng.random(COUNT) < GeneratorConfig().target_share
    bases, partners = _draw(in_target, target, source, rng), _draw(~in_target, target, source, rng)
    space = _space(source)
    parts = [HEAD]
    for name in TEXT_OPERATORS:
        degree = OPERATORS[name].default_degree or float(GeneratorConfig().degree)
        made = build_operator(name, lambda: space, lambda: None)(bases, partners, degree, np.random.default_rng(SEED))
        seeds = partners if name == "source" else bases
        rows = [
            f"| {_cell(seed)} | {_cell(rewrite.text)} | {rewrite.changed_share:.0%} |"
            for seed, rewrite in zip(seeds, made, strict=True)
        ]
        parts.append("\n".join([f"## {name}\n", "| seed text | candidate | changed |", "| --- | --- | ---: |", *rows]))
    atomic_write_text(PAGE, "\n\n".join(part.strip("\n") for part in parts) + "\n")
    print(f"wrote {PAGE}")


def _draw(in_target: np.ndarray, target: Examples, source: Examples, rng: np.random.Generator) -> list[TextInput]:
    few, many = (rng.integers(0, len(examples), size=len(in_target)) for examples in (target, source))
    return [target.inputs[i] if mine else source.inputs[j] for mine, i, j in zip(in_target, few, many, strict=True)]


def _space(examples: Examples) -> TokenSpace:
    teacher = load_encoder("minilm-l6", examples.label_names, SEED)
    student = build_student(StudentConfig(), teacher, examples.label_names, examples.inputs, SEED)
    size = len(student.tokenizer)
    geometry = teacher.word_embeddings().cpu()[:size]
    table = build_neighbour_table(geometry, vocabulary(student.tokenizer), GeneratorConfig().neighbours)
    return TokenSpace(
        student.tokenizer,
        table,
        student.word_embeddings().cpu()[:size],
        lambda inputs: embedding_gradients(student, lambda texts: predict(teacher, texts, LENGTH), inputs, LENGTH),
        LENGTH,
    )


def _cell(text: TextInput) -> str:
    """One line that Markdown shows as it is."""
    shown = " ".join(text[0].split())
    for mark in "\\`*_[]<>|#~":
        shown = shown.replace(mark, f"\\{mark}" if mark not in "<>" else {"<": "&lt;", ">": "&gt;"}[mark])
    return shown


if __name__ == "__main__":
    main()
