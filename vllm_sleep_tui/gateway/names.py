"""What requests call models: names, aliases, adapters, and spellings that fit into a path."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from urllib.parse import quote, unquote

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
    is_adapter: bool = False


class Names:
    """Every name of every model."""

    def __init__(
        self, served: Mapping[str, Sequence[str]], adapters: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        whole: dict[str, set[Target]] = {}
        dashed: dict[str, set[Target]] = {}
        targets = [Target(model, name) for model, names in served.items() for name in (model, *names)]
        targets += [
            Target(model, name, is_adapter=True)
            for model, names in (adapters or {}).items()
            for name in names
            if name not in served.get(model, ())
        ]
        for target in targets:
            whole.setdefault(target.served, set()).add(target)
            dashed.setdefault(_ODD.sub("-", target.served), set()).add(target)
        # A model's own name is its own; two may have an adapter of one name, or names that differ in signs.
        whole |= {model: {Target(model, model)} for model in served}
        self._known = dashed | whole
        self._targets = {name: next(iter(found)) for name, found in self._known.items() if len(found) == 1}
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

    def find(self, name: str, *, path: Target | None = None) -> Target:
        """The model called `name`, that of the `path` first; else Refusal with the nearest or the two."""
        target, owners = self._targets.get(name), self._known.get(name, ())
        if path is not None:
            target = next((owner for owner in owners if owner.model == path.model), target)
        if target is None and owners:
            models = sorted(owner.model for owner in owners)
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                f"{name!r} is a name of {' and of '.join(models)}. Ask under the path of one, as in "
                f"/{quote(models[0], safe='/:')}/v1/chat/completions, or give them names that differ.",
                code="model_ambiguous",
            )
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
