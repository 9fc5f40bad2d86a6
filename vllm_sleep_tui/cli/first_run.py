"""The panel of somebody without a config: one screen of choices, the file, and the first model started."""

from __future__ import annotations

from dataclasses import replace

from vllm_sleep_tui.cli.common import say
from vllm_sleep_tui.cli.init import EXAMPLE, MAX_MODELS, config_text, gpus_needed
from vllm_sleep_tui.config.load import LoadedConfig, load
from vllm_sleep_tui.config.schema import write_schema
from vllm_sleep_tui.config.types import CONFIG_NAME, SCHEMA_NAME
from vllm_sleep_tui.errors import RefusedError
from vllm_sleep_tui.files import is_taken, private_dir, write_private
from vllm_sleep_tui.fleet.survey import CachedModel, Surroundings, flag_tables, look_around
from vllm_sleep_tui.paths import config_dir, here, state_dir
from vllm_sleep_tui.tui.first_run import FirstRun, Offer, Wish


def ask_first() -> Wish | None:
    """What the person wants of what was found here; None: to leave."""
    say("Looking for vLLM, GPUs and cached models …")
    machine = look_around(here())
    return FirstRun(machine, offers_of(machine), config_dir() / CONFIG_NAME).run()


def offers_of(machine: Surroundings) -> list[Offer]:
    """Every cached model, the smallest first; chosen are those that chat and fit, up to MAX_MODELS."""
    offers: list[Offer] = []
    for model in sorted(machine.models, key=lambda model: model.bytes):
        note = "" if model.generates else "does not chat"
        if gpus_needed(model.bytes, machine.gpus) is None:
            note = "too large for the GPUs here"
        is_chosen = not note and sum(offer.is_chosen for offer in offers) < MAX_MODELS
        offers.append(Offer(model=model, is_chosen=is_chosen, note=note))
    if not any(offer.is_chosen for offer in offers):
        example = CachedModel(name=EXAMPLE, bytes=0, generates=True)
        offers.append(Offer(model=example, is_chosen=True, note="an example, fetched when it starts"))
    return offers


def write_wish(wish: Wish) -> LoadedConfig:
    """Write the config of what was chosen into the user's folder; raises PanelError if it cannot be."""
    machine = look_around(here())
    environments = (wish.environment,) if wish.environment else ()
    path = private_dir(config_dir()) / CONFIG_NAME
    if is_taken(path):  # written while the person chose
        raise RefusedError(f"{path} is there by now.", "Nothing was written; open the panel again.")
    chosen = replace(machine, environments=environments)
    write_private(path, config_text(chosen, sorted(wish.models, key=lambda model: model.bytes)).encode())
    loaded = load(path)
    write_schema(path.with_name(SCHEMA_NAME), flag_tables(loaded, state_dir(), may_ask=False))
    return loaded
