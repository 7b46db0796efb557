"""``tacit keys``: identities and their key files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tacit.identity import Identity, key_text
from tacit.party.cluster_file import require_name

app = typer.Typer(help="Identities: make one, or show its public key.", no_args_is_help=True)


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose: alice, bob, provider, or an owner's or a client's name.")],
    folder: Annotated[Path, typer.Option(help="Where NAME.key goes.")] = Path(),
) -> None:
    """Make an identity: NAME.key, which only you can read, and the public key for cluster.toml."""
    require_name(name)
    path = folder / f"{name}.key"
    identity = Identity.fresh()
    identity.save(path)
    typer.echo(
        f"wrote {path}: keep it secret, and keep a copy: what is encrypted under it is lost without it", err=True
    )
    _print(path, identity)


@app.command()
def show(file: Annotated[Path, typer.Argument(help="A key file.")]) -> None:
    """Print the name of a key file and its public key, as cluster.toml wants it."""
    _print(file, Identity.load(file))


def _print(path: Path, identity: Identity) -> None:
    typer.echo(f"{path.stem} {key_text(identity.public)}")
