"""The memory ledger: what the engine may use, and what for.

Weights, KV pages and scratch are counted in bytes against one budget, the ``memory`` argument or what the machine and
the process's cgroups leave. What does not fit is refused before anything is allocated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenmill.errors import MemoryLimitError, UsageError
from tokenmill.program.kv import PAGE_TOKENS, KvGroupSpec

DEFAULT_SHARE = 0.9
"""Share of the available memory that is the budget if none is given: the rest is for Python, tokenizer and system."""
DEFAULT_TOKENS_PER_SEQUENCE = 2048
"""Tokens of KV per sequence where no budget is given; a longer sequence takes the others' pages."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes the engine may use, and who says so."""

    limit: int
    source: str
    given: bool
    """True if the user chose it."""


@dataclass(frozen=True, slots=True)
class MemoryLedger:
    """What the budget is spent on, in bytes. ``str()`` gives a table."""

    budget: MemoryBudget
    weights: int
    kv: int
    scratch: int
    kv_pages: tuple[int, ...]
    """Pages of each KV group."""
    groups: tuple[KvGroupSpec, ...]
    max_model_len: int
    """Most tokens of one sequence, prompt and output."""
    max_num_seqs: int
    """Most sequences that run at once."""
    swap: int = 0
    """Most bytes of swap files; on disk, so not part of the total."""

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.scratch

    def checked(self, advice: str = "lower max_num_seqs or max_batch_tokens, or raise memory") -> MemoryLedger:
        """This ledger. Raises MemoryLimitError, with ``advice``, if it exceeds the budget."""
        if self.total > self.budget.limit:
            raise MemoryLimitError(
                f"the model needs {size(self.total)} (weights {size(self.weights)}, KV cache {size(self.kv)}, scratch "
                f"{size(self.scratch)}), {self.budget.source} allows {size(self.budget.limit)}; {advice}"
            )
        return self

    def __str__(self) -> str:
        rows = [("weights", size(self.weights), "mapped")]
        for group, (spec, pages) in enumerate(zip(self.groups, self.kv_pages, strict=True)):
            window = "" if spec.window is None else f", window {spec.window}"
            detail = f"{pages} pages of {PAGE_TOKENS} tokens, {spec.layers} layers {spec.element.name.lower()}{window}"
            rows.append((f"KV group {group}", size(pages * spec.page_bytes), detail))
        rows.append(("scratch", size(self.scratch), ""))
        limits = f"{self.max_model_len} tokens a sequence, {self.max_num_seqs} sequences at once"
        rows.append(("total", size(self.total), limits))
        if self.swap:
            rows.append(("swap files", size(self.swap), "at most, on disk"))
        rows.append(("budget", size(self.budget.limit), self.budget.source))
        return "\n".join(f"{name:<12} {amount:>10}  {detail}".rstrip() for name, amount, detail in rows)


def plan_memory(
    budget: MemoryBudget,
    *,
    weights: int,
    scratch: int,
    groups: Sequence[KvGroupSpec],
    pages_needed: Callable[[int], Sequence[int]],
    longest: int,
    max_model_len: int | None,
    max_num_seqs: int,
) -> MemoryLedger:
    """Divides the budget.

    ``pages_needed(length)`` gives the pages per group of a sequence of ``length`` tokens; ``longest`` is the model's
    own maximum. Without ``max_model_len`` the context is as long as model and budget allow. Every group gets the pages
    of one sequence of that length, and beyond that those of ``max_num_seqs`` sequences of one length, as long as fits.

    Raises MemoryLimitError with needed and available bytes and the argument to lower.
    """

    def kv_bytes(pages: Sequence[int]) -> int:
        return sum(count * spec.page_bytes for count, spec in zip(pages, groups, strict=True))

    left = budget.limit - weights - scratch
    shortest = PAGE_TOKENS if max_model_len is None else max_model_len
    needed = kv_bytes(pages_needed(shortest))
    if needed > left:
        advice = "choose a smaller model or raise memory" if max_model_len is None else "lower max_model_len"
        raise MemoryLimitError(
            f"{shortest} tokens of KV cache need {size(needed)} beside {size(weights)} of weights and {size(scratch)} "
            f"of scratch, {size(weights + scratch + needed)} in all, but {budget.source} allows {size(budget.limit)}; "
            f"{advice}"
        )
    if max_model_len is None:
        max_model_len = _largest(longest, lambda length: kv_bytes(pages_needed(length)) <= left)

    own = pages_needed(max_model_len)

    def pages_for(length: int) -> list[int]:
        return [max(one, max_num_seqs * each) for one, each in zip(own, pages_needed(length), strict=True)]

    most = max_model_len if budget.given else min(max_model_len, DEFAULT_TOKENS_PER_SEQUENCE)
    length = _largest(most, lambda tokens: kv_bytes(pages_for(tokens)) <= left)
    pages = tuple(pages_for(length) if kv_bytes(pages_for(length)) <= left else own)
    return MemoryLedger(
        budget=budget,
        weights=weights,
        kv=kv_bytes(pages),
        scratch=scratch,
        kv_pages=pages,
        groups=tuple(groups),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
    )


def memory_budget(memory: int | str | None, root: Path = Path("/")) -> MemoryBudget:
    """The budget: ``memory`` in bytes or as text ("6GB", "512MiB"), or most of what is available now.

    ``root`` holds ``proc`` and ``sys`` (another folder in tests). Raises UsageError for a text that is no size.
    """
    if memory is not None:
        return MemoryBudget(parse_size(memory), f"memory={memory}", given=True)
    available, source = _available(root)
    return MemoryBudget(int(available * DEFAULT_SHARE), f"{DEFAULT_SHARE:.0%} of {source}", given=False)


def parse_size(given: int | str, name: str = "memory") -> int:
    """Bytes of a size such as 8000000000, "8GB" (10^9 each), "8GiB" or "8G" (2^30 each), given as ``name``.

    Raises UsageError.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(given))
    if match is None or match[2].lower() not in _UNITS or isinstance(given, bool | float):
        raise UsageError(f'{name} is {given!r}; give bytes or a size such as "6GB" or "512MiB"')
    number = int(float(match[1]) * _UNITS[match[2].lower()])
    if number <= 0:
        raise UsageError(f"{name} is {given!r}; it must be above 0")
    return number


def size(count: int) -> str:
    """Bytes for people: 134 MB, 1.53 GB (powers of ten)."""
    for unit, factor, digits in (("GB", 10**9, 2), ("MB", 10**6, 0), ("kB", 10**3, 0)):
        if abs(count) >= factor:
            return f"{count / factor:.{digits}f} {unit}"
    return f"{count} B"


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest length up to ``most`` that fits, a multiple of the page size unless it is ``most``; fits is monotone.

    At least one page, whether that fits or not.
    """
    if fits(most):
        return most
    low, high = 1, max(most // PAGE_TOKENS, 1)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle * PAGE_TOKENS):
            low = middle
        else:
            high = middle - 1
    return min(low * PAGE_TOKENS, most)


def _available(root: Path) -> tuple[int, str]:
    """Bytes that this process may still take, and what bounds them: the machine or a cgroup above the process."""
    fields = {}
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    candidates = [(fields["MemAvailable"], "the machine's available memory")]
    for folder, limit_file, usage_file in _memory_groups(root):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is None or usage is None or limit >= fields["MemTotal"]:
            continue
        # Page cache that the kernel can drop counts as usage of the group, but not as taken.
        candidates.append((max(limit - usage + _reclaimable(folder / "memory.stat"), 0), "the cgroup's free memory"))
    return min(candidates)


def _memory_groups(root: Path) -> list[tuple[Path, str, str]]:
    """Folders of the process's memory cgroups up to the mount, with the names of limit and usage files (v2 and v1)."""
    v2, v1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup/memory"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for mount, names, matches in (
        (v2, ("memory.max", "memory.current"), lambda controllers: controllers == ""),
        (
            v1,
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            lambda controllers: "memory" in controllers.split(","),
        ),
    ):
        # Inside a container the path may be the host's; the mount's root is then the container's own group.
        paths = [line.split(":", 2)[2] for line in lines if line.count(":") >= 2 and matches(line.split(":", 2)[1])]
        folder = mount / (paths[0] if paths else "/").lstrip("/")
        while folder != mount:
            found.append((folder, *names))
            folder = folder.parent
        found.append((mount, *names))
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


def _reclaimable(path: Path) -> int:
    try:
        fields = dict(line.split() for line in path.read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(fields.get("total_inactive_file", fields.get("inactive_file", 0)))
