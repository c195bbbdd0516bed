"""The central promise: no held-out target text is trained on. Compared with the splits themselves, not with the set of
forbidden hashes that the code makes of them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from l2a.config import override
from l2a.data.examples import held_out_words, normalised_hash
from l2a.pipeline.data import load_run_data
from l2a.pipeline.distill import distill
from l2a.pipeline.session import RunContext, open_session
from l2a.pipeline.students import draw_candidates, generator_inputs


@pytest.fixture(scope="module")
def leaking(config, tmp_path_factory):
    """A run whose source and unlabelled text hold every text of the target."""
    folder = tmp_path_factory.mktemp("leaking")
    target = [json.loads(line) for line in Path(config.target).read_text().splitlines()]
    few, copied = load_run_data(config).splits, {"label": "negative", "split": "train"}
    copies = [{"text": f"{row['text'].upper()} !!", **copied} for row in target if row["split"] != "train"]
    copies += [{"text": text, **copied} for (text,) in (*few.reward.inputs, *few.validation.inputs, *few.train.inputs)]
    own = Path(config.source).read_text()
    (folder / "source.jsonl").write_text(own + "\n".join(map(json.dumps, copies)) + "\n")
    (folder / "more.txt").write_text("\n".join(row["text"] for row in target) + "\n")
    changes = {"source": str(folder / "source.jsonl"), "unlabelled": [str(folder / "more.txt")]}
    changes |= {"generator.mixture": {"damaged": 0.8}, "generator.degrees": [0.2, 0.6]}
    return RunContext(override(config, {**changes, "output_dir": str(folder / "run")}))


def hashes(inputs):
    return {normalised_hash(text) for text in inputs}


def held_out(data):
    return [hashes(part.inputs) for part in (data.splits.reward, data.splits.validation, data.target.test.reveal())]


def test_training_texts_hold_no_text_of_reward_validation_or_test(leaking, caplog):
    data, said = (
        leaking.data,
        r"(?s)source: \d+ of its \d+ texts are held out or near copies.*unlabelled: .*\d+ held out",
    )
    assert re.search(said, caplog.text)
    trained_on = hashes((*data.source.inputs, *data.unlabelled, *data.splits.train.inputs))
    assert len(data.unlabelled) > 20 and "unlabelled: more.txt" in data.files
    for split in held_out(data):
        assert split and not trained_on & split
    assert not held_out_words((*data.source.inputs, *data.splits.train.inputs)) & data.target.test.words


@pytest.fixture(scope="module")
def drawing(leaking):
    """Its session, a pool of candidates and what they were drawn from."""
    session = open_session(leaking)
    return session, draw_candidates(session, np.random.default_rng(0)).pool, generator_inputs(session)


def test_drawn_texts_hold_no_text_of_reward_validation_or_test(leaking, drawing):
    _, pool, inputs = drawing
    origins = {origin.rpartition(":")[0] for origin in pool.origins}
    assert origins >= {"source", "target", "more.txt"} and origins & {"damaged 0.2", "damaged 0.6"}
    for split in held_out(leaking.data):
        assert split <= inputs.forbidden_hashes
        for texts in (pool.inputs, inputs.source_inputs, inputs.target_inputs):
            assert not hashes(texts) & split


def test_texts_that_judge_the_student_are_neither_trained_on_nor_held_out(leaking, drawing):
    session, pool, inputs = drawing
    choice, reward = map(hashes, leaking.set_apart)
    assert len(choice) > 5 and len(reward) > 5 and not choice & reward
    bases = (*inputs.source_inputs, *inputs.unlabelled, *inputs.target_inputs)
    assert len(session.source) == len(leaking.source) < len(leaking.data.source)
    for texts in (pool.inputs, bases, leaking.source.inputs, leaking.data.splits.train.inputs):
        assert not hashes(texts) & (choice | reward)
    for split in held_out(leaking.data):
        assert not split & (choice | reward)


@pytest.mark.slow
def test_unlabelled_text_is_reported_with_and_without(leaking):
    rows = distill(override(leaking.config, {"compare": True, "selector.agent": "random"})).rows
    assert {row.name for row in rows} >= {"plain_kd_unlabelled_student", "l2a_without_unlabelled_student"}
