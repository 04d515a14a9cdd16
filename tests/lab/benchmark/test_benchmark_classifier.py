import pytest

from ws_detectron.lab.benchmark import classifier
from ws_detectron.lab.benchmark.measurements import table


def test_every_variant_is_timed_in_every_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "MAX_STEPS", 2)
    parts = classifier.measure_classifier("cpu", 3, 0, ["bn", "gn_ws"], [4, 8])
    for batch_size, part in zip((4, 8), parts):
        assert part["facts"] == {"batch_size": batch_size, "steps": 2}
        assert {n: len(values) for n, values in part["seconds"].items()} == {"bn": 3, "gn_ws": 3}
        # 16 images take some milliseconds, 50,000 over a second
        assert all(value > 1 for values in part["seconds"].values() for value in values)


def test_compiled_is_related_to_compiled_bn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "MAX_STEPS", 2)
    monkeypatch.setattr(classifier.torch, "compile", lambda model, **_: model)
    modes = ["plain", "compile"]
    (part,) = classifier.measure_classifier("cpu", 2, 0, ["bn", "gn"], [4], modes)
    assert list(part["seconds"]) == ["bn", "bn, compiled", "gn", "gn, compiled"]
    part["seconds"].update({"bn, compiled": [10.0, 20.0], "gn, compiled": [15.0, 30.0]})
    (row,) = [
        line
        for line in table({"kind": "classifier", "parts": [part]}).splitlines()
        if line.startswith("| gn, compiled")
    ]
    assert "1.50 (1.50 to 1.50)" in row and "15.0 (1.50)" in row
