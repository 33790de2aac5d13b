"""``tokenmill bench peers``: the engines to compare with, each in a virtual environment of its own."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenmill.cli.terminal import print_table, say
from tokenmill.cli.verbs import group

Name = Annotated[str, typer.Argument(help="A name from `tokenmill bench peers list`.")]


def list_peers() -> None:
    """Show the known engines and whether their environments exist."""
    from tokenmill.bench.peers import PEERS, environment_python, problem

    rows = []
    for peer in PEERS.values():
        python = environment_python(peer.name)
        state = "not installed" if not python.exists() else problem(peer, str(python)) or "installed"
        rows.append((peer.name, state, " ".join(peer.packages), peer.note))
    print_table(("peer", "state", "packages", "size or time"), rows)


def install_peer(name: Name) -> None:
    """Make a virtual environment for an engine and install it there."""
    from tokenmill.bench.peers import install, parse_peer

    peer, _ = parse_peer(name)
    print(install(peer, say))


peers = group("List or install the engines to compare with.", {"list": list_peers, "install": install_peer})
