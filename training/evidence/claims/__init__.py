"""The paper's claims tested by a plan that was written before: decoders trained together with the end of one encoder.

`plan` reads the plan, `tokens` computes once what does not move, `runs` trains and evaluates, `noise` and `costs`
measure, `statistics` compares, `verdicts` judges the hypotheses, `report` writes what came out, `exploration` looks
for reasons.
"""

from .costs import measure_plan_costs
from .exploration import build_exploration, explore, render_exploration
from .noise import load_noise
from .plan import DatasetPlan, NoisePlan, Plan, read_plan
from .report import draw_claims, render_claims
from .runs import run_grid
from .verdicts import build_claims

__all__ = [
    "DatasetPlan",
    "NoisePlan",
    "Plan",
    "build_claims",
    "build_exploration",
    "draw_claims",
    "explore",
    "load_noise",
    "measure_plan_costs",
    "read_plan",
    "render_claims",
    "render_exploration",
    "run_grid",
]
