"""Whether torch has compiled an optimizer's step.

Rule of this module: it only asks. Where torch does not tell, the answer is no.
"""

from __future__ import annotations

import sys
from typing import Any


def is_compiled(optimizer: Any) -> bool:
    """Whether compiled code of the optimizer's step is kept, however it came to be compiled."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    step, seen = type(optimizer).step, 0
    while dynamo is not None and step is not None and seen < 8:  # torch wraps it twice or so
        try:
            if dynamo._debug_get_cache_entry_list(step.__code__):
                return True
        except (AttributeError, TypeError):
            return False
        step, seen = getattr(step, "__wrapped__", None), seen + 1
    return False
