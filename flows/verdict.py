"""Judge a logged run again from its measurements: the same verdict, or something was altered.

python -m flows verdict RUN_ID
"""

from tasks.verify import recompute

__all__ = ["recompute"]
