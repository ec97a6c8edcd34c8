"""The words `rollcast keys add | list | revoke`.

Owns: their options and help. Does not know the keys file (`live/keys.py`), which is imported only when one is called.
"""

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

File = Annotated[
    Path, typer.Option("--file", metavar="FILE", help="The keys file; only its owner may be able to read it (0600).")
]
KEYS_FILE = Path("keys.json")


def verbs() -> typer.Typer:
    """The verbs."""
    app = typer.Typer(
        help="API keys of the live policy: make, list and revoke them.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )

    @app.command(epilog="Example: rollcast keys add alice --scope user --file keys.json")
    def add(
        name: Annotated[
            str, typer.Argument(metavar="NAME", help="Whose key it is: letters, digits, '.', '_', '@', '-'.")
        ],
        scope: Annotated[
            Literal["user", "admin"], typer.Option(help="user: may ask. admin: may promote, roll back and scale too.")
        ] = "user",
        rate: Annotated[
            float | None, typer.Option(min=0.001, metavar="R", help="Requests a second; else the server's limit.")
        ] = None,
        concurrent: Annotated[
            int | None, typer.Option(min=1, metavar="N", help="Requests at a time; else the server's limit.")
        ] = None,
        file: File = KEYS_FILE,
    ) -> None:
        """Make a key and print it, once: the file holds only its digest. A running server takes it within a second."""
        from rollcast.live.keys import add_key, make_key

        key, text = make_key(name, scope, rate, concurrent)
        add_key(file, key)
        typer.echo(f"key {key.id} of {name}, scope {scope}, in {file}; it is shown only now:", err=True)
        typer.echo(text)

    @app.command("list", epilog="Example: rollcast keys list --file keys.json --json")
    def list_(
        file: File = KEYS_FILE, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
    ) -> None:
        """All keys: id, name, scope and when they were made; never the keys themselves."""
        from rollcast.live.keys import read_keys

        keys = [key.model_dump(exclude={"sha256"}) for key in read_keys(file)]
        if as_json:
            typer.echo(json.dumps(keys, indent=2))
        for key in keys if not as_json else []:
            typer.echo(f"{key['id']}  {key['scope']:<5}  {key['created']}  {key['name']}")

    @app.command(epilog="Example: rollcast keys revoke alice --file keys.json")
    def revoke(
        key: Annotated[str, typer.Argument(metavar="ID|NAME", help="A key by its id, or all keys of a name.")],
        file: File = KEYS_FILE,
    ) -> None:
        """Take keys out of the file. A running server refuses them within a second."""
        from rollcast.live.keys import revoke_key

        for gone in revoke_key(file, key):
            typer.echo(f"revoked {gone.id} of {gone.name}")

    return app
