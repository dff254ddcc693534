"""The GPU command: its sections at toy size on the CPU, and how it deals with those that fail, hang
or come too late.
"""

import json
import sys

import numpy as np
import pytest

from experiments.gpu import correctness, results, sections


def fake(scripts):
    """Starts `python -c` in place of each section."""
    return lambda name, output, rehearse: sections.logged(
        [sys.executable, "-c", scripts[name]], output / f"{name}.log"
    )


def test_a_section_that_fails_or_hangs_ends_no_other(tmp_path):
    line = json.dumps({"section": "grouped", "what": "forward | backward", "tflops": 123.4})
    scripts = {
        "device": "raise ValueError('no such device')",
        "training": "import time; time.sleep(60)",
        "grouped": f"open({str(tmp_path / 'measurements.jsonl')!r}, 'a').write({line!r} + '\\n')",
    }
    statuses = sections.run_all(list(scripts), tmp_path, 4.0, False, begin=fake(scripts))
    assert statuses["device"] == "failed with code 1: ValueError: no such device"
    assert statuses["training"].startswith("out of time after 1 s")
    assert statuses["grouped"] == "done"
    text = (tmp_path / "gpu.md").read_text()
    assert (
        "| forward \\| backward | 123.4 |" in text
        and "no such device" in text
        and "out of time after 1 s" in text
    )
    assert [r["section"] for r in results.read(tmp_path) if "status" in r] == list(scripts)


def test_what_does_not_begin_in_time_is_recorded(tmp_path):
    scripts = dict.fromkeys(("reference", "correctness", "training"), "import time; time.sleep(60)")
    statuses = sections.run_all(
        ["correctness", "training"], tmp_path, 0.5, True, begin=fake(scripts)
    )
    assert statuses["correctness"].startswith("no numbers from the CPU: out of time")
    assert statuses["training"] == "not run: out of time"
    assert "not run: out of time" in (tmp_path / "gpu.md").read_text()


@pytest.mark.parametrize("name", ["device", "grouped", "attention"])
def test_kernel_sections_measure_here_or_say_what_they_need(name, tmp_path):
    sections.run_here(name, tmp_path, True)
    records = results.read(tmp_path)
    assert {r["section"] for r in records} == {name}
    assert all("tflops" in r or name == "device" for r in records if "error" not in r)
    errors = [r["error"] for r in records if "error" in r]
    assert (
        errors == ["needs a GPU, this is a cpu"] * {"device": 0, "grouped": 1, "attention": 2}[name]
    )
    assert max(r.get("largest_difference", 0) for r in records) < 0.02


def test_training_and_decoding_give_their_speed(tmp_path):
    for name in ("training", "decoding"):
        sections.run_here(name, tmp_path, True)
    training, *decoding = results.read(tmp_path)
    assert training["tokens_per_s"] > 0 and 0 < training["mfu"] < 1
    assert [(r["weights"], r["batch"]) for r in decoding] == [("float32", 4), ("fp8", 4)]
    assert all(r["tokens_per_s"] > 0 for r in decoding)


def test_the_verdict_is_of_the_numbers():
    rng = np.random.default_rng(0)
    names = ("logits", "loss", "gradients/a", "gradients/b", "update/a", "log-probabilities")
    expected = {name: rng.normal(size=(2, 3)) for name in names} | {"tokens": np.ones((2, 3), int)}
    found = expected | {name: expected[name] * (1 + 1e-6) for name in names}
    assert correctness.compare(found, expected, "float32")["verdict"] == "PASS"
    for name in names:
        wrong = found | {name: expected[name] * 1.01}
        verdict = correctness.compare(wrong, expected, "float32")["verdict"]
        assert verdict == f"FAIL: {name.split('/')[0]}"
    other = found | {"tokens": np.array([[1, 1, 1], [1, 0, 1]])}
    assert correctness.compare(other, expected, "float32")["verdict"] == "FAIL: greedy tokens"
    assert (
        correctness.compare(found | {"loss": np.nan}, expected, "bfloat16")["verdict"]
        == "FAIL: loss"
    )
