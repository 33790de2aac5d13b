"""``tokenmill bench``: how fast, and how close to what this machine can do. One file per verb or family of verbs."""

from __future__ import annotations

import typer

from tokenmill.cli.bench.compare import compare
from tokenmill.cli.bench.peers import peers
from tokenmill.cli.bench.profile import profile
from tokenmill.cli.bench.report import report
from tokenmill.cli.bench.serve import serve
from tokenmill.cli.bench.speed import latency, roofline, startup, throughput

bench = typer.Typer(
    help="Measure speed, as a share of this machine's limits.", no_args_is_help=True, rich_markup_mode=None
)
bench.command("roofline")(roofline)
bench.command("latency")(latency)
bench.command("throughput")(throughput)
bench.command("startup")(startup)
bench.command("compare")(compare)
bench.command("profile")(profile)
bench.command("serve")(serve)
bench.command("report")(report)
bench.add_typer(peers, name="peers")
