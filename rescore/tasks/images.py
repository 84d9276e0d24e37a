"""Image super-resolution over pixels as tokens, as in Stern et al. 2018: numbers 0 to 255, row by row.

A base LM for it has a token for every intensity whose id is the number, so that the distance of two ids is that of
their intensities (`--acceptance distance:eps=2`); `docs/recipes/train_superresolution.py` trains one.
"""

from __future__ import annotations

from rescore.tasks.base import Limits, Task, only_reference
from rescore.tasks.metrics import CLOSENESS

TASKS = (
    Task(
        name="superresolution", description="grey images of more pixels from few: numbers 0 to 255, row by row",
        fields=("low", "high"), template="{low}", references=only_reference("high"), metrics=(CLOSENESS,), chat=False,
        limits=Limits(new_tokens=256),
        without_hub="it has no data set on the hub; docs/recipes/train_superresolution.py makes one",
    ),
)  # fmt: skip
