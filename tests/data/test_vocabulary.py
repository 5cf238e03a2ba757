"""Pruned tokenizers: the same tokens wherever all of them were kept, for every algorithm, also in a new process."""

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache

import pytest
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from hfdistill import prune_tokenizer, train_wordpiece
from hfdistill.data.vocabulary import _renumber


TEXTS = [
    "The cat sat on the mat, where the other cats sat; nobody was newer, lower or wider than the widest cat.",
    "A naïve café owner wrote 1234 words about 東京 and the lowest widths of the newest mats.",
    "Where others sat lower, wider words were written: the matter of the owner's cat.",
] * 4
CORPUS = ["the cat sat lower than the other cats", "newer words, wider mats", "the café of the owner"]
WORDS = "cat cats lower lowest newer mats widest café the owner words wo er ow at 東 q 1 , 's".split()


def _bpe(special):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    model = json.loads(core.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def _unigram(special):
    """Characters and the substrings of words, scored by frequency: the trainer of Unigram is not deterministic."""
    words = Counter(f"▁{word}" for text in TEXTS for word in text.split())
    counts = Counter()
    for word, count in words.items():
        counts.update({word[i:k]: count for i in range(len(word)) for k in range(i + 1, min(len(word), i + 6) + 1)})
    pieces = sorted(piece for piece, count in counts.items() if len(piece) == 1 or count >= 12)
    scores = [(piece, math.log(counts[piece] * len(piece) / sum(counts.values()))) for piece in pieces]
    return {"vocab": [(token, 0.0) for token in special] + scores}


def _llama():
    """Sentencepiece-like BPE: pieces of characters with all their merges, and bytes to fall back on."""
    pieces = ["▁", *"thecasowrinml", *"th he ▁th the ▁the at ▁c ▁cat cat ca er ow low ▁l lo ower".split()]
    merges = "t+h h+e ▁+th th+e t+he ▁th+e ▁+the a+t ▁+c ▁c+at c+at c+a ca+t e+r o+w l+ow ▁+l l+o lo+w ow+er"
    merges = [tuple(merge.split("+")) for merge in merges.split()]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return tf.LlamaTokenizer(vocab={token: i for i, token in enumerate(dict.fromkeys([*first, *pieces]))}, merges=merges)


MAKE = {
    "bert": lambda: train_wordpiece(TEXTS, vocab_size=200),
    "roberta": lambda: tf.RobertaTokenizer(**_bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])),
    "gpt2": lambda: tf.GPT2Tokenizer(**_bpe(["<|endoftext|>"])),
    "llama": _llama,
    "albert": lambda: tf.AlbertTokenizer(**_unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"])),
    "xlm_roberta": lambda: tf.XLMRobertaTokenizer(**_unigram(["<s>", "<pad>", "</s>", "<unk>"])),
    "t5": lambda: tf.T5Tokenizer(**_unigram(["<pad>", "</s>", "<unk>"]), extra_ids=4),
}


@cache
def pair(name):
    tokenizer = MAKE[name]()
    return tokenizer, *prune_tokenizer(tokenizer, CORPUS)


def assert_exact(name, text) -> bool:
    """Whether all tokens of the text were kept; if so they are the same ones."""
    tokenizer, pruned, kept = pair(name)
    before, after = tokenizer.tokenize(text), pruned.tokenize(text)
    if not set(before) <= pruned.get_vocab().keys():
        return False
    assert after == before
    ids = pruned(text, text)["input_ids"]
    assert [kept[i] for i in ids] == tokenizer(text, text)["input_ids"]
    return True


@pytest.mark.parametrize("name", MAKE)
def test_the_corpus_is_cut_as_before_and_little_else_is_kept(name):
    tokenizer, pruned, kept = pair(name)
    assert all(assert_exact(name, text) for text in CORPUS)
    assert len(pruned) == len(kept) < len(tokenizer) or name == "llama"
    assert len(set(kept)) == len(kept) and [tokenizer.convert_ids_to_tokens(i) for i in kept] == pruned.convert_ids_to_tokens(
        range(len(kept))
    )
    assert kept == sorted(kept)
    assert type(pruned) is type(tokenizer) and pruned.special_tokens_map == tokenizer.special_tokens_map
    assert pruned.all_special_tokens == tokenizer.all_special_tokens
    assert set(pruned.all_special_ids) == {kept.index(i) for i in tokenizer.all_special_ids}
    assert set(tokenizer.get_added_vocab()) == set(pruned.get_added_vocab())
    used = {token for text in CORPUS for token in tokenizer.tokenize(text)}
    extra = {
        t for t in pruned.get_vocab().keys() - used - set(tokenizer.get_added_vocab()) if len(t.removeprefix("##")) > 1 and t[0] != "<"
    }
    longest = max(map(len, used))
    if name in ("bert", "albert", "xlm_roberta", "t5"):
        assert len(extra) <= 1  # the Unigram piece with the lowest score
    else:
        assert all(len(token) < longest and any(token in word for word in used) for token in extra)  # on the way to a used token


@settings(deadline=None, max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", MAKE)
def test_any_text_of_kept_tokens_is_cut_as_before(name, data):
    pieces = [token.strip("#▁Ġ") for token in pair(name)[1].get_vocab() if token.isascii() and token[0] not in "<["]
    text = data.draw(st.lists(st.sampled_from([*WORDS, *pieces, " ", " ", " "]) | st.text(max_size=3), max_size=12).map("".join))
    assert_exact(name, text)


@pytest.mark.parametrize("name", MAKE)
def test_such_texts_exist_beyond_the_corpus(name):
    texts = ["other words", "the owner sat", "wider cats than newer mats", "cat cats lower other", "the the at er", "the cat lower"]
    assert sum(assert_exact(name, text) for text in texts) >= 3


def test_other_words_fall_back():
    tokenizer, pruned, _ = pair("bert")
    assert tokenizer.tokenize("widest 1234") != pruned.tokenize("widest 1234")
    assert "".join(token.removeprefix("##") for token in pruned.tokenize("widest")) == "widest"  # its characters are there
    assert pruned.tokenize("1234") == ["[UNK]"] and pruned.tokenize("東") == ["[UNK]"]
    for name in ("roberta", "gpt2", "llama"):
        assert pair(name)[1].decode(pair(name)[1]("東京 widest 1234", add_special_tokens=False)["input_ids"]) == "東京 widest 1234"
    _, pruned, _ = pair("xlm_roberta")
    assert pruned.unk_token_id in pruned("東")["input_ids"]


def test_unigram_scores_of_unknown_characters_do_not_move():
    """Without the lowest piece, the unknown token (10 below it) plus one long piece would beat three kept pieces."""
    vocab = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), ("ab", -9.0), ("cd", -9.0), ("ef", -9.0)]
    vocab += [("a", -40.0), ("bcdef", -2.0), ("zzz", -60.0)]
    tokenizer = tf.XLMRobertaTokenizer(vocab=vocab)
    assert tokenizer.tokenize("abcdef") == ["▁", "ab", "cd", "ef"]
    pruned, kept = prune_tokenizer(tokenizer, ["ab", "cd", "ef", "bcdef"], keep=[])
    assert pruned.tokenize("abcdef") == ["▁", "ab", "cd", "ef"]
    assert "zzz" in pruned.get_vocab() and len(kept) == len(set(kept))


def test_rare_tokens_and_tokens_to_keep():
    tokenizer = pair("bert")[0]
    often, _ = prune_tokenizer(tokenizer, [*CORPUS, "the the"], min_count=3)
    assert "the" in often.get_vocab() and "cat" not in often.get_vocab()
    assert often.tokenize("the cat")[0] == "the" and "".join(often.tokenize("cat")).replace("##", "") in ("cat", "[UNK]")
    kept, _ = prune_tokenizer(tokenizer, CORPUS, keep=["widest"])
    assert kept.tokenize("widest") == ["widest"] != pair("bert")[1].tokenize("widest")


def test_the_given_tokenizer_stays_and_settings_follow():
    tokenizer = train_wordpiece(TEXTS, vocab_size=200, max_length=77)
    tokenizer.add_tokens(["<speaker>"])
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.padding_side, tokenizer.name_or_path = "left", "org/name"
    before = tokenizer.backend_tokenizer.to_str()
    pruned, kept = prune_tokenizer(tokenizer, CORPUS)
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"] == json.loads(before)["model"]
    assert pruned.model_max_length == 77 and pruned.padding_side == "left" and pruned.chat_template == "{{ messages }}"
    assert pruned.name_or_path == "org/name"
    assert pruned.tokenize("the <speaker> cat") == ["the", "<speaker>", "cat"]
    assert kept[pruned.convert_tokens_to_ids("<speaker>")] == tokenizer.convert_tokens_to_ids("<speaker>")


PROCESSORS = {
    "bert": lambda cls, sep: processors.BertProcessing(sep, cls),
    "roberta": lambda cls, sep: processors.RobertaProcessing(sep, cls),
    "template": lambda cls, sep: processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [cls, sep]),
    "sequence": lambda cls, sep: processors.Sequence([processors.BertProcessing(sep, cls)]),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_special_tokens_behind_the_words_get_their_new_ids(name):
    old = pair("bert")[0].get_vocab()
    tokens = sorted(old, key=lambda token: (token.startswith("["), old[token]))
    core = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = PROCESSORS[name](*[(token, tokens.index(token)) for token in ("[CLS]", "[SEP]")])
    core.enable_padding(pad_id=tokens.index("[PAD]"), pad_token="[PAD]")
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    pruned, kept = prune_tokenizer(tokenizer, CORPUS)
    assert max(kept) > len(kept)
    for batch in (["the cat", "the"], [("the cat", "mats"), ("the", "q")]):
        rows = [[kept[i] for i in row] for row in pruned(batch, padding=True)["input_ids"]]
        assert rows == tokenizer(batch, padding=True)["input_ids"]
    state = json.loads(core.to_str())  # whose padding Transformers sets anew at each call, and other readers of the file do not
    _renumber(state, {old: new for new, old in enumerate(kept)}, set(pruned.get_vocab()))
    assert kept[state["padding"]["pad_id"]] == tokens.index("[PAD]")


def test_the_unknown_piece_of_unigram_gets_its_new_id():
    vocab = [("▁", -1.0), ("cat", -2.0), ("mat", -3.0), ("s", -4.0), ("<unk>", 0.0)]
    core = Tokenizer(models.Unigram(vocab, unk_id=4))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    pruned, kept = prune_tokenizer(tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), ["cat cats"])
    assert pruned.convert_ids_to_tokens(pruned("cat q")["input_ids"]) == ["▁", "cat", "▁", "<unk>"] and kept == [0, 1, 3, 4]


def test_plain_auto_tokenizer_loads_them_in_a_new_process(tmp_path):
    names, texts = ["bert", "roberta", "llama", "albert"], [*CORPUS, "東京 widest 1234 [MASK] q"]
    for name in names:
        pair(name)[1].save_pretrained(tmp_path / name)
        for path in (tmp_path / name).iterdir():
            assert tempfile.gettempdir() not in path.read_text(encoding="utf-8"), path.name
    code = f"""
import json, sys
sys.modules["hfdistill"] = None
from transformers import AutoTokenizer
for name in {names!r}:
    tokenizer = AutoTokenizer.from_pretrained(name)
    print(json.dumps([type(tokenizer).__name__, len(tokenizer), tokenizer({texts!r}, {texts!r})["input_ids"]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        pruned = pair(name)[1]
        assert json.loads(line) == [type(pruned).__name__, len(pruned), pruned(texts, texts)["input_ids"]]


def test_what_cannot_be_pruned():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ValueError, match="algorithm 'WordLevel'.*Pruning is exact for WordPiece, BPE, Unigram"):
        prune_tokenizer(tf.PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]"), ["a"])
    with pytest.raises(ValueError, match="ByT5Tokenizer is not a fast tokenizer"):
        prune_tokenizer(tf.ByT5Tokenizer(), ["a"])
    tokenizer = MAKE["gpt2"]()
    tokenizer.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(ValueError, match=r"drops merges at random \(dropout=0.1\)"):
        prune_tokenizer(tokenizer, ["a"])
    tokenizer = pair("bert")[0]
    with pytest.raises(ValueError, match="There is no text"):
        prune_tokenizer(tokenizer, ["", "  "])
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match=f"min_count must be an integer >= 1, got {wrong}"):
            prune_tokenizer(tokenizer, CORPUS, min_count=wrong)
    with pytest.raises(ValueError, match=r"keep names \['nosuchtoken'\]"):
        prune_tokenizer(tokenizer, CORPUS, keep=["the", "nosuchtoken"])


def test_a_class_that_rebuilds_its_tables_is_refused(monkeypatch):
    """What the loaded tokenizer really does is compared with what it should do."""
    tokenizer, pruned, _ = pair("bert")
    monkeypatch.setattr(type(tokenizer), "from_pretrained", classmethod(lambda cls, folder: MAKE["bert"]()))
    with pytest.raises(ValueError, match="BertTokenizer does not keep its tokens when its vocabulary is cut"):
        prune_tokenizer(tokenizer, CORPUS)
