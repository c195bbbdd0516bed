"""A whole run shared by two processes: the first alone writes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from l2a.config import as_yaml, override


@pytest.mark.slow
def test_two_processes_make_one_run(config, shared_cache, tmp_path):
    small = override(config, {"kd.rounds": 1, "selector.agent": "random", "compare": False})
    (tmp_path / "run.yaml").write_text(as_yaml(replace(small, output_dir=str(tmp_path / "run"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "l2a"]
    command += ["distill", "--config", str(tmp_path / "run.yaml")]
    folders = {"PYTHONPATH": str(Path(__file__).parents[2]), "L2A_CACHE": str(shared_cache)}
    environment = {**os.environ, **folders, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rows" in json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert done.stdout.count("evidence:") == 1
