"""Chapter 1's studies: probes on clothing and on photos, in the quick profile."""

import numpy as np
import pytest

from ftbook import results
from ftbook.studies import background as study


@pytest.mark.parametrize("inputs", ["pixels", "PCA", *study.NETWORKS])
def test_a_probe_on_clothing_is_scored_on_the_split_it_is_told(inputs):
    for split, n in (("valid", study.SIZES["valid"]), ("test", len(study.images("test", study.TARGET)[1]))):
        right = study.run_clothing(0, split, inputs, labels=3, C=0.01)["accuracy"]
        assert right.shape == (n,) and right.dtype == bool


def test_photos_to_learn_from_are_not_those_that_choose():
    y = study.photos("pixels")["train"][1]
    few, rest = study._drawn(0, y)
    assert not set(few) & set(rest) and len(few) + len(rest) == len(y)
    right = {s: study.run_photos(0, s, "pixels", labels=3, C=0.01)["accuracy"] for s in ("valid", "test")}
    assert len(right["valid"]) == len(rest) and len(right["test"]) == len(study.photos("pixels")["test"][1])


def test_source_and_target_change_places():
    classes = [study.images("test", c)[1] for c in (study.TARGET, study.SOURCE)]
    straight, swapped = (study.described("pixels", 0, s)["test"][1] for s in (False, True))
    assert (straight == classes[0].numpy()).all() and (swapped == classes[1].numpy()).all()


@pytest.mark.filterwarnings("ignore:.*at the edge")
def test_the_studies_have_a_row_for_every_kind_of_input_and_number_of_labels(tmp_path, monkeypatch):
    monkeypatch.setenv("FTBOOK_RESULTS", str(tmp_path))

    def fake(seed, split, inputs, labels, C):
        return {"accuracy": np.arange(8) < 2 + C / 10 + (seed % 2)}

    monkeypatch.setattr(study, "run_clothing", fake)
    monkeypatch.setattr(study, "run_photos", fake)
    study.main()
    for name, rows in (("photos", study.photo_rows()), ("clothing", study.clothing_rows())):
        found = results.load_study(study.CHAPTER, name).rows("accuracy")
        assert [(r["inputs"], r["labels"]) for r in found] == [(r["inputs"], r["labels"]) for r in rows]
        assert {r["tried"] for r in found} == {len(study.STRENGTHS)}
    leak = results.load_study(study.CHAPTER, "leak").rows("accuracy")
    assert [r["inputs"] for r in leak] == ["layer, clothing", "layer, all classes"]
    with pytest.raises(ValueError, match="no study 'shirts'; use photos, clothing, leak"):
        study.main("shirts")
