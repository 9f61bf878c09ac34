"""The architecture as facts: imports go one way, and importing the runtime stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import benchmarks.gpu
import benchmarks.training
import specattn_bench
import specattn_codegen
import specattn_runtime

BENCH = Path(specattn_bench.__file__).parent
GPU = Path(benchmarks.gpu.__file__).parent
TRAINING = Path(benchmarks.training.__file__).parent
CODEGEN = Path(specattn_codegen.__file__).parent
RUNTIME = Path(specattn_runtime.__file__).parent
TUNER = {
    *("tune", "tune_session", "tune_measured", "tune_modelled", "search", "shortlist", "jobs", "worker"),
    *("workforce", "seeds", "shared_study"),
    *("measure", "conditions", "prove", "record", "cost_model", "model_fit", "cli"),
}


def imported_modules(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_codegen_never_imports_the_runtime() -> None:
    for file in CODEGEN.rglob("*.py"):
        assert not any(name.startswith("specattn_runtime") for name in imported_modules(file)), file


def test_nothing_that_is_measured_imports_the_benchmarks() -> None:
    for package in (CODEGEN, RUNTIME):
        for file in package.rglob("*.py"):
            assert not any(name.startswith(("specattn_bench", "benchmarks")) for name in imported_modules(file)), file


def test_the_runtime_never_imports_the_tuner() -> None:
    for file in RUNTIME.rglob("*.py"):
        used = {name.split(".")[1] for name in imported_modules(file) if name.startswith("specattn_codegen.")}
        allowed = {"cli"} if file.parent.name == "cli" else set()  # console.run, how every command ends
        assert not used & (TUNER - allowed), file


def test_imports_are_absolute_and_at_the_top() -> None:
    for package in (CODEGEN, RUNTIME, BENCH, GPU, TRAINING):
        for file in package.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom):
                    assert node.level == 0, file
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    nested = [n for n in ast.walk(node) if isinstance(n, (ast.Import, ast.ImportFrom))]
                    assert not nested, f"{file}: import inside {node.name}"


def test_importing_the_runtime_loads_no_tuner_and_no_gpu_compiler() -> None:
    heavy = "[m for m in ('optuna', 'tilelang', 'triton', 'transformers', 'rich') if m in sys.modules]"
    shown = subprocess.run(
        [sys.executable, "-c", f"import sys, specattn_runtime; print({heavy})"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "[]"


def test_only_paths_reads_the_projects_environment() -> None:
    for package in (CODEGEN, RUNTIME, BENCH, GPU, TRAINING):
        for file in package.rglob("*.py"):
            if file.name != "paths.py":
                assert 'SPECATTN_CACHE_DIR"]' not in file.read_text(), file
                assert 'environ.get("SPECATTN' not in file.read_text(), file
