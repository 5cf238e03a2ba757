"""What is written: whole shards only, again after a kill, by any number of processes, readable by `datasets`, and nothing twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import families
import numpy as np
import pytest
import torch
import vision_families as vision
from datasets import load_dataset
from stored_runs import bert, corpus_rows, images, numbered_rows, tokenizer, write

from hfdistill import CausalCollator, MaskingCollator, TeacherStore, store_teacher
from hfdistill.capture_plan import CapturePlan
from hfdistill.teachers import store_files, store_format, store_keys, store_writing
from hfdistill.teachers.store_format import Shard, StoredSignal


def names(folder) -> list[str]:
    """Of the files in `data`, shards without the suffix of the run that wrote them."""
    return sorted(re.sub(r"-[0-9a-f]{8}\.arrow$", ".arrow", path.name) for path in (Path(folder) / "data").iterdir())


def shard_path(folder, process: int = 0) -> Path:
    (path,) = (Path(folder) / "data").glob(f"part-000{process}-000000-*.arrow")
    return path


def contents(store: TeacherStore) -> dict[tuple[int, int], list[np.ndarray]]:
    """Every answer, by its key, with the bytes of all columns."""
    found = {}
    for shard in store.shards:
        for row in range(len(shard)):
            key = int(shard.ids[row]), int(shard.epochs[row])
            assert key not in found, f"{key} is stored twice"
            found[key] = [shard.row(column, row).copy() for column in store.columns]
    return found


def assert_equal(one: TeacherStore, other: TeacherStore) -> None:
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    for key in first:
        for ours, theirs in zip(first[key], second[key], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_table_holds_what_the_teacher_says(tmp_path):
    """Logits and hidden states of the real tokens, by example_id, as a forward pass of one row gives them."""
    plan = CapturePlan(hidden_states=frozenset([1]), embeddings=True, pooled=True)
    store, model, data = write(tmp_path, plan=plan), bert(), numbered_rows()
    assert len(store) == 20 and store.complete and sorted(store.columns) == ["embeddings", "hidden_states.1", "logits", "pooled"]
    found = contents(store)
    for row in data:
        inputs = {name: torch.tensor([row[name]]) for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(**inputs, output_hidden_states=True)
            base = model.bert(**inputs)
        expected = {
            "logits": out.logits,
            "embeddings": out.hidden_states[0],
            "hidden_states.1": out.hidden_states[2],
            "pooled": base.pooler_output,
        }
        for column, stored in zip(store.columns, found[row["example_id"], 0], strict=True):
            np.testing.assert_allclose(stored, expected[column].flatten().numpy(), rtol=1e-4, atol=1e-5)


def test_datasets_reads_the_shards(tmp_path):
    store = write(tmp_path / "store")
    table = load_dataset("arrow", data_files=str(tmp_path / "store/data/*.arrow"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.column_names == ["example_id", "epoch", "input_hash", "checksum", "logits"]
    assert table["example_id"][:] == [11 * i - 30 for i in range(20)]
    np.testing.assert_allclose(table["logits"][0], contents(store)[-30, 0][0])


def test_several_shards_and_a_second_run(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writing, "SHARD_ROWS", 6)
    store = write(tmp_path / "a")
    assert names(tmp_path / "a") == [f"part-0000-00000{i}.arrow" for i in range(4)]
    assert [len(shard) for shard in store.shards] == [6, 6, 6, 2]
    monkeypatch.setattr(store_writing, "write_shard", lambda *_: pytest.fail("written again"))
    assert_equal(write(tmp_path / "a"), store)
    monkeypatch.undo()
    assert_equal(write(tmp_path / "b"), store)


def test_a_shard_is_closed_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writing, "SHARD_BYTES", 4000)
    store = write(tmp_path, plan=CapturePlan(hidden_states=frozenset([0])))
    assert max(path.stat().st_size for path in (tmp_path / "data").iterdir()) < 8000 and len(store.shards) > 3


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_work_and_another_number_goes_on(processes, tmp_path):
    """Two or three threads with a barrier stand for processes; a whole shard is then lost, and one process fills the gap."""
    barrier, models = threading.Barrier(processes), [bert() for _ in range(processes)]
    errors = []

    def process(index: int) -> None:
        try:
            write(tmp_path / "many", model=models[index], process_index=index, num_processes=processes, wait=barrier.wait)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=process, args=(i,)) for i in range(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert names(tmp_path / "many") == [f"part-000{i}-000000.arrow" for i in range(processes)]
    one = write(tmp_path / "one")
    assert_equal(TeacherStore(tmp_path / "many"), one)
    shard_path(tmp_path / "many", 1).unlink()
    assert not TeacherStore(tmp_path / "many").complete
    assert_equal(write(tmp_path / "many"), one)
    assert "part-0000-000001.arrow" in names(tmp_path / "many")


KILLED = """
import os, signal, sys
from pathlib import Path
from stored_runs import bert, numbered_rows, pad_without_number
from hfdistill import store_teacher
from hfdistill.teachers import store_files, store_format, store_writing
store_writing.SHARD_ROWS = 4
replaced, original = 0, os.replace
def replace(*args):
    global replaced
    if str(args[1]).endswith(".arrow"):
        replaced += 1
        if replaced == 3:  # its bytes are written, its name is not
            os.kill(os.getpid(), signal.SIGKILL)
    return original(*args)
store_format.os.replace = replace
store_teacher(sys.argv[1], bert(), numbered_rows(), pad_without_number, dtype="float32", batch_size=3, progress=False)
"""


def kill(folder: Path) -> None:
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (here, here.parent, here.parents[1])))}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


def interrupt(folder: Path) -> None:
    """As `kill`, at the same moment, in this process."""
    replace, replaced = os.replace, []

    def interrupted(source, target):
        replaced.append(target)
        if sum(str(path).endswith(".arrow") for path in replaced) == 3:
            raise KeyboardInterrupt
        replace(source, target)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store_format.os, "replace", interrupted)
        patch.setattr(store_writing, "SHARD_ROWS", 4)
        write(folder)


@pytest.mark.parametrize("end", [interrupt, pytest.param(kill, marks=pytest.mark.slow)])
def test_after_a_kill_only_whole_shards_are_there_and_the_next_run_goes_on(end, tmp_path, monkeypatch):
    end(tmp_path / "store")
    left = names(tmp_path / "store")
    assert [name for name in left if name.endswith(".arrow")] == ["part-0000-000000.arrow", "part-0000-000001.arrow"]
    assert any(name.endswith(".partial") for name in left)
    half = TeacherStore(tmp_path / "store")
    assert len(half) == 8 and not half.complete
    asked = []
    cut = store_writing.TeacherAsker.rows
    monkeypatch.setattr(store_writing.TeacherAsker, "rows", lambda self, keys, *rest: asked.extend(keys.ids) or cut(self, keys, *rest))
    whole = write(tmp_path / "store")
    assert len(set(asked[2:])) == 12  # after the two of the example batch
    assert_equal(whole, write(tmp_path / "again"))
    assert all(name.endswith(".arrow") for name in names(tmp_path / "store"))


def replace_file(path: Path, content: bytes) -> None:
    """Not in place: the old file may still be mapped."""
    path.unlink()
    path.write_bytes(content)


def test_truncated_and_altered_shards_are_named(tmp_path):
    store = write(tmp_path)
    path = shard_path(tmp_path)
    whole, value = path.read_bytes(), store.shards[0].row("logits", 7).tobytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 300):
        replace_file(path, whole[:cut])
        with pytest.raises(ValueError, match=r"part-0000-000000-\w{8}\.arrow is damaged .*Delete this file"):
            TeacherStore(tmp_path)
    place = whole.index(value)
    replace_file(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged = TeacherStore(tmp_path)
    damaged.read(np.array([-30]), 0)
    with pytest.raises(ValueError, match=r"part-0000-000000-\w{8}\.arrow is damaged: the answer to example_id 47 is not what was written"):
        damaged.read(np.array([-30, 47]), 0)
    path.unlink()
    assert_equal(write(tmp_path), write(tmp_path.with_name("again")))


def test_damaged_manifests_and_foreign_folders(tmp_path):
    write(tmp_path / "store")
    manifest = tmp_path / "store/manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:-20])
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        TeacherStore(tmp_path / "store")
    manifest.write_text(text.replace('"format": 1', '"format": 7'))
    with pytest.raises(ValueError, match="has format 7, this version of hfdistill reads up to 1"):
        TeacherStore(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"holds other files \(thesis\.tex\) and no manifest\.json"):
        write(tmp_path / "mine")
    with pytest.raises(ValueError, match="holds no stored teacher: manifest.json is missing"):
        TeacherStore(tmp_path / "mine")


def test_numbers_that_do_not_fit_are_refused(tmp_path):
    model = bert()
    with torch.no_grad():
        model.classifier.bias.fill_(1e5)
    with pytest.raises(ValueError, match="The teacher's logits has the value 100000, which is no finite number in float16. Set teacher"):
        write(tmp_path, model=model, dtype="float16")
    assert not list(tmp_path.rglob("*.arrow"))
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="has the value nan.*Check the teacher and the data"):
        write(tmp_path, model=model)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(store_writing.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="Storing the teacher takes about 0.0 GB .20 examples, 1 epochs., but only 0.0 GB are free"):
        write(tmp_path / "store")


def test_bfloat16_is_kept_bit_by_bit():
    values = torch.randn(50).mul(100).bfloat16()
    signal = StoredSignal("logits", "example", (50,), "bfloat16")
    packed = signal.pack(values)
    assert packed.dtype == np.int16 and torch.equal(signal.unpack(packed), values)


def test_masks_of_each_epoch_are_stored(tmp_path):
    model = families.build("bert", 1, head="MaskedLM", vocab_size=len(tokenizer()))
    collator = MaskingCollator(tokenizer(), 0.3, seed=3)
    store = store_teacher(tmp_path, model, corpus_rows(), collator, epochs=3, progress=False, dtype="float32")
    assert len(store) == 36 and store.manifest.logits == "hidden" and collator.epoch == 0
    hashes = [{int(h) for shard in store.shards for h, e in zip(shard.hashes, shard.epochs) if e == epoch} for epoch in range(3)]
    assert [len(own) for own in hashes] == [12, 12, 12] and len(hashes[0] | hashes[1] | hashes[2]) > 24
    static, plain_collator = images()
    store = store_teacher(tmp_path.with_name("b"), vision.build("resnet", 1), static, plain_collator, epochs=3, progress=False)
    assert len(store) == 12 and store.manifest.epochs == 1


def test_the_head_with_features_gives_the_logits(tmp_path):
    model = families.build("gpt2", 1, head="LMHeadModel", vocab_size=len(tokenizer()))
    store = store_teacher(tmp_path, model, corpus_rows(), CausalCollator(tokenizer()), progress=False, dtype="float32")
    row = corpus_rows()[3]
    with torch.no_grad():
        expected = model(torch.tensor([row["input_ids"]])).logits[0]
    (answer,) = store.read(np.array([row["example_id"]]), 0)
    features = torch.from_numpy(answer["row_features"]).view(-1, 32)
    torch.testing.assert_close(features @ store.head["weight"].T, expected, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_no_projection_is_refused(tmp_path):
    model = families.build("gpt2", 1, head="LMHeadModel", vocab_size=len(tokenizer()))
    model.lm_head.register_forward_hook(lambda _m, _a, out: out * 1.5)
    with pytest.raises(ValueError, match="embedding of the teacher .GPT2LMHeadModel. do not give its logits.*teacher_store_logits=top_k"):
        store_teacher(tmp_path, model, corpus_rows(), CausalCollator(tokenizer()))
    with pytest.raises(ValueError, match="teacher_store_logits=hidden is for the vocabulary of a language model"):
        write(tmp_path, logits="hidden")


def test_images_padded_to_the_largest_of_a_batch_are_refused(tmp_path):
    small, large = vision.batch(32, rows=3), vision.batch(64, rows=3)
    data = [{"pixel_values": own["pixel_values"][i], "example_id": n} for n, (own, i) in enumerate([(small, 0), (small, 1), (large, 0)])]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return data[i]

    def pad_images(rows):
        side = max(row["pixel_values"].size(-1) for row in rows)
        pad = torch.nn.functional.pad
        return {"pixel_values": torch.stack([pad(row["pixel_values"], (0, side - row["pixel_values"].size(-1)) * 2) for row in rows])}

    with pytest.raises(ValueError, match="depends on the other rows of its batch"):
        store_teacher(tmp_path, vision.build("resnet", 1), Rows(), pad_images, CapturePlan(features=frozenset([1])), progress=False)


def test_the_shard_says_what_is_wrong_with_its_columns(tmp_path):
    store_id = write(tmp_path).manifest.store_id
    path = shard_path(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        Shard(path, [StoredSignal("logits", "example", (4,), "float32")], store_id)
    with pytest.raises(ValueError, match="is damaged"):
        Shard(path, [StoredSignal("pooled", "example", (3,), "float32")], store_id)
    right = StoredSignal("logits", "example", (3,), "float32")
    assert len(Shard(path, [right], store_id)) == 20
    with pytest.raises(ValueError, match="was written with another manifest.json"):
        Shard(path, [right], "another")


def test_offsets_beyond_the_file_are_damage(tmp_path):
    """They would be read as numbers of other columns, and are under no checksum until they are."""
    write(tmp_path, plan=CapturePlan(hidden_states=frozenset([0])))
    path, store = shard_path(tmp_path), TeacherStore(tmp_path)
    offsets = store.shards[0]._columns["hidden_states.0"][2]
    content, place = path.read_bytes(), path.read_bytes().index(offsets.tobytes())
    changed = offsets.copy()
    changed[3] = changed[-1] + 1000
    replace_file(path, content[:place] + changed.tobytes() + content[place + offsets.nbytes :])
    with pytest.raises(ValueError, match="is damaged"):
        TeacherStore(tmp_path)


def test_shards_belong_to_their_manifest(tmp_path):
    """The same teacher, plan and numbers: only the number of the store tells that a shard came from elsewhere."""
    write(tmp_path / "a")
    write(tmp_path / "b", model=families.build("bert", 2, seed=7))
    shard_path(tmp_path / "a").unlink()
    shard_path(tmp_path / "b").rename(tmp_path / "a/data/part-0000-000000-00000000.arrow")
    with pytest.raises(ValueError, match="was written with another manifest.json .* may be of another teacher"):
        TeacherStore(tmp_path / "a")
    write(tmp_path / "c")
    (tmp_path / "c/manifest.json").unlink()
    with pytest.raises(ValueError, match="holds answers and no manifest.json.*Delete the folder"):
        write(tmp_path / "c")


def test_a_manifest_is_made_once(tmp_path):
    """Two runs that start at the same time both find no manifest; the second one must not replace the first one's."""
    write(tmp_path)
    manifest = store_format.Manifest.read(tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ValueError, match="has been made by another run at the same time"):
        manifest.write(tmp_path, new=True)
    assert (tmp_path / "manifest.json").read_bytes() == before and names(tmp_path) == ["part-0000-000000.arrow"]


def test_two_runs_have_names_of_their_own(tmp_path):
    """Both would look for a free number at the same time, find the same one, and the later shard would replace the other."""
    write(tmp_path / "a", count=4)
    (row,) = (path.read_bytes() for path in (tmp_path / "a/data").iterdir())
    first, second = (store_writing._ShardWriter(tmp_path / "a", TeacherStore(tmp_path / "a").manifest, 0) for _ in range(2))
    for number, writer in enumerate((first, second)):
        writer.add(store_format.StoredRow(number, 0, 0, {"logits": np.zeros(3, np.float32)}))
        writer.close()
    assert row in (path.read_bytes() for path in (tmp_path / "a/data").iterdir())
    assert len(TeacherStore(tmp_path / "a")) == 6


def test_partials_of_running_processes_stay(tmp_path):
    write(tmp_path)
    machine, ended = store_files._MACHINE, subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".part.arrow.{machine}.{os.getppid()}.partial", f".part.arrow.00000000.{ended.pid}.partial"]
    for name in (*kept, f".part.arrow.{machine}.{ended.pid}.partial"):
        (tmp_path / "data" / name).write_text("")
    write(tmp_path)
    assert sorted(path.name for path in (tmp_path / "data").glob(".*")) == sorted(kept)


def test_another_head_is_refused(tmp_path):
    model = families.build("gpt2", 1, head="LMHeadModel", vocab_size=len(tokenizer()))
    store = store_teacher(tmp_path, model, corpus_rows(), CausalCollator(tokenizer()), progress=False)
    other = {name: tensor + 1 for name, tensor in store.head.items()}
    store_format.write_head(tmp_path, other["weight"], None)
    with pytest.raises(ValueError, match="head.safetensors cannot be read .it is not the one that the manifest was written with"):
        TeacherStore(tmp_path).head["weight"]


def test_complete_counts_each_epoch(tmp_path):
    """As many answers as there should be, but those of one epoch to other examples."""
    model = families.build("bert", 1, head="MaskedLM", vocab_size=len(tokenizer()))
    rows, collator = corpus_rows(), MaskingCollator(tokenizer(), 0.3, seed=3)
    store = store_teacher(tmp_path, model, rows, collator, epochs=2, progress=False)
    assert store.complete
    known, places = store._index[1]
    store._index[1] = (np.where(known == known[-1], known[-1] + 1, known), places)
    assert len(store) == 24 and not store.complete


def test_numbers_that_stand_twice_are_refused(tmp_path):
    data = numbered_rows(4).to_list()
    data[3]["example_id"] = data[1]["example_id"]
    with pytest.raises(ValueError, match="1 rows have an 'example_id' that another row has too, such as -19"):
        store_teacher(tmp_path / "a", bert(), type(numbered_rows()).from_list(data), lambda rows: pytest.fail("asked"), progress=False)


def test_rows_are_read_once_for_their_numbers(tmp_path):
    class Counted(torch.utils.data.Dataset):
        def __init__(self):
            self.read = 0

        def __len__(self):
            return 100

        def __getitem__(self, i):
            self.read += 1
            return {"example_id": i, "input_ids": torch.tensor([1, 2])}

    data = Counted()
    assert store_keys.example_ids(data).tolist() == list(range(100)) and data.read == 101
    data.read, seen = 0, []
    columns = ["input_ids"]
    collate_rows = lambda rows: seen.append(len(rows)) or {"input_ids": torch.stack([row["input_ids"] for row in rows])}  # noqa: E731
    assert not store_keys.changes_with_the_epoch(data, collate_rows, columns)
    assert seen == [64, 64, *[1] * 8]


def test_a_collator_that_does_not_tell_its_epoch_is_refused(tmp_path):
    class Forgetful:
        def set_epoch(self, epoch):
            pass

        def __call__(self, rows):
            return pytest.fail("asked")

    with pytest.raises(ValueError, match="Forgetful has set_epoch and no attribute epoch"):
        store_keys.changes_with_the_epoch(numbered_rows(), Forgetful(), ["input_ids"])


def test_classes_that_the_student_lacks_are_cut_before_the_top_is_taken(tmp_path):
    model = families.build("gpt2", 1, head="LMHeadModel", vocab_size=len(tokenizer()))
    with torch.no_grad():
        model.lm_head.weight[-3:] *= 20  # the largest logits of many rows
    options = dict(logits="top_k", top_k=4, temperature=2.0, dtype="float32", progress=False)
    shared = len(tokenizer()) - 3
    store = store_teacher(tmp_path / "a", model, corpus_rows(), CausalCollator(tokenizer()), classes=shared, **options)
    row = corpus_rows()[2]
    with torch.no_grad():
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
    assert (logits.argmax(1) >= shared).any()
    (answer,) = store.read(np.array([row["example_id"]]), 0)
    np.testing.assert_array_equal(answer["top_ids"].reshape(-1, 4), logits[:, :shared].topk(4).indices.numpy())
    np.testing.assert_allclose(answer["top_logsumexp"], (logits[:, :shared] / 2).logsumexp(1).numpy(), rtol=1e-4)
    with pytest.raises(ValueError, match=r"stored\.classes: stored \d+, now \d+"):
        store_teacher(tmp_path / "a", model, corpus_rows(), CausalCollator(tokenizer()), **options)
