"""Chapter 25: all-reduce by hand, data parallelism in four ways, files in parts, killed ranks, cut layers, costs, rows from disk."""

import copy
import functools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import parallel_script
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from ftbook import results
from ftbook.distributed import (
    ShardedRows,
    SplitLinear,
    all_reduce,
    bubble,
    cost,
    fit_cost,
    launch,
    load_shards,
    over_links,
    save_shards,
    sum_gradients,
    timetable,
    train_parallel,
    zero_bytes,
)
from ftbook.train import Checkpoint, EarlyStopping, Settings, cut_model, evaluate, fit


def net(kind=torch.float64, dropout=0.0):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))
    return body.to(kind)


def toy(n=44, kind=torch.float64):
    draws = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=draws, dtype=kind), torch.randint(0, 3, (n,), generator=draws)


def trained(parallel="hand", kind=torch.float64, dropout=0.0, **how):
    """In a process of a group: a few steps of a small network."""
    how = {"steps": 6, "batch_size": 11, "lr": 0.05} | how
    return train_parallel(net(kind, dropout), toy(kind=kind), parallel=parallel, **how)


CASES = {  # name -> (way, options), run by one process and by two
    "hand": ("hand", {}),
    "in order": ("hand", {"accumulate": 2}),
    "dropout": ("hand", {"dropout": 0.4}),
    "dropout in order": ("hand", {"dropout": 0.4, "accumulate": 2}),
    "few rows": ("hand", {"batch_size": 1, "steps": 3}),
    "ddp": ("ddp", {}),
    "ddp 2": ("ddp", {"accumulate": 2}),
    "zero": ("zero", {}),
    "zero 2": ("zero", {"accumulate": 2}),
    "fsdp": ("fsdp", {}),
    "fsdp 2": ("fsdp", {"accumulate": 2}),
    "killed hand": ("hand", {"dropout": 0.3}),
    "killed fsdp": ("fsdp", {"dropout": 0.3}),
}


def all_cases():
    return {name: trained(way, **how) for name, (way, how) in CASES.items()}


@functools.cache
def every(ranks):
    """All cases on so many processes, a list over ranks of what they gave."""
    return launch(all_cases, ranks)


def one(name="hand"):
    """In a group of one, which has as many threads as the others."""
    return every(1)[0][name]


def two(name="hand"):
    return [rank[name] for rank in every(2)]


def gap(a, b):
    assert a.weights.keys() == b.weights.keys()
    return max((a.weights[k] - b.weights[k]).abs().max().item() for k in a.weights)


# ---------------------------------------------------------------- processes


def told(*args):
    return dist.get_rank(), dist.get_world_size(), args, torch.get_num_threads()


def test_every_process_knows_who_it_is_and_gets_the_arguments():
    assert launch(told, 2, "a", 3) == [(0, 2, ("a", 3), 1), (1, 2, ("a", 3), 1)]


def broken(rank):
    if dist.get_rank() == rank:
        raise KeyError("lost")
    dist.barrier()


def test_an_error_in_a_process_is_shown_and_ends_the_others():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 has died.*KeyError: 'lost'.*No restart is left of 0"):
        launch(broken, 2, 1)
    assert time.monotonic() - begun < 30


def silent():
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(60)


def test_a_process_that_waits_for_ever_is_named():
    with pytest.raises(TimeoutError, match=r"rank \[0, 1\] did not finish within 3 seconds"):
        launch(silent, 2, timeout=3)


def second_time():
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()
    return os.environ["TORCHELASTIC_RESTART_COUNT"]


def test_a_killed_process_is_started_again_with_the_others():
    assert launch(second_time, 2, restarts=1) == ["1", "1"]
    with pytest.raises(RuntimeError, match="exit code -9|Connection|rank 0 has died"):
        launch(second_time, 2)


@pytest.mark.parametrize(
    "how, told",
    [
        ({"ranks": 0}, "ranks"),
        ({"restarts": -1}, "0 or more"),
        ({"restarts": 0.5}, "whole"),
        ({"timeout": 0}, "timeout"),
    ],
)
def test_a_launch_that_makes_no_sense_is_refused(how, told):
    with pytest.raises(ValueError, match=told):
        launch(silent, **how)


def fitted():
    model = net(torch.float32)
    about = {
        "epochs": 2,
        "batch_size": 11,
        "lr": 0.05,
        "seed": 3,
        "settings": Settings(precision="fp32", progress=False),
    }
    history = fit(model, toy(kind=torch.float32), **about)
    return model.state_dict(), history.settings["processes"]


def test_fit_runs_on_all_processes_as_on_one():
    (a, n), (b, _) = launch(fitted, 2)
    (whole, m), *_ = launch(fitted, 1)
    assert (n, m) == (2, 1) and all(torch.equal(a[k], b[k]) for k in a)
    for k in whole:
        torch.testing.assert_close(a[k], whole[k], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- fit, with the model whole or cut


class Blocks(nn.Module):
    """Layers in a list, as transformers have them, one of them frozen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Tanh()) for _ in range(3))
        self.last = nn.Linear(16, 3)
        self.layers[0].requires_grad_(False)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.last(x)


class Normed(Blocks):
    """With running means, of which every process sees its own rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return super().forward(self.norm(x))


PLAN = {"precision": "fp32", "progress": False, "device": "cpu"}
HARD = {"schedule": "linear", "warmup": 0.2, "clip_norm": 0.5}
FITS = {  # name -> model, settings; of fit
    "plain": (Blocks, {}),
    "all at once": (Blocks, HARD | {"accumulate": 3}),
    "norm": (Normed, {}),
}
NAMED = ("sgd", "Adam")


def unscored(x, y):
    """Batches with weights of their own; the second process has nothing to score in some of them."""
    batches = [(x[i : i + 11], y[i : i + 11].clone()) for i in range(0, len(x), 11)]
    for _, labels in batches[::2]:
        labels[1::2] = -100
    return batches


def fit_case(kind, settings, parallel, **more):
    model = kind().double()
    if dist.get_rank():  # the first process's weights count
        with torch.no_grad():
            model.last.weight.mul_(2)
    x, y = toy(56)
    train, valid = (x[:44], y[:44]), (x[44:], y[44:])
    if "accumulate" in settings:
        train, valid = unscored(*train), [(x[44:52], y[44:52]), (x[:1], y[:1]), (x[1:3], torch.tensor([1, -100]))]
    groups = more.pop("groups", None)
    if groups:
        params = [{"params": model.last.parameters(), "lr": 0.01}, {"params": [model.first.weight]}]
        settings = settings | {"params": params}
    about = {"epochs": 4, "batch_size": 11, "lr": 0.05, "metrics": "accuracy"} | more
    plan = Settings(**PLAN | settings, parallel=parallel)
    history = fit(model, train, valid, callbacks=[EarlyStopping(patience=3)], settings=plan, **about)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in history.rows]
    held = sum(getattr(p, "to_local", p.clone)().numel() for p in model.parameters())
    after = evaluate(model, (x, y))["loss"]
    return parallel_script.whole(model), rows, held, after


def fit_cases(parallel):
    found = {name: fit_case(*case, parallel) for name, case in FITS.items()}
    found["groups"] = fit_case(Blocks, {}, parallel, groups=True)
    for name in NAMED:
        found[name] = fit_case(Blocks, {}, parallel, optimizer=name)
    return found


@functools.cache
def fits(parallel, ranks=2):
    return launch(fit_cases, ranks, parallel)


@pytest.mark.parametrize("name", [*FITS, "groups", *NAMED])
def test_fit_with_a_cut_model_equals_ddp_and_one_process(name):
    cut, whole, (alone,) = fits("fsdp"), fits("ddp"), fits(None, 1)
    for rank in (0, 1):
        weights, rows, held, after = cut[rank][name]
        assert 0.4 < held / alone[name][2] < 0.6, "a rank holds half"
        for other in (whole[rank][name], alone[name])[: 1 if name == "norm" else 2]:
            assert weights.keys() == other[0].keys()
            off = {k: (weights[k] - v).abs().max().item() for k, v in other[0].items() if "running" not in k}
            assert max(off.values()) < 1e-6
            assert len(rows) == len(other[1])
            for a, b in zip(rows, other[1], strict=True):
                assert a == pytest.approx(b, abs=1e-6)
            assert after == pytest.approx(other[3], abs=1e-6)


def told_by(model, **settings):
    how = {k: settings.pop(k) for k in ("optimizer", "callbacks") if k in settings}
    with pytest.raises(ValueError) as error:
        fit(model, toy(kind=torch.float32), settings=Settings(**PLAN | settings), **how)
    return str(error.value)


class Thaws:
    """Unfreezes a layer in the second epoch."""

    def on_epoch_begin(self, run):
        run.model.layers[0].requires_grad_(run.epoch > 0)


def refusals(folder):
    single, fsdp = Blocks(), {"parallel": "fsdp"}
    adam = torch.optim.AdamW(single.parameters())
    found = [
        told_by(single, **fsdp, optimizer=adam),
        told_by(single, **fsdp, channels_last=True),
        told_by(single, **fsdp, optimizer="Muon"),
        told_by(single, **fsdp, callbacks=[Checkpoint(f"{folder}/run.pt")]),
    ]
    with pytest.raises(ValueError, match="epoch 2 trains 16 parameters and the one before it 12") as error:
        settings = Settings(**PLAN, **fsdp)
        fit(Blocks(), toy(kind=torch.float32), epochs=2, callbacks=[Thaws()], settings=settings)
    cut_model(single)
    history = fit(single, toy(kind=torch.float32), settings=settings, optimizer=torch.optim.AdamW(single.parameters()))
    return [*found, told_by(single), str(error.value), len(history)]


def test_what_a_cut_model_cannot_do_is_refused(tmp_path):
    for optimizer, layout, muon, file, whole, thawed, epochs in launch(refusals, 2, str(tmp_path)):
        assert "pass its name or class, or cut_model" in optimizer and "leave channels_last out" in layout
        assert "optimizer='Muon': by name go adamw, adam" in muon
        assert "save_shards in a callback" in file and "Settings(parallel='fsdp')" in whole
        assert "Freeze before fit" in thawed and epochs == 1, "and one that was cut before is trained"


def alone_in_a_group():
    return told_by(Blocks(), parallel="fsdp"), len(fit(Blocks(), toy(kind=torch.float32), settings=Settings(**PLAN)))


def test_one_process_is_told_how_to_be_more():
    for parallel in ("ddp", "fsdp"):
        assert "start the script by torchrun --nproc-per-node 2" in told_by(Blocks(), parallel=parallel)
    told, epochs = launch(alone_in_a_group, 1)[0]
    assert "this group has 1: start 2 or more" in told and epochs == 1
    with pytest.raises(ValueError, match="parallel"):
        Settings(parallel="tensor")


# ---------------------------------------------------------------- torchrun


def torchrun(*args, restarts=0):
    """What the script's first process has written; bounded in time, since ranks can wait for each other."""
    root = Path(__file__).resolve().parents[1]
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    own["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), parallel_script.__file__, *map(str, args)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(args[0], weights_only=True)


@pytest.mark.parametrize("way, at, victim", [("hand", 3, 1), ("fsdp", 5, 0)])
def test_torchrun_starts_again_and_the_run_equals_the_unbroken_one(way, at, victim, tmp_path):
    about = ("--way", way, "--checkpoint", tmp_path / "parts", "--at", at, "--victim", victim)
    found = torchrun(tmp_path / "out.pt", *about, restarts=1)
    assert (found["start"], found["ranks"], found["attempt"]) == (at - 1, 2, 1)
    weights = two(f"killed {way}")[0].weights
    assert found["weights"].keys() == weights.keys()
    assert all(torch.equal(v, weights[k]) for k, v in found["weights"].items())


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_fit_under_torchrun_equals_one_process(parallel, tmp_path):
    found = torchrun(tmp_path / "out.pt", "--fit", parallel)
    weights, losses, _ = parallel_script.fitted(None)
    assert found["ranks"] == 2 and found["losses"] == pytest.approx(losses, abs=1e-6)
    for k, v in weights.items():
        torch.testing.assert_close(found["weights"][k], v, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- all-reduce


@pytest.mark.parametrize("how", ["ring", "tree", "ordered"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("shape", [(1,), (5, 3), ()])
def test_all_ranks_get_the_sum(how, ranks, shape):
    draws = torch.Generator().manual_seed(ranks)
    parts = torch.randn(ranks, *shape, generator=draws, dtype=torch.float64)
    before = parts.clone()
    found = over_links(lambda link: all_reduce(parts[link.rank], how, link), ranks)
    assert all(torch.equal(f, found[0]) for f in found) and torch.equal(parts, before)
    torch.testing.assert_close(found[0], parts.sum(0), rtol=0, atol=1e-12)


@given(st.integers(1, 6), st.integers(1, 40), st.sampled_from(["ring", "tree", "ordered"]))
@settings(max_examples=25, deadline=None)
def test_whole_numbers_are_added_exactly(ranks, size, how):
    parts = torch.arange(ranks * size).reshape(ranks, size) ** 2
    found = over_links(lambda link: all_reduce(parts[link.rank], how, link), ranks)
    assert all(torch.equal(f, parts.sum(0)) for f in found)


def test_only_the_ordered_way_keeps_the_bits_of_one_process():
    parts = torch.tensor([[1e8], [1.0], [-1e8], [1.0]]).expand(4, 4).clone()
    want = parts[0].clone()
    for part in parts[1:]:
        want += part
    found = {
        h: over_links(lambda link, h=h: all_reduce(parts[link.rank], h, link), 4)[0]
        for h in ("ordered", "tree", "ring")
    }
    assert torch.equal(found["ordered"], want)
    assert not torch.equal(found["tree"], want) or not torch.equal(found["ring"], want)


def reduced():
    x = torch.arange(7.0, dtype=torch.float64) * (dist.get_rank() + 1)
    theirs = x.clone()
    dist.all_reduce(theirs)
    return theirs, [all_reduce(x, how) for how in ("ring", "tree", "ordered")], all_reduce(x[:1], "ring")


def test_16_bits_go_over_a_link_and_a_rank_that_is_not_there_is_refused():
    x = torch.tensor([1.0, 2.5, -3.0], dtype=torch.bfloat16)
    for how in ("ring", "tree", "ordered"):
        for found in over_links(lambda link, how=how: all_reduce(x, how, link), 2):
            assert torch.equal(found, 2 * x)
    with pytest.raises(ValueError, match="there are 0 to 1"):
        over_links(lambda link: link.send(x, 7), 2)
    with pytest.raises(TypeError, match="x is list"):
        all_reduce([1.0], link=None)


def test_processes_get_what_torch_gives():
    for theirs, ours, single in launch(reduced, 2):
        assert all(torch.equal(t, theirs) for t in ours) and torch.equal(single, theirs[:1])


def test_without_a_group_it_says_how_to_get_one():
    with pytest.raises(RuntimeError, match=r"start with launch\(fn, ranks\) or torchrun"):
        all_reduce(torch.ones(1))
    with pytest.raises(ValueError, match="how"):
        all_reduce(torch.ones(1), "star")


def test_links_hold_back_as_long_as_they_say():
    def timed(link):
        x = torch.zeros(50_000, dtype=torch.uint8)
        link.wait()
        begun = time.perf_counter()
        if link.rank == 0:
            link.send(x, 1)
        else:
            link.receive(x, 0)
        return time.perf_counter() - begun

    assert 0.05 <= over_links(timed, 2, delay=0.05)[1] < 1
    assert 0.09 <= over_links(timed, 2, rate=5e5)[1] < 1, "50,000 bytes take a tenth of a second"


def test_an_error_on_a_link_frees_those_who_wait():
    def fails(link):
        if link.rank == 0:
            raise KeyError("gone")
        return link.receive(torch.ones(1), 0)

    before = threading.active_count()
    with pytest.raises((KeyError, OSError)):
        over_links(fails, 2)
    time.sleep(0.3)
    assert threading.active_count() <= before + 2


# ---------------------------------------------------------------- data parallelism


def test_two_processes_have_the_bits_of_one_that_accumulates_their_rows():
    alone, pair = one("in order"), two()
    assert gap(alone, pair[0]) == 0 == gap(pair[0], pair[1]) and alone.losses == pair[0].losses
    assert gap(one(), pair[0]) < 1e-12, "and the joint batch to rounding"


def test_dropout_is_drawn_for_rows_and_not_for_processes():
    alone, pair = one("dropout in order"), two("dropout")
    assert gap(alone, pair[0]) == 0 and gap(one("in order"), alone) > 1e-4


@pytest.mark.parametrize("name", ["ddp", "ddp 2", "zero", "zero 2", "fsdp", "fsdp 2"])
def test_every_way_equals_one_process(name):
    pair, alone = two(name), one()
    assert gap(pair[0], alone) < 1e-12 and gap(pair[0], pair[1]) == 0
    assert pair[0].losses == pytest.approx(alone.losses, abs=1e-12)


def test_gradients_are_sums_and_a_parameter_without_one_counts_as_zero():
    def step(link):
        model = nn.ModuleDict({"a": nn.Linear(2, 1), "b": nn.Linear(1, 1)})
        model["b"].requires_grad_(False)
        model["c"] = nn.Linear(1, 1)
        if link.rank == 0:
            model["a"](torch.ones(1, 2)).sum().backward()
        sum_gradients(model, "ring", link)
        return [None if p.grad is None else p.grad.flatten().tolist() for p in model.parameters()]

    assert over_links(step, 2) == [[[1, 1], [1], None, None, [0], [0]]] * 2


def test_parameters_of_two_kinds_are_refused():
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())
    with pytest.raises(TypeError, match="2 kinds.*Cast the model to one"):
        sum_gradients(model)


def test_a_batch_with_fewer_rows_than_processes_counts_once():
    assert gap(two("few rows")[0], one("few rows")) < 1e-12


def test_a_dict_of_tensors_is_data_too():
    x, y = toy()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x):
            return self.body(x)

    a = train_parallel(Named(), {"x": x, "labels": y}, parallel="hand", steps=2)
    b = train_parallel(net(), (x, y), parallel="hand", steps=2)
    assert a.losses == b.losses


@pytest.mark.parametrize(
    "how, told",
    [
        ({"parallel": "ddp"}, "needs a group of processes"),
        ({"parallel": "tensor"}, "parallel"),
        ({"steps": 0}, "steps"),
        ({"accumulate": 0}, "accumulate"),
        ({"batch_size": 0}, "batch_size"),
        ({"every": 0}, "every"),
        ({"lr": math.nan}, "lr must be positive"),
        ({"data": (torch.zeros(4, 6), torch.zeros(3).long())}, r"have \[4, 3\] rows"),
        ({"data": (torch.zeros(0, 6), torch.zeros(0).long())}, "at least one"),
    ],
)
def test_training_that_cannot_be_is_refused(how, told):
    with pytest.raises((ValueError, RuntimeError), match=told):
        train_parallel(net(), **{"parallel": "hand", "data": toy()} | how)


# ---------------------------------------------------------------- memory


def held_by_all():
    return {way: trained(way, kind=torch.float32, steps=2).held for way in ("hand", "ddp", "zero", "fsdp")}


def test_ranks_hold_what_the_equation_says():
    held = launch(held_by_all, 2)
    n = sum(p.numel() for p in net().parameters())
    for way, stage in {"hand": 0, "ddp": 0, "zero": 1, "fsdp": 3}.items():
        mean = sum(sum(rank[way].values()) for rank in held) / 2
        assert mean == pytest.approx(zero_bytes(n, 2, stage), rel=0.06), way


@given(st.integers(1, 10**9), st.integers(1, 512), st.booleans())
def test_every_stage_holds_less_and_one_rank_holds_all(n, ranks, mixed):
    sizes = [zero_bytes(n, ranks, stage, mixed) for stage in range(4)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 16 * n
    assert sizes[3] * ranks == pytest.approx(16 * n)
    assert len({zero_bytes(n, 1, stage, mixed) for stage in range(4)}) == 1


# ---------------------------------------------------------------- files in parts, killed ranks


def both_ways(folder, steps):
    """Go on with what another number of processes has written."""
    how = {"steps": steps, "every": 2}
    return {way: trained(way, checkpoint=f"{folder}/{way}", **how) for way in ("ddp", "fsdp")}


@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(first, then, tmp_path):
    launch(both_ways, first, str(tmp_path), 4)
    for way, found in launch(both_ways, then, str(tmp_path), 6)[0].items():
        assert found.start == 4 and len(found.losses) == 2
        assert gap(found, one()) < 1e-12
        assert [p.name for p in (tmp_path / way).iterdir()] == ["step-000006"]


def test_a_finished_run_is_read_and_not_run_again(tmp_path):
    how = {"checkpoint": tmp_path, "parallel": "hand", "steps": 3}
    a, b = (train_parallel(net(), toy(), **how) for _ in range(2))
    assert (b.start, b.losses) == (3, []) and gap(a, b) == 0


def test_the_newest_checkpoint_has_the_largest_step_and_other_folders_do_not_count(tmp_path):
    model = net()
    adam = torch.optim.Adam(model.parameters())
    for step in (999_999, 1_000_000):
        save_shards(tmp_path / str(step), model, adam, step)
        shutil.move(tmp_path / str(step) / f"step-{step}", tmp_path / f"step-{step}")
    (tmp_path / "step-old").mkdir()
    assert load_shards(tmp_path, model, adam) == 1_000_000
    with pytest.raises(ValueError, match="step=-1"):
        save_shards(tmp_path, model, adam, -1)


def test_what_was_written_by_half_is_not_read(tmp_path):
    model = net()
    adam = torch.optim.AdamW(model.parameters())
    assert load_shards(tmp_path, model, adam) == 0
    save_shards(tmp_path, model, adam, 7)
    (tmp_path / "part").mkdir()
    assert load_shards(tmp_path, model, adam) == 7
    save_shards(tmp_path, model, adam, 8)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000008"]


def kill_at(folder, parallel, at, victim):
    """Rank `victim` is killed after step `at` of the first attempt."""

    def watch(step):
        if (step, dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]) == (at, victim, "0"):
            os.kill(os.getpid(), signal.SIGKILL)

    return trained(parallel, dropout=0.3, checkpoint=folder, every=2, watch=watch)


@pytest.mark.parametrize("parallel, at, victim", [("hand", 3, 1), ("fsdp", 5, 0)])
def test_a_run_whose_process_was_killed_equals_the_unbroken_one(parallel, at, victim, tmp_path):
    again = launch(kill_at, 2, str(tmp_path), parallel, at, victim, restarts=1)
    whole = two(f"killed {parallel}")
    assert gap(again[0], whole[0]) == 0 and again[0].start == at - 1


def zeroed(folder):
    trained("zero", checkpoint=folder)


def test_a_zero_optimizer_in_parts_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match='use parallel="fsdp" for files in parts'):
        launch(zeroed, 2, str(tmp_path))


# ---------------------------------------------------------------- cut layers


def halves(kind):
    torch.manual_seed(0)
    a, b = nn.Linear(6, 8).double(), nn.Linear(8, 4, bias=kind).double()
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y = b(torch.relu(a(x)))
    y.square().sum().backward()
    want, wx = y.detach(), x.grad.clone()
    rank = dist.get_rank()
    wa, wb = a.weight.grad.chunk(2, 0)[rank], b.weight.grad.chunk(2, 1)[rank]
    wide, narrow = SplitLinear(a, "columns"), SplitLinear(b, "rows")
    x.grad = None
    got = narrow(torch.relu(wide(x)))
    got.square().sum().backward()
    pairs = [(got, want), (x.grad, wx), (wide.weight.grad, wa), (narrow.weight.grad, wb)]
    if kind:
        pairs.append((narrow.bias.grad, b.bias.grad))
    pairs.append((wide.bias.grad, a.bias.grad.chunk(2)[rank]))
    return max((p - q).abs().max().item() for p, q in pairs)


def against_torch():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    ours = nn.Sequential(SplitLinear(whole[0], "columns"), nn.ReLU(), SplitLinear(whole[2], "rows"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    theirs = parallelize_module(copy.deepcopy(whole), init_device_mesh("cpu", (2,)), plan)
    x = torch.randn(5, 6)
    a, b = ours(x), theirs(x)
    a.sum().backward()
    b.sum().backward()
    same = torch.equal(ours[0].weight.grad, theirs[0].weight.grad.to_local())
    return (a - b).abs().max().item(), same


def cut():
    try:
        SplitLinear(nn.Linear(3, 5), "columns")
    except ValueError as error:
        refused = str(error)
    return halves(True), halves(False), against_torch(), refused


def test_cut_layers_equal_the_whole_one_and_those_of_torch():
    for with_bias, without, (off, same), refused in launch(cut, 2):
        assert max(with_bias, without) < 1e-12 and off < 1e-6 and same
        assert "a layer of 5 outputs cannot be cut into 2 equal parts" in refused


# ---------------------------------------------------------------- pipelines


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["gpipe", "1f1b"]), st.integers(1, 3))
@settings(deadline=None)
def test_a_timetable_keeps_every_order_and_waits_as_long_as_the_equation_says(stages, micro, order, backward):
    table = timetable(stages, micro, order, backward)
    assert (table == 0).mean() == pytest.approx(bubble(stages, micro))
    for k in range(1, micro + 1):
        first = [np.flatnonzero(row == k)[0] for row in table]
        last = [np.flatnonzero(row == -k)[-1] for row in table]
        assert first == sorted(set(first)) and last == sorted(set(last), reverse=True)
        assert all((row == k).sum() == 1 and (row == -k).sum() == backward for row in table)
        assert first[-1] < last[-1]


def in_flight(row):
    return int(np.cumsum((row > 0).astype(int) - (row < 0).astype(int)).max())


def test_one_forward_one_backward_keeps_fewer_micro_batches():
    assert in_flight(timetable(4, 12, "gpipe")[0]) == 12
    assert in_flight(timetable(4, 12, "1f1b")[0]) == 4


@pytest.mark.parametrize("call", [lambda: timetable(0, 1), lambda: timetable(2, 2, "zigzag"), lambda: bubble(1, 0)])
def test_a_pipeline_without_parts_is_refused(call):
    with pytest.raises(ValueError):
        call()


# ---------------------------------------------------------------- what it costs


def test_the_messages_are_those_that_are_sent():
    class Counted:
        def __init__(self, link):
            self.link, self.rank, self.ranks, self.n = link, link.rank, link.ranks, 0

        def exchange(self, x, *about):
            self.n += 1
            return self.link.exchange(x, *about)

    def count(how):
        def call(link):
            seen = Counted(link)
            all_reduce(torch.ones(60), how, seen)
            return seen.n

        return over_links(call, 4)

    assert count("ring") == [cost("ring", 0, 4, 1.0, 1.0)] * 4
    assert count("ordered") == [cost("ordered", 0, 4, 1.0, 1.0)] * 4


@given(st.floats(1e-6, 1e-1), st.floats(1e4, 1e11))
@settings(deadline=None)
def test_latency_and_rate_are_found_again(latency, rate):
    rows = [
        {"how": h, "size": s, "ranks": p, "seconds": cost(h, s, p, latency, rate)}
        for h in ("ring", "tree")
        for s in (1, latency * rate + 1, 1e3 * latency * rate + 2)
        for p in (2, 4)
    ]
    found = fit_cost(rows)
    assert found.latency == pytest.approx(latency, rel=1e-2) and found.rate == pytest.approx(rate, rel=1e-2)


def test_a_tree_wins_with_small_tensors_and_a_ring_with_large_ones():
    small, large = ([cost(h, s, 64, 1e-3, 1e8) for h in ("ring", "tree")] for s in (1e2, 1e8))
    assert small[1] < small[0] and large[0] < large[1]


def test_one_size_does_not_tell_latency_from_rate():
    row = {"how": "ring", "size": 10, "ranks": 2, "seconds": 1.0}
    with pytest.raises(ValueError, match="a small and a large tensor"):
        fit_cost([row, row])
    with pytest.raises(ValueError, match="above 0"):
        fit_cost([row, row | {"size": 20, "seconds": 0.0}])
    with pytest.raises(ValueError, match="size must be at least 0"):
        fit_cost([row, row | {"size": -20}])
    with pytest.raises(ValueError, match="a row lacks ranks"):
        fit_cost([row, {k: v for k, v in row.items() if k != "ranks"}])
    with pytest.raises(ValueError, match="size must be at least 0"):
        cost("ring", math.nan, 2, 0.0, 1.0)


def test_what_slow_links_take_is_what_the_model_says():
    def timed(link):
        link.wait()
        begun = time.perf_counter()
        all_reduce(torch.zeros(20_000), "ring", link)
        link.wait()
        return time.perf_counter() - begun

    told = cost("ring", 80_000, 3, 0.02, 1e6)
    seconds = min(max(over_links(timed, 3, 0.02, 1e6)) for _ in range(3))
    assert 0.95 * told <= seconds < 2 * told, "a busy machine is late, never early"


# ---------------------------------------------------------------- rows from disk


@pytest.fixture
def files(tmp_path):
    made, start = [], 0
    for k, n in enumerate((7, 1, 12)):
        x = torch.arange(start, start + n)
        save_file({"x": x, "twice": torch.stack((x, 2 * x), 1).float()}, tmp_path / f"{k}.safetensors")
        made.append(tmp_path / f"{k}.safetensors")
        start += n
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [3, 4, 19, 20, 100])
@pytest.mark.parametrize("block", [1, 3, 64])
def test_every_row_comes_once_on_one_rank(files, ranks, size, block):
    parts = [ShardedRows(files, size, rank, ranks, block=block) for rank in range(ranks)]
    batches = [list(part) for part in parts]
    assert {len(b) for b in batches} == {len(parts[0])}, "all have the same number of batches"
    seen = torch.cat([b["x"] for mine in batches for b in mine])
    assert sorted(seen.tolist()) == list(range(20))
    assert all(len(b["x"]) > 0 and torch.equal(b["twice"][:, 1], 2 * b["x"].float()) for mine in batches for b in mine)


def test_another_epoch_has_another_order_and_the_same_one_the_same(files):
    rows = ShardedRows(files, 4, 0, 1, block=2)

    def order(epoch):
        rows.set_epoch(epoch)
        return torch.cat([b["x"] for b in rows]).tolist()

    assert order(0) == order(0) != order(1)
    assert order(0) != list(range(20))


def test_the_sampler_of_torch_repeats_rows_and_ours_does_not(files):
    from torch.utils.data import DistributedSampler

    theirs = [i for rank in range(3) for i in DistributedSampler(range(20), 3, rank)]
    assert len(theirs) == 21 and len(set(theirs)) == 20
    assert sum(len(b["x"]) for rank in range(3) for b in ShardedRows(files, 6, rank, 3)) == 20


def test_a_file_is_mapped_and_not_read(tmp_path):
    path = tmp_path / "big.safetensors"
    save_file({"x": torch.zeros(2_000_000, 4)}, path)
    import tracemalloc

    tracemalloc.start()
    rows = ShardedRows(path, 64, 0, 1)
    for _, batch in zip(range(50), rows, strict=False):
        assert batch["x"].shape == (64, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 < path.stat().st_size


def test_files_that_do_not_fit_are_refused(tmp_path, files):
    other = tmp_path / "other.safetensors"
    save_file({"y": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="give all files the same"):
        ShardedRows([*files, other], 4, 0, 1)
    save_file({"x": torch.zeros(3), "y": torch.zeros(2)}, other)
    with pytest.raises(ValueError, match=r"tensors of \[2, 3\] rows"):
        ShardedRows(other, 4, 0, 1)
    save_file({"x": torch.zeros(3, dtype=torch.bfloat16)}, other)
    with pytest.raises(TypeError, match="x is stored as BF16"):
        ShardedRows(other, 4, 0, 1)
    with pytest.raises(ValueError, match="no file"):
        ShardedRows([], 4, 0, 1)
    save_file({"x": torch.zeros(3), "twice": torch.zeros(3, 2)}, other)
    with pytest.raises(ValueError, match="a row of x is float32"):
        ShardedRows([*files, other], 4, 0, 1)
    save_file({"x": torch.zeros(3).long(), "twice": torch.zeros(3, 3)}, other)
    with pytest.raises(ValueError, match=r"a row of twice is float32 \(3,\)"):
        ShardedRows([*files, other], 4, 0, 1)
    with pytest.raises(ValueError, match="give both, or none"):
        ShardedRows(files, 4, rank=1)
    other.write_text("no tensors in here")
    with pytest.raises(ValueError, match="other.safetensors is no safetensors file"):
        ShardedRows(other, 4, 0, 1)
    with pytest.raises(ValueError, match="a batch needs a row for each"):
        ShardedRows(files, 2, 0, 3)
    with pytest.raises(ValueError, match="1 rows for 2 ranks"):
        ShardedRows(files[1], 2, 0, 2)


# ---------------------------------------------------------------- sweeps and the study


@pytest.fixture
def study():
    """Not imported above: the processes of this file need not know it."""
    from ftbook.studies import distributed

    return distributed


def test_a_pool_of_processes_finds_what_one_process_finds(study):
    tasks = [(0, 16), (1, 16)]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("forkserver")) as pool:
        found = [job.result() for job in [pool.submit(study.sweep_task, *task) for task in tasks]]
    assert found == [study.sweep_task(*task) for task in tasks]


def test_a_sweep_runs_on_dask(study, tmp_path, monkeypatch):
    Client = pytest.importorskip("distributed").Client
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    how = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "dashboard_address": None}
    with Client(**how) as client:
        options = {"chapter": "99_toy", "name": "sizes", "seeds": [0, 1], "executor": client.get_executor()}
        results.sweep(study.sweep_task, {"width": [4, 8]}, **options)
    assert len(results.load_sweep("99_toy", "sizes").rows) == 4, "two widths, two seeds"


def test_the_rate_of_many_devices_follows_the_rule(study):
    assert [study.factor_of(rule, 16) for rule in ("searched", "kept", "square root", "linear")] == [1, 1, 4, 16]


def test_the_study_measures_links_and_rows(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    study.main("links", "reading")
    links, reading = (results.load(study.CHAPTER, name) for name in ("links", "reading"))
    assert {r["ranks"] for r in links} == set(study.RANKS) and all(r["predicted"] > 0 for r in links)
    assert [r["whole"] for r in reading] == [False, True] * len(study.ROWS)


def test_the_study_loses_ranks_and_goes_on(study, tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))
    monkeypatch.setattr(study, "SEEDS", (0,))
    study.main("killed")
    assert all(r["same"] for r in results.load(study.CHAPTER, "killed"))


def test_an_unknown_part_is_refused_before_anything_runs(study):
    with pytest.raises(ValueError, match="no study 'speed'; use ways, batches"):
        study.main("speed")
