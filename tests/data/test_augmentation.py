"""TinyBERT's augmentation against one written word by word; its draws, pairs and refusals."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import families
import pytest
import torch
import transformers
from datasets import Dataset

from hfdistill import AUGMENTATION_COPIES, augment_texts, train_wordpiece
from hfdistill.data import augmentation
from hfdistill.data.augmentation import STOP_WORDS
from hfdistill.data.candidates import context_length, whole_words


TEXTS = [
    "Return the largest number, or raise ValueError.",
    "A socket connects to (remote) hosts; see http2 and foo_bar!",
    "Parsing files is slow. Parsing strings isn't",
    "the and of",
    "",
    "Compute mean value 3 times — unknown ☃ word",
]
WORDS = "return largest number raise socket connects remote hosts see files slow strings compute mean value times word".split()


@pytest.fixture(scope="module")
def tokenizer():
    """Some words whole; `valueerror`, `parsing`, `unknown`, `foo_bar` in pieces."""
    corpus = [" ".join(WORDS) + " . , ; ( ) ! _ 2 3 bcdfgijkpqrvwxyz"] * 5 + [f"{a} {b}" for a, b in itertools.pairwise(WORDS)]
    corpus += ["the and of or a to is in t"]
    return train_wordpiece(corpus, vocab_size=150)


@pytest.fixture(scope="module")
def model(tokenizer):
    # A wide initialisation: with the usual one all words are about equally probable everywhere.
    return families.build("bert", 2, head="MaskedLM", vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.8)


def rows_of(*columns, names=("text", "other")):
    return Dataset.from_dict({name: list(column) for name, column in zip(names, columns)})


def augmented(texts, model, tokenizer, **options):
    """Text -> its copies."""
    done = augment_texts(rows_of(texts), ["text"], model, tokenizer, **options)
    found = {i: [] for i in range(len(texts))}
    for text, source in list(zip(done["text"], done["source"]))[len(texts) :]:
        found[source].append(text)
    return found


# ---- A reference that knows nothing of offsets, batches and tokenizer internals ----


def is_word(token):
    return re.fullmatch("[a-z]+", token) is not None


def slow_candidates(text, model, tokenizer, count):
    """Part of the text (words and what lies between) -> candidates, one forward pass a word; for lower-case WordPiece."""
    vocabulary = tokenizer.get_vocab()
    parts = re.findall(r"\w+|\W", text)
    found = {}
    pieces = [tokenizer.tokenize(part) for part in parts]
    for number, part in enumerate(parts):
        if not part.isalpha() or part.lower() in STOP_WORDS or "[UNK]" in pieces[number]:
            continue
        if len(pieces[number]) == 1:
            tokens = sum((["[MASK]"] if i == number else own for i, own in enumerate(pieces)), [])
            ids = torch.tensor([[vocabulary[token] for token in ["[CLS]", *tokens, "[SEP]"]]])
            with torch.no_grad():
                scores = model(ids).logits[0, 1 + tokens.index("[MASK]")]
        else:
            table = model.bert.embeddings.word_embeddings.weight.detach()
            mean = sum(table[vocabulary[piece]] for piece in pieces[number]) / len(pieces[number])
            scores = torch.tensor([float(mean @ row / (mean.norm() * row.norm())) for row in table])
        ranked = sorted((token for token in vocabulary if is_word(token)), key=lambda token: -float(scores[vocabulary[token]]))
        found[number] = ranked[:count]
    return parts, found


def test_the_vocabulary_is_as_the_tests_want_it(tokenizer):
    assert all(tokenizer.tokenize(word) == [word] for word in WORDS)
    assert all(len(tokenizer.tokenize(word)) > 1 for word in ("valueerror", "parsing", "unknown"))
    assert tokenizer.tokenize("☃") == ["[UNK]"]


def test_with_one_candidate_and_certainty_every_word_is_the_best_one(model, tokenizer):
    found = augmented(TEXTS, model, tokenizer, copies=4, candidates=1, probability=1.0)
    for i, text in enumerate(TEXTS):
        parts, best = slow_candidates(text, model, tokenizer, 1)
        wanted = list(parts)
        for number, (word,) in best.items():
            wanted[number] = parts[number] if word == parts[number].lower() else word
        assert found[i] == ([] if wanted == parts else ["".join(wanted)]), text
    assert found[3] == found[4] == []  # stop words only, and nothing at all


def test_every_candidate_and_no_other_word_appears(model, tokenizer):
    found = augmented(TEXTS, model, tokenizer, copies=200, candidates=3, probability=0.7)
    for i, text in enumerate(TEXTS):
        parts, candidates = slow_candidates(text, model, tokenizer, 3)
        seen = [set() for _ in parts]
        for copy in [text, *found[i]]:
            own = re.findall(r"\w+|\W", copy)
            assert len(own) == len(parts)
            for words, word in zip(seen, own):
                words.add(word)
        for number, part in enumerate(parts):
            expected = {part} | {word for word in candidates.get(number, ()) if word != part.lower()}
            assert seen[number] == expected, (text, part)


def test_words_are_replaced_as_often_as_asked_and_uniformly(model, tokenizer):
    text = "connects socket hosts"
    (_, candidates), copies = slow_candidates(text, model, tokenizer, 4), 4000
    drawn = Counter()
    slots = {text: [augmentation.Slot(0, 8, ("a", "b", "c", "d")), augmentation.Slot(9, 15, ("e",)), augmentation.Slot(16, 21, ("f",))]}
    for seed in range(copies):  # one draw a seed, so that nothing is lost as a duplicate
        for copy in augmentation._copies((text,), slots, 1, 0.4, seed):
            drawn.update(copy[0].split())
    assert len(candidates) == 3
    assert drawn["e"] == pytest.approx(0.4 * copies, rel=0.06) and drawn["f"] == pytest.approx(0.4 * copies, rel=0.06)
    for word in "abcd":
        assert drawn[word] == pytest.approx(0.1 * copies, rel=0.15)


def test_originals_come_first_then_copies_by_source_without_duplicates(model, tokenizer):
    rows = Dataset.from_dict({"text": TEXTS, "label": [1] * len(TEXTS)})
    done = augment_texts(rows, ["text"], model, tokenizer, copies=50, candidates=2)
    assert done.column_names == ["text", "source"]  # no label
    assert done["text"][: len(TEXTS)] == TEXTS and done["source"][: len(TEXTS)] == list(range(len(TEXTS)))
    assert done["source"][len(TEXTS) :] == sorted(done["source"][len(TEXTS) :])
    pairs = list(zip(done["text"], done["source"]))
    assert len(set(pairs)) == len(pairs) > 3 * len(TEXTS)
    assert max(Counter(done["source"]).values()) <= 51


def test_the_word_itself_is_no_replacement_even_in_another_letter_case(model, tokenizer):
    text = "Socket."
    everything = len(whole_words(tokenizer))
    copies = augmented([text], model, tokenizer, copies=600, candidates=everything, probability=1.0)[0]
    assert "socket." not in copies and len(copies) == everything - 1


def test_no_copies_and_no_replacements_leave_the_rows(model, tokenizer):
    for options in ({"copies": 0}, {"probability": 0.0}):
        done = augment_texts(rows_of(TEXTS), ["text"], model, tokenizer, **options)
        assert done["text"][:] == TEXTS and done["source"][:] == list(range(len(TEXTS)))
    assert len(augment_texts(rows_of([]), ["text"], model, tokenizer)) == 0


def test_order_batch_size_and_other_rows_change_nothing(model, tokenizer, monkeypatch):
    whole = augmented(TEXTS, model, tokenizer, copies=10)
    again = augmented(TEXTS, model, tokenizer, copies=10, batch_size=1)
    assert again == whole
    backwards = augmented(TEXTS[::-1], model, tokenizer, copies=10, batch_size=3)
    assert {len(TEXTS) - 1 - i: copies for i, copies in backwards.items()} == whole
    assert augmented(TEXTS[2:3], model, tokenizer, copies=10)[0] == whole[2]
    monkeypatch.setattr(augmentation, "CHUNK", 2)
    assert augmented(TEXTS, model, tokenizer, copies=10) == whole
    assert augmented(TEXTS, model, tokenizer, copies=10, seed=1) != whole
    more = augmented(TEXTS, model, tokenizer, copies=14)
    assert all(more[i][: len(whole[i])] == whole[i] for i in whole)


def test_pairs_go_in_step(model, tokenizer):
    """The authors' code writes every second sentence beside the last copy of the first one."""
    first, second = ["socket connects", "see strings"], ["remote hosts", "the"]
    done = augment_texts(rows_of(first, second), ["text", "other"], model, tokenizer, copies=12, candidates=5, probability=1.0)
    assert done.column_names == ["text", "other", "source"]
    copies = [(a, b) for a, b, source in zip(done["text"], done["other"], done["source"]) if source == 0][1:]
    assert len(copies) == len(set(copies)) and len({a for a, _ in copies}) > 5 and len({b for _, b in copies}) > 5
    assert len({b for _, b in copies}) > len(copies) / 2  # not each second text beside every first one
    assert {b for b, source in zip(done["other"], done["source"]) if source == 1} == {"the"}


def test_a_pair_is_new_where_one_of_its_texts_is(model, tokenizer):
    done = augment_texts(rows_of(["of"], ["socket"]), ["text", "other"], model, tokenizer, copies=30, candidates=3, probability=1.0)
    assert set(done["text"]) == {"of"} and len(done) == len(set(done["other"])) <= 4


def test_long_texts_are_replaced_within_the_context_only(model, tokenizer):
    text = " ".join(["socket"] * 5 + ["parsing"] + ["hosts"] * 100)
    pieces = len(tokenizer.tokenize("parsing"))
    for max_length, words in ((2 + 5 + pieces, 6), (2 + 5 + pieces - 1, 5), (2 + 5, 5)):
        copies = augmented([text], model, tokenizer, copies=60, candidates=2, probability=0.9, max_length=max_length)[0]
        changed = {i for copy in copies for i, (a, b) in enumerate(zip(copy.split(), text.split())) if a != b}
        assert changed == set(range(words)), max_length
    assert augmented([text], model, tokenizer, copies=1)[0] != [text]  # 64 positions, without a warning


def test_neighbours_can_be_left_out_or_brought_along(model, tokenizer):
    text = ["Parsing"]
    assert augmented(text, model, tokenizer, neighbours="none", probability=1.0)[0] == []
    brought = augmented(text, model, tokenizer, neighbours={"parsing": ["scanning", "lexing", "reading"]}, candidates=2, probability=1.0)
    assert set(brought[0]) == {"scanning", "lexing"}


def test_own_stop_words(model, tokenizer):
    copies = augmented(["the socket"], model, tokenizer, stop_words={"socket"}, copies=30, probability=1.0)[0]
    assert copies and all(copy.endswith(" socket") for copy in copies)


def test_whole_words_of_wordpiece_and_of_bytes(tokenizer):
    words = whole_words(tokenizer)
    assert set(words.values()) == {token for token in tokenizer.get_vocab() if is_word(token)}
    assert set(WORDS) < set(words.values())
    bytes_ = byte_level()
    words = whole_words(bytes_)
    assert set(words.values()) >= {"socket", "hosts"} and all(bytes_.convert_ids_to_tokens(i) == f"Ġ{word}" for i, word in words.items())


def byte_level():
    from tokenizers import ByteLevelBPETokenizer

    core = ByteLevelBPETokenizer(add_prefix_space=False)
    text = [" ".join(WORDS), " " + " ".join(WORDS[::-1])] * 4
    core.train_from_iterator(text, vocab_size=600, min_frequency=1, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return transformers.RobertaTokenizer(vocab=core.get_vocab(), merges=merges(core), model_max_length=40)


def merges(core):
    import json

    return [tuple(pair) for pair in json.loads(core.to_str())["model"]["merges"]]


def test_byte_level_bpe(monkeypatch):
    tokenizer = byte_level()
    model = families.build("roberta", 2, head="MaskedLM", vocab_size=len(tokenizer), pad_token_id=1, initializer_range=0.8)
    assert context_length(model, tokenizer, None) == 38  # 40 rows in the position table, of which two are never used
    text = "see (remote) hosts, bzzt and socket"
    pieces = {word: tokenizer.tokenize(f" {word}") for word in ("hosts", "bzzt", "socket")}
    assert [len(pieces[word]) for word in pieces] == [1, len(pieces["bzzt"]), 1] and len(pieces["bzzt"]) > 1
    copies = augmented([text], model, tokenizer, copies=400, candidates=2, probability=0.8)[0]
    pattern = re.compile(r"(\w+) \((\w+)\) (\w+), (\w+) and (\w+)")
    seen = [set(words) for words in zip(*(pattern.fullmatch(copy).groups() for copy in copies))]
    original = pattern.fullmatch(text).groups()
    assert all(2 <= len(words | {word}) <= 3 for words, word in zip(seen, original))
    # The last word, by hand.
    ids = tokenizer(text)["input_ids"]
    ids[-2] = tokenizer.mask_token_id
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0, -2]
    words = [token for token in tokenizer.get_vocab() if re.fullmatch("Ġ[a-z]+", token) and token[1:] in whole_words(tokenizer).values()]
    best = sorted(words, key=lambda token: -float(scores[tokenizer.convert_tokens_to_ids(token)]))[:2]
    assert seen[-1] | {"socket"} == {token[1:] for token in best} | {"socket"}


@pytest.mark.parametrize("family", ["distilbert", "albert", "electra", "mpnet", "deberta_v2", "modernbert"])
def test_any_masked_language_model(family, tokenizer):
    """The vocabulary head is shown one position a row: same words as from the logits of all positions."""
    model = families.build(family, 2, head="MaskedLM", vocab_size=len(tokenizer))
    text = "socket connects hosts"
    copy = augmented([text], model, tokenizer, copies=1, candidates=1, probability=1.0)[0]
    words = whole_words(tokenizer)
    wanted = []
    for place in (1, 2, 3):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        ids[0, place] = tokenizer.mask_token_id
        with torch.no_grad():
            scores = model(ids).logits[0, place]
        wanted.append(words[max(words, key=lambda i: float(scores[i]))])
    assert copy == [" ".join(wanted)]


def test_model_is_left_as_it_was(model, tokenizer):
    model = families.build("bert", 1, head="MaskedLM", vocab_size=len(tokenizer), max_position_embeddings=64).train()
    model.bert.encoder.layer[0].eval()
    modes, before = [module.training for module in model.modules()], model(torch.tensor([[2, 7, 3]])).logits.shape
    one = augmented(TEXTS, model, tokenizer, copies=5)
    assert [module.training for module in model.modules()] == modes and model(torch.tensor([[2, 7, 3]])).logits.shape == before
    assert augmented(TEXTS, model.eval(), tokenizer, copies=5) == one  # no dropout in it


def test_result_is_kept_and_found_again(model, tokenizer, tmp_path, monkeypatch):
    rows, options = rows_of(TEXTS), {"copies": 5, "cache_dir": tmp_path / "cache"}
    first = augment_texts(rows, ["text"], model, tokenizer, **options)
    assert first["text"][:] == augment_texts(rows, ["text"], model, tokenizer, copies=5)["text"][:]
    with monkeypatch.context() as patch:
        patch.setattr(augmentation, "_augment", None)
        again = augment_texts(rows, ["text"], model, tokenizer, **options, batch_size=7)
        assert again["text"][:] == first["text"][:] and again["source"][:] == first["source"][:]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    for change in ({"seed": 1}, {"candidates": 14}, {"stop_words": ()}, {"neighbours": "none"}, {"max_length": 20}):
        augment_texts(rows, ["text"], model, tokenizer, **{**options, **change})
    augment_texts(rows_of(TEXTS[::-1]), ["text"], model, tokenizer, **options)
    other = families.build("bert", 2, head="MaskedLM", seed=3, vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.8)
    augment_texts(rows, ["text"], other, tokenizer, **options)
    assert len(list((tmp_path / "cache").iterdir())) == 8


def test_table_of_tasks():
    assert AUGMENTATION_COPIES == {"cola": 30, "mnli": 10, "mrpc": 30, "sst2": 20, "qqp": 10, "qnli": 20, "rte": 30, "stsb": 30}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"copies": -1}, "copies must be a whole number of at least 0, got -1"),
        ({"candidates": 0}, "candidates must be a whole number of at least 1"),
        ({"batch_size": 2.5}, "batch_size must be a whole number of at least 1, got 2.5"),
        ({"probability": 1.5}, "probability must lie between 0 .* got 1.5"),
        ({"neighbours": "glove"}, "neighbours must be 'embedding', 'none' or a mapping"),
        ({"max_length": 2}, "max_length=2 does not fit: 2 special tokens"),
        ({"max_length": 65}, "takes at most 64"),
    ],
)
def test_bad_settings(options, message, model, tokenizer):
    with pytest.raises(ValueError, match=message):
        augment_texts(rows_of(TEXTS), ["text"], model, tokenizer, **options)


def test_bad_columns_texts_models_and_tokenizers(model, tokenizer):
    with pytest.raises(ValueError, match="text_columns=\\['sentence'\\] must be one or more columns of \\['text'\\]"):
        augment_texts(rows_of(TEXTS), ["sentence"], model, tokenizer)
    with pytest.raises(ValueError, match="Row 1 of column 'text' holds None"):
        augment_texts(rows_of(["socket", None]), ["text"], model, tokenizer)
    with pytest.raises(ValueError, match="BertForSequenceClassification is none"):
        augment_texts(rows_of(TEXTS), ["text"], families.build("bert", 1, vocab_size=150), tokenizer)
    with pytest.raises(ValueError, match="The tokenizer has .* and BertForMaskedLM only 64"):
        augment_texts(rows_of(TEXTS), ["text"], families.build("bert", 1, head="MaskedLM"), tokenizer)
    plain = transformers.BertTokenizer(vocab=tokenizer.get_vocab())
    plain.mask_token = None
    with pytest.raises(ValueError, match="mask_token=None.* cannot be used"):
        augment_texts(rows_of(TEXTS), ["text"], model, plain)


def test_rows_draw_for_themselves():
    """Each row has its own line of draws: not all rows change the same places."""
    slots = [augmentation.Slot(i, i + 1, ("x",)) for i in range(0, 20, 2)]
    texts = [" ".join("abcdefghij"), " ".join("klmnopqrst")]
    found = [augmentation._copies((text,), {text: slots}, 8, 0.4, 0) for text in texts]
    assert [[[c == "x" for c in copy] for (copy,) in own] for own in found][0] != [[[c == "x" for c in copy] for (copy,) in found[1]]][0]


def test_a_word_whose_end_is_tied_to_punctuation_stays():
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "sock", "##et,", "hosts", "files"])}
    core = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=40, **special)
    model = families.build("bert", 1, head="MaskedLM", vocab_size=len(vocab))
    copies = augmented(["socket, hosts"], model, tokenizer, probability=1.0, copies=50)[0]
    assert len(copies) == 3 and all(copy.startswith("socket, ") for copy in copies)
