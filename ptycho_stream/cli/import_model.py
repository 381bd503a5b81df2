"""``ptycho-stream models import``: take weights that were trained elsewhere into a registry.

Registered by ``ptycho_stream.cli.models``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer


def import_model(
    file: Annotated[Path, typer.Argument(help="State dict or checkpoint, saved by torch.save.")],
    name: Annotated[str, typer.Option("--name", help="Of the new model.")],
    registry: Annotated[
        Path, typer.Option("--registry", metavar="FOLDER", help="Folder of models to add it to.")
    ],
    architecture: Annotated[
        str, typer.Option("--architecture", help="Network that the weights are of.")
    ] = "cnn",
    settings: Annotated[
        str,
        typer.Option("--settings", metavar="JSON", help="Of the network, where not the defaults."),
    ] = "{}",
    prefix: Annotated[
        str, typer.Option("--prefix", help="Take the weights whose names begin so, without it.")
    ] = "",
    probe: Annotated[
        Path | None,
        typer.Option(
            "--probe",
            metavar="FILE",
            help="Probe of the training, if the model's patches are relative to its window (cnn).",
        ),
    ] = None,
    model_type: Annotated[
        Literal["pinn", "supervised"] | None,
        typer.Option("--model-type", help="How it was trained, for the manifest."),
    ] = None,
) -> None:
    """Add a foreign state dict to a registry; names and shapes must be those of the network.

    A bundle of the PtychoPINN face (wts.h5.zip) tells its network itself: it takes no options.

    Example: ptycho-stream models import best.pt --name mine --registry models
    --settings '{"size_px": 64, "gridsize": 2}'
    """
    from ptycho_stream.models.foreign import import_state_dict  # imports torch
    from ptycho_stream.models.manifest import Manifest
    from ptycho_stream.models.registry import ModelRegistry
    from ptycho_stream.ptychopinn.bundle import ARCHIVE_FILE, load_bundle, register

    if file.name == ARCHIVE_FILE:
        if settings != "{}" or prefix or probe is not None or model_type is not None:
            raise typer.BadParameter(f"{ARCHIVE_FILE} tells its network itself: leave options out")
        manifest = register(load_bundle(file), name, ModelRegistry(registry))
        typer.echo(f"model {manifest.name} is in {registry}, sha256 {manifest.sha256[:12]}")
        return
    values = _settings(settings)
    if probe is not None:
        values["probe_center_yx_px"] = _center_of(probe)
    training = {} if model_type is None else {"model_type": model_type}
    manifest = import_state_dict(
        file,
        Manifest(name=name, architecture=architecture, settings=values, training=training),
        ModelRegistry(registry),
        prefix=prefix,
    )
    typer.echo(f"model {manifest.name} is in {registry}, sha256 {manifest.sha256[:12]}")


def _settings(text: str) -> dict[str, Any]:
    try:
        held: object = json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(f"--settings is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise typer.BadParameter('--settings needs a JSON object, such as {"size_px": 64}')
    return cast("dict[str, Any]", held)


def _center_of(path: Path) -> list[float]:
    import torch

    from ptycho_stream.networks.cnn import center_of_intensity
    from ptycho_stream.physics.probe import load_probe

    power = torch.as_tensor(load_probe(path).power_yx)
    return center_of_intensity(power[None])[0].tolist()
