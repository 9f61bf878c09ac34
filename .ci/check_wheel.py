"""Checks an installed wheel from outside the checkout: data inside the package, every command there, a kernel run."""

import sys
from importlib import metadata
from pathlib import Path

import torch

import specattn_codegen
from specattn_codegen import HeadConfig, ScoreSpec, paths
from specattn_runtime import load_kernels

site = Path(sys.argv[1]).resolve()
for place in (Path(specattn_codegen.__file__).parent, paths.templates_dir(), paths.shipped_packs_dir()):
    if not place.resolve().is_relative_to(site) or not any(place.iterdir()):
        sys.exit(f"{place} is not a filled folder of the installed wheel {site}")
if "TERMS AND CONDITIONS" not in paths.licence_text():
    sys.exit("the installed wheel lacks its licence, which exports carry")

commands = metadata.distribution("specattn-codegen").entry_points.select(group="console_scripts")
missing = {"specattn-bench", "specattn-export", "specattn-generate", "specattn-pack", "specattn-tune"} - {
    command.name for command in commands
}
if missing:
    sys.exit(f"the installed wheel lacks {', '.join(sorted(missing))}")
for command in commands:
    command.load()
    if not Path(str(sys.modules[command.module].__file__)).resolve().is_relative_to(site):
        sys.exit(f"{command.name} is not the installed wheel's: {sys.modules[command.module].__file__}")

kernels = load_kernels(HeadConfig.from_model("llama3-8b"), dtype=torch.bfloat16, page_size=16)
key = torch.randn(1, 16, 8, 128, dtype=torch.bfloat16)
lengths, rows = torch.tensor([16], dtype=torch.int32), torch.tensor([0, 1], dtype=torch.int32)
query, table = torch.randn(1, 32, 128, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int32)
result = kernels.verify_attention(query, key, key, table, lengths, rows, max_q=1, score=ScoreSpec())
if result.scores is None or not result.scores[..., :15].isfinite().all() or not result.out.isfinite().all():
    sys.exit("the installed wheel's kernel gave wrong numbers")
print(f"wheel of {site}: templates, packs, commands and a kernel are fine")
