"""Chapter 19: soft targets against PyTorch, answers kept on disk, students, what happens inside, the studies."""

import copy
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ftbook import distill as module
from ftbook import models, results
from ftbook.distill import (
    Match,
    Matched,
    SoftLabels,
    WordLSTM,
    Words,
    changed_copies,
    cut,
    distill,
    fit_soft,
    hidden_loss,
    layer_map,
    pack_targets,
    relation_loss,
    teacher_logits,
)
from ftbook.studies import distill as study
from ftbook.texts import TextClassifier, encode_texts
from ftbook.train import Settings

PLAN = Settings(precision="fp32", weight_decay=0.0, progress=False)
TEXTS = ["A dull film.", "A warm and clever story about nothing in particular.", "Fine."]


class Net(nn.Linear):
    """A linear model whose input has a name."""

    def forward(self, x):
        return super().forward(x)


@pytest.fixture(scope="module")
def bert():
    body, tokenizer = models.load("bert_mini_en")
    torch.manual_seed(0)
    return TextClassifier(body), encode_texts(TEXTS, tokenizer)


# ---------------------------------------------------------------- soft targets


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_soft_targets_equal_pytorchs_divergence_in_value_and_gradient(temperature):
    z, v = torch.randn(2, 6, 4)
    z.requires_grad_()
    ours = SoftLabels(temperature)(z, pack_targets(v))
    p, q = (u / temperature for u in (v, z))
    theirs = temperature**2 * F.kl_div(q.log_softmax(1), p.log_softmax(1), reduction="batchmean", log_target=True)
    assert torch.isclose(ours, theirs, atol=1e-6)
    a, b = (torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-6)


def test_a_label_weighs_alpha_where_there_is_one_and_nothing_elsewhere():
    z, v = torch.randn(2, 3, 4)
    y = torch.tensor([2, -100, 0])
    soft = torch.stack([SoftLabels()(z[i : i + 1], pack_targets(v[i : i + 1])) for i in range(3)])
    hard = F.cross_entropy(z, y.clamp(min=0), reduction="none")
    wanted = [0.7 * soft[0] + 0.3 * hard[0], soft[1], 0.7 * soft[2] + 0.3 * hard[2]]
    ours = SoftLabels(alpha=0.3)(z, pack_targets(v, y))
    assert torch.isclose(ours, torch.stack(wanted).mean(), atol=1e-6)
    alone = SoftLabels(alpha=1.0)(z[:1], pack_targets(v[:1], y[:1]))
    assert torch.isclose(alone, F.cross_entropy(z[:1], y[:1]), atol=1e-6)


def test_hot_soft_targets_are_a_regression_on_centered_logits():
    z, v = torch.randn(2, 5, 3, dtype=torch.float64)
    apart = (z - z.mean(1, keepdim=True)) - (v - v.mean(1, keepdim=True))
    hot = SoftLabels(1e4)(z, torch.cat((torch.full((5, 1), -100.0), v), 1))
    assert hot.item() == pytest.approx((apart**2).sum(1).mean().item() / 6, rel=1e-3)


@given(st.floats(0.3, 20), st.floats(-3, 3))
def test_a_student_that_says_the_same_up_to_a_level_loses_nothing(temperature, level):
    v = torch.tensor([[2.0, -1.0, 0.5]])
    assert SoftLabels(temperature)(v + level, pack_targets(v)).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda: SoftLabels(0.0), "the temperature must be greater than 0"),
        (lambda: SoftLabels(alpha=1.5), "alpha from 0 to 1"),
        (lambda: pack_targets(torch.zeros(3)), r"floats of shape \(N, C\)"),
        (lambda: pack_targets(torch.zeros(3, 2).long()), "give the teacher's logits, floats"),
        (lambda: pack_targets(torch.zeros(3, 2), torch.zeros(2).long()), "one class number for each row"),
        (lambda: pack_targets(torch.zeros(1, 2), torch.tensor([2])), "the teacher has 2 classes: 0 to 1"),
        (lambda: SoftLabels()(torch.zeros(2, 3), torch.zeros(2, 3)), "as many classes as the student"),
    ],
)
def test_targets_that_do_not_fit_are_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


# ---------------------------------------------------------------- answers on disk


def test_answers_come_from_the_file_until_teacher_examples_or_precision_change(tmp_path, monkeypatch):
    teacher, x, file = nn.Linear(3, 2), torch.randn(7, 3), tmp_path / "answers.safetensors"
    first = teacher_logits(teacher, x, file)
    asked = []
    predict = module.predict
    monkeypatch.setattr(module, "predict", lambda *a, **k: asked.append(1) or predict(*a, **k))
    assert torch.equal(teacher_logits(teacher, x, file), first) and not asked
    assert torch.allclose(teacher_logits(teacher, x.flip(0), file), first.flip(0)) and len(asked) == 1
    with torch.no_grad():
        teacher.bias += 1
    assert torch.allclose(teacher_logits(teacher, x, file), first + 1, atol=1e-6) and len(asked) == 2
    teacher_logits(teacher, x, file, precision="fp32")
    teacher_logits(teacher, x, file, precision="fp32")
    assert len(asked) == 3
    assert [f.name for f in tmp_path.iterdir()] == ["answers.safetensors"]


def test_inputs_and_answers_that_cannot_be_kept_are_refused(tmp_path):
    teacher, file = nn.Linear(3, 2), tmp_path / "answers.safetensors"
    two = {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(1, 3)}
    with pytest.raises(ValueError, match="rows {'input_ids': 2, 'attention_mask': 1}; give"):
        teacher_logits(teacher, two, file)
    for inputs in ({}, {"labels": torch.ones(2)}):
        with pytest.raises(ValueError, match="give at least one tensor"):
            teacher_logits(teacher, inputs, file)
    for inputs in ([[0.0] * 3], {"x": [[0.0] * 3]}):
        with pytest.raises(TypeError, match="inputs are {'x': 'list'}; give tensors"):
            teacher_logits(teacher, inputs, file)
    with pytest.raises(ValueError, match="answers to 1 of 2 rows are not finite"):
        teacher_logits(teacher, torch.tensor([[0.0] * 3, [math.nan] * 3]), file)
    assert not file.exists()


def test_a_foreign_file_is_left_as_it_is(tmp_path):
    for number, write in enumerate((lambda f: f.write_text("mine"), lambda f: save_file({"logits": torch.ones(1)}, f))):
        file = tmp_path / f"{number}.safetensors"
        write(file)
        before = file.read_bytes()
        with pytest.raises(ValueError, match="was not written by teacher_logits, and is left as it is"):
            teacher_logits(nn.Linear(3, 2), torch.zeros(1, 3), file)
        assert file.read_bytes() == before


def test_answers_stand_in_the_order_of_the_examples_and_labels_are_not_read(bert):
    teacher, inputs = bert
    teacher.train()
    given = inputs | {"labels": torch.zeros(3).long()}
    ours = teacher_logits(teacher, given, batch_size=1, precision="fp32")
    assert teacher.training
    with torch.no_grad():
        theirs = teacher.eval()(**inputs)
    assert torch.allclose(ours, theirs, atol=1e-5)


# ---------------------------------------------------------------- students


def test_a_fit_to_certain_probabilities_is_a_fit_to_labels():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 3)), rng.integers(0, 3, 60)
    for make in (LogisticRegression, lambda: make_pipeline(StandardScaler(), LogisticRegression())):
        soft = fit_soft(make(), x, np.eye(3)[y])
        hard = make().fit(x, y)
        assert np.allclose(soft.predict_proba(x), hard.predict_proba(x), atol=1e-4)


def test_soft_probabilities_give_the_gradient_of_cross_entropy_with_soft_targets():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(1)
    x, p = rng.normal(size=(80, 2)), rng.dirichlet((1, 1), 80)
    fitted = fit_soft(LogisticRegression(C=1e8, tol=1e-8), x, p)
    slope = (fitted.predict_proba(x)[:, 1] - p[:, 1]) @ x
    assert np.abs(slope).max() < 1e-2, "at the optimum nothing pulls"


def test_texts_in_a_pipeline_are_counted_once():
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    texts, p = ["good film", "bad film", "good"], np.array([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])
    fitted = fit_soft(make_pipeline(TfidfVectorizer(), LogisticRegression()), texts, p)
    alone = TfidfVectorizer().fit(texts)
    assert np.allclose(fitted[0].idf_, alone.idf_) and fitted.predict(["good"]).tolist() == [1]


@pytest.mark.parametrize(
    "x, p, told",
    [
        (np.zeros((2, 1)), np.array([0.5, 0.5]), r"give \(N, C\)"),
        (np.zeros((2, 1)), np.array([[0.5, 0.6], [1, 0]]), "rows that sum to 1"),
        (np.zeros((3, 1)), np.array([[0.5, 0.5], [1, 0]]), "3 rows and 2 rows of probabilities"),
    ],
)
def test_probabilities_that_are_none_are_refused(x, p, told):
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(ValueError, match=told):
        fit_soft(LogisticRegression(), x, p)


def test_a_class_that_is_never_probable_keeps_its_column():
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import MultinomialNB

    x, p = np.array([[2.0, 0.0], [0.0, 2.0]]), np.array([[0.9, 0.0, 0.1], [0.2, 0.0, 0.8]])
    for model in (LogisticRegression(), MultinomialNB()):
        said = fit_soft(model, x, p).predict_proba(x)
        assert said.shape == (2, 3) and said[:, 1].max() < 0.05 and said.argmax(1).tolist() == [0, 2]


def test_words_of_a_text_are_numbered_and_others_share_one_number():
    words = Words(["The film , the story", "a film"], min_count=2)
    inputs = words(["the Film is", "", "film " * 60], max_length=5)
    assert len(words) == 4 and words.numbers == {"the": 2, "film": 3}
    assert inputs["input_ids"][:2].tolist() == [[2, 3, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 1, 5]
    with pytest.raises(TypeError, match="put a single text in a list"):
        Words("the film")
    with pytest.raises(TypeError, match="put a single text in a list"):
        words("the film")
    with pytest.raises(ValueError, match="no text is given; pass a list"):
        words([])


def test_an_lstm_reads_a_text_the_same_in_any_batch():
    words = Words(TEXTS, min_count=1)
    net = WordLSTM(len(words), n_classes=3).eval()
    alone = torch.cat([net(**words([text])) for text in TEXTS])
    assert torch.allclose(net(**words(TEXTS)), alone, atol=1e-6) and alone.shape == (3, 3)


def test_a_cut_model_runs_its_layers_in_order_and_shares_no_weight(bert):
    teacher, inputs = bert
    teacher.eval()
    whole = cut(teacher, range(4))
    mixed = cut(teacher, [3, 0, -1])
    assert mixed.body.config.num_hidden_layers == 3 and teacher.body.config.num_hidden_layers == 4
    with torch.no_grad():
        assert torch.equal(whole(**inputs), teacher(**inputs))
        h = teacher.body.embeddings(input_ids=inputs["input_ids"])
        hide = (1 - inputs["attention_mask"].float())[:, None, None] * torch.finfo(h.dtype).min
        for i in (3, 0, 3):
            h = teacher.body.encoder.layer[i](h, hide)
        seen = inputs["attention_mask"][..., None]
        by_hand = teacher.head((h * seen).sum(1) / seen.sum(1))
        assert torch.allclose(mixed(**inputs), by_hand, atol=1e-5)
        for weight in mixed.parameters():
            weight.zero_()
    assert all(p.abs().max() > 0 for p in teacher.body.encoder.parameters() if p.ndim > 1)


def test_how_a_cut_model_attends_is_switched_in_all_its_layers(bert):
    teacher, inputs = bert
    student = cut(teacher.eval(), [0, 0])
    assert len({id(m.config) for m in student.modules() if hasattr(m, "config")}) == 1
    with torch.no_grad():
        before = student(**inputs)
        student.body.set_attn_implementation("eager")
        layers = student.body.encoder.layer
        assert [layer.attention.self.config._attn_implementation for layer in layers] == ["eager"] * 2
        assert teacher.body.config._attn_implementation == "sdpa"
        assert torch.allclose(student(**inputs), before, atol=1e-5)


@pytest.mark.parametrize("layers", [[], [4], [0, -5]])
def test_layers_that_are_not_there_cannot_be_kept(bert, layers):
    with pytest.raises(ValueError, match="TextClassifier has 4: give numbers from 0 to 3, at least one"):
        cut(bert[0], layers)
    with pytest.raises(ValueError, match="Linear has no ModuleList"):
        cut(nn.Linear(2, 2), [0])


# ---------------------------------------------------------------- inside


@given(st.integers(1, 12), st.integers(1, 12))
def test_an_even_map_uses_every_layer_of_the_student_and_ends_with_the_last(student, teacher):
    if student > teacher:
        with pytest.raises(ValueError, match="no more than the teacher has"):
            layer_map(student, teacher)
        return
    pairs = layer_map(student, teacher)
    assert [s for s, _ in pairs] == list(range(student)) and pairs[-1][1] == teacher - 1
    above = [t for _, t in pairs]
    assert above == sorted(set(above)) and above[0] >= 0


def test_other_maps_and_a_wrong_name():
    assert layer_map(2, 5, "first") == ((0, 0), (1, 1)) and layer_map(2, 5, "last") == ((1, 4),)
    with pytest.raises(ValueError, match='allowed are "even", "first" and "last"'):
        layer_map(2, 4, "top")


def test_hidden_states_are_compared_at_visible_positions_alone():
    a, b = torch.randn(2, 2, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    seen = mask.bool()
    assert torch.isclose(hidden_loss(a, b, mask), F.mse_loss(a[seen], b[seen]))
    assert torch.equal(hidden_loss(a, b.masked_fill(~seen[..., None], 9), mask), hidden_loss(a, b, mask))
    with pytest.raises(ValueError, match="the widths must be equal"):
        hidden_loss(a, b[..., :2], mask)


def test_the_attention_of_queries_and_keys_is_that_of_transformers(bert):
    teacher, inputs = bert
    plain = copy.deepcopy(teacher.body)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = plain.eval()(**inputs, output_attentions=True).attentions[2]
        layer = teacher.body.encoder.layer[2]
        with module._noted(module._parts("attention", 2, layer)) as seen:
            teacher.eval()(**inputs)
    ours = module._relations(seen[2, "query"], seen[2, "key"], inputs["attention_mask"], heads=4).exp()
    rows = inputs["attention_mask"][:, None, :, None].bool()
    assert torch.allclose(ours * rows, theirs * rows, atol=1e-5)
    assert not layer._forward_hooks and not layer.attention.self.query._forward_hooks


def test_relations_do_not_see_padding_and_student_may_have_another_width():
    a, b = torch.randn(2, 5, 8), torch.randn(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    loss = relation_loss((a, a), (b, b), mask, heads=4)
    a[1, 2:], b[1, 2:] = 7.0, -7.0
    assert torch.isclose(relation_loss((a, a), (b, b), mask, heads=4), loss, atol=1e-6) and loss > 0
    with pytest.raises(ValueError, match="3 heads do not divide the width 8"):
        relation_loss((a, a), (b, b), mask, heads=3)


@pytest.mark.parametrize("kind", ["hidden", "attention", "relation"])
def test_a_copy_is_not_apart_from_its_teacher_and_a_cut_one_is(bert, kind):
    teacher, inputs = bert
    teacher.eval()
    same = Matched(cut(teacher, range(4)), teacher, [Match(kind)])(**inputs)
    other = Matched(cut(teacher, [1, 2]), teacher, [Match(kind, weight=2.0)])(**inputs)
    assert abs(float(same.apart)) < 1e-6 < float(other.apart) and same.answer.shape == (3, 2)


def test_a_term_is_the_weighted_mean_over_its_pairs(bert):
    teacher, inputs = bert
    student = cut(teacher.eval(), [1, 2])
    apart = [float(Matched(student, teacher, [Match("hidden", (p,))])(**inputs).apart) for p in ((0, 1), (1, 3))]
    both = Matched(student, teacher, [Match("hidden", ((0, 1), (1, 3)), weight=3.0)])(**inputs).apart
    assert float(both) == pytest.approx(3 * np.mean(apart), rel=1e-5)


def test_hidden_states_of_another_width_get_a_matrix_that_is_trained(bert):
    from transformers import BertConfig, BertModel

    teacher, inputs = bert
    vocabulary = teacher.body.config.vocab_size
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    small = BertConfig(vocab_size=vocabulary, **sizes)
    student = TextClassifier(BertModel(small, add_pooling_layer=False))
    both = Matched(student, teacher, [Match("hidden"), Match("relation", heads=2)])
    assert {n: tuple(m.weight.shape) for n, m in both.bridges.items()} == {"0_1": (256, 24), "1_3": (256, 24)}
    both(**inputs).apart.backward()
    assert all(m.weight.grad.abs().max() > 0 for m in both.bridges.values())
    assert all(p.grad is None for p in teacher.parameters())
    assert not any("_other" in name for name, _ in both.named_parameters())


@pytest.mark.parametrize(
    "call, told",
    [
        (lambda b: Match("logits"), "allowed are hidden, attention, relation"),
        (lambda b: Match("hidden", weight=-1), "give 0 or more"),
        (
            lambda b: Match("hidden", ()),
            r"layers are \(\); give layers: a name or pairs \(student, teacher\), at least one",
        ),
        (lambda b: Match("hidden", 3), "layers are 3; give layers: a name or pairs"),
        (lambda b: Match("hidden", ((0, 1, 2),)), r"layers are \(\(0, 1, 2\),\); give layers: a name or pairs"),
        (lambda b: Match("hidden", (0, 1)), r"layers are \(0, 1\); give layers: a name or pairs"),
        (
            lambda b: Matched(cut(b, [0]), b, [Match("hidden", ((1, 0),))]),
            r"the pair \(1, 0\) is none of a student of 1",
        ),
        (lambda b: Matched(b, cut(b, [0]), [Match("hidden")]), "a student of 4 layers and a teacher of 1"),
        (lambda b: Matched(nn.Linear(2, 2), b, [Match("hidden")]), "Linear has no ModuleList"),
        (
            lambda b: Matched(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), b, [Match("relation", heads=2)]),
            "has no projection called query or q_proj",
        ),
        (
            lambda b: Matched(nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), b, [Match("relation")]),
            "does not say how many heads",
        ),
    ],
)
def test_matches_that_do_not_fit_are_refused(bert, call, told):
    with pytest.raises(ValueError, match=told):
        call(bert[0])


def test_a_match_that_is_not_in_a_list_is_refused(bert):
    one = Match("hidden", [[0, 0]])
    assert one.layers == ((0, 0),)
    for run in (
        lambda: Matched(bert[0], bert[0], one),
        lambda: distill(bert[0], bert[0], {"x": torch.ones(1, 1)}, match=one),
        lambda: distill(bert[0], bert[0], {"x": torch.ones(1, 1)}, match=["hidden"]),
    ):
        with pytest.raises(TypeError, match="give a list of Match, such as"):
            run()


def test_where_nothing_is_visible_nothing_is_apart():
    a, b = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 4)
    for loss in (
        hidden_loss(a, b, torch.zeros(2, 3)),
        relation_loss((a, a), (b, b), torch.zeros(2, 3), heads=2),
    ):
        loss.backward()
        assert loss.item() == 0 and a.grad.abs().max() == 0


# ---------------------------------------------------------------- distill


def test_a_student_of_the_same_form_becomes_its_teacher():
    torch.manual_seed(0)
    x, teacher, student = torch.randn(128, 4), Net(4, 3), Net(4, 3)
    before = copy.deepcopy(teacher.state_dict())
    distill(teacher, student, {"x": x}, epochs=150, lr=0.03, settings=PLAN)
    assert torch.allclose(student(x).softmax(1), teacher(x).softmax(1), atol=0.02)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_answers_can_be_given_instead_of_a_teacher_with_the_same_result():
    x, teacher = torch.randn(40, 4), Net(4, 2)
    first, second = Net(4, 2), Net(4, 2)
    second.load_state_dict(first.state_dict())
    distill(teacher, first, {"x": x}, epochs=3, seed=5, settings=PLAN)
    distill(teacher_logits(teacher, {"x": x}), second, {"x": x}, epochs=3, seed=5, settings=PLAN)
    assert torch.equal(first.weight, second.weight)


def test_labels_are_mixed_in_where_they_are_known():
    x, told = torch.eye(2), torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    student = Net(2, 2, bias=False)
    y = torch.tensor([-100, 1])
    data = {"x": x, "labels": y}
    distill(told, student, data, alpha=1.0, epochs=300, lr=0.1, batch_size=2, settings=PLAN)
    assert student(x).argmax(1).tolist() == [0, 1] and y.tolist() == [-100, 1]
    assert set(data) == {"x", "labels"}, "the caller's dict stays"


def test_the_inside_is_matched_while_answers_are_learned(bert):
    teacher, inputs = bert
    teacher.train()
    student = cut(teacher, [0, 3])
    with torch.no_grad():
        before = float(Matched(student, teacher.eval(), [Match("relation")])(**inputs).apart)
    teacher.train()
    history = distill(
        teacher, student, inputs, match=[Match("relation", weight=5.0)], epochs=15, lr=1e-3, settings=PLAN
    )
    assert teacher.training and all(p.grad is None for p in teacher.parameters())
    with torch.no_grad():
        after = float(Matched(student.eval(), teacher.eval(), [Match("relation")])(**inputs).apart)
    assert after < 0.5 * before and history["train_loss"][-1] < history["train_loss"][0]


def test_batches_of_ones_own_are_used():
    seen = []

    def batches(told):
        seen.append({k: tuple(v.shape) for k, v in told.items()})
        return [told]

    distill(torch.randn(6, 2), Net(3, 2), {"x": torch.randn(6, 3)}, batches=batches, settings=PLAN)
    assert seen == [{"x": (6, 3), "labels": (6, 3)}]


def test_what_cannot_be_distilled_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match="data is a Tensor; give a dict of tensors"):
        distill(torch.zeros(2, 2), Net(3, 2), x)
    with pytest.raises(ValueError, match="given as its answers; give the model"):
        distill(torch.zeros(2, 2), Net(3, 2), {"x": x}, match=[Match("hidden")])
    with pytest.raises(ValueError, match="the same number of rows"):
        distill(torch.zeros(3, 2), Net(3, 2), {"x": x}, settings=PLAN)
    with pytest.raises(ValueError, match="from a teacher with as many classes"):
        distill(torch.zeros(2, 4), Net(3, 2), {"x": x}, settings=PLAN)


# ---------------------------------------------------------------- unlabeled text


def test_changed_copies_are_many_masked_or_short_and_repeatable():
    text = "one two three four five six seven eight"
    plain = changed_copies([text], 3, share=0.0, short=0.0)
    assert plain == [text] * 3
    masked = changed_copies([text] * 50, 1, share=0.25, short=0.0, mask="#")
    words = " ".join(masked).split()
    assert len(words) == 400 and 0.18 < words.count("#") / 400 < 0.32
    cut_down = changed_copies([text] * 40, 1, share=0.0, short=1.0)
    assert all(1 <= len(t.split()) <= 5 and t in text for t in cut_down)
    assert changed_copies([text], 5, seed=3) == changed_copies([text], 5, seed=3)
    assert changed_copies(["", "x"], 1, share=0.0) == ["", "x"]
    for bad in (lambda: changed_copies("x", 1), lambda: changed_copies(["x"], 0)):
        with pytest.raises(ValueError, match="give a list of texts, and 1 copy or more"):
            bad()
    with pytest.raises(ValueError, match="give 0 to 1"):
        changed_copies(["x"], 1, share=2.0)


# ---------------------------------------------------------------- studies


def test_labels_of_the_transfer_set_are_not_used():
    few, rest = study.halves(0)
    assert not set(few.tolist()) & set(rest.tolist()) and len(few) == 2 * study.LABELED
    assert len(few) + len(rest) == len(study.train_set())
    labels = study._known(0)
    assert (labels[rest] == -100).all() and torch.equal(labels[few], study.train_set().y[few])
    assert not torch.equal(few, study.halves(1)[0])


def test_the_teacher_is_tuned_with_the_rate_that_chapter_8_chose():
    stored = json.loads((module.Path(__file__).parent.parent / "results" / "08_finetune.json").read_text())
    (full,) = [r for r in stored["cpu"]["more"]["value"]["accuracy"] if r["method"] == "full"]
    assert study._rate() == full["lr"]


def test_all_texts_are_there_and_the_teacher_answers_each():
    for name in ("train", "valid", "test", *study.KINDS):
        assert len(study.says(0, name)) == len(study._texts(name, 0)) > 0


def test_a_score_counts_repeated_mistakes_among_the_teachers_mistakes():
    y, above = study.reviews()["test"].y, study.says(0, "test").argmax(1)
    found = study._scored(0, "test", F.one_hot(above, 2).float())
    up, down = found["repeated"]
    assert found["agreement"].all() and (up == down).all() and down.sum() == (above != y).sum()


def test_every_row_of_a_table_has_its_baseline_and_ways_that_choose_as_many_rates():
    made = study.rows("targets")
    grids = {len(r["lr"]) for r in made if isinstance(r.get("lr"), list)}
    assert made[0]["student"] == "majority" and len(grids) == 1
    assert {r["way"] for r in made if r["student"] == study.MAIN} == {*study.WAYS, study.SELF}


def test_a_student_is_trained_with_as_many_batches_as_it_is_asked_for(monkeypatch):
    seen = []

    def note(target, net, inputs, batches, **about):
        made = batches(inputs)
        assert about["epochs"] * len(made) >= about["settings"].max_steps  # else the texts end before
        seen.append((made.size, about["settings"].max_steps))

    monkeypatch.setattr(study, "distill", note)
    texts = study._texts("train")
    for student in ("LSTM", study.MAIN):
        for batches in (0, 5):
            study._trained(student, 0, texts, torch.zeros(len(texts), 2), 1e-3, batches=batches)
    assert seen == [(64, study.LONGER), (64, 5), (32, study.STEPS), (64, 5)]


@pytest.mark.slow
def test_the_studies_run_store_their_rows_and_do_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main()
    stored = json.loads((tmp_path / "19_distill.json").read_text())["quick"]
    names = {"costs", "targets", "inside", "sizes", "longer", "transfer", "heat", "flips", "photos", "samples"}
    assert names <= set(stored)
    for name in names - {"costs", "samples"}:
        found = results.load_study(study.CHAPTER, name)
        assert "majority" in {r.get("student", r["way"]) for r in found.rows("accuracy")}
        assert all(0 <= r.mean <= 1 for r in found.rows("accuracy"))
    costs = results.load(study.CHAPTER, "costs")
    assert set(costs) == {*study.STUDENTS, "teacher"} and all(c["milliseconds"] > 0 for c in costs.values())
    assert costs["1 layer"]["weights"] < costs["3 layers"]["weights"] < costs["teacher"]["weights"]
    for name in ("run", "run_inside", "run_transfer", "run_heat", "run_flips", "run_photo"):
        monkeypatch.setattr(study, name, lambda *a, **_: pytest.fail("it ran again"))
    study.main("targets", "inside", "sizes", "longer", "transfer", "heat", "flips", "photos")
    with pytest.raises(ValueError, match="no study 'sums'; use costs, targets, inside"):
        study.main("sums")
    assert math.isfinite(costs["teacher"]["p95"]) and os.environ["FTBOOK_RESULTS"] == str(tmp_path)
