"""Builds the documentation as a site, with the pages that are made from the program itself.

python -m docs.make_site [--out DIR]

What the config takes comes from its types, the keys from the bindings, the verbs from the command line, the
cures from the table that reads the logs. Zensical builds it and fails on a link that leads nowhere. The site
lies in DIR/site; it loads nothing from elsewhere.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from vllm_sleep_tui.cli.app import command
from vllm_sleep_tui.cli.man import options, verbs
from vllm_sleep_tui.config.schema import schema
from vllm_sleep_tui.engine.cause_table import CAUSES
from vllm_sleep_tui.tui.keys import ELSEWHERE, KEYS

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "docs",
    "screenshots",
    "tests/gpu/README.md",
)
"""What the site is made of, each at its place in the repository, so that links hold in both."""
MADE = "docs/reference"
KINDS = ("Config", "ModelConfig", "IdleConfig", "GatewayConfig", "GatewayKeyConfig", "SimulatedGpuConfig")
WORDS = {"object": "a mapping", "boolean": "true or false", "integer": "a number"}
Rows = Iterable[Sequence[str]]


def table(titles: Sequence[str], rows: Rows) -> Iterator[str]:
    """A table of Markdown."""
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in row) + " |"


def config_page() -> Iterator[str]:
    """Every key of the config."""
    yield "# Every key of the config"
    yield "\nMade from the types that read the file. What the keys are for is on [its page](../config.md).\n"
    kinds: dict[str, Any] = schema()["$defs"]
    for name in KINDS:
        described = kinds[name]
        required = described.get("required", [])
        yield f"\n## {name.removesuffix('Config') or 'The file'}\n\n{described['description']}\n"
        rows = []
        for key, value in described["properties"].items():
            default = "required" if key in required else otherwise(value)
            rows.append((f"`{key}`", takes(value), default, described_as(value, kinds)))
        yield from table(("Key", "Takes", "If left out", "What it is"), rows)


def described_as(value: dict[str, Any], kinds: dict[str, Any]) -> str:
    """What a key is: its own words, else those of its type."""
    if "description" in value:
        return str(value["description"])
    if "$ref" in value and value["$ref"].endswith("Config"):
        return str(kinds[value["$ref"].rpartition("/")[2]]["description"])
    inside = [*value.get("anyOf", []), *([value["items"]] if isinstance(value.get("items"), dict) else [])]
    return next(filter(None, (described_as(one, kinds) for one in inside)), "")


def takes(value: dict[str, Any]) -> str:
    """A type of the schema in words."""
    if "anyOf" in value:
        kinds = dict.fromkeys(takes(one) for one in value["anyOf"] if one.get("type") != "null")
        return " or ".join(kinds)
    if "$ref" in value:
        name = str(value["$ref"]).rpartition("/")[2]
        return {"Args": "a mapping"}.get(name, name.removesuffix("Config"))
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if "examples" in value:
        return f"such as `{value['examples'][0]}`"
    kind = value.get("type", "text")
    if kind == "array" and "items" in value:
        return f"a list: {takes(value['items'])}"
    return WORDS.get(kind, "text") if isinstance(kind, str) else "text"


def otherwise(value: dict[str, Any]) -> str:
    """What a key is when it is left out."""
    default = msgspec.to_builtins(value.get("default"))
    if not default and not isinstance(default, (bool, int)):
        return "–"
    if isinstance(default, dict):
        return "–" if not any(default.values()) else f"`{json.dumps(default)}`"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def keys_page() -> Iterator[str]:
    """Every key of the panel."""
    yield "# Every key of the panel"
    yield "\nMade from the bindings; `?` shows the same. `--read-only` leaves out what changes something.\n"
    rows = [(f"`{key.cap}`", key.help, "yes" if key.changes else "") for key in KEYS]
    yield from table(
        ("Key", "What it does", "Changes something"),
        [*rows, *((f"`{cap}`", words, "") for cap, words in ELSEWHERE)],
    )


def verbs_page() -> Iterator[str]:
    """Every verb."""
    yield "# Every verb"
    yield "\nMade from the command line; `-h` says the same of one, `vllm-sleep-tui man` of all.\n"
    root: click.Context = command.make_context("vllm-sleep-tui", [], resilient_parsing=True)
    yield from table(
        ("Option of all", "What it does"), ((f"`{name}`", words) for name, words in options(command, root))
    )
    for verb, ctx in verbs(root):
        yield f"\n## {ctx.command_path.removeprefix('vllm-sleep-tui ')}\n"
        yield f"```\n{' '.join([ctx.command_path, *verb.collect_usage_pieces(ctx)])}\n```\n"
        yield "\n".join(line.strip() for line in (verb.help or "").replace("\b", "").splitlines())
        own = [row for row in options(verb, ctx) if not row[0].startswith(("-h", "--config"))]
        if own:
            yield ""
            yield from table(("Option", "What it does"), ((f"`{name}`", words) for name, words in own))


def cures_page() -> Iterator[str]:
    """Every cause that is read from a log."""
    yield "# Every cause that is read from a server's log"
    yield "\nMade from the table that reads the logs; `{…}` is what the log says."
    yield "[What else can go wrong](../cures.md)\n"
    yield from table(("What is told", "What to do"), dict.fromkeys((one.reason, one.cure) for one in CAUSES))


def stage(into: Path) -> None:
    """Lay out what the site is built of."""
    for name in PAGES:
        source, target = ROOT / name, into / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.jsonl*"))
        else:
            shutil.copyfile(source, target)
    made = {"config": config_page, "keys": keys_page, "verbs": verbs_page, "cures": cures_page}
    (into / MADE).mkdir()
    for name, page in made.items():
        (into / MADE / f"{name}.md").write_text("\n".join(page()) + "\n", encoding="utf-8")


def build(out: Path) -> Path:
    """Build the site in `out`; its folder. Raises CalledProcessError if a link leads nowhere."""
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / "pages", ignore_errors=True)
    stage(out / "pages")
    shutil.copyfile(ROOT / "docs/zensical.toml", out / "zensical.toml")
    subprocess.run([sys.executable, "-m", "zensical", "build", "--strict", "--clean"], cwd=out, check=True)
    return out / "site"


def main() -> None:
    """Read the arguments and build."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("--out", type=Path, help="a folder for it; without, it is only checked")
    given = parser.parse_args()
    if given.out:
        print(build(given.out.absolute()))
        return
    with tempfile.TemporaryDirectory(prefix="vst-") as folder:
        build(Path(folder))


if __name__ == "__main__":
    main()
