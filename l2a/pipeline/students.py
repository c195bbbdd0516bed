"""Trains the student: plainly, or in rounds of drawing, selecting and distilling candidates."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from l2a.distributed import agree
from l2a.generator.diagnostics import ChainDiagnostics
from l2a.generator.neighbours import build_neighbour_table
from l2a.generator.pool import CandidatePool, draw_pool
from l2a.generator.problem import GeneratorProblem, vocabulary
from l2a.kd.data import DistillationSet, Renewal, join
from l2a.kd.gradients import embedding_gradients
from l2a.kd.inference import run_student
from l2a.pipeline.context import RunContext
from l2a.pipeline.rewards import REAL_POOL, candidate_influences, real_reward
from l2a.pipeline.workbench import Workbench, open_workbench
from l2a.selector.agents import load_agent
from l2a.selector.problem import Selection, SelectionProblem
from l2a.selector.select import select, select_again
from l2a.students.student import Student


@dataclass(frozen=True)
class Round:
    """One round of candidates.

    Attributes:
        pool: What the generator drew.
        selection: What the selector kept of it.
        chains: How well the generator's chains moved.
    """

    pool: CandidatePool
    selection: Selection
    chains: ChainDiagnostics


@dataclass(frozen=True)
class Drawn:
    """A pool that was just drawn.

    Attributes:
        pool: What the generator drew.
        candidates: The same texts, to distil on.
        chains: How well the generator's chains moved.
    """

    pool: CandidatePool
    candidates: DistillationSet
    chains: ChainDiagnostics


@dataclass(frozen=True)
class TrainedStudent:
    """A distilled student.

    Attributes:
        student: With its best weights, in eval mode.
        rounds: What was drawn and kept; empty without augmentation.
        choice_log_likelihood: Score of the best state on the model-choice split.
    """

    student: Student
    rounds: tuple[Round, ...]
    choice_log_likelihood: float


def train_plain_student(context: RunContext) -> TrainedStudent:
    """Distil on the target's shots, the source and any unlabelled text, with as many updates as the full method.

    Args:
        context: The run.

    Returns:
        The student.
    """
    bench = open_workbench(context)
    bench.distil(None, context.config.kd.total_steps, "plain distillation")
    return finish(bench, ())


def train_l2a_student(context: RunContext) -> TrainedStudent:
    """Warm up on target and source, then draw, select and distil for some rounds.

    Args:
        context: The run.

    Returns:
        The student, with everything that was drawn and kept.
    """
    bench, kd = open_workbench(context), context.config.kd
    bench.distil(None, kd.warmup_steps, "warm-up")
    rounds: list[Round] = []
    for number in range(kd.rounds):
        rounds.append(_round(bench, number, rounds[-1].selection if rounds else None))
    return finish(bench, tuple(rounds))


def _round(bench: Workbench, number: int, previous: Selection | None) -> Round:
    context = bench.context
    rng = np.random.default_rng([context.config.seed, 2, number])
    drawn = draw_candidates(bench, rng)
    with context.progress.stage("select candidates"):
        problem = selection_problem(bench, drawn, load_agent(context.config.selector.agent).rule is None)
        policy = previous.policy if previous else None
        selection = select(problem, context.config.selector, rng, policy, context.progress)
    context.progress.event("round", number=number, kept=int(selection.kept.sum()), **_facts(selection.diagnostics))
    selection = _distil_kept(bench, drawn.candidates, problem, selection, rng)
    return Round(drawn.pool, selection, drawn.chains)


def draw_candidates(bench: Workbench, rng: np.random.Generator) -> Drawn:
    """Draw a pool of candidates for a student as it is now.

    Args:
        bench: The student and its texts.
        rng: The source of every random draw.

    Returns:
        The pool, labelled and tokenised.
    """
    context, size = bench.context, bench.context.config.kd.pool_size
    with context.progress.stage("draw candidates"):
        pool, chains = draw_pool(generator_problem(bench), context.config.generator, size, rng, context.progress)
    return Drawn(pool, bench.labelled(pool.inputs), chains)


def _distil_kept(
    bench: Workbench,
    candidates: DistillationSet,
    problem: SelectionProblem,
    selection: Selection,
    rng: np.random.Generator,
) -> Selection:
    """Distil on the kept candidates; an agent that says so keeps others as the student changes."""
    steps, config = bench.context.config.kd.round_steps, bench.context.config.selector
    every, kept = load_agent(config.agent).rescore_every, np.flatnonzero(selection.kept)
    if every is None or selection.fell_back:
        bench.distil(candidates.take(kept), steps, "distillation")
        return selection
    chosen = [selection]

    def choose(logits: NDArray[np.float32]) -> NDArray[np.int64]:
        now = replace(problem, student_logits=logits)
        chosen.append(select_again(now, config, rng, selection.policy))
        return np.flatnonzero(chosen[-1].kept)

    bench.distil(candidates, steps, "distillation", Renewal(candidates, kept, every, choose))
    facts = {**selection.diagnostics, "rescored": len(chosen) - 1}
    return replace(chosen[-1], agent=selection.agent, diagnostics=facts)


def _facts(diagnostics: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in diagnostics.items() if not isinstance(value, list)}


def finish(bench: Workbench, rounds: tuple[Round, ...]) -> TrainedStudent:
    """Take the best state as the result.

    Args:
        bench: Its student has been trained.
        rounds: What was drawn and kept.

    Returns:
        The student, in eval mode.
    """
    bench.trainer.restore_best()
    parity = bench.trainer.refit_output_layer(bench.known.encoded)
    if parity is not None:
        bench.context.progress.event("fold_parity", **asdict(parity))
    bench.student.model.eval()
    return TrainedStudent(bench.student, rounds, bench.trainer.best_score)


def generator_problem(bench: Workbench) -> GeneratorProblem:
    """Give the generator what it reads of a run, the student's gradient as it is now.

    Args:
        bench: The run with its student.

    Returns:
        Texts, labels, tokens, neighbours and callables.
    """
    context, student = bench.context, bench.student
    size = len(student.tokenizer)  # embedding matrices are often padded beyond the vocabulary
    embeddings = student.word_embeddings().cpu()[:size]
    shared = student.tokenizer.get_vocab() == context.teacher.tokenizer.get_vocab()
    # The teacher's embeddings know better which words are near; the gradient lives in the student's.
    geometry = context.teacher.word_embeddings().cpu()[:size] if shared else embeddings
    neighbours = context.config.generator.neighbours
    length = context.config.max_length
    return GeneratorProblem(
        source_inputs=context.data.source.inputs + context.data.unlabelled,
        target_inputs=context.data.splits.train.inputs,
        source_outputs=join([part for part in (bench.source, bench.unlabelled) if part is not None]).teacher,
        target_outputs=bench.target.teacher,
        tokenizer=student.tokenizer,
        word_embeddings=embeddings,
        neighbours=build_neighbour_table(geometry, vocabulary(student.tokenizer), neighbours, context.progress),
        labeller=context.labeller,
        gradient=lambda inputs: embedding_gradients(student, context.labeller, inputs, length),
        forbidden_hashes=context.data.forbidden,
        max_length=length,
    )


def selection_problem(bench: Workbench, drawn: Drawn, for_policies: bool = True) -> SelectionProblem:
    """Describe a pool and the student's state to a selector.

    Args:
        bench: The student and its texts.
        drawn: The pool.
        for_policies: Measure influences, which rules do not read.

    Returns:
        The problem.
    """
    candidates = drawn.candidates
    judged = np.random.default_rng([bench.context.config.seed, 8]).permutation(len(candidates)) < REAL_POOL
    few = candidates.take(np.flatnonzero(judged))
    return SelectionProblem(
        pool=drawn.pool,
        student_logits=agree(run_student(bench.student, candidates.encoded)[0]),
        influences=candidate_influences(bench, candidates, few, bench.reward) if for_policies else None,
        real_reward=lambda kept: real_reward(bench, candidates.take(np.flatnonzero(kept & judged))),
    )
