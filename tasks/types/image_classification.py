"""Images in, one of several labels out."""

from tasks.types.classes import *  # noqa: F403
from tasks.types.images import *  # noqa: F403

AUTO = "AutoModelForImageClassification"
