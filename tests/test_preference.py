"""Chapter 14: CartPole, pairs and rewards against their formulas, rollouts that are on-policy, the studies."""

import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ftbook import causal, losses, models, peft, preference, results
from ftbook.preference import (
    CartPole,
    Episodes,
    Policy,
    Rollouts,
    bradley_terry,
    group_advantages,
    grpo_loss,
    ipo,
    join_answers,
    kto,
    play,
    policy_gradient,
    ppo_loss,
    score_answers,
    simpo,
)
from ftbook.studies import preference as study
from ftbook.train import Settings, fit

PLAN = Settings(precision="fp32", weight_decay=0.0, progress=False)


@pytest.fixture(scope="module")
def small():
    """The bundled decoder."""
    return causal.load_decoder(models.path("decoder_mini_en"))


@pytest.fixture
def tiny():
    """A decoder of nine pieces with a LoRA, as policy and adapter."""
    model = causal.Decoder(causal.Sizes(vocab=9, width=16, layers=2, heads=2, kv_heads=1, hidden=24))
    with torch.no_grad():
        model.embed_tokens.weight *= 20  # so that it has preferences at all
    torch.manual_seed(0)
    adapter = peft.apply(model, peft.LoRA(("v_proj", "o_proj", "down_proj"), r=4))
    return Policy(model), adapter


# ---------------------------------------------------------------- CartPole


def test_a_push_obeys_the_equations_of_motion():
    """Lagrange's equations of cart and rod, solved anew by linear algebra, and one explicit Euler step."""
    env = CartPole(5, seed=3)
    env.state = np.random.default_rng(0).uniform(-0.2, 0.2, (5, 4))
    before, push = env.state.copy(), np.array([0, 1, 1, 0, 1])
    after, _ = env.step(push)
    cart, pole, half, g, dt = 1.0, 0.1, 0.5, 9.8, 0.02
    for (x, v, angle, turn), a, new in zip(before, push, after, strict=True):
        force = 10.0 if a else -10.0
        matrix = [[cart + pole, pole * half * math.cos(angle)], [math.cos(angle), 4 / 3 * half]]
        right = [force + pole * half * turn**2 * math.sin(angle), g * math.sin(angle)]
        gain, tip = np.linalg.solve(matrix, right)
        assert np.allclose(new, [x + dt * v, v + dt * gain, angle + dt * turn, turn + dt * tip], atol=1e-12)


def test_games_equal_those_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium")
    peer, draws = gymnasium.make("CartPole-v1").unwrapped, np.random.default_rng(1)
    peer.reset(seed=0)
    env = CartPole(1)
    env.state = np.array([peer.state], dtype=float)
    alive = True
    while alive:
        action = int(draws.integers(2))
        _, _, fallen, *_ = peer.step(action)
        state, going = env.step(np.array([action]))
        assert np.allclose(state[0], peer.state, atol=1e-9)
        alive = bool(going[0])
        assert alive != fallen


def test_a_game_that_is_over_stands_still_and_a_limit_ends_all():
    env = CartPole(2, limit=4)
    env.state[0, 2] = 0.3  # beyond 12 degrees
    first, alive = env.step([1, 1])
    assert alive.tolist() == [False, True]
    second, _ = env.step([0, 0])
    assert np.array_equal(first[0], second[0]) and not np.array_equal(first[1], second[1])
    env.step([0, 1])
    assert env.step([1, 0])[1].tolist() == [False, False]


@pytest.mark.parametrize("action", [[0], [0, 2], [[0, 1]]])
def test_a_push_that_is_none_is_refused(action):
    with pytest.raises(ValueError, match="give 0 or 1 for each of the 2 games"):
        CartPole(2).step(action)


@pytest.mark.parametrize("discount", [-0.1, 2.0, math.nan])
def test_a_discount_that_is_no_share_is_refused(discount):
    with pytest.raises(ValueError, match=f"discount={discount}: give a number from 0 to 1"):
        Episodes(nn.Linear(4, 2), discount=discount)


def test_answers_in_no_batches_are_refused(tiny):
    ids, scored = join_answers([[1]], [[2]])
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1"):
        score_answers(tiny[0], ids, scored, batch_size=0)


def test_no_game_is_refused():
    for wrong in (0, 1.5, "2"):
        with pytest.raises(ValueError, match="games must be an integer >= 1, got"):
            CartPole(wrong)
    with pytest.raises(ValueError, match="limit must be an integer >= 1, got 0"):
        CartPole(1, limit=0)


def test_play_repeats_with_its_seed_and_says_how_long_games_lasted():
    always = [play(study.lean, 6, seed=s)[2].sum(0) for s in (1, 1, 2)]
    assert torch.equal(always[0], always[1]) and not torch.equal(always[0], always[2])
    states, actions, alive = play(study.lean, 6, seed=1)
    assert states.shape == (*alive.shape, 4) and actions.shape == alive.shape
    assert torch.equal(actions[alive] == 1, states[alive][:, 2] > 0), "the pushes are the expert's"


def test_the_worth_of_a_push_is_what_was_survived_after_it_minus_the_mean_of_the_games():
    policy = nn.Linear(4, 2)
    nn.init.zeros_(policy.weight)
    nn.init.zeros_(policy.bias)
    games = Episodes(policy, 3, 1, discount=0.9, seed=5)
    _, target = next(iter(games))
    _, _, alive = play(policy, 3, seed=5 * 100_003)
    length = alive.sum(0).tolist()
    worth = torch.tensor([[sum(0.9**k for k in range(max(0, n - t))) for n in length] for t in range(len(alive))])
    base = torch.stack([w[a].mean() for w, a in zip(worth, alive, strict=True)])
    expected = (worth - base[:, None])[alive]
    assert torch.allclose(target[:, 1], expected / expected.std(), atol=1e-4)
    assert games.lengths == [pytest.approx(np.mean(length))]


def test_rewards_improve_on_what_was_imitated():
    policy = study.imitate(study.small_policy(1), 1)
    before = play(policy, 20, seed=9)[2].sum(0).float().mean()
    fit(policy, Episodes(policy, 8, 30, seed=1), loss=policy_gradient, lr=1e-2, settings=PLAN)
    assert play(policy, 20, seed=9)[2].sum(0).float().mean() > 1.5 * before


# ---------------------------------------------------------------- policy gradients


@pytest.mark.parametrize("baseline", [0.0, 0.7, -3.0])
def test_the_mean_over_actions_is_the_gradient_of_the_expected_reward(baseline):
    logits = torch.randn(1, 5, requires_grad=True)
    reward = torch.randn(5)
    right = torch.autograd.grad((logits.softmax(1) * reward).sum(), logits)[0]
    mean = torch.zeros(1, 5)
    for action, p in enumerate(logits.softmax(1)[0].tolist()):
        loss = policy_gradient(logits, torch.tensor([[action, reward[action] - baseline]]))
        mean -= p * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(mean, right, atol=1e-5)


def test_advantages_are_centered_and_scaled_within_each_group():
    rewards = torch.randn(12)
    ours = group_advantages(rewards, 4).view(3, 4)
    rows = rewards.view(3, 4)
    assert torch.allclose(
        ours, (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True), atol=1e-5
    )
    plain = group_advantages(rewards, 4, scale=False).view(3, 4)
    assert torch.allclose(plain, rows - rows.mean(1, keepdim=True), atol=1e-6)
    assert group_advantages(torch.ones(4), 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("target", [torch.ones(3, 3), torch.ones(2), torch.ones(2, 2), torch.ones(3, 2, 1)])
def test_an_action_without_its_advantage_is_refused(target):
    with pytest.raises(ValueError, match="with the number of the action and its advantage"):
        policy_gradient(torch.zeros(3, 4), target)


@pytest.mark.parametrize("action", [-1.0, 4.0])
def test_an_action_that_there_is_not_is_refused(action):
    with pytest.raises(ValueError, match="must lie in 0..3 for 4 classes"):
        policy_gradient(torch.zeros(1, 4), torch.tensor([[action, 1.0]]))


@pytest.mark.parametrize(
    "rewards, group, told",
    [
        (torch.zeros(4), 1, "at least two answers to compare"),
        (torch.zeros(5), 2, "5 rewards in groups of 2: give a multiple of the group"),
        (torch.zeros(2, 2), 2, "give one number for each answer"),
        (torch.zeros(0), 2, "N at least 1"),
        (torch.zeros(4), "2", "group must be an integer >= 1, got '2'"),
        (torch.zeros(4), 2.0, "group must be an integer >= 1, got 2.0"),
    ],
)
def test_rewards_that_make_no_groups_are_refused(rewards, group, told):
    with pytest.raises(ValueError, match=told):
        group_advantages(rewards, group)


def test_rewards_that_are_no_tensor_are_refused():
    for wrong in ("2", [0.0, 1.0], 3):
        with pytest.raises(TypeError, match="rewards is a .*: give a Tensor"):
            group_advantages(wrong, 2)
    assert group_advantages(torch.tensor([0, 1]), 2).tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_was_measured_and_is_no_number_is_refused_by_name(tiny, bad):
    two, flag = torch.tensor([bad, -1.0]), torch.tensor([True, False])
    pieces, fine = two[None], torch.tensor([-2.0, -1.0])
    for name, call in {
        "rewards": lambda: group_advantages(two, 2),
        "target": lambda: policy_gradient(torch.zeros(2, 2), torch.stack((torch.zeros(2), two), 1)),
        "scores": lambda: bradley_terry(two),
        "reference_chosen": lambda: ipo(fine, fine, two, fine),
        "rejected": lambda: simpo(fine, two, 2, 3),
        "reference": lambda: kto(fine, two, flag),
        "advantage": lambda: ppo_loss(pieces * 0 + 1, fine[None], pieces, fine[None]),
        "old": lambda: ppo_loss(fine[None], pieces, fine[None], fine[None]),
    }.items():
        with pytest.raises(ValueError, match=f"^{name}: 1 of .* are NaN or infinite; give finite numbers"):
            call()
    rollouts = Rollouts(tiny[0], torch.tensor([[1], [2]]), lambda rows, answers: [bad] * len(answers), new=2)
    with pytest.raises(ValueError, match="^rewards: 32 of 32 are NaN or infinite"):
        next(iter(rollouts))


def test_what_is_trained_and_no_number_is_left_to_the_loop():
    score = torch.tensor([math.nan, 1.0], requires_grad=True)
    assert bradley_terry(score).isnan()  # `fit` names step, batch and rate


def test_the_clipped_loss_has_a_gradient_only_where_a_step_still_gains():
    ratio = torch.tensor([[0.5], [0.9], [1.1], [1.5]])
    for sign, moving in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        logp = ratio.log().requires_grad_()
        loss = ppo_loss(logp, torch.zeros(4, 1), torch.full((4, 1), sign), torch.ones(4, 1))
        clipped = -torch.minimum(sign * ratio, sign * ratio.clamp(0.8, 1.2))[:, 0]
        assert torch.allclose(loss, clipped)
        grad = torch.autograd.grad(loss.sum(), logp)[0][:, 0]
        assert (grad != 0).tolist() == moving


def test_with_fresh_answers_grpo_is_reinforce_with_the_advantages_of_the_group(tiny):
    policy, adapter = tiny
    batches = Rollouts(policy, torch.tensor([[1], [2]]), lambda rows, a: [float(sum(x)) for x in a], group=3, new=4)
    ids, scored, target = next(iter(batches))
    mask, gain, *_ = target.unbind(-1)
    weights = list(adapter.parameters())
    ours = torch.autograd.grad(grpo_loss(policy(ids, scored), target), weights)
    plain = -((gain * policy(ids, scored)).sum(1) / mask.sum(1)).mean()
    theirs = torch.autograd.grad(plain, weights)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))


def test_the_penalty_is_on_average_the_divergence_and_pulls_toward_the_reference():
    p, q = torch.randn(2, 7).softmax(1)
    target = torch.stack((torch.ones(7), torch.zeros(7), q.log()), -1)[:, None]
    logp = p.log()[:, None].requires_grad_()
    each = torch.stack([grpo_loss(logp[i : i + 1], target[i : i + 1], beta=1.0) for i in range(7)])
    assert torch.isclose((p * each).sum(), (p * (p / q).log()).sum(), atol=1e-6)
    assert each.min() >= 0
    grad = torch.autograd.grad(each.sum(), logp)[0][:, 0]
    assert torch.equal(grad > 0, p > q), "descent lowers what is more probable than under the reference"


# ---------------------------------------------------------------- pairs


def test_dpo_is_the_binary_cross_entropy_of_its_implicit_rewards():
    """The formula as TRL computes it: -logsigmoid(beta (pi log-ratios - reference log-ratios))."""
    four = [torch.randn(6, dtype=torch.float64, requires_grad=i < 2) for i in range(4)]
    chosen, rejected, ref_chosen, ref_rejected = four
    ours = losses.dpo(*four, beta=0.3)
    theirs = -F.logsigmoid(0.3 * ((chosen - rejected) - (ref_chosen - ref_rejected))).mean()
    assert torch.isclose(ours, theirs)
    for a, b in zip(*(torch.autograd.grad(loss, four[:2]) for loss in (ours, theirs)), strict=True):
        assert torch.allclose(a, b)
    rewards = torch.stack((chosen - ref_chosen, rejected - ref_rejected), 1).flatten()
    assert torch.isclose(bradley_terry(0.3 * rewards), ours), "Bradley-Terry on the log-ratios"


def test_dpo_equals_the_loss_and_gradients_of_trls_trainer(tmp_path):
    """Three pairs of answers of unequal length, a small Llama and its reference, in TRL's own batch."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = causal.train_tokenizer(["good bad film a the was so"] * 9, 300)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=getattr(tokenizer, "backend_tokenizer", tokenizer), eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    policy, reference = (
        LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.5, **sizes)) for _ in "ab"
    )
    pairs = [("the film was", " good", " so bad"), ("a film", " was good", " bad"), ("so", " good", " bad bad bad")]
    config = trl.DPOConfig(
        str(tmp_path / "out"), per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False, beta=0.3,
        gradient_checkpointing=False, max_length=None, loss_type=["sigmoid"], disable_dropout=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        policy,
        reference,
        config,
        train_dataset=Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), p, strict=True)) for p in pairs]),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    grads = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()

    def answered(model):
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        said = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (said * batch["completion_mask"][:, 1:]).sum(1).chunk(2)

    (chosen, rejected), (ref_chosen, ref_rejected) = answered(trainer.model), answered(reference)
    ours = losses.dpo(chosen, rejected, ref_chosen.detach(), ref_rejected.detach(), beta=0.3)
    ours.backward()
    assert torch.isclose(ours, theirs, atol=1e-5)
    for p, grad in zip(trainer.model.parameters(), grads, strict=True):
        assert torch.allclose(p.grad, grad, atol=1e-4)


def test_the_best_policy_of_a_penalized_reward_has_dpo_margins_equal_to_the_rewards():
    """pi* proportional to pi_ref exp(r / beta): beta times its log-ratios differ as the rewards do."""
    reference, reward, beta = torch.randn(5).softmax(0), torch.randn(5), 0.7
    best = reference * (reward / beta).exp()
    ratio = beta * (best / best.sum() / reference).log()
    assert torch.allclose(ratio - ratio[0], reward - reward[0], atol=1e-5)


def test_ipo_wants_a_margin_and_no_more():
    margin = torch.tensor([0.0, 2.5, 5.0, 10.0], requires_grad=True)
    zero = torch.zeros(4)
    loss = ipo(margin, zero, zero, zero, beta=0.1)
    assert torch.isclose(loss, ((margin - 5) ** 2).mean())
    grad = torch.autograd.grad(loss, margin)[0]
    assert grad[2] == 0 and grad[0] < 0 < grad[3]


def test_simpo_compares_means_over_pieces():
    chosen, rejected = torch.tensor([-6.0, -9.0]), torch.tensor([-8.0, -4.0])
    sizes = torch.tensor([3, 9]), torch.tensor([2, 4])
    ours = simpo(chosen, rejected, *sizes, beta=2.0, gamma=0.5)
    by_hand = [-F.logsigmoid(torch.tensor(2 * (c - r) - 0.5)) for c, r in ((-2, -4), (-1, -1))]
    assert torch.isclose(ours, sum(by_hand) / 2)


def test_kto_moves_good_answers_up_and_bad_ones_down_from_a_common_point():
    policy = torch.tensor([-3.0, -4.0, -5.0], requires_grad=True)
    reference, good = torch.tensor([-4.0, -4.0, -4.0]), torch.tensor([True, False, True])
    loss = kto(policy, reference, good, beta=0.5, weights=(1.0, 2.0))
    start = max(0.0, (1 + 0 - 1) / 3)
    values = [1 - 1 / (1 + math.exp(-0.5 * s)) for s in (1 - start, start, -1 - start)]
    assert loss.item() == pytest.approx((values[0] + 2 * values[1] + values[2]) / 3)
    assert torch.equal(torch.autograd.grad(loss, policy)[0] < 0, good)


def test_pairs_and_betas_that_cannot_be_are_refused():
    one = torch.zeros(1)
    with pytest.raises(ValueError, match="3 rows are no pairs"):
        bradley_terry(torch.zeros(3))
    for loss in (ipo, simpo):
        with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
            loss(one, one, one, one, beta=0)
    with pytest.raises(ValueError, match="beta must be positive and finite, got -1"):
        kto(one, one, one > 0, beta=-1)


def test_a_reward_model_finds_the_order_behind_pairs():
    draws = torch.Generator().manual_seed(0)
    x, truth = torch.randn(400, 3, generator=draws), torch.tensor([2.0, -1.0, 0.5])
    worth = x @ truth
    order = torch.stack([torch.tensor([i, i + 1])[worth[i : i + 2].argsort(descending=True)] for i in range(0, 400, 2)])
    net = nn.Linear(3, 1)
    fit(net, [(x[order.flatten()], torch.zeros(400))], loss=bradley_terry, epochs=150, lr=0.05, settings=PLAN)
    found = net.weight[0].detach()
    assert torch.cosine_similarity(found, truth, dim=0) > 0.97


# ---------------------------------------------------------------- answers


def test_answers_are_scored_as_the_logits_of_the_whole_text_say(small):
    prompts, answers = [[5, 6, 7], [5, 6]], [[8, 9], [8, 9, 10]]
    ids, scored = join_answers(prompts, answers)
    found = score_answers(Policy(small), ids, scored, batch_size=1)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        with torch.no_grad():
            whole = small(torch.tensor([p + a])).log_softmax(-1)[0]
        right = [whole[len(p) + i - 1, piece].item() for i, piece in enumerate(a)]
        assert found[row, scored[row]].tolist() == pytest.approx(right, abs=1e-4)
        assert not found[row, ~scored[row]].any()


def test_no_logits_are_computed_that_nobody_scores(small, monkeypatch):
    given = []
    forward = causal.Decoder.forward

    def counted(self, ids, where=None, cache=None):
        out = forward(self, ids, where, cache)
        given.append(out.shape[:-1].numel())
        return out

    monkeypatch.setattr(causal.Decoder, "forward", counted)
    ids, scored = join_answers([[5, 6, 7], [5, 6]], [[8, 9], [8, 9, 10]])
    score_answers(Policy(small), ids, scored)
    assert given == [5]


def test_a_prompt_of_any_length_changes_no_score_of_another(small):
    one = join_answers([[5, 6, 7]], [[8, 9]])
    two = join_answers([[5, 6, 7], list(range(20, 60))], [[8, 9], [3]])
    policy = Policy(small)
    assert torch.allclose(score_answers(policy, *one)[0], score_answers(policy, *two)[0, :5], atol=1e-5)


@pytest.mark.parametrize(
    "prompts, answers, told",
    [
        ([[1]], [], "1 prompts and 0 answers"),
        ([], [], "at least one"),
        ([[]], [[1]], "has no piece"),
        ([[1]], [[]], "end answers with it"),
    ],
)
def test_prompts_and_answers_that_do_not_fit_are_refused(prompts, answers, told):
    with pytest.raises(ValueError, match=told):
        join_answers(prompts, answers)


# ---------------------------------------------------------------- rollouts


def even(rows, answers):
    return [float(np.mean([i % 2 == 0 for i in a])) if a else 0.0 for a in answers]


def test_rollouts_are_written_by_the_policy_as_it_is_by_then(tiny):
    policy, _ = tiny
    batches = Rollouts(
        policy, torch.tensor([[1], [2], [3]]), even, prompts_per_batch=3, group=2, steps=2, new=3, seed=4
    )
    first, second = iter(batches), iter(batches)
    ids = next(first)[0]
    assert torch.equal(ids, next(second)[0]), "the same seed, the same policy"
    assert sorted(set(ids[:, 0].tolist())) == [1, 2, 3] and len(batches) == 2
    with torch.no_grad():  # make one piece nearly certain
        policy.model.embed_tokens.weight[7] *= 40
    assert not torch.equal(next(first)[0], ids)


def test_a_whole_run_can_be_written_beforehand_and_says_how_likely_it_was_then(tiny):
    policy, _ = tiny
    batches = Rollouts(policy, torch.tensor([[1]]), even, prompts_per_batch=1, group=4, steps=3, every=3, new=3)
    drawn = list(batches)
    assert len(drawn) == 3 == len(batches.rewards) and all(t.shape[-1] == 4 for *_, t in drawn)
    for ids, scored, target in drawn:
        assert torch.allclose(target[..., 3], score_answers(policy, ids, scored), atol=1e-5)


def test_an_answer_ends_with_its_stop_and_what_follows_is_not_scored(tiny):
    policy, _ = tiny
    seen = []

    def reward(rows, answers):
        seen.extend(answers)
        return [float(len(a)) for a in answers]

    batches = Rollouts(policy, torch.tensor([[1]]), reward, prompts_per_batch=8, group=8, steps=1, new=6, stop=2)
    ids, scored, _ = next(iter(batches))
    for row, keep, answer in zip(ids, scored, seen, strict=True):
        pieces = row[keep].tolist()
        assert 2 not in pieces[:-1] and answer == [i for i in pieces if i != 2]
        assert len(pieces) == 6 or pieces[-1] == 2


def test_the_reference_is_the_policy_without_its_adapter(tiny):
    policy, adapter = tiny
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(0, 0.5)
    batches = Rollouts(policy, torch.tensor([[1], [2]]), even, reference=adapter.disable, group=2, new=3)
    ids, scored, target = next(iter(batches))
    with adapter.disable():
        right = score_answers(policy, ids, scored)
    assert torch.allclose(target[..., 2], right, atol=1e-6)
    assert not torch.allclose(right, score_answers(policy, ids, scored), atol=1e-3)


def test_fit_on_rollouts_earns_more_and_a_penalty_holds_it_back(tiny):
    start = {k: v.clone() for k, v in tiny[0].state_dict().items()}
    earned, apart = {}, {}
    for beta in (0.0, 3.0):
        policy, adapter = tiny
        policy.load_state_dict(start)
        batches = Rollouts(
            policy,
            torch.tensor([[1], [3]]),
            even,
            reference=adapter.disable,
            prompts_per_batch=2,
            steps=40,
            new=4,
            seed=1,
        )
        fit(policy, batches, loss=lambda a, b, beta=beta: grpo_loss(a, b, beta=beta), lr=3e-2, settings=PLAN)
        earned[beta] = np.mean(batches.rewards[-5:])
        ids, scored, target = next(iter(batches))
        apart[beta] = (score_answers(policy, ids, scored) - target[..., 2]).sum(1).mean().item()
    assert earned[0.0] > np.mean(even(None, [[i] for i in range(9)])) + 0.2
    assert earned[3.0] < earned[0.0] and apart[3.0] < apart[0.0]


def test_rollouts_refuse_what_they_cannot_draw(tiny):
    for prompts in (torch.zeros(3), torch.zeros(0, 2), torch.zeros(2, 0)):
        with pytest.raises(ValueError, match="at least one prompt of at least one piece"):
            Rollouts(tiny[0], prompts.long(), even)
    for name in ("prompts_per_batch", "group", "steps", "every", "new"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1, got '4'"):
            Rollouts(tiny[0], torch.zeros(2, 2).long(), even, **{name: "4"})


def test_a_reward_that_forgets_an_answer_is_refused(tiny):
    for wrong in (lambda rows, answers: [1.0], lambda rows, answers: torch.ones(len(answers), 1)):
        with pytest.raises(ValueError, match="for 32 answers: return one number for each"):
            next(iter(Rollouts(tiny[0], torch.tensor([[1], [2]]), wrong, new=2)))


# ---------------------------------------------------------------- studies


def test_no_sum_is_in_two_splits():
    parts = {name: set(study.sums(name)) for name in ("train", "valid", "test")}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))


def test_form_and_number_of_a_sum_are_judged_apart(monkeypatch):
    class Words:
        def decode(self, answer):
            return "".join(answer)

    monkeypatch.setattr(study, "decoder", lambda: (None, Words()))
    monkeypatch.setattr(study, "WRITE", 4)
    answers = [[" ", "8"], [" ", "9"], [" ", "8", ".", " "], [" ", "1", "\n\n", "8"], ["so", " ", "8"]]
    form, right = study._checked([(3, 5)] * 5, answers)
    assert form.tolist() == [True, True, False, True, False]
    assert right.tolist() == [True, False, True, False, True]


def test_praise_counts_words_of_the_list():
    assert study._praise(["Great fun, great!", "a dull film", ""]).tolist() == [1.0, 0.0, 0.0]


def test_pairs_are_as_uneven_as_was_asked():
    for bias, share in ((0.5, 0.5), (0.9, 0.9)):
        texts = study._uneven("train", 20, bias, 1)
        longer = [len(a.split()) > len(b.split()) for a, b in zip(texts[::2], texts[1::2], strict=True)]
        assert np.mean(longer) == pytest.approx(share) and len(texts) == 40


def test_adapters_lie_in_the_upper_half_and_the_model_without_them_is_the_reference():
    policy, adapter = study.adapted(1)
    assert all("layers.0." not in name for name, _ in adapter.named_parameters())
    ids, scored = join_answers([[1, 2]], [[3, 4]])
    apart, _ = study._apart(policy, adapter, ids, 2)
    assert float(apart.abs().max()) < 1e-6
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(0, 1.0)
    apart, _ = study._apart(policy, adapter, ids, 2)
    assert float(apart.min()) > 0 and copy.deepcopy(scored).shape == ids.shape


def test_games_used_again_keep_how_likely_a_push_was_and_the_clip_stops_what_has_moved_far():
    policy = study.small_policy(1)
    games = preference.Episodes(policy, games=2, steps=1, seed=1, limit=20)
    batches = [*study._Again(games)]
    assert len(batches) == study.PASSES
    states, target = batches[0]
    logits = policy(states)
    paid = logits.log_softmax(1).gather(1, target[:, :1].long())
    assert torch.allclose(target[:, 2:], paid, atol=1e-6)
    weights = list(policy.parameters())
    ours, theirs = (
        torch.autograd.grad(loss(policy(states), target), weights) for loss in (study._clipped, study._unclipped)
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    good = target[target[:, 1] > 0]
    good[:, 2] -= 1.0  # now e times as likely as when it was played
    moved = states[target[:, 1] > 0]
    for loss, still in ((study._clipped, True), (study._unclipped, False)):
        pull = torch.autograd.grad(loss(policy(moved), good), weights)
        assert still == (max(g.abs().max() for g in pull) < 1e-8)


@pytest.mark.slow
def test_the_studies_run_store_their_rows_and_do_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main()
    stored = json.loads((tmp_path / "14_preference.json").read_text())["quick"]
    assert {"toy", "toy_curves", "reuse", "length", "sums", "frontier", "judges", "hacked", "samples reference"} <= set(
        stored
    )
    frontier = results.load_study(study.CHAPTER, "frontier")
    methods = {r["method"] for r in frontier.rows("reward")}
    assert methods == {"reference", "best of n", "SFT on the best", "DPO", "GRPO"}
    assert all(len(r["values"]) == 2 for r in frontier.rows("kl"))
    base = frontier.row("kl", method="reference")
    assert abs(base.mean) < 1e-5, "a fresh LoRA changes nothing"
    for name in ("run", "run_toy", "run_hacked", "run_sums", "run_length", "_taught", "_second"):
        monkeypatch.setattr(study, name, lambda *a, **_: pytest.fail("it ran again"))
    study.main("length", "sums", "hacked")
    with pytest.raises(ValueError, match="no study 'dpo'; use toy, length, sums, reuse, frontier, relatives, hacked"):
        study.main("dpo")
    assert preference.__all__[1] == "CartPole"


def test_losses_of_pairs_refuse_what_would_be_broadcast_in_silence():
    two, one = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0])
    sizes = torch.tensor([2, 3])
    for wrong in (one, two[None], two[:0]):
        with pytest.raises(ValueError, match="one number for each answer"):
            preference.ipo(two, wrong, two, two)
        with pytest.raises(ValueError, match="one number for each answer"):
            preference.simpo(two, two, wrong, sizes)
        with pytest.raises(ValueError, match="one number for each answer"):
            preference.kto(two, two, wrong > 0)
    with pytest.raises(TypeError, match="rejected is a list"):
        preference.ipo(two, [-1.0, -2.0], two, two)
    with pytest.raises(ValueError, match="a length is below 1"):
        preference.simpo(two, two, sizes, sizes * 0)
    with pytest.raises(TypeError, match="give bool"):
        preference.kto(two, two, sizes)


def test_the_clipped_loss_refuses_an_advantage_for_each_answer_alone():
    pieces = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="spread an answer's advantage"):
        preference.ppo_loss(pieces, pieces, torch.zeros(2), pieces + 1)
    with pytest.raises(ValueError, match="clip=-1"):
        preference.ppo_loss(*[pieces] * 4, clip=-1)
