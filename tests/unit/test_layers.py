"""The layers of the design: what each part of the package may import, kept by reading every import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vllm_sleep_tui
from vllm_sleep_tui.config.flags import shipped_tables

PACKAGE = Path(vllm_sleep_tui.__file__).parent
BASE = {"text", "errors", "files", "units"}
DOWN_TO_ENGINE = BASE | {"config", "engine", "telemetry"}
DOOR = {
    "fleet",
    "snapshot",
    "states",
    "events",
    "past",
    "server_log",
    "survey",
    "advice",
    "doctor",
    "conversations",
    "pictures",
}
"""What faces may use of `fleet`: itself, the questions that need no open fleet, the types of both."""
FACE = BASE | {"paths", "config"} | {f"fleet.{module}" for module in DOOR}
ALLOWED: dict[str, set[str]] = {
    "text": set(),
    "units": set(),
    "errors": {"text"},
    "files": {"text", "errors"},
    "paths": BASE | {"config"},
    "leaving": set(),
    "upstream": set(),
    "simulator": set(),
    "config": BASE | {"engine.serve_args"},  # which imports nothing of ours
    "engine": BASE | {"upstream", "config", "telemetry.prometheus"},
    "telemetry": BASE | {"config", "simulator.devices"},
    "sizing": DOWN_TO_ENGINE,
    "fleet": DOWN_TO_ENGINE | {"paths", "sizing", "simulator.devices"},
    "bench": FACE,
    "tui": FACE | {"bench", "gateway", "leaving"},
    "gateway": FACE | {"upstream", "engine.endpoints"},  # what a path is, which the guard knows
    "web": FACE | {"engine.endpoints"},  # the guard's rules for pages of other sites
    "cli": FACE | {"bench", "gateway", "leaving", "tui", "web"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""What each part may import besides itself; `a.b` allows that module alone."""
ONLY_THE_PANEL = {"textual", "rich"}


def imports(path: Path) -> Iterator[str]:
    """Every module named in an import, late ones included; those of the package without its name."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(path for path in PACKAGE.rglob("*.py") if "themes" not in path.parts)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_only(path: Path) -> None:
    part = part_of(path)
    for name in imports(path):
        if not name.startswith("vllm_sleep_tui."):
            continue
        target = name.removeprefix("vllm_sleep_tui.")
        inside = target.split(".")[0] == part or target == "__version__"
        allowed = any(target == word or target.startswith(f"{word}.") for word in ALLOWED[part])
        assert inside or allowed, f"{part} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_panel_knows_textual_and_nobody_imports_vllm(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    runs_in_vllm = path.name == "dump_parser.py" or path.parent.name == "backend"
    assert "vllm" not in roots or runs_in_vllm
    assert part_of(path) == "tui" or not roots & ONLY_THE_PANEL


@pytest.mark.parametrize(
    "module", ["engine/guard.py", "fleet/keeper.py", "fleet/pool_holder.py", "simulator/devices.py"]
)
def test_what_runs_alone_needs_only_the_standard_library(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / module)}
    if module == "engine/guard.py":
        roots -= {"uvicorn"}  # vLLM's own, once vLLM runs; the copy is importable without it
    assert roots <= sys.stdlib_module_names | {"__future__"}


def test_our_sleep_mode_runs_inside_vllm_and_needs_nothing_of_ours() -> None:
    allowed = sys.stdlib_module_names | {"__future__", "torch", "triton", "vllm"}  # vLLM brings Triton
    for path in (PACKAGE / "engine" / "backend").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path.name
            elif isinstance(node, ast.ImportFrom):
                own = node.level == 1  # of the folder itself, whatever it is called there
                assert own or (node.module or "").split(".")[0] in allowed, path.name


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("vllm_sleep_tui.fleet.survey", {"httptools", "textual", "rich", "sqlite3"}),
        ("vllm_sleep_tui.fleet.fleet", {"textual"}),
        ("vllm_sleep_tui.cli", {"httptools", "textual", "rich"}),
        ("vllm_sleep_tui.cli.chat", {"httptools", "textual", "rich", "sqlite3", "prompt_toolkit"}),
        ("vllm_sleep_tui.cli.status", {"httptools", "textual", "rich", "sqlite3"}),
    ],
)
def test_a_late_import_is_late(module: str, unwanted: set[str]) -> None:
    program = f"import {module}, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not unwanted & set(loaded.stdout.split())


def test_what_asks_vllm_needs_nothing_but_it() -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / "engine/dump_parser.py")}
    assert roots <= sys.stdlib_module_names | {"vllm"}


PROC = re.compile(r"^/proc\b")
READS_PROC = {
    "telemetry/kernel.py",  # what psutil cannot tell
    "fleet/keeper.py",  # needs nothing but the standard library, as it outlives installations
    "fleet/pool_holder.py",  # likewise
    "engine/backend/holder.py",  # inside vLLM, and of itself alone
    "telemetry/gpus.py",  # the driver's version, not a process's
    "bench/machine.py",  # what the machine is, not its processes
}


ONLY_IN_ENGINE = re.compile(
    r"\bvllm:\w|/(sleep|wake_up|is_sleeping|collective_rpc|reset_prefix_cache|health|metrics|panel/\w+)\b"
    r"|\breload_weights\b|\bpanel_(sleep|keep)_"
)


def literals(path: Path) -> Iterator[str]:
    """Every string of the code; docstrings are prose."""
    tree = ast.parse(path.read_text())
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_names_of_vllms_metrics_and_its_admin_paths_are_known_to_the_engine_alone(path: Path) -> None:
    """The simulator, which speaks the same HTTP and shares no code, has its own."""
    if part_of(path) not in ("engine", "simulator"):
        assert [text for text in literals(path) if ONLY_IN_ENGINE.search(text)] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_processes_are_read_by_psutil_and_what_it_cannot_tell_in_one_file(path: Path) -> None:
    if str(path.relative_to(PACKAGE)) not in READS_PROC and part_of(path) != "simulator":
        assert [text for text in literals(path) if PROC.search(text)] == []


FLAGS = {name.lstrip("-") for table in shipped_tables() for flag in table.flags for name in flag.names}


def flags_named(path: Path) -> Iterator[str]:
    """The strings that are a flag's whole name, or are looked up in a model's `args`."""
    for text in literals(path):
        if "-" in text.lstrip("-") and text.lstrip("-") in FLAGS:
            yield text
    for node in ast.walk(ast.parse(path.read_text())):
        where, key = None, None
        if isinstance(node, ast.Subscript):
            where, key = node.value, node.slice
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            where, key = node.func.value, next(iter(node.args), None)
        if isinstance(where, ast.Attribute) and where.attr == "args" and isinstance(key, ast.Constant):
            yield str(key.value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_vllms_flags_are_known_to_the_engine_alone(path: Path) -> None:
    """Others read a model's arguments through `engine.serve_args.ServeArgs`."""
    if part_of(path) not in ("engine", "simulator"):
        assert list(flags_named(path)) == []


def test_what_the_config_reads_of_the_engine_needs_nothing_of_ours() -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / "engine/serve_args.py")}
    assert roots <= sys.stdlib_module_names


def test_what_is_about_one_model_takes_its_handle() -> None:
    """No function takes the core and a name, or the core and a record: `Model` has both."""
    pairs = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            kinds = {ast.unparse(each.annotation) for each in arguments if each.annotation is not None}
            named = {each.arg for each in arguments}
            if "Core" in kinds and ("name" in named or "Record" in kinds):
                pairs.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.name}")
    assert set(pairs) == {p for p in pairs if p.startswith("fleet/model.py")}
