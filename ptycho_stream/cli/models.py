"""``ptycho-stream models …``: which networks there are, and where each comes from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ptycho_stream.cli.import_model import import_model
from ptycho_stream.cli.options import AsJson, Config, print_table
from ptycho_stream.errors import ModelError

if TYPE_CHECKING:
    from ptycho_stream.models.registry import ModelRegistry

app = typer.Typer(
    help="List and describe the models of the registry.\n\nExample: ptycho-stream models list",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Registry = Annotated[
    Path | None,
    typer.Option("--registry", metavar="FOLDER", help="Of models; else the configuration's."),
]


def _changeable(config: Path | None, registry: Path | None) -> ModelRegistry:
    """The registry, whose model in use the configuration lets change."""
    if config is not None:
        from ptycho_stream.models.active import check_unpinned
        from ptycho_stream.settings import load_settings

        check_unpinned(load_settings(config).model)
    return _registry(config, registry)


def _registry(config: Path | None, registry: Path | None) -> ModelRegistry:
    from ptycho_stream.models.registry import ModelRegistry  # imports torch

    if registry is None and config is not None:
        from ptycho_stream.settings import load_settings

        registry = load_settings(config).model.registry
    return ModelRegistry(registry)


def _in_use(config: Path | None, models: ModelRegistry) -> str:
    """Name of the model in use, which the configuration may pin."""
    from ptycho_stream.models.active import model_in_use
    from ptycho_stream.settings import ModelSettings, load_settings

    settings = ModelSettings() if config is None else load_settings(config).model
    return model_in_use(settings.model_copy(update={"registry": models.root}))


@app.command("list")
def list_models(config: Config = None, registry: Registry = None, as_json: AsJson = False) -> None:
    """List the shipped models and those of the registry's folder.

    Example: ptycho-stream models list --registry models
    """
    models = _registry(config, registry)
    manifests, active = models.list(), _in_use(config, models)
    if as_json:
        told = [asdict(manifest) | {"in_use": manifest.name == active} for manifest in manifests]
        typer.echo(json.dumps(told))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "architecture", "created", "parent", "metrics"):
        table.add_column(column, overflow="fold")
    for manifest in manifests:
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items())
        mark = " (in use)" if manifest.name == active else ""
        table.add_row(
            manifest.name + mark,
            manifest.architecture,
            manifest.created,
            manifest.parent or "-",
            metrics,
        )
    print_table(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the model, as `models list` prints it.")],
    config: Config = None,
    registry: Registry = None,
) -> None:
    """Print a model's manifest as JSON.

    Example: ptycho-stream models show unrolled-v2
    """
    manifests = _registry(config, registry).list()
    for manifest in manifests:
        if manifest.name == name:
            typer.echo(json.dumps(asdict(manifest), indent=2))
            return
    known = ", ".join(manifest.name for manifest in manifests) or "none"
    raise ModelError(f"there is no model {name!r}; there are: {known}")


@app.command()
def use(
    name: Annotated[str, typer.Argument(help="Name of the model, as `models list` prints it.")],
    config: Config = None,
    registry: Registry = None,
) -> None:
    """Take a model into use: it is what `default` means in this registry from now on.

    A daemon that runs takes it at its next reload; `ptycho-stream ctl use` changes it at once.

    Example: ptycho-stream models use unrolled-v2 --registry models
    """
    models = _changeable(config, registry)
    models.use(name)
    typer.echo(f"model {models.active()} is in use in {models.root}")


@app.command()
def rollback(config: Config = None, registry: Registry = None) -> None:
    """Go back to the model that was in use before.

    A daemon that runs takes it at its next reload; `ptycho-stream ctl rollback` does it at once.

    Example: ptycho-stream models rollback --registry models
    """
    models = _changeable(config, registry)
    former, name = models.active(), models.rollback()
    typer.echo(f"model {name} is in use in {models.root}, no more {former}")


@app.command("export")
def export_model(
    name: Annotated[str, typer.Argument(help="Name of the model; `default` is the one in use.")],
    target: Annotated[Path, typer.Argument(metavar="FOLDER", help="To copy its folder into.")],
    config: Config = None,
    registry: Registry = None,
) -> None:
    """Copy a model with its manifest into another folder, for another machine's registry.

    Example: ptycho-stream models export default /media/stick --config my.toml
    """
    models = _registry(config, registry)
    place = models.export(_in_use(config, models) if name == "default" else name, target)
    typer.echo(f"model {place.name} is in {place}")


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
    from ptycho_stream.training.budget import Budget
    from ptycho_stream.training.pretrain import pretrain as train  # imports Lightning

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


app.command("import")(import_model)
