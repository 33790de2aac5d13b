"""``tokenmill bench``: how fast, and how close to what this machine can do. One file per verb or family of verbs."""

from __future__ import annotations

from tokenmill.cli.bench.compare import compare
from tokenmill.cli.bench.peers import peers
from tokenmill.cli.bench.profile import profile
from tokenmill.cli.bench.report import report
from tokenmill.cli.bench.serve import serve
from tokenmill.cli.bench.speed import latency, roofline, startup, throughput
from tokenmill.cli.verbs import group

bench = group(
    "Measure speed, as a share of this machine's limits.",
    {
        "roofline": roofline,
        "latency": latency,
        "throughput": throughput,
        "startup": startup,
        "compare": compare,
        "profile": profile,
        "serve": serve,
        "report": report,
    },
)
bench.add_typer(peers, name="peers")
