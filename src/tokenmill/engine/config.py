"""The engine's configuration: one frozen object, validated once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenmill.engine.ledger import parse_size
from tokenmill.engine.policies import FirstComeFirstServed, PriorityWithAgeing, SchedulingPolicy
from tokenmill.engine.scheduler import MAX_SCORED_ROWS
from tokenmill.errors import UsageError
from tokenmill.program.kv import KvElement

SERVING_STEP_TARGET = 0.05
"""Seconds: twenty tokens a second for everyone while prompts are computed."""
_POLICIES: dict[str, SchedulingPolicy] = {"fcfs": FirstComeFirstServed(), "priority": PriorityWithAgeing()}
KV_ELEMENTS = {"f16": KvElement.F16, "bf16": KvElement.BF16, "f32": KvElement.F32}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What :class:`tokenmill.llm.LLM` was asked for. Raises UsageError naming parameter, value and allowed range."""

    model: str | Path
    backend: Literal["native", "torch"] = "native"
    memory: int | str | None = None
    """Bytes, or a size such as "6GB"; None: most of what the machine or its cgroup has available."""
    max_model_len: int | None = None
    """Most tokens of a sequence, prompt and output; None: the model's own maximum, or what fits."""
    max_num_seqs: int = 64
    """Most sequences that run at once."""
    max_batch_tokens: int = 512
    """Most tokens of one step: long prompts are computed in chunks of at most this size."""
    kv_cache_dtype: str = "f16"
    threads: int = 0
    """Threads of a step; 0: all that the process may use."""
    cache_dir: str | Path | None = None
    """Folder of the build cache."""
    enable_prefix_caching: bool = True
    swap_space: int | str | None = None
    """Bytes, or a size such as "8GB", of files for the KV pages of requests that make room for others. None: they are
    computed again."""
    swap_dir: str | Path | None = None
    """Folder of the swap files, on a disk (not in memory, as /tmp may be); None: in the cache folder."""
    step_target: float | None = None
    """Seconds that a step should take: long prompts are cut so that their neighbours get a token that often, at the
    price of some throughput. None cuts them by ``max_batch_tokens`` only. Servers use ``SERVING_STEP_TARGET``."""
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"
    """Who starts first and keeps pages: the earlier arrival, or the smaller ``priority`` (with ageing)."""
    screened_head: Literal["off", "on", "auto"] = "off"
    """Greedy steps read 5 of 8 bits of the output head first, and all bits only where the largest logit may be: the
    same tokens, sooner, at the price of a second, smaller head in memory. "on" refuses a model whose head cannot be
    screened; "auto" screens where the head is a fair part of what a decoded token reads."""
    max_waiting: int | None = None
    """Most requests that wait for a start; more are refused (EngineOverloadedError). None: no bound."""

    def __post_init__(self) -> None:
        for name, path, optional in (
            ("model", self.model, False),
            ("cache_dir", self.cache_dir, True),
            ("swap_dir", self.swap_dir, True),
        ):
            if not (optional and path is None) and (not isinstance(path, str | Path) or not str(path)):
                raise UsageError(f"{name} is {path!r}; it must be a name or path")
        if self.backend not in ("native", "torch"):
            raise UsageError(f'backend is {self.backend!r}; it must be "native" or "torch"')
        if self.memory is not None:
            parse_size(self.memory)
        if self.swap_space is not None:
            parse_size(self.swap_space, "swap_space")
        _check("max_model_len", self.max_model_len, 2, 2**30, optional=True)
        _check("max_num_seqs", self.max_num_seqs, 1, 4096)
        _check("max_batch_tokens", self.max_batch_tokens, self.max_num_seqs, 2**20)
        if not isinstance(self.kv_cache_dtype, str) or self.kv_cache_dtype not in KV_ELEMENTS:
            raise UsageError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; it must be one of {', '.join(KV_ELEMENTS)}")
        _check("threads", self.threads, 0, 1024)
        if not isinstance(self.enable_prefix_caching, bool):
            raise UsageError(f"enable_prefix_caching is {self.enable_prefix_caching!r}; it must be True or False")
        target = self.step_target
        if target is not None and (isinstance(target, bool | str) or not 0.001 <= target <= 60):
            raise UsageError(f"step_target is {target!r}; it must be None or seconds, 0.001 to 60")
        if self.scheduling_policy not in _POLICIES:
            raise UsageError(
                f"scheduling_policy is {self.scheduling_policy!r}; it must be one of {', '.join(_POLICIES)}"
            )
        if self.screened_head not in ("off", "on", "auto"):
            raise UsageError(f'screened_head is {self.screened_head!r}; it must be "off", "on" or "auto"')
        _check("max_waiting", self.max_waiting, 0, 2**31, optional=True)

    @property
    def kv_element(self) -> KvElement:
        return KV_ELEMENTS[self.kv_cache_dtype]

    @property
    def policy(self) -> SchedulingPolicy:
        return _POLICIES[self.scheduling_policy]

    @property
    def logit_rows(self) -> int:
        """Rows of logits of one step."""
        return max(self.max_num_seqs, MAX_SCORED_ROWS)


def _check(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        reason = " (max_num_seqs)" if name == "max_batch_tokens" else ""
        raise UsageError(f"{name} is {value!r}; it must be a whole number, {low}{reason} to {high}")
