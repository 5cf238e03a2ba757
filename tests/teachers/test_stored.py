"""Reading: the signals of a batch are those of the live teacher, padded as it is, and nothing but the right answers is given."""

from __future__ import annotations

import shutil
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import vision_families as vision
from stored_runs import bert, collate, corpus_rows, images, numbered_rows, pad_without_number, span_rows, token_rows, tokenizer, write

from hfdistill import CausalCollator, FrozenTeacher, MaskingCollator, StoredTeacher, TeacherStore, store_teacher
from hfdistill.capture_plan import CapturePlan
from hfdistill.teachers import store_hub, store_table, store_writing
from hfdistill.teachers.store_keys import KeyedCollator


def batch_of(data, places, collator=pad_without_number, inputs=("input_ids",)):
    """Rows in any order, with their keys."""
    return KeyedCollator(collator, inputs)([data[i] for i in places])


def with_ids(data):
    return data.add_column("example_id", range(len(data)))


PLACES = [7, 2, 11, 0]


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_hidden_states_are_padded_again(dtype, tolerance, tmp_path):
    """Whatever the order and however long the longest row of the batch is; padding is 0."""
    plan = CapturePlan(hidden_states=frozenset([0, 1]), embeddings=True, pooled=True)
    stored, live = StoredTeacher(write(tmp_path, plan=plan, dtype=dtype)), FrozenTeacher(bert())
    for places in (PLACES, [1, 2], [0]):
        batch = batch_of(numbered_rows(), places)
        got, expected = stored(batch, plan), live(batch, plan)
        real = batch["attention_mask"].bool()
        assert torch.equal(got.attention_mask, real) and got.logits.dtype == getattr(torch, dtype)
        for ours, theirs in [(got.logits, expected.logits), (got.pooled, expected.pooled)]:
            torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=tolerance)
        for ours, theirs in [(got.embeddings, expected.embeddings), *((got.hidden_states[k], expected.hidden_states[k]) for k in (0, 1))]:
            torch.testing.assert_close(ours.float()[real], theirs[real], rtol=tolerance, atol=tolerance)
            assert not ours[~real].any()
    only = stored(batch_of(numbered_rows(), PLACES), CapturePlan(logits=False, hidden_states=frozenset([1])))
    assert only.logits is None and only.hidden_states.keys() == {1} and only.pooled is None


def test_left_padding(tmp_path):
    """It moves tokens to other positions, so answers to right padding are not its own; where its place is always the same it is stored."""
    plan = CapturePlan(hidden_states=frozenset([1]))
    stored = StoredTeacher(write(tmp_path / "right", plan=plan))

    def left(batch_rows, length=9):
        padded = pad_without_number(batch_rows)
        for i, mask in enumerate(padded["attention_mask"].bool()):
            padded["input_ids"][i] = torch.cat([padded["input_ids"][i][~mask], padded["input_ids"][i][mask]])
        padded["attention_mask"] = padded["attention_mask"].flip(1)
        fixed = torch.nn.functional.pad
        return {**padded, **{n: fixed(padded[n], (length - padded[n].size(1), 0)) for n in ("input_ids", "attention_mask")}}

    moved = batch_of(numbered_rows(), PLACES, left)
    with pytest.raises(ValueError, match="was given to other inputs"):
        stored(moved, plan)
    own = StoredTeacher(store_teacher(tmp_path / "left", bert(), numbered_rows(), left, plan, dtype="float32", progress=False))
    real = moved["attention_mask"].bool()
    expected = FrozenTeacher(bert())(moved, plan).hidden_states[1][real]
    torch.testing.assert_close(own(moved, plan).hidden_states[1][real], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="depends on the other rows of its batch"):
        longest = lambda rows: left(rows, max(len(row["input_ids"]) for row in rows))  # noqa: E731
        store_teacher(tmp_path / "longest", bert(), numbered_rows(), longest, plan, progress=False)


@pytest.mark.parametrize("kind", ["tokens", "spans"])
def test_logits_by_token_and_of_spans(kind, tmp_path):
    data, head, labels = (token_rows(), "TokenClassification", 3) if kind == "tokens" else (span_rows(), "QuestionAnswering", 2)
    data, model = with_ids(data), families.build("bert", 1, head=head, num_labels=labels)
    stored = StoredTeacher(store_teacher(tmp_path, model, data, pad_without_number, dtype="float32", progress=False))
    live = FrozenTeacher(model)
    batch = batch_of(data, PLACES)
    got, expected, real = stored(batch, CapturePlan()), live(batch, CapturePlan()), batch["attention_mask"].bool()
    real = real[:, :, None] if kind == "tokens" else real[:, None]
    torch.testing.assert_close(got.logits, expected.logits.where(real, 0.0), rtol=1e-5, atol=1e-5)


def test_maps_and_logits_of_images(tmp_path):
    data, collator = images(augmentation={"horizontal_flip": 0.5})
    collator = collator.for_training()
    model, plan = vision.build("resnet", 2), CapturePlan(features=frozenset([0, 2]))
    stored = StoredTeacher(store_teacher(tmp_path, model, data, collator, plan, epochs=2, dtype="float32", progress=False))
    live = FrozenTeacher(model)
    live.capture.find_stages({"pixel_values": torch.zeros(1, 3, 32, 32)})
    for epoch in (1, 0):
        collator.set_epoch(epoch)
        batch = batch_of(data, PLACES, collator, ["pixel_values"])
        got, expected = stored(batch, plan), live(batch, plan)
        torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)
        for stage in (0, 2):
            torch.testing.assert_close(got.features[stage], expected.features[stage], rtol=1e-4, atol=1e-5)
    collator.set_epoch(2)
    with pytest.raises(ValueError, match="has no answer to example_id 49 in epoch 2, only 24 of 24 answers"):
        stored(batch_of(data, PLACES, collator, ["pixel_values"]), plan)


def vocabulary_store(folder, family: str, **options):
    head = "MaskedLM" if family == "bert" else "LMHeadModel"
    model = families.build(family, 2, head=head, vocab_size=len(tokenizer()))
    collator = MaskingCollator(tokenizer(), 0.3, seed=3) if family == "bert" else CausalCollator(tokenizer())
    return model, collator, StoredTeacher(store_teacher(folder, model, corpus_rows(), collator, dtype="float32", progress=False, **options))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("kind", ["hidden", "top_k", "full"])
def test_logits_of_a_vocabulary_at_rows(family, kind, tmp_path):
    model, collator, stored = vocabulary_store(tmp_path, family, logits=kind, top_k=5, temperature=2.0)
    batch = batch_of(corpus_rows(), PLACES, collator)
    expected = FrozenTeacher(model)(batch, CapturePlan()).logits
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten()
    rows = mask.nonzero().squeeze(1)[torch.tensor([9, 1, 4, 20])]
    got, wanted = stored(batch, CapturePlan(), rows=rows), expected.flatten(0, 1)[rows]
    assert torch.equal(got.rows, rows)
    if kind == "hidden":
        torch.testing.assert_close(got.projection.logits(), wanted, rtol=1e-4, atol=1e-5)
        whole = stored(batch, CapturePlan())
        assert whole.rows is None and whole.projection is None
        torch.testing.assert_close(whole.logits.flatten(0, 1)[rows], wanted, rtol=1e-4, atol=1e-5)
    elif kind == "full":
        torch.testing.assert_close(got.logits, wanted, rtol=1e-4, atol=1e-5)
    else:
        top, values = got.top_logits, wanted.sort(descending=True)
        torch.testing.assert_close(top.values, values.values[:, :5], rtol=1e-4, atol=1e-5)
        assert torch.equal(top.ids, values.indices[:, :5]) and top.temperature == 2.0 and top.tail
        torch.testing.assert_close(top.logsumexp, (wanted / 2).logsumexp(1), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="The top 5 logits are stored, .* but all logits of all positions are asked for"):
            stored(batch, CapturePlan())


def test_positions_that_are_not_stored_are_refused(tmp_path):
    def labelled(batch):
        return (batch["labels"] != -100).flatten().nonzero().squeeze(1)

    _, collator, stored = vocabulary_store(tmp_path, "bert", rows_of=labelled)
    batch = batch_of(corpus_rows(), PLACES, collator)
    assert stored(batch, CapturePlan(), rows=labelled(batch)).projection.features.shape == (len(labelled(batch)), 32)
    with pytest.raises(ValueError, match="has no logits for a position of example_id 7 that carries a loss now"):
        stored(batch, CapturePlan(), rows=torch.tensor([0]))
    assert batch["labels"][0, 0] == -100
    whole = stored(batch, CapturePlan()).logits  # of all positions: there is no answer where none was stored, not one of zeros
    there = batch["labels"] != -100
    assert whole[there].isfinite().all() and whole[~there].isnan().all()


def test_lost_mass_is_what_the_stored_classes_leave(tmp_path):
    model, collator, stored = vocabulary_store(tmp_path, "gpt2", logits="top_k", top_k=5, temperature=1.0)
    data = corpus_rows()
    lost = []
    for row in data:
        with torch.no_grad():
            probabilities = model(torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
        lost.append(1 - probabilities.topk(5).values.sum(-1))
    lost = torch.cat(lost)
    mean, worst = stored.store.lost_mass()
    assert mean == pytest.approx(float(lost.mean()), abs=1e-5) and worst == pytest.approx(float(lost.quantile(0.99)), abs=1e-5)
    assert TeacherStore(tmp_path).lost_mass(examples=3)[0] == pytest.approx(mean, rel=0.1)


def test_other_inputs_are_refused_by_their_hash(tmp_path):
    stored, data = StoredTeacher(write(tmp_path)), numbered_rows()

    def changed(change):
        return KeyedCollator(lambda given: change(pad_without_number(given)), ["input_ids"])([data[i] for i in PLACES])

    def token(batch):
        batch["input_ids"][2, 1] += 1
        return batch

    def cut(batch):
        return {**batch, "attention_mask": batch["attention_mask"] * (torch.arange(batch["attention_mask"].size(1)) < 8)}

    for change, example in ((token, 91), (cut, -30)):  # the row at 11, and the one of the batch that has 9 tokens
        with pytest.raises(ValueError, match=rf"stored answer to example_id {example} \(epoch 0\) .* was given to other inputs"):
            stored(changed(change), CapturePlan())
    batch = batch_of(data, PLACES)
    swapped = {**batch, "input_ids": batch["input_ids"].flip(0), "attention_mask": batch["attention_mask"].flip(0)}
    keys = swapped.pop("teacher_store_keys")
    with pytest.raises(ValueError, match="was given to other inputs"):
        stored({**swapped, "example_id": torch.from_numpy(keys.ids)}, CapturePlan())
    with pytest.raises(ValueError, match="has no answer to example_id 5 in epoch 0, only 20 of 20"):
        stored({**swapped, "example_id": torch.tensor([47, 5, 91, -30])}, CapturePlan())
    with pytest.raises(ValueError, match="A batch has no 'example_id'.*set eval_with_teacher=False"):
        stored(swapped, CapturePlan())


def test_a_loop_of_ones_own(tmp_path):
    """Without the trainer: the collator keeps the column, nothing else is needed."""
    stored, model = StoredTeacher(write(tmp_path)), bert()
    batch = collate([numbered_rows()[i] for i in PLACES])
    torch.testing.assert_close(stored(batch, CapturePlan()).logits, FrozenTeacher(model)(batch, CapturePlan()).logits, rtol=1e-5, atol=1e-5)


def test_what_a_capture_is_asked(tmp_path):
    plan = CapturePlan(hidden_states=frozenset([1]))
    capture = StoredTeacher(write(tmp_path, plan=plan)).capture
    example = pad_without_number([numbered_rows()[i] for i in PLACES])
    signals = capture.require(plan, example)
    assert signals.logits.shape == (4, 3) and signals.hidden_states[1].shape == (4, 9, 32)
    assert capture.depth == 2 and capture.name == "stored teacher (BertForSequenceClassification)" and not capture.is_causal
    assert capture.inner.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"} and capture.inner.config.vocab_size == families.VOCAB
    with pytest.raises(ValueError, match=r"has no pooled, hidden_states 0, only logits, hidden_states\.1, but terms"):
        capture.require(CapturePlan(pooled=True, hidden_states=frozenset([0])), example)
    with pytest.raises(ValueError, match="was stored without its stages"):
        capture.find_stages(example)


def test_few_files_are_open_and_nothing_stays_mapped(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writing, "SHARD_ROWS", 2)
    monkeypatch.setattr(store_table, "OPEN_FILES", 3)
    store, data = write(tmp_path), numbered_rows()
    order = [int(i) for i in torch.randperm(20)]
    answers = store.read(np.array([data[i]["example_id"] for i in order]), 0)
    single = TeacherStore(tmp_path)
    for i, answer in zip(order, answers):
        np.testing.assert_array_equal(answer["logits"], single.read(np.array([data[i]["example_id"]]), 0)[0]["logits"])
    for opened in (store, single):
        assert sum(shard._file is not None for shard in opened.shards) == 3
    maps = Path("/proc/self/maps")
    assert not maps.is_file() or "part-0000" not in maps.read_text()


class FakeHub:
    """`HfApi` and `snapshot_download` on a folder."""

    def __init__(self, root):
        self.root, self.calls = root, []

    def create_repo(self, repo_id, **options):
        self.calls.append((repo_id, options))

    def upload_file(self, path_or_fileobj, path_in_repo, repo_id, **options):
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        (self.root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

    def upload_folder(self, repo_id, folder_path, allow_patterns, **options):
        for path in folder_path.rglob("*"):
            if path.is_file() and any(path.relative_to(folder_path).match(pattern) for pattern in allow_patterns):
                target = self.root / repo_id / path.relative_to(folder_path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        return "commit"

    def snapshot_download(self, repo_id, repo_type, revision, allow_patterns):
        assert repo_type == "dataset" and allow_patterns == ["manifest.json", "head.safetensors", "data/*.arrow"]
        if not (self.root / repo_id).exists():
            raise OSError("404 Not Found")
        return str(self.root / repo_id)


def test_a_store_on_the_hub(tmp_path, monkeypatch):
    from huggingface_hub import DatasetCard

    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(store_hub, "HfApi", lambda token: hub)
    monkeypatch.setattr(store_hub, "snapshot_download", hub.snapshot_download)
    model = bert()
    model.config._name_or_path = "/home/ana/models/teacher"
    store = write(tmp_path / "store", model=model)
    (tmp_path / "store/data/.part.partial").write_text("")
    assert store.push_to_hub("ana/answers", private=True) == "commit"
    assert hub.calls == [("ana/answers", {"repo_type": "dataset", "private": True, "exist_ok": True})]
    files = {path.relative_to(hub.root / "ana/answers").as_posix() for path in (hub.root / "ana/answers").rglob("*") if path.is_file()}
    shard = store.shards[0].path.name
    assert files == {"README.md", "manifest.json", f"data/{shard}"} and not (tmp_path / "store/README.md").exists()
    for name in ("README.md", "manifest.json"):
        text = (hub.root / "ana/answers" / name).read_text()
        assert "/home" not in text and "teacher" in text
    assert DatasetCard.load(hub.root / "ana/answers/README.md").data.tags == ["hfdistill", "knowledge-distillation"]
    monkeypatch.chdir(tmp_path)
    name, batch = "hf://datasets/ana/answers", batch_of(numbered_rows(), PLACES)
    torch.testing.assert_close(StoredTeacher(name)(batch, CapturePlan()).logits, StoredTeacher(store)(batch, CapturePlan()).logits)
    with pytest.raises(ValueError, match="'ana/nothing' is neither a folder with a stored teacher nor a data set on the Hub"):
        TeacherStore("hf://datasets/ana/nothing")
    with pytest.raises(ValueError, match="holds no stored teacher"):  # a folder, and never the Hub
        TeacherStore("ana/answers")
    with pytest.raises(ValueError, match="is called hf://datasets/user/name, got 'hf://ana/answers'"):
        write("hf://ana/answers")
    before = {path: path.stat().st_mtime_ns for path in hub.root.rglob("*")}
    assert len(write(name, model=model)) == 20
    (hub.root / "ana/answers/data" / shard).rename(tmp_path / shard)
    with pytest.raises(ValueError, match="is on the Hub, where nothing is added to it, and has not all answers to 20 examples"):
        write(name, model=model)
    (tmp_path / shard).rename(hub.root / "ana/answers/data" / shard)
    files = [path for path in before if path.is_file()]
    assert {path: before[path] for path in files} == {path: path.stat().st_mtime_ns for path in hub.root.rglob("*") if path.is_file()}
    assert not (tmp_path / "hf:").exists()
    store.shards[0].path.unlink()
    with pytest.raises(ValueError, match="is not complete: others could not train from it"):
        TeacherStore(tmp_path / "store").push_to_hub("ana/half")
