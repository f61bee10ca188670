"""Text in, one of several labels out."""

from tasks.types.classes import *  # noqa: F403
from tasks.types.texts import *  # noqa: F403

AUTO = "AutoModelForSequenceClassification"
ANSWER = {"label": "string", "score": "double", "truncated": "boolean"}
