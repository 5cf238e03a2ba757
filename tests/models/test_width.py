import families
import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from hfdistill.models.student import build_student, copy_weights
from hfdistill.models.width import WIDTHS, axes_of, role_of


UNITS = 40  # an intermediate size that no other axis of the tiny models has, nor has its double
INTERMEDIATE = {"distilbert": "hidden_dim", "gpt2": "n_inner"}


def scattered(family, layers, **options):
    model = families.build(family, layers, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logits(model, family):
    with torch.no_grad():
        return model(**families.batch(family)).logits


def silence_units(model, units):
    """Zeroes everything that reads or writes some intermediate units, by the length of axes alone."""
    found = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" in name or "wpe" in name:
                continue
            for axis, length in enumerate(parameter.shape):
                if length in (UNITS, 2 * UNITS):
                    everywhere = units if length == UNITS else torch.cat([units, units + UNITS])
                    parameter.index_fill_(axis, everywhere, 0.0)
                    found += 1
    assert found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("family", families.FAMILIES)
def test_dropping_silent_intermediate_units_changes_nothing(family, width):
    teacher = scattered(family, 2, **{INTERMEDIATE.get(family, "intermediate_size"): UNITS, "max_position_embeddings": 41})
    kept = torch.arange(24) if width == "slice" else torch.randperm(UNITS, generator=torch.Generator().manual_seed(2))[:24]
    silence_units(teacher, torch.tensor([unit for unit in range(UNITS) if unit not in kept]))
    student = build_student(teacher, intermediate_size=24, width=width, seed=5)
    assert torch.allclose(logits(student, family), logits(teacher, family), atol=1e-5)
    assert student.num_parameters() < teacher.num_parameters() and student.copy_report.sliced > 0
    assert student.copy_report.random == 0 and student.config.distilled_from["width"] == width


ATTENTION = {"llama": "self_attn", "qwen2": "self_attn", "qwen3": "self_attn", "vit": "attention", "deit": "attention"}


def silence_heads(model, family, heads):
    """Zeroes queries and outputs of some heads of every block; keys and values too where the whole group of two falls silent."""
    with torch.no_grad():
        for module in [m for n, m in model.named_modules() if n.endswith(f".{ATTENTION[family]}")]:
            grouped = module.k_proj.weight.shape[0] == 16
            for head in heads:
                rows = slice(8 * head, 8 * head + 8)
                module.q_proj.weight[rows] = 0.0
                module.o_proj.weight[:, rows] = 0.0
                group = (head // 2) if grouped else head
                if not grouped or {2 * group, 2 * group + 1} <= set(heads):
                    module.k_proj.weight[8 * group : 8 * group + 8] = 0.0
                    module.v_proj.weight[8 * group : 8 * group + 8] = 0.0


@pytest.mark.parametrize("width, silent", [("slice", [2, 3]), ("norm", [0, 1])])
@pytest.mark.parametrize("family", ATTENTION)
def test_dropping_silent_heads_changes_nothing(family, width, silent):
    teacher = scattered(family, 2)
    silence_heads(teacher, family, silent)
    # Llama and Qwen3 keep their own head_dim; the others would widen their heads unless told not to.
    own = {} if family in ("llama", "qwen3") else {"head_dim": 8}
    student = build_student(teacher, num_attention_heads=2, width=width, **own)
    assert getattr(student.config, "num_key_value_heads", 1) == 1
    query = next(p for n, p in student.named_parameters() if n.endswith("q_proj.weight"))
    assert query.shape == (16, 32)
    assert torch.allclose(logits(student, family), logits(teacher, family), atol=1e-5)


@pytest.mark.parametrize("width, silent", [("slice", [1, 3]), ("norm", [0, 2])])
def test_queries_stay_with_their_key_value_head(width, silent):
    teacher = scattered("qwen3", 2)
    silence_heads(teacher, "qwen3", silent)
    student = build_student(teacher, num_attention_heads=2, num_key_value_heads=2, width=width)
    assert torch.allclose(logits(student, "qwen3"), logits(teacher, "qwen3"), atol=1e-5)


def test_norm_chooses_heads_block_by_block():
    teacher = scattered("llama", 2)
    with torch.no_grad():
        for block, loud in ((0, 0), (1, 1)):
            attention = teacher.model.layers[block].self_attn
            attention.v_proj.weight[8 * loud : 8 * loud + 8] *= 50
    student = build_student(teacher, num_attention_heads=2, width="norm")
    for block, loud in ((0, 0), (1, 1)):
        ours, theirs = (model.model.layers[block].self_attn for model in (student, teacher))
        assert torch.equal(ours.v_proj.weight, theirs.v_proj.weight[8 * loud : 8 * loud + 8])
        assert torch.equal(ours.q_proj.weight, theirs.q_proj.weight[16 * loud : 16 * loud + 16])
        assert torch.equal(ours.o_proj.weight, theirs.o_proj.weight[:, 16 * loud : 16 * loud + 16])


def test_norm_chooses_intermediate_units_block_by_block():
    teacher = scattered("bert", 2)
    with torch.no_grad():
        for block, unit in ((0, 7), (1, 40)):
            teacher.bert.encoder.layer[block].output.dense.weight[:, unit] *= 50
    student = build_student(teacher, intermediate_size=1, width="norm")
    for block, unit in ((0, 7), (1, 40)):
        assert torch.equal(
            student.bert.encoder.layer[block].intermediate.dense.bias, teacher.bert.encoder.layer[block].intermediate.dense.bias[[unit]]
        )


def numpy_state(model):
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def top(scores, count):
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def squares(matrix, axis):
    """Sum of squares of every slice of a 2-d array along `axis`."""
    return (matrix**2).sum(1 - axis)


@pytest.mark.parametrize("width", WIDTHS)
def test_bert_cut_in_all_directions_equals_a_cut_by_hand(width):
    """hidden 32 -> 16, heads 4 -> 2 of 8 dims, units 48 -> 20, blocks 4 -> 2 from 1 and 3."""
    teacher = scattered("bert", 4)
    student = build_student(teacher, 2, hidden_size=16, num_attention_heads=2, intermediate_size=20, width=width)
    t, s = numpy_state(teacher), numpy_state(student)
    layer = "bert.encoder.layer.{}.".format
    reads = ["attention.self.query.weight", "attention.self.key.weight", "attention.self.value.weight", "intermediate.dense.weight"]
    writes = ["attention.output.dense.weight", "output.dense.weight"]

    hidden = np.arange(16)
    if width == "norm":
        score = sum(squares(t[f"bert.embeddings.{n}_embeddings.weight"], 1) for n in ("word", "position", "token_type"))
        score = score + squares(t["classifier.weight"], 1)
        score = score + squares(t["bert.pooler.dense.weight"], 0) + squares(t["bert.pooler.dense.weight"], 1)
        for block in (1, 3):
            score = score + sum(squares(t[layer(block) + n], 1) for n in reads) + sum(squares(t[layer(block) + n], 0) for n in writes)
        hidden = top(score, 16)
        assert not np.array_equal(hidden, np.arange(16))

    expected = {}
    for name in ("word_embeddings.weight", "position_embeddings.weight", "token_type_embeddings.weight"):
        expected[f"bert.embeddings.{name}"] = t[f"bert.embeddings.{name}"][:, hidden]
    for name in ("weight", "bias"):
        expected[f"bert.embeddings.LayerNorm.{name}"] = t[f"bert.embeddings.LayerNorm.{name}"][hidden]
    expected["bert.pooler.dense.weight"] = t["bert.pooler.dense.weight"][np.ix_(hidden, hidden)]
    expected["bert.pooler.dense.bias"] = t["bert.pooler.dense.bias"][hidden]
    expected["classifier.weight"], expected["classifier.bias"] = t["classifier.weight"][:, hidden], t["classifier.bias"]
    for ours, theirs in ((0, 1), (1, 3)):
        b = {name.removeprefix(layer(theirs)): value for name, value in t.items() if name.startswith(layer(theirs))}
        heads, units = np.arange(2), np.arange(20)
        if width == "norm":
            score = sum(squares(b[f"attention.self.{n}.weight"], 0) for n in ("query", "key", "value")) + squares(
                b["attention.output.dense.weight"], 1
            )
            heads = top(score.reshape(4, 8).sum(1), 2)
            units = top(squares(b["intermediate.dense.weight"], 0) + squares(b["output.dense.weight"], 1), 20)
        rows = (heads[:, None] * 8 + np.arange(8)).ravel()
        cut = {}
        for name in ("query", "key", "value"):
            cut[f"attention.self.{name}.weight"] = b[f"attention.self.{name}.weight"][np.ix_(rows, hidden)]
            cut[f"attention.self.{name}.bias"] = b[f"attention.self.{name}.bias"][rows]
        cut["attention.output.dense.weight"] = b["attention.output.dense.weight"][np.ix_(hidden, rows)]
        cut["intermediate.dense.weight"] = b["intermediate.dense.weight"][np.ix_(units, hidden)]
        cut["intermediate.dense.bias"] = b["intermediate.dense.bias"][units]
        cut["output.dense.weight"] = b["output.dense.weight"][np.ix_(hidden, units)]
        for name in ("attention.output.dense.bias", "output.dense.bias"):
            cut[name] = b[name][hidden]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            cut[f"{name}.weight"], cut[f"{name}.bias"] = b[f"{name}.weight"][hidden], b[f"{name}.bias"][hidden]
        expected |= {layer(ours) + name: value for name, value in cut.items()}
    assert s.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(s[name], value, err_msg=name)
    assert student.copy_report.copied == 3 and student.copy_report.sliced == student.num_parameters() - 3


@pytest.mark.parametrize("width", WIDTHS)
def test_llama_cut_in_all_directions_equals_a_cut_by_hand(width):
    """hidden 32 -> 16, heads 4 -> 2, key-value heads 2 -> 1, units 48 -> 20, blocks 4 -> 2 from 0 and 3; tied head."""
    teacher = scattered("llama", 4, head="CausalLM", tie_word_embeddings=True)
    student = build_student(teacher, 2, hidden_size=16, num_attention_heads=2, intermediate_size=20, width=width, layer_map="0:0,1:3")
    t, s = numpy_state(teacher), numpy_state(student)
    layer = "model.layers.{}.".format

    hidden = np.arange(16)
    if width == "norm":
        score = squares(t["model.embed_tokens.weight"], 1)  # the tied head is the same matrix and counts once
        for block in (0, 3):
            for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
                score = score + squares(t[f"{layer(block)}{name}.weight"], 1)
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                score = score + squares(t[f"{layer(block)}{name}.weight"], 0)
        hidden = top(score, 16)
    expected = {"model.norm.weight": t["model.norm.weight"][hidden]}
    expected["model.embed_tokens.weight"] = expected["lm_head.weight"] = t["model.embed_tokens.weight"][:, hidden]
    for ours, theirs in ((0, 0), (1, 3)):
        b = {name.removeprefix(layer(theirs)): value for name, value in t.items() if name.startswith(layer(theirs))}
        group, units = 0, np.arange(20)
        if width == "norm":
            score = squares(b["self_attn.k_proj.weight"], 0).reshape(2, 8).sum(1) + squares(b["self_attn.v_proj.weight"], 0).reshape(
                2, 8
            ).sum(1)
            score = score + squares(b["self_attn.q_proj.weight"], 0).reshape(2, 16).sum(1)
            score = score + squares(b["self_attn.o_proj.weight"], 1).reshape(2, 16).sum(1)
            group = int(np.argmax(score))
            score = squares(b["mlp.gate_proj.weight"], 0) + squares(b["mlp.up_proj.weight"], 0) + squares(b["mlp.down_proj.weight"], 1)
            units = top(score, 20)
        queries, keys = np.arange(16 * group, 16 * group + 16), np.arange(8 * group, 8 * group + 8)
        cut = {
            "self_attn.q_proj": b["self_attn.q_proj.weight"][np.ix_(queries, hidden)],
            "self_attn.k_proj": b["self_attn.k_proj.weight"][np.ix_(keys, hidden)],
            "self_attn.v_proj": b["self_attn.v_proj.weight"][np.ix_(keys, hidden)],
            "self_attn.o_proj": b["self_attn.o_proj.weight"][np.ix_(hidden, queries)],
            "mlp.gate_proj": b["mlp.gate_proj.weight"][np.ix_(units, hidden)],
            "mlp.up_proj": b["mlp.up_proj.weight"][np.ix_(units, hidden)],
            "mlp.down_proj": b["mlp.down_proj.weight"][np.ix_(hidden, units)],
            "input_layernorm": b["input_layernorm.weight"][hidden],
            "post_attention_layernorm": b["post_attention_layernorm.weight"][hidden],
        }
        expected |= {f"{layer(ours)}{name}.weight": value for name, value in cut.items()}
    assert s.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(s[name], value, err_msg=name)


def test_fused_projections_are_cut_as_their_parts():
    """GPT-2 keeps [q | k | v] in the columns of a transposed weight, ModernBERT in the rows; both are cut part by part."""
    teacher = scattered("gpt2", 1)
    student = build_student(teacher, hidden_size=16, num_attention_heads=2)
    ours, theirs = (m.transformer.h[0].attn for m in (student, teacher))
    for part in range(3):
        expected = theirs.c_attn.weight[:16, 32 * part : 32 * part + 16]
        assert torch.equal(ours.c_attn.weight[:, 16 * part : 16 * part + 16], expected)
        assert torch.equal(ours.c_attn.bias[16 * part : 16 * part + 16], theirs.c_attn.bias[32 * part : 32 * part + 16])
    assert torch.equal(ours.c_proj.weight, theirs.c_proj.weight[:16, :16])
    assert torch.equal(student.transformer.h[0].mlp.c_fc.weight, teacher.transformer.h[0].mlp.c_fc.weight[:16])

    teacher = scattered("modernbert", 1)
    student = build_student(teacher, hidden_size=16, num_attention_heads=2, intermediate_size=20)
    ours, theirs = student.model.layers[0], teacher.model.layers[0]
    for part in range(3):
        expected = theirs.attn.Wqkv.weight[32 * part : 32 * part + 16, :16]
        assert torch.equal(ours.attn.Wqkv.weight[16 * part : 16 * part + 16], expected)
    for part in range(2):
        assert torch.equal(ours.mlp.Wi.weight[20 * part : 20 * part + 20], theirs.mlp.Wi.weight[48 * part : 48 * part + 20, :16])


def test_narrower_heads_keep_their_first_dims():
    teacher = scattered("distilbert", 1)
    student = build_student(teacher, hidden_size=16)
    ours, theirs = (m.distilbert.transformer.layer[0].attention for m in (student, teacher))
    for head in range(4):
        assert torch.equal(ours.q_lin.weight[4 * head : 4 * head + 4], theirs.q_lin.weight[8 * head : 8 * head + 4, :16])
        assert torch.equal(ours.out_lin.weight[:, 4 * head : 4 * head + 4], theirs.out_lin.weight[:16, 8 * head : 8 * head + 4])


@pytest.mark.parametrize("size", [4, 6])
def test_narrower_rotary_heads_keep_the_dims_that_turn_as_fast(size):
    teacher = scattered("llama", 1)
    student = build_student(teacher, head_dim=size)
    fast, theirs = student.model.rotary_emb.inv_freq.log(), teacher.model.rotary_emb.inv_freq.log()
    nearest = [int((theirs - f).abs().argmin()) for f in fast]
    assert nearest == ([0, 2] if size == 4 else [0, 1, 3])
    dims = torch.tensor(nearest + [4 + pair for pair in nearest])
    ours, source = (m.model.layers[0].self_attn for m in (student, teacher))
    for head in range(4):
        assert torch.equal(ours.q_proj.weight[size * head : size * head + size], source.q_proj.weight[8 * head + dims])
    teacher = scattered("qwen3", 1)
    student = build_student(teacher, head_dim=size)
    assert torch.equal(student.model.layers[0].self_attn.q_norm.weight, teacher.model.layers[0].self_attn.q_norm.weight[dims])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_narrow_students_of_every_family_are_filled_and_reload(family, tmp_path):
    teacher = scattered(family, 3)
    student = build_student(teacher, 2, hidden_size=16, num_attention_heads=2, intermediate_size=24, width="norm")
    assert student.copy_report.random == 0 and student.copy_report.sliced > 0
    assert student.copy_report.copied + student.copy_report.sliced == student.num_parameters()
    assert torch.isfinite(logits(student, family)).all()
    # A cut takes numbers of the teacher and makes up none.
    known = torch.cat([p.detach().flatten() for p in teacher.parameters()]).unique()
    assert all(torch.isin(p, known).all() for p in student.parameters())
    student.save_pretrained(tmp_path)
    again, info = type(student).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(logits(again, family), logits(student, family))


def test_embedding_projections_are_cut_on_both_sides():
    teacher = scattered("albert", 2)
    student = build_student(teacher, hidden_size=24, embedding_size=8, num_attention_heads=4)
    ours, theirs = student.albert, teacher.albert
    assert torch.equal(ours.embeddings.word_embeddings.weight, theirs.embeddings.word_embeddings.weight[:, :8])
    assert torch.equal(ours.encoder.embedding_hidden_mapping_in.weight, theirs.encoder.embedding_hidden_mapping_in.weight[:24, :8])
    teacher = scattered("electra", 2)
    student = build_student(teacher, hidden_size=16, num_attention_heads=2)
    assert student.copy_report.unused == ["electra.embeddings_project.weight", "electra.embeddings_project.bias"]
    same = scattered("electra", 2, embedding_size=32)
    assert build_student(same, hidden_size=16, num_attention_heads=2).config.embedding_size == 16


def test_image_embeddings_are_cut_along_the_hidden_axis():
    teacher = scattered("deit", 2)
    student = build_student(teacher, hidden_size=16, num_attention_heads=2)
    ours, theirs = student.deit.embeddings, teacher.deit.embeddings
    assert torch.equal(ours.cls_token, theirs.cls_token[..., :16]) and torch.equal(
        ours.distillation_token, theirs.distillation_token[..., :16]
    )
    assert torch.equal(ours.position_embeddings, theirs.position_embeddings[..., :16])
    assert torch.equal(ours.patch_embeddings.projection.weight, theirs.patch_embeddings.projection.weight[:16])


def test_mpnet_heads_keep_their_shared_position_bias():
    teacher = scattered("mpnet", 2)
    with torch.no_grad():  # each block would choose other heads by itself: head 0 here, head 3 there, 2 second in both
        for block, loud in ((0, 0), (1, 3)):
            attention = teacher.mpnet.encoder.layer[block].attention.attn
            attention.v.weight[8 * loud : 8 * loud + 8] *= 4 if loud == 0 else 6
            attention.v.weight[16:24] *= 3.7
    student = build_student(teacher, hidden_size=16, num_attention_heads=2, width="norm")
    bias = teacher.mpnet.encoder.relative_attention_bias.weight
    assert torch.equal(student.mpnet.encoder.relative_attention_bias.weight, bias[:, [2, 3]])
    for block in range(2):
        ours, theirs = (m.mpnet.encoder.layer[block].attention.attn.v.bias for m in (student, teacher))
        assert torch.equal(ours, theirs[16:])


def test_deberta_position_projections_and_pooler_follow():
    teacher = scattered("deberta_v2", 2)
    student = build_student(teacher, hidden_size=16, num_attention_heads=2)
    ours, theirs = (m.deberta.encoder.layer[1].attention.self for m in (student, teacher))
    assert torch.equal(ours.pos_key_proj.weight, theirs.pos_key_proj.weight[:16, :16])
    assert torch.equal(student.deberta.encoder.rel_embeddings.weight, teacher.deberta.encoder.rel_embeddings.weight[:, :16])
    assert student.config.pooler_hidden_size == 16 and student.pooler.dense.weight.shape == (16, 16)


def test_hidden_size_equal_to_other_sizes_is_not_confused():
    """vocabulary, positions and intermediate size all 32 like the hidden size."""
    teacher = scattered(
        "bert", 2, vocab_size=32, max_position_embeddings=32, intermediate_size=32, num_labels=32, head="TokenClassification"
    )
    student = build_student(teacher, hidden_size=16, num_attention_heads=2, width="norm")
    assert student.bert.embeddings.word_embeddings.weight.shape == (32, 16)
    both = build_student(teacher, hidden_size=16, intermediate_size=16, num_attention_heads=2, width="slice")
    ours, theirs = (m.bert.encoder.layer[0] for m in (both, teacher))
    assert torch.equal(ours.intermediate.dense.weight, theirs.intermediate.dense.weight[:16, :16])
    assert torch.equal(both.classifier.weight, teacher.classifier.weight[:, :16])


def test_head_dim_that_an_architecture_does_not_read():
    with pytest.raises(ValueError, match="takes head_dim from hidden_size and num_attention_heads"):
        build_student(scattered("bert", 2), num_attention_heads=2, head_dim=8)


def test_unknown_attention_is_refused_for_width_and_welcome_for_depth():
    config = tf.GPTNeoXConfig(hidden_size=16, num_attention_heads=2, intermediate_size=20, num_hidden_layers=3, vocab_size=20)
    teacher = tf.GPTNeoXModel(config)
    assert build_student(teacher, 2).copy_report.random == 0
    with pytest.raises(ValueError, match="projections of GPTNeoXLayer are not known.*change only num_hidden_layers"):
        build_student(teacher, 2, intermediate_size=10)


def test_parameters_nobody_knows_are_left_alone_and_named():
    class WithExtra(tf.BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Parameter(torch.zeros(config.hidden_size + 1))

    teacher = WithExtra(families.build("bert", 2).config)
    assert build_student(teacher, hidden_size=16, num_attention_heads=2).copy_report.names_random == ["extra"]


def test_copy_weights_cuts_too():
    teacher, student = scattered("bert", 4), families.build("bert", 2, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    report = copy_weights(student, teacher, "last")
    assert report.layers == [2, 3] and report.random == 0
    assert torch.equal(student.bert.encoder.layer[0].output.dense.weight, teacher.bert.encoder.layer[2].output.dense.weight[:16, :24])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_matrix_of_a_block_has_a_role(family):
    model = families.build(family, 2)
    from hfdistill.models.anatomy import find_blocks
    from hfdistill.models.width import Sizes

    sizes = Sizes.of(model.config)
    for block in find_blocks(model).modules:
        for name, parameter in block.named_parameters():
            if parameter.dim() == 2:
                assert role_of(name.rpartition(".")[0]) is not None, name
                assert None not in axes_of(name, parameter.shape, parameter.shape, sizes, sizes, block)
