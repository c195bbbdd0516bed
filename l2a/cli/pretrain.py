"""The command ``l2a pretrain``: distil a general student from unlabelled text."""

from pathlib import Path
from typing import Annotated

import typer


def pretrain_command(
    text: Annotated[
        list[str],
        typer.Option(help="A .txt file (one text a line) or a domain, whose labels are not read; repeatable."),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder of the student; an interrupted run resumes from it.")],
    protect: Annotated[
        list[str] | None,
        typer.Option(help="A domain whose texts must stay unseen, such as one it will be tried on; repeatable."),
    ] = None,
    teacher: Annotated[str, typer.Option(help="minilm-l6, a model folder or a Hub id.")] = "minilm-l6",
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 4000,
    seed: Annotated[int, typer.Option(help="Decides first weights, variants and order.")] = 0,
    max_length: Annotated[int, typer.Option(help="Longest input in tokens.")] = 128,
    variants: Annotated[int, typer.Option(help="Spans, pairs, mixes and noisy texts made from the text.")] = 200_000,
    tokens_per_batch: Annotated[int, typer.Option(help="Padded tokens in a step.")] = 4096,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 8e-4,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 500,
    embedding_size: Annotated[int, typer.Option(help="Width of the student's word embeddings.")] = 80,
    hidden_size: Annotated[int, typer.Option(help="Width of its layers.")] = 128,
    layers: Annotated[int, typer.Option(help="Number of its layers.")] = 2,
    intermediate_size: Annotated[int, typer.Option(help="Width of its feed-forward blocks.")] = 512,
    heads: Annotated[int, typer.Option(help="Attention heads in a layer.")] = 4,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show every event.")] = False,
) -> None:
    """Distil a small general student from a pretrained encoder, without labels."""
    from l2a.pretraining.config import PretrainConfig
    from l2a.pretraining.general import pretrain
    from l2a.pretraining.shape import StudentShape
    from l2a.progress import RunProgress

    config = PretrainConfig(
        output_dir, tuple(text), tuple(protect or ()), teacher, steps, seed, max_length, variants, tokens_per_batch,
        learning_rate, checkpoint_every,
        StudentShape(embedding_size, hidden_size, layers, intermediate_size, heads),
    )  # fmt: skip
    progress = RunProgress(log_file=None, verbosity=int(verbose))
    try:
        folder = pretrain(config, progress)
    finally:
        progress.close()
    typer.echo(f"the general student is in {folder}; use it with: l2a distill --student {folder}")
