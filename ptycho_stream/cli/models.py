"""``ptycho-stream models …``: which networks there are, and where each comes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ptycho_stream.cli.options import AsJson, Config, print_table
from ptycho_stream.errors import ModelError

if TYPE_CHECKING:
    from ptycho_stream.models.manifest import Manifest

app = typer.Typer(
    help="List and describe the models of the registry.\n\nExample: ptycho-stream models list",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Registry = Annotated[
    Path | None,
    typer.Option("--registry", metavar="FOLDER", help="Of models; else the configuration's."),
]


def _manifests(config: Path | None, registry: Path | None) -> list[Manifest]:
    from ptycho_stream.models.registry import ModelRegistry  # imports torch

    if registry is None and config is not None:
        from ptycho_stream.settings import load_settings

        registry = load_settings(config).model.registry
    return ModelRegistry(registry).list()


@app.command("list")
def list_models(config: Config = None, registry: Registry = None, as_json: AsJson = False) -> None:
    """List the shipped models and those of the registry's folder.

    Example: ptycho-stream models list --registry models
    """
    manifests = _manifests(config, registry)
    if as_json:
        typer.echo(json.dumps([asdict(manifest) for manifest in manifests]))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "architecture", "created", "parent", "metrics"):
        table.add_column(column, overflow="fold")
    for manifest in manifests:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
        table.add_row(
            manifest.name, manifest.architecture, manifest.created, manifest.parent or "-", metrics
        )
    print_table(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the model, as `models list` prints it.")],
    config: Config = None,
    registry: Registry = None,
) -> None:
    """Print a model's manifest as JSON.

    Example: ptycho-stream models show unrolled-v1
    """
    manifests = _manifests(config, registry)
    for manifest in manifests:
        if manifest.name == name:
            typer.echo(json.dumps(asdict(manifest), indent=2))
            return
    known = ", ".join(manifest.name for manifest in manifests) or "none"
    raise ModelError(f"there is no model {name!r}; there are: {known}")


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(help="Name of the new model.")],
    registry: Annotated[
        Path, typer.Option("--registry", metavar="FOLDER", help="Folder of models to add it to.")
    ],
    minutes: Annotated[float, typer.Option(min=0.01, help="How long to train.")] = 25.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of every frame.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. [all cores]")] = None,
    work: Annotated[
        Path, typer.Option("--work", metavar="FOLDER", help="For checkpoint and curves.")
    ] = Path("out/pretrain"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoint in the work folder.")
    ] = False,
) -> None:
    """Train an unrolled network on synthetic frames alone and add it to a registry.

    Example: ptycho-stream models pretrain mine --registry models --minutes 25
    """
    from ptycho_stream.models.registry import ModelRegistry

    target = ModelRegistry(registry)
    target.check_new(name)
    from ptycho_stream.training.pretrain import Budget  # imports Lightning
    from ptycho_stream.training.pretrain import pretrain as train

    result = train(
        work,
        Budget(minutes=minutes),
        seed=seed,
        threads=threads,
        resume=work / "last.ckpt" if resume else None,
    )
    manifest = result.save(target, name)
    metrics = ", ".join(f"{key} {value:.4g}" for key, value in manifest.metrics.items())
    typer.echo(f"model {manifest.name} is in {registry}: {metrics}")
