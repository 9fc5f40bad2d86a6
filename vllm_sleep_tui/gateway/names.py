"""What requests call models: names, aliases, adapters, and spellings that fit into a path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import unquote

from vllm_sleep_tui.gateway.replies import Refusal

_ODD = re.compile(r"[/: ]+")
LONGEST_SHOWN = 200
"""Characters of an unknown name."""


@dataclass(frozen=True, slots=True)
class Target:
    """The model that a request is for."""

    model: str
    served: str
    """What its server is to be asked for: an adapter's name, or one of the model's."""


class Names:
    """Every name of every model."""

    def __init__(self, served: Mapping[str, Sequence[str]]) -> None:
        self._targets = {name: Target(model, name) for model, names in served.items() for name in names}
        self._targets |= {model: Target(model, model) for model in served}
        for name, target in list(self._targets.items()):
            self._targets.setdefault(_ODD.sub("-", name), target)
        self._served = served
        self._longest = 2 + max((name.count("/") for name in self._targets), default=0)
        """Parts of a path, the empty one before its slash counted, that a name may take."""

    @property
    def models(self) -> list[str]:
        """The models, in the config's order."""
        return list(self._served)

    def others(self, model: str) -> list[str]:
        """What a model may be called beside its name."""
        return [name for name, target in self._targets.items() if target.model == model and name != model]

    def find(self, name: str) -> Target:
        """The model called `name`; raises Refusal with the nearest."""
        target = self._targets.get(name)
        if target is None:
            name = name[:LONGEST_SHOWN]  # to compare takes memory and time by its length
            near = difflib.get_close_matches(name, self._targets, n=1)
            hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(self._served)}."
            raise Refusal(
                HTTPStatus.NOT_FOUND,
                f"The model {name!r} does not exist. {hint}",
                code="model_not_found",
            )
        return target

    def split(self, path: str) -> tuple[Target | None, str]:
        """The model that a path begins with, as in /MODEL/v1/completions, and the path for its server."""
        parts = path.split("/")
        for end in range(min(len(parts) - 1, self._longest), 1, -1):
            target = self._targets.get(unquote("/".join(parts[1:end])))
            if target is not None:
                return target, "/" + "/".join(parts[end:])
        return None, path
