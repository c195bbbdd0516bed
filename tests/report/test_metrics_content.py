import json
import math
import re
from pathlib import Path

import pytest

from l2a.report.run_folder import metrics_content, peak_memory_mb
from l2a.util.errors import RunError
from tests.report.conftest import make_row

STATUS = Path("/proc/self/status")


def content(rows, **facts):
    return metrics_content(rows, facts)


def test_content_has_the_promised_fields(rows):
    metrics = json.loads(json.dumps(content(rows, rounds=[1])))
    assert metrics.keys() == {"rows", "peak_memory_mb", "versions", "threads", "rounds"}
    assert metrics["rows"][0] == {
        "name": "tfidf_logreg",
        "accuracy": {"value": 0.7, "low": pytest.approx(0.65), "high": pytest.approx(0.75)},
        "macro_f1": {"value": pytest.approx(0.69), "low": pytest.approx(0.64), "high": pytest.approx(0.74)},
        "parameters": 1234567,
        "latency_ms": {"batch_1": 1.234, "batch_1_spread": 0.1, "batch_32": 0.5, "batch_32_spread": 0.02},
    }
    assert {"python", "l2a", "torch", "transformers"} <= metrics["versions"].keys()
    assert metrics["threads"] == 1


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_row(wrong):
    with pytest.raises(RunError, match=r"tfidf_logreg is not finite"):
        content([make_row("tfidf_logreg", 0.7, latency_ms={"batch_1": wrong, "batch_32": 1.0})])


@pytest.mark.skipif(not STATUS.exists(), reason="the reference is Linux's own record")
def test_peak_memory_is_the_high_water_mark_in_megabytes():
    mark = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert mark is not None
    assert peak_memory_mb() == pytest.approx(int(mark[1]) * 1024 / 1e6, rel=0.02)
