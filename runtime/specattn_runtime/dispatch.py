"""The operations as a caller has them: each call gets the kernel of its size, built at first use. Never tunes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from specattn_codegen import build, paths, space
from specattn_codegen.buckets import bucket
from specattn_codegen.calls import AttentionInputs, attention_call, select_call
from specattn_codegen.digest import digest
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Kernel
from specattn_codegen.packs import ladder
from specattn_codegen.packs.ladder import Ladder, Rung
from specattn_codegen.policy import Policy
from specattn_codegen.processors import cpu_info, gpu_detect
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, Op, ScoreHeads, ScoreSpec, Workload, require_type
from specattn_runtime.plans import Plans, tune_command
from specattn_runtime.scratch import Scratch

logger = logging.getLogger("specattn")

DTYPE_NAMES: dict[torch.dtype, Dtype] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
FLOAT8_NAMES: dict[torch.dtype, KvDtype] = {
    torch.float8_e4m3fn: "float8_e4m3",
    torch.float8_e5m2: "float8_e5m2",
}
BATCH_INVARIANT_SIZES = (1, 1, 4096, 256)  # batch, q_len, kv_len, budget


class Kernels:
    """The operations of one HeadConfig on one device. They share scratch memory: one thread and stream at a time.

    `rungs` tells, for every kernel in use, how its plan was found: see specattn_codegen.packs.ladder. `digest` is
    equal for ranks of a cluster that give every call the same plan and kernel: see require_agreement.
    """

    def __init__(
        self,
        heads: HeadConfig,
        arch: Arch,
        device: torch.device,
        dtype: Dtype,
        kv_dtype: KvDtype | None,
        page_size: int,
        packs: Ladder,
        *,
        strict: bool,
        batch_invariant: bool,
        keep_scratch: bool,
    ) -> None:
        self.heads = heads
        self.arch = arch
        self.device = device
        self.dtype: Dtype = dtype
        self.kv_dtype: KvDtype | None = kv_dtype
        self.page_size = page_size
        self.packs = packs
        self.rungs: dict[tuple[KernelSpec, Workload], Rung] = {}
        self._batch_invariant = batch_invariant
        self._keep_scratch = keep_scratch
        self._kernels: dict[tuple[KernelSpec, tuple[int, int, int, int]], Kernel] = {}
        self._specs: dict[tuple[Op, ScoreSpec | None, ScoreHeads | None], KernelSpec] = {}
        self._scratch = Scratch(device, keep=keep_scratch)
        self._plans = Plans(packs, tune_command(heads, arch, dtype, kv_dtype, page_size), strict=strict)

    def verify_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        out: VerifyOutput | None = None,
        workspace: torch.Tensor | None = None,
    ) -> VerifyOutput:
        """Causal attention of each request's rows over its whole cache, with the scores of its prefix keys.

        q [total_q, Hq, D]; k_cache [pages, page_size, Hkv, D], v_cache [pages, page_size, Hkv, Dv] (any strides, unit
        last); page_table [B, max_pages], kv_lens [B], cu_q [B + 1] int32. Row i of request b sits at position
        `kv_lens[b] - q_len[b] + i` and sees the keys up to itself, its own included. max_q and max_kv bound rows and
        keys per request. Pages of a request's keys must be pages of the cache: another one raises SpecError on the CPU;
        on a GPU nobody looks, and it reads what lies there. Entries past its keys are not followed. Scores: see
        ScoreSpec; columns at and past a request's prefix are left unwritten. lse_ref [total_q, Hq] float32 goes with a
        reference normaliser; k_scale and v_scale, of one element or one per KV head, with an 8-bit cache.
        Raises SpecError for inputs that break these rules.
        """
        spec = self._spec("verify_attention", score, None)
        inputs = AttentionInputs(q, k_cache, v_cache, page_table, kv_lens, cu_q)
        self._require_here(q, "q")
        call = attention_call(
            spec,
            self.page_size,
            inputs,
            max_q=max_q,
            max_kv=max_kv,
            sinks=sinks,
            lse_ref=lse_ref,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
        )
        kernel = self._kernel(spec, call.batch, max_q, call.max_kv, 0)
        kernel.launch(call, self._scratch.lend(kernel.workspace_bytes(call), workspace))
        return VerifyOutput(call.out, call.lse, call.scores, call.histogram)

    def select_kv(
        self,
        scores: torch.Tensor,
        prefix_lens: torch.Tensor,
        policy: Policy,
        *,
        sink: int = 0,
        recent: int = 0,
        block: int = 1,
        histogram: torch.Tensor | None = None,
        page_table: torch.Tensor | None = None,
        slot_dtype: torch.dtype = torch.int32,
        union: int = 1,
        out: Selection | None = None,
        workspace: torch.Tensor | None = None,
    ) -> Selection:
        """Scores [B, S, N] float32 and prefix_lens [B] int32 -> the keys to keep, exactly and in ascending order.

        The first `sink` and the last `recent` prefix keys are always kept and count inside the budget. A leading layer
        axis of the scores goes through in one launch. block=n takes scores of n keys each; prefix_lens, budgets, sink
        and recent stay in keys. histogram is the one verification left with the same scores. With page_table
        [B, max_pages] int32 the selection also has slots, the blocks' places in the paged cache, of slot_dtype int32 or
        int64. union=n takes scores [B, S * n, N], as of n verify rows for each KV head, and gives [B, S, K]: every key
        that any of n neighbouring rows selects, once; K is at most n times what one row may select, and at most N.
        TopP takes masses, finite and not negative: other scores raise SpecError on the CPU; on a GPU, where looking at
        them would wait for the device, they give some selection of the forced keys and more.
        """
        self._require_here(scores, "scores")
        call = select_call(
            scores,
            prefix_lens,
            policy,
            sink=sink,
            recent=recent,
            block=block,
            histogram=histogram,
            page_table=page_table,
            page_size=self.page_size,
            slot_dtype=slot_dtype,
            union=union,
            out=out,
        )
        layers, batch, rows, columns = call.shape
        heads: ScoreHeads = "kv_head" if rows == union * self.heads.num_kv_heads else "layer"
        spec = self._spec("select_kv", None, heads)
        kernel = self._kernel(spec, layers * batch, 1, max(1, columns), call.indices.shape[-1])
        kernel.launch(call, self._scratch.lend(kernel.workspace_bytes(call), workspace))
        return call.selection

    def sparse_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        selection: Selection,
        tail_start: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        out: SparseOutput | None = None,
        workspace: torch.Tensor | None = None,
    ) -> SparseOutput:
        """A row at position p sees {selected j < tail_start} and {tail_start <= j <= p}.

        selection as select_kv gives it, one row per KV head or one for the layer; tail_start [B] int32. Where it has
        slots, selected keys are read there and the page table serves the tail alone. The indices of a row may come in
        any order, and one given twice counts twice; -1 in indices or slots, an index of the tail and a slot outside
        the cache select nothing. The other arguments are those of verify_attention; with everything selected the
        results equal its results.
        """
        spec = self._spec("sparse_attention", None, self._rows_of(selection))
        inputs = AttentionInputs(q, k_cache, v_cache, page_table, kv_lens, cu_q)
        self._require_here(q, "q")
        call = attention_call(
            spec,
            self.page_size,
            inputs,
            max_q=max_q,
            max_kv=max_kv,
            sinks=sinks,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            selection=selection,
            tail_start=tail_start,
        )
        kernel = self._kernel(spec, call.batch, max_q, call.max_kv, selection.indices.shape[2])
        kernel.launch(call, self._scratch.lend(kernel.workspace_bytes(call), workspace))
        return SparseOutput(call.out, call.lse)

    def mixed_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        selection: Selection,
        tail_start: torch.Tensor,
        mode: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        k_scale: torch.Tensor | None = None,
        v_scale: torch.Tensor | None = None,
        out: VerifyOutput | None = None,
        workspace: torch.Tensor | None = None,
    ) -> VerifyOutput:
        """One launch for a batch in which some requests verify and others draft.

        mode [B] int32: 0 for a request that verifies, as in verify_attention, with scores; 1 for one that drafts, as in
        sparse_attention, whose score columns stay unwritten and whose histogram is 0. A verifying request's selection
        and tail_start are not read. The other arguments are those of the two.
        """
        spec = self._spec("mixed_attention", score, self._rows_of(selection))
        inputs = AttentionInputs(q, k_cache, v_cache, page_table, kv_lens, cu_q)
        self._require_here(q, "q")
        call = attention_call(
            spec,
            self.page_size,
            inputs,
            max_q=max_q,
            max_kv=max_kv,
            sinks=sinks,
            lse_ref=lse_ref,
            k_scale=k_scale,
            v_scale=v_scale,
            out=out,
            selection=selection,
            tail_start=tail_start,
            mode=mode,
        )
        kernel = self._kernel(spec, call.batch, max_q, call.max_kv, selection.indices.shape[2])
        kernel.launch(call, self._scratch.lend(kernel.workspace_bytes(call), workspace))
        return VerifyOutput(call.out, call.lse, call.scores, call.histogram)

    def prepare(
        self, *scores: ScoreSpec, max_q: int = 8, max_kv: int = 32768, batch: int = 1, budget: int = 2048
    ) -> None:
        """Builds the kernels of a decode loop ahead of its first call: verification without scores and with each of
        `scores`, selection and sparse attention for the same heads. A Triton kernel is machine code only after its
        first launch, so make one call of each kind before capturing a CUDA graph."""
        self._kernel(self._spec("verify_attention", None, None), batch, max_q, max_kv, 0)
        for score in scores:
            self._kernel(self._spec("verify_attention", score, None), batch, max_q, max_kv, 0)
            self._kernel(self._spec("select_kv", None, score.heads), batch, 1, max_kv, budget)
            self._kernel(self._spec("sparse_attention", None, score.heads), batch, 1, max_kv, budget)

    def _require_here(self, tensor: torch.Tensor, name: str) -> None:
        require_type(name, tensor, torch.Tensor, "a torch.Tensor")
        if tensor.device.type != self.device.type:
            raise SpecError(
                f"{name} is on {tensor.device}: these kernels were loaded for {self.device}; "
                f"load them with device={tensor.device.type!r} or move the tensors"
            )

    def _rows_of(self, selection: Selection) -> ScoreHeads:
        require_type("selection", selection, Selection, "a Selection, as select_kv returns it")
        return "layer" if selection.indices.shape[1] == 1 and self.heads.num_kv_heads > 1 else "kv_head"

    def _spec(self, op: Op, score: ScoreSpec | None, selection: ScoreHeads | None) -> KernelSpec:
        key = (op, score, selection)
        if key not in self._specs:
            dtype: Dtype = "float32" if op == "select_kv" else self.dtype
            self._specs[key] = KernelSpec(
                op=op,
                heads=self.heads,
                dtype=dtype,
                kv_dtype=self.kv_dtype,
                page_size=self.page_size if self.arch.is_gpu and op != "select_kv" else 0,
                score=score,
                selection=selection,
            )
        return self._specs[key]

    @property
    def digest(self) -> str:
        """Of all that decides plans and kernels here."""
        return digest(self.packs.digest, self.dtype, self.kv_dtype, self.page_size, self._batch_invariant)

    def _kernel(self, spec: KernelSpec, batch: int, q_len: int, kv_len: int, budget: int) -> Kernel:
        """The kernel of a call's size bucket; one for every size where results must not depend on the batch."""
        if self._batch_invariant:
            sizes = BATCH_INVARIANT_SIZES
        else:
            rows = bucket(q_len)
            sizes = (bucket(batch), rows, max(rows, bucket(kv_len)), budget and bucket(budget))
        key = (spec, sizes)
        kernel = self._kernels.get(key)
        if kernel is None:
            batch, q_len, kv_len, budget = sizes
            kernel = self._build(spec, Workload(batch=batch, q_len=q_len, kv_len=kv_len, budget=budget))
            self._kernels[key] = kernel
        return kernel

    def _build(self, spec: KernelSpec, workload: Workload) -> Kernel:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise SpecError(f"{spec.name} is not built yet and a CUDA graph is being captured; call prepare() first")
        found = self._plans.find(spec, workload)
        plan = found.plan
        if spec.op == "mixed_attention":
            plan = space.for_mixed(plan, spec, self.arch)
            if self._batch_invariant and self.arch.is_gpu:
                raise SpecError(
                    "mixed_attention, batch_invariant=True: on a GPU what a block reads depends on the whole batch; "
                    "launch verify_attention and sparse_attention apart, or load kernels without batch_invariant"
                )
        plan = space.batch_invariant(plan) if self._batch_invariant else plan
        plan = plan if self._keep_scratch else space.reentrant(plan)
        source = render(spec, plan, build.target_for(plan, self.arch))
        logger.info("%s %s: %s plan (%s)", spec.name, workload.name, found.rung, plan)
        self.rungs[spec, workload] = found.rung
        if found.candidate and found.candidate.entry.spec == spec and plan == found.plan:
            self._plans.warn_if_stale(found.candidate, source)
        return build.load(source)


def load_kernels(
    heads: HeadConfig,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    page_size: int = 16,
    strict: bool = False,
    batch_invariant: bool = False,
    keep_scratch: bool = True,
    packs: str | Path | Sequence[str | Path] = (),
    frozen: bool = False,
) -> Kernels:
    """Kernels for one HeadConfig, from tuned packs where there are any, else on the safe default plan with a warning.

    device           "cpu" or a CUDA device
    dtype            of q and the KV cache: torch.float32, torch.float16 or torch.bfloat16
    kv_dtype         of the KV cache where it differs: torch.float8_e4m3fn or torch.float8_e5m2
    page_size        keys per page of the cache
    strict           a missing pack entry raises SpecError instead of falling back to the default plan;
                     SPECATTN_STRICT=1 says so for all
    batch_invariant  a row's result does not depend on what else is in the batch, on the bounds or on the threads,
                     nor, on the CPU, on how many rows its request verifies
    keep_scratch     keep scratch memory between calls; False allocates it anew, for several threads or streams
    packs            folders of packs, or single packs, looked up before all others
    frozen           a process that has read its packs does not see later changes; SPECATTN_FROZEN=1 says so for all

    Packs are read here; of explicit, environment, user, site and shipped ones the first that has an entry wins. Never
    tunes. Kernels are built at first use and kept in the cache folder; `prepare()` builds ahead.
    """
    require_type("heads", heads, HeadConfig, "a HeadConfig, as HeadConfig.from_model('llama3-8b')")
    if dtype not in DTYPE_NAMES:
        raise SpecError(f"dtype={dtype}: must be one of {', '.join(map(str, DTYPE_NAMES))}")
    if kv_dtype not in (None, dtype, *FLOAT8_NAMES):
        raise SpecError(f"kv_dtype={kv_dtype}: must be {dtype} like q, or one of {', '.join(map(str, FLOAT8_NAMES))}")
    if page_size < 1:
        raise SpecError(f"page_size={page_size}: must be at least 1 key")
    place = _device(device)
    arch = cpu_info.detect(measure=False) if place.type == "cpu" else gpu_detect.local()
    explicit = (packs,) if isinstance(packs, (str, Path)) else packs
    layers = paths.pack_layers(*map(Path, explicit))
    for layer in layers[: len(explicit)]:
        if not layer.exists():
            raise SpecError(f"packs={str(layer)!r}: no such folder or file; `specattn-pack list` shows what there is")
    read = ladder.read_once if frozen or paths.is_frozen() else ladder.read
    return Kernels(
        heads,
        arch,
        place,
        DTYPE_NAMES[dtype],
        None if kv_dtype is None else FLOAT8_NAMES.get(kv_dtype),
        page_size,
        read(arch, heads, layers),
        strict=strict or paths.is_strict(),
        batch_invariant=batch_invariant,
        keep_scratch=keep_scratch,
    )


def _device(named: str | torch.device) -> torch.device:
    try:
        device = torch.device(named)
    except RuntimeError as error:  # in words that name every device torch was ever built for
        raise SpecError(f"device={named!r}: must be cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise SpecError(f"device={named!s}: must be cpu or cuda")
    return device
