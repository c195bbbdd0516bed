"""Trains the student: plainly, or in rounds of drawing, selecting and distilling candidates."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import NamedTuple

import numpy as np

from l2a.config import resolve_degree
from l2a.data import Bools, Doubles, Examples, Floats, Ints, TextInput, concatenate, encoding, normalised_hash
from l2a.generator.chain import CandidatePool, Diagnostics, GeneratorInputs, draw_pool, fit_target_density
from l2a.generator.operators import OPERATORS, TEXT_OPERATORS, build_operator, masked_words
from l2a.generator.tokens import TokenSpace, build_neighbour_table, vocabulary
from l2a.kd import data as kd_data, trainer as kd_trainer
from l2a.kd.data import DistillationSet
from l2a.pipeline.session import RunContext, TrainingSession, apart_from, mixture, open_session
from l2a.selector import agents, algorithms, reward
from l2a.selector.problem import Selection, SelectionProblem
from l2a.selector.select import select
from l2a.student.student import Student
from l2a.teacher import labelling, model
from l2a.util import RunError, UsageError, logger

# Logit of a real label where a teacher's would stand.
CERTAIN = 10.0
# Of the source, that stand for it where the surrogate is fitted.
SOURCE_TEXTS = 2000
# Drawing stops when enough different texts came, or after this many times as many draws.
DRAWS_LIMIT = 10
Texts = tuple[TextInput, ...]


class Round(NamedTuple):
    """One round of candidates.

    Attributes:
        pool: What the generator drew.
        selection: What the selector kept of it.
        chains: How well the generator's chains moved.
        problem: What a policy that chose had before it, to explain the choice; None where a rule chose.
    """

    pool: CandidatePool
    selection: Selection
    chains: Diagnostics
    problem: SelectionProblem | None = None


class Drawn(NamedTuple):
    """A pool that was just drawn.

    Attributes:
        pool: What the generator drew.
        candidates: The same texts, to distil on.
        chains: How well the generator's chains moved.
    """

    pool: CandidatePool
    candidates: DistillationSet
    chains: Diagnostics


@dataclass(frozen=True)
class TrainedStudent:
    """A distilled student.

    Attributes:
        student: With its best weights, in eval mode.
        rounds: What was drawn and kept; empty without augmentation.
        score: Of its state, which was the best of its training.
    """

    student: Student
    rounds: tuple[Round, ...]
    score: kd_trainer.Score


def train_plain_student(context: RunContext) -> TrainedStudent:
    """Distil on the target's shots and the source, with as many updates as the full method."""
    session = open_session(context)
    session.distil(None, context.config.kd.total_steps, "plain distillation")
    return finish(session, ())


def train_unlabelled_student(context: RunContext) -> TrainedStudent:
    """Distil on unlabelled text too: as many texts as the full method draws, but as they are and drawn at random."""
    session, kd = warm_up(context), context.config.kd
    texts, size = session.unlabelled, kd.pool_size * kd.rounds
    drawn = np.random.default_rng([context.config.seed, 2]).permutation(len(texts))[:size]
    session.distil(session.labelled(tuple(texts[i] for i in drawn)), kd.rounds * kd.round_steps, "distillation")
    return finish(session, ())


def warm_up(context: RunContext) -> TrainingSession:
    """Build a student and distil on target and source, as far as to the first round."""
    session = open_session(context)
    session.distil(None, context.config.kd.warmup_steps, "warm-up")
    return session


def train_l2a_student(context: RunContext) -> TrainedStudent:
    """Warm up on target and source, then draw, select and distil for some rounds."""
    session, rounds = warm_up(context), list[Round]()
    for number in range(context.config.kd.rounds):
        rounds.append(_round(session, number, rounds[-1].selection.policy if rounds else None))
    return finish(session, tuple(rounds))


def _round(session: TrainingSession, number: int, policy: algorithms.TrainedPolicy | None) -> Round:
    context, config = session.context, session.context.config
    card, rng = agents.load_agent(config.selector.agent), np.random.default_rng([config.seed, 2, number])
    drawn = draw_candidates(session, rng)
    with context.progress.stage("select candidates"):
        problem = selection_problem(session, drawn)
        selection = select(problem, config.selector, rng, policy, context.progress)
    kept = int(selection.kept.sum())
    if kept in (0, len(drawn.pool)) and card.rule != "all":
        message = "selector: it keeps %d of %d candidates, so it chooses nothing; change selector.keep_rate"
        logger.warning(message, kept, len(drawn.pool))
    facts = {name: value for name, value in selection.diagnostics.items() if not isinstance(value, list | dict)}
    context.progress.event("round", number=number, kept=kept, **facts)
    explained = None if selection.policy is None or selection.fell_back else reward.surrogate_only(problem)
    session.distil(drawn.candidates.take(np.flatnonzero(selection.kept)), config.kd.round_steps, "distillation")
    return Round(drawn.pool, selection, drawn.chains, explained)


def draw_candidates(session: TrainingSession, rng: np.random.Generator) -> Drawn:
    """Draw a pool of candidates, labelled and tokenised, for a student as it is now."""
    context, size = session.context, session.context.config.kd.pool_size
    with context.progress.stage("draw candidates"):
        pool, chains = draw_pool(generator_inputs(session), context.config.generator, size, rng, context.progress)
    return Drawn(pool, session.labelled(pool.inputs), chains)


def _made_texts(session: TrainingSession) -> dict[TextInput, str]:
    """Make more bases for the chains by word operators, a part of them at every degree, and say what made them."""
    context, config, made = session.context, session.context.config.generator, dict[TextInput, str]()
    rng, texts = np.random.default_rng([context.config.seed, 12]), (*context.source.inputs, *session.unlabelled)
    for name, share in config.mixture.items():
        operator = build_operator(name, lambda: _token_space(session), lambda: None, context.progress)
        degrees = config.degrees or (resolve_degree(config.degree, len(session.known)),)
        for degree, places in zip(degrees, np.array_split(rng.permutation(len(texts)), len(degrees)), strict=True):
            bases = [texts[i] for i in places[: round(share * len(places))]]
            new = operator(bases, bases, degree, rng)
            made |= {one.text: f"{name} {degree:g}:{i}" for i, one in enumerate(new)}
    return made


def finish(session: TrainingSession, rounds: tuple[Round, ...]) -> TrainedStudent:
    """Take a trained student's best state, in eval mode, as the result of these rounds."""
    session.trainer.restore_best()
    if (parity := session.trainer.refit_output_layer(session.known.encoded)) is not None:
        session.context.progress.event("fold_parity", **parity)
    session.student.model.eval()
    assert session.trainer.best is not None
    return TrainedStudent(session.student, rounds, session.trainer.best)


def generator_inputs(session: TrainingSession) -> GeneratorInputs:
    """Give the generator what it reads of a run, the student's gradient as it is now."""
    context = session.context
    others = {text: context.near_texts[text] for text in session.unlabelled}
    others |= {text: origin for text, origin in _made_texts(session).items() if text not in others}
    return GeneratorInputs(
        source_inputs=context.source.inputs, unlabelled=others, target_inputs=context.data.splits.train.inputs,
        embed=context.embed, space=_token_space(session), labeller=context.labeller,
        forbidden_hashes=context.data.forbidden | context.never_trained_on,
    )  # fmt: skip


def _token_space(session: TrainingSession) -> TokenSpace:
    """Give token operators the student's words, their neighbours and its gradient as it is now."""
    context, student = session.context, session.student
    size = len(student.tokenizer)  # embedding matrices are often padded beyond the vocabulary
    embeddings = student.word_embeddings().cpu()[:size]
    shared = student.tokenizer.get_vocab() == context.teacher.tokenizer.get_vocab()
    # The teacher's embeddings know better which words are near; the gradient lives in the student's.
    geometry = context.teacher.word_embeddings().cpu()[:size] if shared else embeddings
    words, length = vocabulary(student.tokenizer), context.config.max_length
    neighbours = build_neighbour_table(geometry, words, context.config.generator.neighbours, context.progress)

    gradients = partial(kd_trainer.embedding_gradients, student, context.labeller, max_length=length)
    return TokenSpace(student.tokenizer, neighbours, embeddings, gradients, length)


def selection_problem(
    session: TrainingSession, drawn: Drawn, judged: DistillationSet | None = None
) -> SelectionProblem:
    """Describe a pool and the student's state to a selector.

    Args:
        session: The student.
        drawn: The pool.
        judged: What selections are judged on; None for the run's reward texts.

    Returns:
        The problem, which asks the student and measures rewards when they are first read, and keeps them; and that
        problem once more, with rewards from other draws. All are to be read before the student is trained further.
    """
    kd, student, judges = session.context.config.kd, session.student, session.reward if judged is None else judged
    few = np.random.default_rng([session.context.config.seed, 8]).permutation(len(session.source))[:SOURCE_TEXTS]

    @cache
    def candidates() -> reward.Views:  # some rules ask for these alone
        return reward.view(student, drawn.candidates)

    @cache
    def others() -> list[reward.Views]:
        return [reward.view(student, part) for part in (judges, session.target, session.source.take(few))]

    def problem(draw: int, repeated: SelectionProblem | None) -> SelectionProblem:
        rows, shares = np.arange(len(judges)), (kd.target_share, 1 - kd.target_share - kd.augmented_share)
        if draw:  # the reward texts are a draw too
            rows = np.random.default_rng([session.context.config.seed, 8, draw]).integers(len(rows), size=len(rows))

        @cache
        def surrogate() -> reward.Surrogate:
            texts, *known = others()
            parts = list(zip(known, shares, strict=True))
            return reward.fit_surrogate(candidates(), parts, kd.augmented_share, texts.take(rows))

        @cache
        def judge(kept: bytes) -> tuple[float, Doubles]:
            with after_updates(session, drawn, np.frombuffer(kept, np.bool_), order=draw):
                labels = reward.label_scores(student, session.judges) if len(session.judges) else np.zeros(0)
                return reward.reward_score(student, judges.take(rows)), labels

        return SelectionProblem(
            drawn.pool, lambda: candidates().student, surrogate, lambda kept: judge(kept.tobytes())[0],
            lambda kept: judge(kept.tobytes())[1], repeated, cache(lambda: near_and_clean(session.context, drawn)),
        )  # fmt: skip

    return problem(0, problem(1, None))


def after_updates(
    session: TrainingSession, drawn: Drawn, kept: Bools | None, updates: int = reward.REAL_UPDATES, order: int = 0
) -> AbstractContextManager[None]:
    """Distil as a round does, on the whole mixture, and take the updates back at the end (``reward.real_updates``)."""
    candidates = None if kept is None else drawn.candidates.take(np.flatnonzero(kept))
    return reward.real_updates(session.trainer, *mixture(session, candidates), updates, order)


def spare_labels(context: RunContext) -> tuple[Examples, Examples]:
    """Give target labels that no run reads, for diagnoses and the rule "oracle" alone.

    Args:
        context: The run.

    Returns:
        Up to 1,000 of the train split for an oracle, at most half of what there is, and the rest, with those of the dev
        split, to judge by. They are neither texts of the run's splits nor set apart.

    Raises:
        UsageError: If there are fewer than 50 for the oracle.
    """
    data, rng = context.data, np.random.default_rng([context.config.seed, 11])
    read = data.forbidden | context.never_trained_on | set(map(normalised_hash, data.splits.train.inputs))
    parts = (data.target.train, data.target.dev)
    train, dev = (part.take(rng.permutation(apart_from(read, part.inputs))) for part in parts)
    half = min(1000, len(train) // 2)
    if half < 50:
        fix = "lower --shots or --dev-shots, or give a target with more labels"
        found = f"{data.target.name} has {len(train)} labels in train that no run reads"
        raise UsageError(f"{found}, and an oracle needs 100; {fix}")
    return train.take(np.arange(half)), concatenate(train.take(np.arange(half, len(train))), dev)


def as_outputs(labels: Ints, classes: int, width: int) -> labelling.TeacherOutputs:
    """Give real labels, int64 (N,), the form of a teacher's outputs, with embeddings of 0; -1 stands for none."""
    certain = CERTAIN * (labels[:, None] == np.arange(classes)).astype(np.float32)
    return labelling.TeacherOutputs(certain, np.zeros((len(labels), width), np.float32))


def near_and_clean(context: RunContext, drawn: Drawn) -> Floats:
    """Score a pool by what no run knows: unchanged texts first, those nearest to a thousand spare texts of the target.

    Returns:
        float32 (N,); lower than all others for candidates that an operator made.

    Raises:
        UsageError: If the target has no spare texts.
    """
    pool, seen = drawn.pool, spare_labels(context)[0]
    context.progress.say(f"the oracle reads {len(seen):,} texts of the target that no other method sees")
    made = tuple(f"{name} " for name in context.config.generator.mixture)  # as ``_made_texts`` names origins
    places = context.embed(pool.inputs)
    by_origin = zip(pool.operators, pool.origins, strict=True)
    unchanged = [operator == "source" and not origin.startswith(made) for operator, origin in by_origin]
    nearness = fit_target_density(places, context.embed(seen.inputs)).log_odds(places)
    return np.where(unchanged, nearness, nearness.min() - 1).astype(np.float32)


def train_augmented_student(context: RunContext) -> TrainedStudent:
    """Warm up on target and source, then distil on augmented examples too, with as many updates as without them.

    ``generator.operator`` and ``generator.copies`` of the run say what is drawn in each round.
    """
    session, kd = warm_up(context), context.config.kd
    for number in range(kd.rounds):
        rng = np.random.default_rng([context.config.seed, 2, number])
        name = context.config.generator.operator
        if name is not None and OPERATORS[name].works_on == "embeddings":
            _distil_in_embedding_space(session, rng)
        else:
            with context.progress.stage("draw candidates"):
                inputs, bases = draw_texts(session, rng)
            labels = [context.real_labels[base] for base in bases] if isinstance(context, WithoutTeacher) else None
            session.distil(session.labelled(inputs, labels), kd.round_steps, "distillation")
    return finish(session, ())


class WithoutTeacher(RunContext):
    """A run on real labels alone: the student starts from the encoder as it was pretrained."""

    @cached_property
    def teacher(self) -> model.Teacher:
        """The pretrained encoder."""
        return self.pretrained()

    @cached_property
    def real_labels(self) -> dict[TextInput, int]:
        """The label of every source and target training text."""
        sets = (self.data.source, self.data.splits.train)
        return {text: int(label) for few in sets for text, label in zip(few.inputs, few.labels, strict=True)}

    def labeller(self, inputs: Sequence[TextInput]) -> labelling.TeacherOutputs:
        """Give real labels the form of a teacher's outputs, where the output layer is fitted; other texts get none."""
        labels = np.array([self.real_labels.get(text, -1) for text in inputs], np.int64)
        return as_outputs(labels, len(self.data.label_names), self.teacher.hidden_size)


def train_fine_tuned_student(context: RunContext) -> TrainedStudent:
    """Train as ``train_augmented_student`` does, but by cross-entropy on real labels, those of new texts inherited.

    No teacher has a part in it.

    Raises:
        UsageError: If the operator asks a teacher.
    """
    usable = [name for name in TEXT_OPERATORS if not OPERATORS[name].needs_gradient]
    if (operator := context.config.generator.operator) not in usable:
        raise UsageError(f"generator.operator is {operator!r}, which needs a teacher; give one of {', '.join(usable)}")
    kd = replace(context.config.kd, alpha=0.0, hidden_weight=0.0, objective="soft_labels")
    return train_augmented_student(WithoutTeacher(replace(context.config, kd=kd), context.progress, context.data))


def draw_texts(session: TrainingSession, rng: np.random.Generator) -> tuple[Texts, Texts]:
    """Draw new texts by the configured operator.

    Returns:
        N different texts, and beside each the text that it was made from; nothing where the chain drew them.

    Raises:
        RunError: If the operator made no new text.
    """
    context, config, data = session.context, session.context.config.generator, session.context.data
    name, size = config.operator, config.copies * context.config.kd.pool_size
    if name is None:
        return draw_pool(generator_inputs(session), config, size, rng, context.progress)[0].inputs, ()
    if OPERATORS[name].works_on == "copies":
        copies, _ = _draw_pairs(session, rng, 0.0 if OPERATORS[name].reads_partner else 1.0)
        return copies, copies
    masked = partial(masked_words, context.config.teacher.model, context.config.max_length, context.progress)
    operator = build_operator(name, partial(_token_space, session), masked, context.progress)
    excluded = data.forbidden | context.never_trained_on | set(map(normalised_hash, data.splits.train.inputs))
    degree = resolve_degree(config.degree, len(data.source) + len(data.splits.train))
    found: dict[str, tuple[TextInput, TextInput]] = {}
    for _ in range(DRAWS_LIMIT):
        bases, partners = _draw_pairs(session, rng, config.target_share)
        for base, rewrite in zip(bases, operator(bases, partners, degree, rng), strict=True):
            if (key := normalised_hash(rewrite.text)) not in excluded:
                found.setdefault(key, (rewrite.text, base))
        if len(found) >= size:
            break
    if not found:
        raise RunError(f"generator.operator {name!r} made no new text; raise generator.degree")
    if len(found) < size:
        logger.warning("%s made %d of %d different texts", name, len(found), size)
    new, origins = zip(*list(found.values())[:size], strict=True)
    return new, origins


def _draw_pairs(session: TrainingSession, rng: np.random.Generator, target_share: float) -> tuple[Texts, Texts]:
    """Draw bases and a partner of the other domain for each, by the base law of the generator's chains."""
    size = session.context.config.generator.copies * session.context.config.kd.pool_size
    source = (*session.context.source.inputs, *session.unlabelled)
    target = session.context.data.splits.train.inputs
    in_target = rng.random(size) < target_share

    def choose(from_target: Bools) -> Texts:
        few, many = (rng.integers(0, len(texts), size=size) for texts in (target, source))
        return tuple(target[i] if own else source[j] for own, i, j in zip(from_target, few, many, strict=True))

    return choose(in_target), choose(~in_target)


def _distil_in_embedding_space(session: TrainingSession, rng: np.random.Generator) -> None:
    teacher, trainer, config = session.context.teacher, session.trainer, session.context.config
    bases, partners = _draw_pairs(session, rng, config.generator.target_share)
    sets, shares = mixture(session, session.labelled(bases))
    start = len(sets[0])  # the bases come second
    if config.generator.operator == "mixkd":
        weights = rng.beta(kd_data.MIX_CONCENTRATION, kd_data.MIX_CONCENTRATION, size=len(bases)).astype(np.float32)
        pairs = encoding.encode(teacher.tokenizer, (*bases, *partners), config.max_length)
        sets[1] = replace(sets[1], teacher=kd_data.mixed_outputs(teacher, pairs, weights))
        trainer.read_batch = partial(kd_data.read_mixed, start=start, partners=sum(map(len, sets)), weights=weights)
        # The partners are in the joined set, so that their tokens count as occurring, but have no share of it.
        sets, shares = [*sets, session.labelled(partners)], [*shares, 0.0]
    else:
        texts = encoding.encode(teacher.tokenizer, bases, config.max_length)
        of_teacher, of_student = (kd_data.token_steps(model, rng) for model in (teacher, session.student))
        read = partial(kd_data.read_perturbed, start=start, teacher=teacher, texts=texts)
        trainer.read_batch = partial(read, teacher_steps=of_teacher, student_steps=of_student)
    trainer.train(sets, shares, config.kd.round_steps, session.context.progress, "distillation")
    trainer.read_batch = kd_data.read_tokens
