"""Source: a spec and a plan as text a person would have written. Deterministic: no clock, no path, no host name."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

import jinja2

from specattn_codegen import paths
from specattn_codegen.digest import digest
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec

SUFFIX = {"cpu": ".cpp", "triton": ".py", "tilelang": ".py"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Rendered text of one kernel file.

    target  what it was rendered for: an instruction set on the CPU, the backend where the text serves every GPU
    """

    spec: KernelSpec
    plan: Plan
    target: str
    text: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:20]

    @property
    def suffix(self) -> str:
        return SUFFIX[self.plan.backend]


@functools.cache
def _environment(folder: Path) -> jinja2.Environment:
    """Kept, as parsing a template takes far longer than filling it in."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["c_float"] = c_float
    return environment


@functools.cache
def templates_digest() -> str:
    """Of every template there is, by name."""
    folder = paths.templates_dir()
    return digest([(str(file.relative_to(folder)), file.read_text()) for file in sorted(folder.rglob("*.jinja"))])


def c_float(value: float) -> str:
    """A float32 literal of C++, exact to the last bit."""
    digits = f"{value:.9g}"
    return f"{digits}f" if set(digits) & set(".e") else f"{digits}.0f"


def render_text(template: str, **context: object) -> str:
    """A template of the templates folder with its variables; a variable nobody gave is a bug and raises."""
    return _environment(paths.templates_dir()).get_template(template).render(**context)


def render(spec: KernelSpec, plan: Plan, target: str) -> Source:
    """Templates choose structure; the constants at the top of the rendered file hold the numbers."""
    name = f"{plan.backend}/{spec.op}{SUFFIX[plan.backend]}.jinja"
    text = render_text(name, spec=spec, heads=spec.heads, plan=plan.as_dict(), target=target)
    return Source(spec=spec, plan=plan, target=target, text=text)
