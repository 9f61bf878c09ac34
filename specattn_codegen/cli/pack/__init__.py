"""specattn-pack: what packs there are, what is in them, why a call gets its plan, and how packs are kept and shared."""

from __future__ import annotations

import click

from specattn_codegen.cli import console
from specattn_codegen.cli.pack.explain import explain
from specattn_codegen.cli.pack.inspect import diff, show, verify
from specattn_codegen.cli.pack.listing import list_packs
from specattn_codegen.cli.pack.sharing import install, merge, promote

EXAMPLES = """
\b
Examples:
  specattn-pack list                                    every pack that lookups see, by layer
  specattn-pack show h100/q32-kv8-d128                  what one holds, and whether it still holds today
  specattn-pack explain --model llama3-8b --gpu h100 --kv-len 65536
  specattn-pack verify path/to/packs                    damage, tampering and plans that no longer work
  specattn-pack diff old.json new.json
  specattn-pack merge mine.json yours.json --out best.json
  specattn-pack install best.json                       into your own layer
  specattn-pack promote h100/q32-kv8-d128 --to site     from your layer to everybody's

\b
A lookup takes the first layer that has an entry for the call's own size bucket:
  explicit     load_kernels(packs=...), --packs
  environment  SPECATTN_CONFIG_DIR
  user         what specattn-tune and specattn-pack install write
  site         for all users of the machine
  shipped      what came with the project
"""


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Look at, check, compare, merge and share packs of tuned kernels.

    A pack is one JSON file: the winning plans of one HeadConfig on one processor, as <processor>/<heads>.json.
    WHAT, below, is the path of a file or such a name without .json.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for subcommand in (list_packs, show, explain, verify, diff, merge, install, promote):
    command.add_command(subcommand)


def main() -> None:
    console.run(command)
