"""`umbel-client model digest`: what a base model's folder holds, and the name of exactly that."""

from pathlib import Path
from typing import Annotated

import typer

from umbel_client.cli.options import Json
from umbel_host.files.model_digest import folder_files, model_digest
from umbel_host.files.model_folder import unreadable
from umbel_host.terminal import print_json, say

model = typer.Typer(help="Look at a base model's folder: digest.", no_args_is_help=True)


@model.command()
def digest(
    folder: Annotated[Path, typer.Argument(help="The folder of the base model.")],
    as_json: Json = False,
) -> None:
    """Print the digest that plans and policies name a model by, and the files that count for it."""
    files = folder_files(folder)
    found = model_digest(files).hex()
    sizes = {name: _size(folder / name) for name in sorted(files)}
    if as_json:
        listed = [{"file": n, "bytes": sizes[n], "sha256": files[n]} for n in sizes]
        print_json({"digest": found, "files": listed})
        return
    for name, size in sizes.items():
        say(f"{size:>16,}  {files[name]}  {name}")
    say(f"\ndigest  {found}")
    say(f'\nA site that allows this model has in [policy] of client.toml: models = ["{found}"]')


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from None
