"""Measures the selector: speed of the surrogate environment, its share of a run, and how far its two rewards agree.

    python benchmarks/selector/bench.py --run RUN --data-root DATA --pair A.jsonl:B.jsonl

writes ``benchmarks/results/selector.json``. RUN is the folder of a run that trains its policy, such as one with
``--selector ppo``. What is not given is left out.
"""

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from l2a.config import SelectorConfig, load_config
from l2a.generator.chain import CandidatePool
from l2a.pipeline.policies import prepare_pair
from l2a.report.run_folder import versions
from l2a.selector.environment import SelectionVecEnv, build_task
from l2a.selector.problem import SelectionProblem, keep_best
from l2a.selector.reward import Views, fit_surrogate
from l2a.selector.select import rerank, retest
from l2a.teacher.labelling import TeacherOutputs
from l2a.util.files import atomic_write_text, to_json

RESULTS = Path(__file__).parents[1] / "results" / "selector.json"
CORES = 2
ENVIRONMENTS = 32
REWARD_TEXTS = 1000


def invented_problem(size: int = 10_000) -> SelectionProblem:
    """Make a large pool, of noise."""
    rng = np.random.default_rng(0)
    views = Views(*(rng.normal(size=(size, width)).astype(np.float32) for width in (384, 2, 2)))
    numbers = rng.random((4, size)).astype(np.float32)
    names = tuple(("a text",) for _ in range(size))
    operators = tuple(rng.choice(["source", "knn", "mix"], size).tolist())
    teacher = TeacherOutputs(views.teacher, views.states)
    pool = CandidatePool(names, ("source:0",) * size, operators, numbers[0], teacher, *numbers[1:])
    surrogate = fit_surrogate(views, [], 1.0, views.take(np.arange(REWARD_TEXTS)))
    return SelectionProblem(pool, lambda: views.student, lambda: surrogate)


def count_steps(seconds: float) -> tuple[float, float]:
    """Step the surrogate environments with random decisions on one thread, for some seconds.

    Args:
        seconds: How long, after the first steps.

    Returns:
        Environment steps a second and a second of processor time, each over 32 candidates.
    """
    task = build_task(invented_problem(), SelectorConfig())
    environments, rng = SelectionVecEnv([task], ENVIRONMENTS, 0), np.random.default_rng(0)
    actions = rng.random((16, ENVIRONMENTS, task.batch)) < 0.5
    with threadpool_limits(1):
        environments.reset()
        environments.step(actions[0])
        started, used, steps = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - started < seconds:
            environments.step(actions[steps % len(actions)])
            steps += 1
        elapsed, used = time.perf_counter() - started, time.process_time() - used
        return steps * ENVIRONMENTS / elapsed, steps * ENVIRONMENTS / used


def steps_per_second(seconds: float) -> dict[str, int]:
    """Add up what one process a core steps at the same time; on a busy machine processor time is the fair measure."""
    with ProcessPoolExecutor(CORES) as processes:
        wall, processor = np.sum(list(processes.map(count_steps, [seconds] * CORES)), axis=0)
    return {"steps_per_second": round(wall), "steps_per_processor_second": round(processor)}


def share_of_run(run: Path) -> float:
    """Read which share of a run's time its selector took, the judging of selections included.

    Args:
        run: Output folder of ``l2a distill``.

    Returns:
        Seconds in the stage "select candidates" over those from the first line of the log to the last event.
    """
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    selected = sum(line["seconds"] for line in lines if line.get("stage") == "select candidates")
    return float(selected / max(line["seconds"] for line in lines if line["event"] != "stage"))


def tiers_of(source: str, target: str, data_root: str | None, selections: int, preset: str) -> dict[str, Any]:
    """Judge random selections of one pair's first pool by both rewards, as a run does that distrusts its policies.

    Args:
        source: Source domain.
        target: Target domain.
        data_root: Folder that relative paths start from.
        selections: How many.
        preset: Budget of the warm-up, size of the pool and share that is kept.

    Returns:
        Rank correlation of the two rewards, and of each with a second measurement of itself.
    """
    config = load_config(preset, None, {"source": source, "target": target, "data_root": data_root})
    problem = prepare_pair(config).problem
    selector = replace(config.selector, real_evaluations=selections)
    assert problem.real_reward is not None
    task, rng = build_task(problem, selector), np.random.default_rng(0)
    tiers, scores = rerank([], task, problem.real_reward, selector, rng)
    kept = [keep_best(values, selector.keep_rate, task.classes) for values in scores]
    return {"tier_correlation": tiers.correlation, **retest(kept, tiers, problem)}


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measures the selector.")
    parser.add_argument("--run", type=Path, help="output folder of a finished run, for the share of its time")
    parser.add_argument("--data-root", help="folder that the pairs' paths start from")
    parser.add_argument("--pair", action="append", default=[], metavar="SOURCE:TARGET", help="may be repeated")
    parser.add_argument("--preset", default="screening", help="card in configs/ with the budget of the pairs")
    parser.add_argument("--selections", type=int, default=16, help="selections judged by both rewards, a pair")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--smoke", action="store_true", help="seconds: a short count of steps and nothing trained")
    return parser.parse_args()


def main() -> None:
    """Measure what was asked for, print it and write it."""
    options = parsed()
    found: dict[str, Any] = {
        **steps_per_second(0.5 if options.smoke else 10.0),
        "measured": f"{CORES} processes of one thread, {ENVIRONMENTS} environments each, 32 candidates a step, "
        f"{REWARD_TEXTS:,} reward texts",
        "versions": versions(),
    }
    if options.run is not None:
        found["share_of_run"] = round(share_of_run(options.run), 4)
    pairs = [] if options.smoke else [pair.split(":") for pair in options.pair]
    by_pair = {
        f"{source}:{target}": tiers_of(source, target, options.data_root, options.selections, options.preset)
        for source, target in pairs
    }
    if by_pair:
        found |= {"preset": options.preset, "by_pair": by_pair}
        found["tier_correlation"] = float(np.mean([one["tier_correlation"] for one in by_pair.values()]))
    atomic_write_text(options.output, to_json(found, indent=1) + "\n")
    print(to_json(found, indent=1))


if __name__ == "__main__":
    main()
