"""Exports: the folder runs where this project cannot be imported and agrees with the oracle; its table is a ladder."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from specattn_codegen import buckets, space
from specattn_codegen.build.resources import Resources
from specattn_codegen.cli import export as cli
from specattn_codegen.environment import current
from specattn_codegen.errors import SpecError
from specattn_codegen.export.hugging_face import repository_files
from specattn_codegen.export.package import Export, default_name, folder_files, write
from specattn_codegen.export.tables import tables
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder, pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.policy import TopK
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.render import render
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, Workload
from specattn_codegen.workloads import TUNED_OPS, default_workloads, model_specs

ARCH = gpus.find("h100")
PAGE_SIZE = 8
PLAIN = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)
ODD = HeadConfig(num_q_heads=4, num_kv_heads=1, head_dim=24, v_head_dim=16, softcap=20.0, sinks=True)
WINDOW = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32, window=9)
CASES: dict[str, tuple[HeadConfig, Dtype, KvDtype | None, str]] = {
    "plain": (PLAIN, "float32", None, "hf-kernels"),
    "odd": (ODD, "float16", None, "folder"),
    "window": (WINDOW, "float16", None, "hf-kernels"),
    "float8": (PLAIN, "float16", "float8_e4m3", "folder"),
}

# A process that cannot import this project, whatever is installed: it runs the code that follows.
BLOCKED = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0].startswith("specattn_") and name.split(".")[0] != PACKAGE:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
sys.path.insert(0, FOLDER)
"""


def tuned(root: Path, specs: tuple[KernelSpec, ...], arch: Arch = ARCH) -> Path:
    """A pack with two sizes of every kernel, of different plans."""
    entries = []
    for spec in specs:
        default = space.default_plan(spec, arch, "triton")
        others = (plan for plan in space.feasible(spec, arch, "triton") if plan != default)
        other = next(plan for plan in others if plan.as_dict().get("merge", "fused") == "fused")  # as it takes counters
        sizes = default_workloads(spec, arch)
        for workload, plan in ((sizes[0], other), (sizes[-1], default)):
            entries.append(
                Entry(
                    spec=spec,
                    workload=workload,
                    plan=plan,
                    chosen_by="modelled",
                    proved_by="interpreter",
                    latency_us=5.0,
                    noise_us=0.0,
                    share_of_ceiling=0.5,
                    resources=(
                        Resources(kernel="k", registers=9, spill_bytes=0, smem_bytes=9, num_warps=4, binary_bytes=9),
                    ),
                    source_digest=render(spec, plan, "triton").digest,
                    environment=current("triton", None),
                )
            )
    return pack.publish(root, arch, specs[0].heads, entries)


def exported(tmp_path: Path, heads: HeadConfig, dtype: Dtype, kv_dtype: KvDtype | None = None) -> Export:
    specs = model_specs(heads, dtype=dtype, kv_dtype=kv_dtype, page_size=PAGE_SIZE, ops=TUNED_OPS)
    packs = tuned(tmp_path / "packs", specs)
    return cli.exported(default_name(ARCH, heads), ARCH, heads, dtype, kv_dtype, PAGE_SIZE, (packs,))


def run_without_the_project(folder: Path, package: str, code: str) -> str:
    """What a process prints in which only `package` of `folder`, torch and triton can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    start = f"PACKAGE, FOLDER = {package!r}, {str(folder)!r}\n{BLOCKED}\n{code}"
    done = subprocess.run(
        [sys.executable, "-P", "-c", start],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        env={**environment, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COMPARE = """
import importlib, torch
kernels = importlib.import_module(PACKAGE)
p = torch.load(FOLDER + "/problem.pt")
inputs = [p[name] for name in ("q", "k_cache", "v_cache", "page_table", "kv_lens", "cu_q")]
rows_of = dict(max_q=p["max_q"], max_kv=p["max_kv"])
more = {name: p[name] for name in ("sinks", "k_scale", "v_scale") if p[name] is not None}
plain = kernels.verify_attention(*inputs, **rows_of, **more)
found = {"plain": tuple(plain[:2])}
if p["scores"]:
    for score in kernels.SCORES:
        reference = {"lse_ref": p["lse_ref"]} if "reference" in score else {}
        found[score] = tuple(kernels.verify_attention(*inputs, **rows_of, **more, score=score, **reference))
    chosen = kernels.select_kv(found["all-kv_head"][2], p["tail_start"], k=12, sink=2, recent=3)
    found["chosen"] = tuple(chosen[:2])
    given = kernels.Selection(p["indices"], p["counts"])
    found["sparse"] = tuple(kernels.sparse_attention(*inputs, given, p["tail_start"], **rows_of, **more))
    for (score, rows), name in kernels.MIXED.items():
        if rows == p["indices"].shape[1]:
            reference = {"lse_ref": p["lse_ref"]} if "reference" in (score or "") else {}
            tensors = (*inputs, given, p["tail_start"], p["mode"])
            found[name] = tuple(kernels.mixed_attention(*tensors, **rows_of, **more, score=score, **reference))
    try:
        import specattn_codegen
    except ImportError as error:
        print("blocked:", error)
torch.save(found, FOLDER + "/found.pt")
importlib.import_module(PACKAGE + ".smoke_test").main()
"""

# How Hugging Face's `kernels` imports the variant that it has fetched: by its path, under a name of its own.
AS_KERNELS_DOES = """
import importlib.util
variant = importlib.util.spec_from_file_location(PACKAGE, FOLDER + "/build/torch-cuda/__init__.py")
sys.modules[PACKAGE] = importlib.util.module_from_spec(variant)
variant.loader.exec_module(sys.modules[PACKAGE])
"""


@pytest.mark.parametrize("name", CASES)
def test_an_export_agrees_with_the_oracle_where_the_project_is_blocked(tmp_path: Path, name: str) -> None:
    heads, dtype, kv_dtype, layout = CASES[name]
    export = exported(tmp_path, heads, dtype, kv_dtype)
    folder = tmp_path / "out"
    write(folder, cli.LAYOUTS[layout](export))
    verify = KernelSpec(op="verify_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, page_size=PAGE_SIZE)
    sparse = dataclasses.replace(verify, op="sparse_attention", selection="kv_head")
    scores = [table.spec for table in export.tables if table.spec.score and table.spec.op == "verify_attention"]
    drafted = attention_problem(sparse, q_lens=[3, 1], kv_lens=[61, 17], page_size=PAGE_SIZE, seed=3, budget=10)
    guesses = torch.randn(4, heads.num_q_heads, generator=torch.Generator().manual_seed(4)) + 3.0
    fields = {field: getattr(drafted, field) for field in AttentionProblem.__dataclass_fields__}
    modes = torch.tensor([0, 1], dtype=torch.int32)
    torch.save({**fields, "mode": modes, "lse_ref": guesses, "scores": bool(scores)}, folder / "problem.pt")
    problem = dataclasses.replace(drafted, indices=None, counts=None)
    code = COMPARE if layout == "folder" else AS_KERNELS_DOES + COMPARE
    shown = run_without_the_project(folder, export.package, code)
    assert shown.splitlines()[-1] == "ok"  # of its own smoke test
    found = torch.load(folder / "found.pt")
    assert check_attention(verify, problem, *found.pop("plain")).passed
    if not scores:
        return
    assert "blocked: specattn_codegen" in shown
    indices, counts = found.pop("chosen")
    prefix = problem.kv_lens - torch.tensor([3, 1], dtype=torch.int32)
    expected = reference.select_kv(found["all-kv_head"][2], prefix, TopK(k=12), sink=2, recent=3)
    assert torch.equal(counts, expected.counts)
    assert torch.equal(indices[..., : expected.indices.shape[-1]], expected.indices)
    assert check_attention(sparse, drafted, *found.pop("sparse")).passed
    for spec in scores:
        assert spec.score is not None
        out, lse, given = found.pop(spec.score.name)
        asked = dataclasses.replace(problem, lse_ref=guesses if spec.score.normaliser == "reference" else None)
        assert check_attention(spec, asked, out, lse, given).passed, spec.name
    mixed = [table.spec for table in export.tables if table.spec.name in found]
    assert len(mixed) >= 3
    for spec in mixed:
        reads_guesses = spec.score is not None and spec.score.normaliser == "reference"
        asked = dataclasses.replace(drafted, mode=modes, lse_ref=guesses if reads_guesses else None)
        assert check_attention(spec, asked, *found.pop(spec.name)).passed, spec.name
    assert found == {}


CHOICES = """
import json, PACKAGE_NAME as kernels
asked = json.load(open(FOLDER + "/asked.json"))
print(json.dumps([kernels.choose(name, **sizes).__name__.rpartition(".")[2] for name, sizes in asked]))
"""


def test_the_table_is_the_ladders(tmp_path: Path) -> None:
    """Within the ladder's reach the same kernel serves, and beyond it the nearest there is."""
    export = exported(tmp_path, PLAIN, "float16")
    write(tmp_path / "out", folder_files(export))
    generator = torch.Generator().manual_seed(0)
    asked: list[tuple[KernelSpec, Workload]] = []
    for table in export.tables:
        for _ in range(40):
            octaves = [
                *torch.randint(0, 8, (2,), generator=generator),
                *torch.randint(8, 18, (2,), generator=generator),
            ]
            batch, q_len, kv_len, budget = (2 ** int(octave) for octave in octaves)
            asked.append((table.spec, Workload(batch=batch, q_len=q_len, kv_len=kv_len, budget=budget)))
    plain = [(spec.name, {n: getattr(w, n) for n in ("batch", "q_len", "kv_len", "budget")}) for spec, w in asked]
    (tmp_path / "out" / "asked.json").write_text(json.dumps(plain))
    shown = run_without_the_project(tmp_path / "out", export.package, CHOICES.replace("PACKAGE_NAME", export.package))
    known = ladder.read(ARCH, PLAIN, [tmp_path / "packs"])
    served = 0
    for (spec, workload), kernel in zip(asked, json.loads(shown), strict=True):
        found = known.tuned(spec, workload)
        if found is not None:
            served += 1
            plan = space.for_mixed(found.plan, spec, ARCH) if spec.op == "mixed_attention" else found.plan
            assert kernel == f"{spec.op}_{render(spec, plan, 'triton').digest[:10]}", (spec.name, workload)
        else:
            rows = next(table.rows for table in export.tables if table.spec == spec)
            nearest = min(rows, key=lambda row: buckets.distance(spec.op, row.workload, workload))
            assert kernel == nearest.kernel
    assert 0.25 < served / len(asked) < 1.0


def test_a_kernel_repository_holds_the_variant_its_metadata_and_an_installable_config(tmp_path: Path) -> None:
    export = exported(tmp_path, PLAIN, "bfloat16")
    files = repository_files(export)
    assert files == repository_files(export)
    metadata = json.loads(files["build/torch-cuda/metadata.json"])
    assert metadata["name"] == "specattn-h100-q4-kv2-d32"
    assert metadata["backend"] == {"type": "cuda", "archs": ["9.0"]}
    assert (metadata["version"], metadata["license"], metadata["python-depends"]) == (1, "Apache-2.0", [])
    assert "[torch-noarch]" in files["build.toml"]
    assert files["README.md"].startswith("---\nlicense: apache-2.0\n")
    source = {name.removeprefix(f"torch-ext/{export.package}/") for name in files if name.startswith("torch-ext/")}
    built = {name.removeprefix("build/torch-cuda/") for name in files if name.startswith("build/")}
    assert built == source | {"metadata.json"}
    write(tmp_path / "repository", files)
    config = tmp_path / "repository" / "build" / "torch-cuda" / "configs" / "h100" / "q4-kv2-d32.json"
    assert pack.load(config).entries == pack.load(tmp_path / "packs" / "h100" / "q4-kv2-d32.json").entries


def test_every_file_says_where_it_comes_from_and_nothing_where_it_was_made(tmp_path: Path) -> None:
    export = exported(tmp_path, PLAIN, "bfloat16")
    files = folder_files(export)
    for name, text in files.items():
        assert str(tmp_path) not in text
        if name.endswith(".py"):
            assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n# Generated by specattn-codegen")
            compile(text, name, "exec")
            assert all(len(line) <= 120 or line.startswith("# Plan: ") for line in text.splitlines()), name
    assert "TERMS AND CONDITIONS" in files[f"{export.package}/LICENSE"]
    rows = json.loads(files[f"{export.package}/PROVENANCE.json"])["rows"]
    assert {(row["rung"], row["chosen_by"], row["proved_by"]) for row in rows} == {("exact", "modelled", "interpreter")}
    assert all(f"{export.package}/kernels/{row['kernel']}.py" in files for row in rows)


def test_the_command_exports_what_packs_have_and_refuses_what_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(tmp_path / "packs", model_specs(PLAIN, dtype="bfloat16", page_size=16, ops=TUNED_OPS))

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["specattn-export", "--packs", str(tmp_path / "packs"), *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    wanted = ("--heads", "4,2,32", "--gpu", "h100", "--out", str(tmp_path / "out"))
    assert run(*wanted) == 0
    assert "16 exact: modelled, proved by interpreter\n" in (shown := capsys.readouterr().out)
    assert "10 exact: modelled, proved by interpreter as verify_attention\n" in shown
    assert (tmp_path / "out" / "specattn_h100_q4_kv2_d32" / "decision.py").is_file()
    refusals = {
        "is not an empty folder": wanted,
        "only Triton kernels": ("--heads", "4,2,32", "--gpu", "cpu"),
        "name='My Kernels'": (*wanted, "--name", "My Kernels"),
        "takes a name for each": ("--model", "gemma3-12b", "--gpu", "h100", "--name", "one"),
    }
    for words, arguments in refusals.items():
        assert run(*arguments) == 2
        shown = capsys.readouterr().err
        assert words in shown
        assert shown.count("\n") == 1


def test_only_tritons_kernels_are_exported(tmp_path: Path) -> None:
    """A plan of another GPU language is passed over, as the package must need nothing but torch and triton."""
    export = exported(tmp_path, WINDOW, "bfloat16")
    spec = export.tables[0].spec
    plan = next(space.feasible(spec, ARCH, "tilelang"))
    path = tmp_path / "packs" / "h100" / f"{WINDOW.name}.json"
    first, *others = pack.load(path).entries
    pack.write(path, dataclasses.replace(pack.load(path), entries=(dataclasses.replace(first, plan=plan), *others)))
    known = ladder.read(ARCH, WINDOW, [path])
    assert known.find(spec, first.workload).plan == plan
    assert {row.source.plan.backend for table in tables([spec], known) for row in table.rows} == {"triton"}


def test_a_name_must_do_for_python_and_for_a_repository(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="must be lower-case"):
        dataclasses.replace(exported(tmp_path, WINDOW, "bfloat16"), name="a_b")
