"""Judge a logged run again from its measurements: the same bytes, or something was altered.

python -m flows verdict RUN_ID
"""

from __future__ import annotations

from recipes.schema import Recipe
from tasks import registry
from tasks.gate import judge
from tasks.measurements import measurements_from_json, verdict_bytes


def recompute(run_id: str) -> tuple[bytes, bool]:
    """The verdict's canonical JSON, and whether it is what the run logged."""
    logged = registry.judged(run_id)
    recipe = Recipe.model_validate(logged.recipe)
    again = verdict_bytes(judge(measurements_from_json(logged.measurements), recipe.gate))
    return again, again == logged.verdict
