"""Profiles, device, seeds, meters, atomic files."""

import ast
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ftbook import runtime


def test_profile_reads_the_environment_and_names_what_is_allowed(monkeypatch):
    monkeypatch.setenv("FTBOOK_PROFILE", " CPU ")
    assert runtime.profile() == "cpu"
    monkeypatch.setenv("FTBOOK_PROFILE", "fast")
    with pytest.raises(ValueError, match="quick, cpu, gpu"):
        runtime.profile()


def test_without_a_word_the_profile_is_cpu_and_a_gpu_is_mentioned_once(monkeypatch, capsys):
    monkeypatch.delenv("FTBOOK_PROFILE")
    for empty in (None, "", "  "):
        if empty is not None:
            monkeypatch.setenv("FTBOOK_PROFILE", empty)
        for kind, lines in (("cpu", 0), ("mps", 1)):
            runtime._mention_gpu.cache_clear()
            monkeypatch.setattr(runtime, "device", lambda kind=kind: torch.device(kind))
            assert (runtime.profile(), runtime.profile()) == ("cpu", "cpu")
            assert capsys.readouterr().out.count("FTBOOK_PROFILE=gpu") == lines
    runtime._mention_gpu.cache_clear()


@pytest.mark.parametrize(
    ("value", "offline"),
    [
        (None, False),
        ("", False),
        ("  ", False),
        ("0", False),
        ("false", False),
        ("False", False),
        (" no ", False),
        ("NO", False),
        ("off", False),
        ("1", True),
        ("true", True),
        ("yes", True),
        ("On", True),
    ],
)
def test_offline_is_what_the_switch_says(monkeypatch, value, offline):
    monkeypatch.delenv("FTBOOK_OFFLINE", raising=False)
    if value is not None:
        monkeypatch.setenv("FTBOOK_OFFLINE", value)
    assert runtime.offline() is offline


@pytest.mark.parametrize("word", ["2", "n", "flase", "offline"])
def test_a_word_that_is_no_yes_or_no_is_an_error_that_names_the_allowed_ones(monkeypatch, word):
    monkeypatch.setenv("FTBOOK_OFFLINE", word)
    with pytest.raises(ValueError, match=f"is '{word}'; 1, true, yes or on .* 0, false, no or off"):
        runtime.offline()


def test_every_environment_variable_of_the_book_is_read_in_one_place(root):
    """Modules read FTBOOK_ variables through `runtime.setting`, so that blanks and an empty value mean the same everywhere."""
    found = []
    for file in sorted((root / "ftbook").glob("[!_]*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Call, ast.Subscript)) and "environ" in ast.unparse(
                node.func if isinstance(node, ast.Call) else node.value
            ):
                if "FTBOOK_" in ast.unparse(node):
                    found.append(f"{file.stem}: {ast.unparse(node)}")
    assert found == []


def test_the_chapter_runs_cell_by_cell_in_a_plain_kernel(root, tmp_path):
    """With no variable of ours set, as in a JupyterLab that somebody just opened."""
    nb = json.loads((root / "nbs" / "A3_runtime.ipynb").read_text(encoding="utf-8"))
    cells = [c["source"] for c in nb["cells"] if c["cell_type"] == "code"]
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    code = (
        "import json, pathlib\nspace = {'__name__': '__main__'}\n"
        "for cell in json.loads(pathlib.Path('cells.json').read_text()):\n    exec(''.join(cell), space)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FTBOOK_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_pick_falls_back_to_smaller_profiles_only():
    assert runtime.pick(quick=1, cpu=2, gpu=3, profile="gpu") == 3
    assert runtime.pick(quick=1, cpu=2, profile="gpu") == 2
    assert runtime.pick(quick=1, profile="cpu") == 1
    assert runtime.pick(quick=None, cpu=2, profile="quick") is None
    assert runtime.pick(quick="now", cpu="later") == "now"
    with pytest.raises(TypeError, match="add quick="):
        runtime.pick(cpu=2, profile="quick")
    with pytest.raises(ValueError, match="profile is 'huge'"):
        runtime.pick(quick=1, profile="huge")


def test_device_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FTBOOK_DEVICE", "cpu")
    assert runtime.device() == torch.device("cpu")
    monkeypatch.setenv("FTBOOK_DEVICE", "tpu")
    with pytest.raises(ValueError, match="this machine has: .*cpu"):
        runtime.device()
    monkeypatch.delenv("FTBOOK_DEVICE")
    assert runtime.device().type in ("cuda", "mps", "cpu")


def test_device_name_of_every_kind(monkeypatch):
    assert "cores" in runtime.device_name("cpu")
    assert runtime.device_name("mps").startswith("Apple GPU of")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda kind: f"card {kind}")
    assert runtime.device_name("cuda:1") == "card cuda:1"
    monkeypatch.setattr(runtime, "Path", lambda name: Path("/nowhere"))
    assert runtime._cpu_model() == ""


def test_seeding_repeats_all_three_generators():
    def draw():
        runtime.seed_everything(11)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()
    for wrong, error in ((1.5, TypeError), (True, TypeError), (-1, ValueError), (2**32, ValueError)):
        with pytest.raises(error, match="give an integer"):
            runtime.seed_everything(wrong)


def test_native_bf16_asks_the_hardware(monkeypatch):
    for flags, expected in (({"avx2"}, False), ({"avx512_bf16"}, True), ({"amx_bf16"}, True), ({"bf16"}, True)):
        monkeypatch.setattr(runtime, "_cpu_flags", lambda flags=flags: flags)
        assert runtime.native_bf16("cpu") is expected
    assert runtime.native_bf16("mps") is False
    for capability, expected in (((7, 5), False), ((8, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda kind, c=capability: c)
        monkeypatch.setattr(torch.version, "hip", None)
        assert runtime.native_bf16("cuda") is expected
    monkeypatch.setattr(torch.version, "hip", "6")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert runtime.native_bf16("cuda") is True


def test_cpu_flags_without_proc(monkeypatch):
    assert runtime._cpu_flags()
    monkeypatch.setattr(runtime, "Path", lambda name: Path("/nowhere"))
    assert isinstance(runtime._cpu_flags(), set)


def hold(megabytes):
    return np.ones(megabytes * 125_000)  # float64: 8 bytes each


def test_meter_sees_a_peak_that_is_gone_at_the_end():
    with runtime.Meter("cpu") as m:
        hold(80).sum()
        assert m.running and m.seconds > 0
    assert not m.running and 60 < m.peak_mb < 200
    assert m.seconds > 0 and "MB" in repr(m)


def test_nested_meters_keep_the_outer_peak():
    with runtime.Meter("cpu") as outer:
        hold(80).sum()
        with runtime.Meter("cpu") as inner:
            hold(30).sum()
    assert outer.peak_mb > 60 and inner.peak_mb < outer.peak_mb
    assert runtime.Meter("cpu").peak_mb == 0.0


def test_meter_closes_on_an_error():
    with pytest.raises(RuntimeError), runtime.Meter("cpu") as m:
        raise RuntimeError
    assert not m.running


def test_peak_memory_returns_the_result():
    result, mb = runtime.peak_memory(lambda: float(hold(50).sum()), "cpu")
    assert result == 50 * 125_000 and mb > 30


def test_sampled_gauge_finds_the_peak_of_its_value():
    values = iter([1.0, 5.0, *[2.0] * 100_000])
    gauge = runtime._SampledGauge(lambda: next(values), "value", every=0.001)
    gauge.reset()
    while gauge.peak < 5:
        gauge.halt.wait(0.001)
    gauge.stop()
    gauge.stop()
    assert gauge.read() == 5.0 and "sampled every 1 ms" in gauge.method and gauge.now() == 2.0


def test_gauges_by_machine(monkeypatch):
    assert runtime._gauge_for("cpu").read() > 0
    monkeypatch.setattr(runtime._LinuxGauge, "works", lambda self: False)
    assert isinstance(runtime._gauge_for("cpu"), (runtime._SampledGauge, runtime._MaxRssGauge))
    monkeypatch.setattr(runtime, "Path", lambda name: Path("/nowhere"))
    gauge = runtime._gauge_for("cpu")
    assert isinstance(gauge, runtime._MaxRssGauge) and gauge.read() >= gauge.now() > 0
    gauge.reset()
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None)
    nothing = runtime._gauge_for("cpu")
    assert np.isnan(nothing.now()) and np.isnan(nothing.read()) and nothing.stop() is None


def test_linux_gauge_without_the_right_is_said_not_to_work(monkeypatch):
    def refuse(self):
        raise PermissionError

    monkeypatch.setattr(runtime._LinuxGauge, "reset", refuse)
    assert runtime._LinuxGauge().works() is False
    with pytest.raises(OSError, match="no line VmNone"):
        runtime._status_mb("VmNone")


def test_cuda_and_mps_gauges_ask_their_drivers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda d: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 3e6)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda d: 7e6)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda d: None)
    with runtime.Meter("cuda") as m:
        assert runtime._gauge_for("cuda").now() == 3.0
    assert m.peak_mb == 7.0 and "max_memory_allocated" in m.method
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2e6)
    assert runtime._gauge_for("mps").now() == 2.0


def test_atomic_write_replaces_whole_files_or_nothing(tmp_path):
    path = tmp_path / "deep" / "a.json"
    with runtime.atomic_write(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".json"
        temporary.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), runtime.atomic_write(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(FileNotFoundError, match="nothing was written"), runtime.atomic_write(path):
        pass
    assert path.read_text() == "one" and [f.name for f in path.parent.iterdir()] == ["a.json"]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys\nfrom ftbook.runtime import atomic_write\nwith atomic_write(sys.argv[1]) as t:\n"
        "    t.write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)])
    assert run.returncode == -9 and path.read_text() == "old"


def test_the_cache_follows_the_environment_and_versions_skip_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("FTBOOK_DATA", str(tmp_path))
    assert runtime.cache_dir() == tmp_path
    monkeypatch.delenv("FTBOOK_DATA")
    assert runtime.cache_dir().name == "ftbook" and not os.environ.get("FTBOOK_DATA")
    assert set(runtime.versions("torch", "no-such-package")) == {"torch"}
