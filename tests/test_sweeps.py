"""The stored sweeps: the parts that only the gpu profile runs, here on made-up files and a tiny model."""

import importlib.util
import json
import os

import pytest

from ftbook import ner
from ftbook.corpus import read_conll


def sweep(root, name):
    """A script of results/sweeps as a module."""
    spec = importlib.util.spec_from_file_location(f"sweep_{name}", root / "results" / "sweeps" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def columns(sentences):
    """CoNLL-2003's four columns with IOB1 tags, as its original files have them."""
    rows = [
        [f"{w} NNP I-NP {t.replace('B-', 'I-')}\n" for w, t in zip(s.words, s.tags, strict=True)] for s in sentences
    ]
    return ("-DOCSTART- -X- -X- O\n\n" + "\n".join("".join(lines) for lines in rows)).encode()


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A tiny encoder and its tokenizer in place of BERT-base."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    letters = [chr(i) for i in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters)]
    config = BertConfig(
        vocab_size=len(pieces),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=160,
    )
    BertModel(config).save_pretrained(tmp_path / "base")
    vocab = tmp_path / "base" / "vocab.txt"
    vocab.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    BertTokenizerFast(str(vocab), do_lower_case=False).save_pretrained(tmp_path / "base")
    monkeypatch.setitem(ner.BERT_BASE, "pretrained_model_name_or_path", str(tmp_path / "base"))


def test_named_entities_on_conll_2003_in_the_gpu_profile(root, fake, base, tmp_path, monkeypatch):
    corpus = list(read_conll(root / "ftbook" / "assets" / "ner_corpus" / "train.conll"))
    fake(
        "conll2003",
        "bio",
        {f"{part}.txt": columns(corpus[i : i + 8]) for part, i in (("train", 0), ("valid", 8), ("test", 16))},
    )
    monkeypatch.setenv("FTBOOK_PROFILE", "gpu")
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path / "results"))
    script = sweep(root, "10_ner")
    script.SETTINGS["epochs"] = 1
    assert script.SETTINGS["sentences"] is None and script.BUDGET.startswith("all sentences")
    script.main([("pretrained", "full", "right"), ("random", "full", "right")])
    stored = json.loads((tmp_path / "results" / "10_ner.json").read_text())["gpu"]["final"]["value"]
    assert stored["n"] == 8 and len(stored["runs"]) == 6
    assert all(run["metrics"]["valid_f1"] >= 0 and "test_f1" in run["metrics"] for run in stored["runs"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
