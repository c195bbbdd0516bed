"""Cards of domains, and the few labelled examples that a run takes from one."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from l2a.data import domains as card_module
from l2a.data.bank import read_bank
from l2a.data.domains import Ratings, as_domain, load_card, load_domain, read_domain, read_ratings
from l2a.data.examples import Domain, Examples, HeldOut, concatenate, few_shot_splits, normalised_hash, words_key
from l2a.data.readers import Row
from l2a.util import RunError, UsageError, list_cards

BALANCED = {"negative": 40, "positive": 40}


def draw(domain, shots, dev_shots, seed=0):
    return few_shot_splits(domain, shots, dev_shots, np.random.default_rng(seed))


def test_every_part_has_its_examples_of_each_class_and_unlabelled_is_the_rest(make_domain):
    domain = make_domain(BALANCED, BALANCED, BALANCED)
    label_of, splits = dict(zip(domain.train.inputs, domain.train.labels, strict=True)), draw(domain, 8, 4)
    parts = (splits.train, splits.reward, splits.validation)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[8, 8], [4, 4], [4, 4]]
    assert (splits.labels_used, splits.labels_ignored) == (32, 160 - 32)
    assert splits.train.labels.tolist()[:4] == [0, 1, 0, 1]
    for part in parts:
        assert all(label_of[text] == label for text, label in zip(part.inputs, part.labels, strict=True))
    assert set(splits.unlabelled) == set(domain.train.inputs) - {text for part in parts for text in part.inputs}


def test_one_seed_gives_one_draw_of_which_more_shots_keep_the_examples_and_another_gives_another(make_domain):
    domain = make_domain(BALANCED, BALANCED, BALANCED)
    few, many = draw(domain, 4, 4), draw(domain, 16, 4)
    assert few.train.inputs == draw(domain, 4, 4).train.inputs != draw(domain, 4, 4, seed=1).train.inputs
    assert set(few.train.inputs) < set(many.train.inputs)
    assert few.reward.inputs == many.reward.inputs and few.validation.inputs == many.validation.inputs


def test_dev_helps_out_when_train_is_short(make_domain):
    domain = make_domain({"negative": 9, "positive": 40}, {"negative": 20, "positive": 20}, BALANCED)
    splits = draw(domain, 8, 4)
    held_out = concatenate(splits.reward, splits.validation)
    negative = [held_out.inputs[i][0] for i in np.flatnonzero(held_out.labels == 0)]
    assert sum(text.startswith("dev") for text in negative) == 7


@pytest.mark.parametrize(("train", "dev"), [(7, 40), (9, 6), (15, 0)])
def test_too_few_examples_are_refused_with_the_counts(make_domain, train, dev):
    domain = make_domain({"negative": 40, "positive": train}, {"negative": 40, "positive": dev}, BALANCED)
    with pytest.raises(UsageError, match=f"16 different .* positive has {train} in train and {dev} in dev.*--shots"):
        draw(domain, 8, 4)


def test_all_labels_are_used_when_no_number_of_shots_is_given(make_domain):
    domain = make_domain({"negative": 100, "positive": 9}, {"negative": 10, "positive": 0}, BALANCED)
    splits = draw(domain, None, 16)
    parts = (splits.train, splits.reward, splits.validation)
    assert [np.bincount(part.labels).tolist() for part in parts] == [[78, 5], [16, 2], [16, 2]]
    assert (splits.labels_used, splits.labels_ignored, splits.unlabelled) == (119, 0, ())
    assert len({text for part in parts for text in part.inputs}) == 119
    dev = sum(text.startswith("dev") for part in parts[1:] for (text,) in part.inputs)
    assert dev == 10 and splits.train.labels.tolist()[:4] == [0, 1, 0, 1]


@pytest.mark.parametrize(("size", "parts"), [(3, [1, 1, 1]), (7, [5, 1, 1]), (8, [4, 2, 2])])
def test_small_classes_keep_at_least_half_for_training(make_domain, size, parts):
    splits = draw(make_domain({"a": size, "b": size}, {"a": 0, "b": 0}, BALANCED), None, 16)
    assert [len(part) // 2 for part in (splits.train, splits.reward, splits.validation)] == parts


def test_a_class_of_two_examples_is_refused(make_domain):
    with pytest.raises(UsageError, match=r"target: the class 'b' has 2 different labelled .* at least 3"):
        draw(make_domain({"a": 9, "b": 2}, {"a": 0, "b": 0}, BALANCED), None, 16)


def test_exactly_enough_is_enough_but_copies_do_not_count(make_domain):
    domain = make_domain({"negative": 16, "positive": 16}, {"negative": 0, "positive": 0}, BALANCED)
    assert draw(domain, 8, 4).labels_used == 32
    copied = Examples((*domain.train.inputs[:31], ("TRAIN  text 30",)), domain.train.labels, domain.label_names)
    with pytest.raises(UsageError, match="positive has 15 in train and 0 in dev"):
        draw(replace(domain, train=copied), 8, 4)


def test_a_target_without_test_texts_is_refused(make_domain):
    with pytest.raises(UsageError, match="no test split, so it can only be a source"):
        draw(make_domain(BALANCED, BALANCED, {"negative": 0, "positive": 0}), 8, 4)


NUMBERS = st.integers(0, 30)
NUMBERED = st.lists(st.tuples(NUMBERS, st.integers(0, 1)), max_size=80)


@given(NUMBERED, NUMBERED, st.lists(NUMBERS, min_size=1, max_size=10), st.integers(0, 5), st.sampled_from([2, None]))
def test_parts_are_disjoint_and_free_of_test_texts(train, dev, test, seed, shots):
    def examples(pairs):
        inputs = tuple((f"Text  {number}" if label else f"text, {number}!",) for number, label in pairs)
        return Examples(inputs, np.array([label for _, label in pairs], dtype=np.int64), ("a", "b"))

    held_out = HeldOut.of(examples([(number, 0) for number in test]))
    domain = Domain("d", ("a", "b"), False, examples(train), examples(dev), held_out, {})
    try:
        splits = draw(domain, shots, 1, seed)
    except UsageError:
        return
    parts = (splits.train.inputs, splits.reward.inputs, splits.validation.inputs, splits.unlabelled)
    hashes = [{normalised_hash(text) for text in part} for part in parts]
    assert sum(map(len, parts)) == len(set().union(*hashes))
    keys = {words_key(*text) for part in parts for text in part}
    assert not set().union(*hashes) & held_out.hashes and not keys & held_out.words


SHIPPED = ("editorials", "movies", "products", "tweets")
CARD = "name: mine\ndescription: d\ntask: t\nlabels: [x, y]\nlicence: MIT\ndata: posts.csv\n"
RATINGS = Ratings("a.txt", 0.5, "text")


@pytest.fixture
def rated(make_tar):
    def make(**files):
        return make_tar("rated.tar.gz", {f"{name}.txt": text.encode() for name, text in files.items()})

    return make


def test_ratings_become_labels_and_the_middle_is_dropped(rated):
    lines = "1\t0.51\tgood\r\n2\t0.5\tmeh\r\n3\t-0.5\tmeh too\r\n4\t-0.51\tbad\r\n5\t3.9\tgreat\tfilm"
    rows = read_ratings(rated(a=lines), RATINGS)
    assert [row.text for row in rows] == [("good",), ("bad",), ("great\tfilm",)]
    assert [row.label for row in rows] == ["positive", "negative", "positive"]


def test_neutral_sentences_of_all_files_are_text_without_labels(rated):
    also = "1\t0\tMeh!\n2\t0.2\tfine\n3\t0.1\tkept out"
    archive = rated(a="1\t0.51\tgood\n2\t-0.5\tmeh\n3\t0\tso so", b=also, c="1\t0\tkept out")
    rows = read_ratings(archive, replace(RATINGS, exclude=("c.txt",), also=("b.txt",)), neutral=True)
    assert rows == [Row((text,), "", "train") for text in ("meh", "so so", "fine")]


@pytest.fixture
def plant(rated, tmp_path, monkeypatch):
    """Put ratings of our own into the package of a shipped card."""

    def plant_ratings(name, lines, **changes):
        archive, card = rated(a=lines), load_card(name)
        artifact = replace(card.artifact, members=(archive.name,))
        monkeypatch.setattr(card_module.fetch, "fetch_artifact", lambda *_: tmp_path)
        card = replace(card, artifact=artifact, ratings=RATINGS, **changes)
        monkeypatch.setattr(card_module, "load_card", lambda _: card)
        return archive

    return plant_ratings


def test_text_without_labels_goes_into_a_bank_without_held_out_sentences_and_is_no_source(plant):
    lines = "".join(f"{i}\t0.1\tthis is a sentence of number {i}\n" for i in range(40))
    plant("neutral", lines, rows_sha256=None)
    rows = [(f"So: THIS is a sentence of number {i}!", "xy"[i % 2], ("train", "test")[i % 2]) for i in range(4)]
    target = as_domain([*rows, ("other", "y", "train")], "target")
    found = read_bank(["neutral"], False, target.test.hashes, held_out_words=target.test.words)
    assert len(found) == 38 and found.files.keys() == {"a.txt"}
    assert not {f"this is a sentence of number {i}" for i in (1, 3)} & {text for (text,) in found}
    with pytest.raises(UsageError, match="'neutral' has no labels; give it to --unlabelled"):
        load_domain("neutral")
    found = read_domain("neutral")
    assert not found.problems and found.counts("train")["examples"] == 40 and found.label_names == ()
    assert [*found.notes()] == ["there are no labels, so the domain can only be given to --unlabelled"]


def test_entities_are_decoded_even_when_encoded_twice(rated):
    assert read_ratings(rated(a="1\t1\ta &amp;amp; b &lt;3"), RATINGS)[0].text == ("a & b <3",)


def test_copies_go_inside_and_across_domains(rated):
    archive = rated(a="1\t1\tWow!\r\n2\t1\twow...\r\n3\t1\t!!!\r\n4\t1\tnice", b="1\t0\tNice.")
    rows = read_ratings(archive, replace(RATINGS, exclude=("b.txt",)))
    assert [row.text for row in rows] == [("Wow!",)]


def test_documents_are_never_cut_in_two(rated):
    lines = "\r\n".join(f"{document}_{i}\t1\tsentence {document} {i}" for document in range(60) for i in range(5))
    archive = rated(a=lines)
    rows = {by: read_ratings(archive, replace(RATINGS, split_by=by)) for by in ("document", "text")}
    places = {by: {(row.text[0].split()[1], row.split) for row in rows[by]} for by in rows}
    assert len(places["document"]) == 60 < len(places["text"])
    assert {split for _, split in places["document"]} == {"train", "dev", "test"}


def test_a_damaged_file_of_ratings_is_refused(rated):
    with pytest.raises(RunError, match=r"rated\.tar\.gz: a\.txt is not a file of ratings"):
        read_ratings(rated(a="1\tmuch\tgood"), RATINGS)


def test_words_key_keeps_letters_and_digits_alone():
    assert words_key("  Ünï_code  \uff37ow!!! :) 24/7") == "ünï code wow 24 7"
    assert words_key("!!! :)") == ""


def test_all_shipped_cards_are_valid_and_pinned():
    assert set(SHIPPED) <= set(list_cards("domains"))
    for name in SHIPPED:
        card = load_card(name)
        assert card.labels == ("negative", "positive") and card.licence == "MIT"
        assert card.artifact is not None and len(card.artifact.sha256) == 64 and card.artifact.kind == "sdist"
        assert card.rows_sha256 is not None and list(card.sizes) == ["train", "dev", "test"]


def test_rows_other_than_the_card_promises_are_refused(plant):
    lines = "\r\n".join(f"{i}\t{(-1) ** i}\tsentence {i}" for i in range(40))
    promised = card_module.rows_sha256(read_ratings(plant("movies", lines), RATINGS))
    with pytest.raises(RunError, match=f"domain card movies: the rows have sha256 {promised}, the card promises"):
        load_domain("movies")
    archive, domain = plant("movies", lines, rows_sha256=promised), load_domain("movies")
    assert len(domain.train) + len(domain.dev) + domain.test.size == 40
    assert domain.files == {"a.txt": hashlib.sha256(archive.read_bytes()).hexdigest()}


def test_the_hash_of_rows_sees_text_label_split_and_order():
    rows = [Row(("a",), "x", "train"), Row(("b",), "y", "test")]
    others = [rows[::-1], rows[:1], [rows[0]._replace(label="y"), rows[1]], [rows[0]._replace(split="dev"), rows[1]]]
    assert len({card_module.rows_sha256(variant) for variant in [rows, *others]}) == 5


def test_a_users_card_names_a_file_beside_it_its_columns_and_the_order_of_labels(write):
    write("domains/posts.csv", "body,stars,split\na,x,train\nb,y,train\nc,y,test\n")
    write("domains/mine.yaml", CARD.replace("[x, y]", "[y, x]") + "columns: {text: body, label: stars}\n")
    domain = load_domain("mine")
    assert (domain.name, domain.label_names, domain.test.size) == ("mine", ("y", "x"), 1)
    assert domain.train.labels.tolist() == [1, 0]


WRONG = [
    ("mine", "other", "name is 'other'; make it the file's name, 'mine'"),
    ("data: posts.csv\n", "", "give either data, or both artifact and ratings"),
    ("task", "label: x\ntask", r"unknown key label.*did you mean 'labels'"),
    (": t", ": unlabelled", r"is 'unlabelled' and labels are \['x', 'y'\]; give labels, or the task 'unlabelled'"),
    ("[x, y]", "[]", r"the task is 't' and labels are \[\]"),
    ("[x, y]", "[x, z]", r"the card has the labels \['x', 'z'\], its data"),
]


@pytest.mark.parametrize(("right", "wrong", "message"), WRONG)
def test_wrong_cards_are_refused(write, right, wrong, message):
    write("domains/posts.csv", "text,label,split\na,x,train\nb,y,train\n")
    write("domains/mine.yaml", CARD.replace(right, wrong))
    with pytest.raises(UsageError, match=message):
        load_domain("mine")


@pytest.mark.slow
def test_shipped_cards_yield_what_they_promise_and_share_no_text(monkeypatch, tmp_path):
    """Needs the package index, or a filled cache in the usual place."""
    monkeypatch.delenv("L2A_CACHE")
    domains = {name: load_domain(name) for name in SHIPPED}
    texts = [row.text for row in read_domain("neutral").of("train")]
    monkeypatch.setenv("L2A_CACHE", str(tmp_path / "own"))
    seen: set[str] = set()
    for name, domain in domains.items():
        sizes = [len(domain.train), len(domain.dev), domain.test.size]
        assert sizes == list(load_card(name).sizes.values())
        hashes = [*map(normalised_hash, domain.train.inputs + domain.dev.inputs), *domain.test.hashes]
        assert len(set(hashes)) == sum(sizes) and not seen & set(hashes)
        seen.update(hashes)
        found = read_bank([texts], False, domain.test.hashes, held_out_words=domain.test.words)
        assert len(found) > 4000 and not {normalised_hash(text) for text in found} & domain.test.hashes
        assert not {words_key(text) for (text,) in found} & domain.test.words
