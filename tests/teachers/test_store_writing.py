"""What is written: whole shards only, again after a kill, by any number of processes, readable by `datasets`, and nothing twice."""

from __future__ import annotations

import os
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
from hfdistill.teachers import store_format, store_writing
from hfdistill.teachers.store_format import Shard, StoredSignal


def names(folder) -> list[str]:
    return sorted(path.name for path in (Path(folder) / "data").iterdir())


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
    (tmp_path / "many/data/part-0001-000000.arrow").unlink()
    assert not TeacherStore(tmp_path / "many").complete
    assert_equal(write(tmp_path / "many"), one)
    assert "part-0000-000001.arrow" in names(tmp_path / "many")


KILLED = """
import os, signal, sys
from pathlib import Path
from stored_runs import bert, numbered_rows, pad_without_number
from hfdistill import store_teacher
from hfdistill.teachers import store_format, store_writing
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
    path = tmp_path / "data/part-0000-000000.arrow"
    whole, value = path.read_bytes(), store.shards[0].row("logits", 7).tobytes()
    for cut in (0, 10, len(whole) // 2, len(whole) - 300):
        replace_file(path, whole[:cut])
        with pytest.raises(ValueError, match=r"part-0000-000000\.arrow is damaged .*Delete this file"):
            TeacherStore(tmp_path)
    place = whole.index(value)
    replace_file(path, whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    damaged = TeacherStore(tmp_path)
    damaged.read(np.array([-30]), 0)
    with pytest.raises(ValueError, match=r"part-0000-000000\.arrow is damaged: the answer to example_id 47 is not what was written"):
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
    write(tmp_path)
    path = tmp_path / "data/part-0000-000000.arrow"
    with pytest.raises(ValueError, match="is damaged"):
        Shard(path, [StoredSignal("logits", "example", (4,), "float32")])
    with pytest.raises(ValueError, match="is damaged"):
        Shard(path, [StoredSignal("pooled", "example", (3,), "float32")])
