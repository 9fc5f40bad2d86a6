"""All knowledge of vLLM: its flags, its HTTP, its versions, its log."""

import sys

# httpx's own command line brings click, Rich and Pygments: 0.1 s of CPU for every verb, and of no use to us.
# Python refuses a module that is set to None, which httpx takes for "not installed".
sys.modules.setdefault("httpx._main", None)  # type: ignore[arg-type]
